from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from driftar import optional
from driftar.prompts import ByteTokenizer, encode_prompts, load_tokenizer


class BeginningTokenizer(ByteTokenizer):
    """Puts a first token before every text, as Llama's does."""

    bos_token_id = 255

    def __call__(self, text: list[str]) -> Mapping[str, Any]:
        lines = super().__call__(text)["input_ids"]
        return {"input_ids": [[255, *line] for line in lines]}


def test_prompts_are_padded_on_the_left_and_end_with_the_size() -> None:
    ids, mask = encode_prompts(ByteTokenizer(), ["cat", ""], boi=258, grid_size=(4, 12))
    suffix = [257, *b"4*12", 258]
    assert ids.tolist() == [[*b"cat", *suffix], [256] * 3 + suffix]
    assert mask.tolist() == [[1] * 9, [0] * 3 + [1] * 6]


def test_guidance_appends_the_negative_prompt() -> None:
    ids, _ = encode_prompts(
        ByteTokenizer(), ["a", "b"], boi=258, grid_size=(1, 1), negative_prompt="no"
    )
    assert [bytes(row[:2].tolist()) if row[0] < 256 else b"" for row in ids] == [
        b"",
        b"",
        *[b"no"] * 2,
    ]
    assert ids[0, 1] == ord("a") and ids[1, 1] == ord("b")


def test_the_size_has_no_first_token_of_its_own() -> None:
    ids, _ = encode_prompts(BeginningTokenizer(), ["a"], boi=258, grid_size=(1, 1))
    assert ids.tolist() == [[255, ord("a"), 257, *b"1*1", 258]]


def test_a_tokeniser_without_padding_is_named() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.pad_token_id = None
    with pytest.raises(ValueError, match="padding token"):
        encode_prompts(tokenizer, ["a"], boi=1, grid_size=(1, 1))


def test_missing_packages_name_their_extra() -> None:
    with pytest.raises(ImportError, match=r"flying needs wings_and_tail.*driftar\[air\]"):
        optional.require("wings_and_tail", "air", "flying")


def test_tokenizers_of_transformers_fit(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1, "<|image_area|>": 2, "a": 3, "cat": 4, "4": 5, "*": 6}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Whitespace(), tokenizers.pre_tokenizers.Punctuation()]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        additional_special_tokens=["<|image_area|>"],
    ).save_pretrained(tmp_path)
    ids, mask = encode_prompts(load_tokenizer(tmp_path), ["a cat", "cat"], boi=9, grid_size=(4, 4))
    assert ids.tolist() == [[3, 4, 2, 5, 6, 5, 9], [0, 4, 2, 5, 6, 5, 9]]
    assert mask.tolist() == [[1] * 7, [0] + [1] * 6]
    with pytest.raises(ValueError, match="no tokeniser"):
        load_tokenizer(tmp_path / "nothing")
