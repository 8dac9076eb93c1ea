"""The text side of NextStep-1: captions to padded token ids that ask for an image of a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from driftar.optional import require

__all__ = ["ByteTokenizer", "Tokenizer", "encode_prompts", "load_tokenizer"]

IMAGE_AREA = "<|image_area|>"


class Tokenizer(Protocol):
    """What is used of a tokeniser of `transformers`."""

    pad_token_id: int | None
    bos_token_id: int | None

    def __call__(self, text: list[str]) -> Mapping[str, Any]:
        """``{"input_ids": list of lists of ids, ...}``, unpadded."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, then padding and the image area token: for tiny models."""

    pad_token_id: int | None = 256
    bos_token_id: int | None = None
    image_area_id = 257

    def __call__(self, text: list[str]) -> Mapping[str, Any]:
        """``{"input_ids": list of lists of ids}``."""
        return {"input_ids": [self._encode(line) for line in text]}

    def _encode(self, line: str) -> list[int]:
        first, *rest = line.split(IMAGE_AREA)
        ids = list(first.encode())
        for part in rest:
            ids += [self.image_area_id, *part.encode()]
        return ids


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """A tokeniser stored by `transformers`; nothing is downloaded and no foreign code is run.

    Raises ImportError without `transformers` and ValueError if there is no such tokeniser.
    """
    transformers = require("transformers", "text", "the tokeniser of a prompt model")
    try:
        tokenizer: Tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{directory} holds no tokeniser that can be read: {error}") from error
    return tokenizer


def encode_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    boi: int,
    grid_size: tuple[int, int],
    negative_prompt: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids and attention mask ``[branches * B, P]``, padded on the left.

    Every row is a caption, the image area token, the text "rows*columns" of the grid of image
    tokens, and the id that begins an image.

    negative_prompt: caption of the unconditional branch, which follows the conditional one; None
    without guidance. Raises ValueError for a tokeniser without a padding token.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer must have a padding token (pad_token_id is None)")
    captions = list(prompts)
    if negative_prompt is not None:
        captions += [negative_prompt] * len(captions)
    rows, columns = grid_size
    suffix = list(tokenizer([f"{IMAGE_AREA}{rows}*{columns}"])["input_ids"][0])
    if suffix[:1] == [tokenizer.bos_token_id]:
        suffix = suffix[1:]
    lines = [[*ids, *suffix, boi] for ids in tokenizer(captions)["input_ids"]]
    longest = max(map(len, lines), default=0)
    padding = [longest - len(line) for line in lines]
    ids = [[tokenizer.pad_token_id] * pad + line for pad, line in zip(padding, lines, strict=True)]
    mask = [[0] * pad + [1] * len(line) for pad, line in zip(padding, lines, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)
