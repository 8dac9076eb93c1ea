"""Where the time of one image goes, per model: ``python -m benchmarks.families --help``."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import driftar
import driftar_kernels
from driftar.models.nextstep import NextStep
from driftar.models.registry import known_models, model_class

from . import machine
from .plots import draw_stages
from .report import RESULTS, markdown_table

STAGES = ("AR", "decoder", "VAE")
OURS, PEER = "driftar", "SDPA blocks"
# What the published settings ask of each family's sampler.
SETTINGS: dict[str, dict[str, Any]] = {
    "mar": {"num_iter": 64, "num_sampling_steps": "100"},
    "transdiff": {"num_steps": 100},
    "transdiff_mrar": {"num_steps": 100},
    "drift_ar": {},
    "nextstep_1": {"num_steps": 20},
}
# NextStep-1's only published size has 14 billion parameters: its tiny one stands for the family.
DEFAULT_MODELS = (
    "mar_base",
    "transdiff_base",
    "transdiff_mrar_base",
    "drift_ar_base",
    "nextstep_1_tiny",
)
_EPILOG = """\
Weights are random: they do not change the time. The peer is the same model with every attention
replaced by PyTorch's scaled_dot_product_attention; where the model needs the entropy of a map, the
peer materialises the map, as the published code does. Rounds alternate between the two; figures are
medians. Writes families.md, families.json and families.png.
"""


@dataclass(frozen=True)
class Measurement:
    """Median seconds of every stage of one image."""

    model: str
    settings: Mapping[str, Any]
    decoder_nfe: int
    seconds: Mapping[str, Mapping[str, float]]  # by variant, then by stage

    def total(self, variant: str) -> float:
        return sum(self.seconds[variant].values())


def sdpa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    query_offset: int = 0,
    enable_gqa: bool = False,
    entropy: str = "head",
    entropy_from: int = 0,
) -> driftar_kernels.AttentionOutput:
    """The attention of the models by PyTorch alone: SDPA, and a materialised map where its entropy
    is wanted. lse and max_score, which no model reads, are NaN.
    """
    if entropy not in ("none", "map"):
        raise NotImplementedError(f"entropy={entropy!r}: no model asks")
    rows, columns = query.shape[2], key.shape[2]
    if is_causal and query_offset < columns - 1:  # else every query sees every key
        seen = torch.ones(rows, columns, dtype=torch.bool).tril(query_offset)
        attn_mask = seen if attn_mask is None else attn_mask & seen
    out = F.scaled_dot_product_attention(query, key, value, attn_mask, enable_gqa=enable_gqa)
    nothing = torch.full(query.shape[:3], torch.nan)
    if entropy == "none":
        return driftar_kernels.AttentionOutput(out, None, nothing, nothing)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    visible = torch.ones_like(scores, dtype=torch.bool) if attn_mask is None else attn_mask
    visible = visible.expand_as(scores)[..., entropy_from:]
    scores = scores[..., entropy_from:].masked_fill(~visible, -torch.inf)
    average = scores.softmax(-1).nan_to_num(0.0).mean(1)
    count = visible.sum(-1).amax(1)
    total = -torch.xlogy(average, average).sum(-1)
    normalised = torch.where(count > 1, total / count.clamp(min=2).log(), 0.0)
    return driftar_kernels.AttentionOutput(out, normalised, nothing, nothing)


@contextmanager
def attention_of(variant: str) -> Iterator[None]:
    """The models' attention: ours, or PyTorch's for the time of the block."""
    ours = driftar_kernels.attention
    if variant == PEER:
        driftar_kernels.attention = sdpa_attention  # type: ignore[assignment]
    try:
        yield
    finally:
        driftar_kernels.attention = ours


@torch.no_grad()
def measure(name: str, settings: Mapping[str, Any], rounds: int, bar: Any) -> Measurement:
    """Alternating rounds of one image with both attentions, after one short warm-up of each."""
    model = driftar.build_model(name).eval()
    pixels = name.endswith("_tiny")  # tiny models make pixels, which need no VAE
    vae = None if pixels else driftar.build_model("kl16").eval()
    request = _request(model)
    short = {key: type(value)(2) for key, value in settings.items()}
    samples: dict[str, list[dict[str, float]]] = {OURS: [], PEER: []}
    for turn in range(rounds + 1):
        for variant in samples:
            generator = torch.Generator().manual_seed(turn)
            with attention_of(variant):
                chosen = settings if turn else short
                result = model.generate_with_stats(request, generator=generator, **chosen)
                stats = result.stats
                taken = {"AR": stats.ar_seconds, "decoder": stats.decoder_seconds, "VAE": 0.0}
                if vae is not None:
                    taken["VAE"] = _decoding_seconds(vae, torch.randn_like(result.latents))
            if turn:
                samples[variant].append(taken)
            bar.update()
    seconds = {
        variant: {stage: statistics.median(t[stage] for t in taken) for stage in STAGES}
        for variant, taken in samples.items()
    }
    return Measurement(name, dict(settings), stats.decoder_nfe, seconds)


def _request(model: Any) -> Tensor:
    """A class label, or a prompt of 16 tokens for models that take prompts."""
    if not isinstance(model, NextStep):
        return torch.zeros(1, dtype=torch.long)
    prompt = torch.ones(1, 16, dtype=torch.long)
    prompt[:, -1] = model.config["boi"]
    return prompt


def _decoding_seconds(vae: Any, latents: Tensor) -> float:
    start = time.perf_counter()
    vae.decode(latents)
    return time.perf_counter() - start


def to_markdown(
    measurements: Sequence[Measurement], info: Mapping[str, Any], date: str, rounds: int
) -> str:
    """The page: machine, picture, table."""
    rows = [["model", "settings", "decoder evaluations", *STAGES, "total", f"/ {PEER}"]]
    for entry in measurements:
        ours = entry.seconds[OURS]
        rows.append(
            [
                entry.model,
                ", ".join(f"{key} {value}" for key, value in entry.settings.items()) or "-",
                str(entry.decoder_nfe),
                *(f"{ours[stage]:.3g} s" for stage in STAGES),
                f"{entry.total(OURS):.3g} s",
                f"{entry.total(OURS) / entry.total(PEER):.2f}",
            ]
        )
    return "\n".join(
        [
            "# Where the time of one image goes",
            "",
            f"{info['cpu']}, {info['cores']} cores, {info['threads']} threads, "
            f"{info['instruction_set']}; driftar {info['driftar']}, PyTorch {info['torch']}; "
            f"{date}. One image, fp32, random weights, no guidance; "
            f"rounds: {rounds}.",
            f"`/ {PEER}`: our total divided by that of the same model on PyTorch's",
            "scaled_dot_product_attention (and a materialised map where an entropy is needed).",
            "",
            "![Stages of one image](families.png)",
            "",
            *markdown_table(rows),
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.families",
        description="Time the AR stage, the decoder and the VAE of one image, per model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=[name for name in known_models() if _can_generate(name)],
        default=list(DEFAULT_MODELS),
        metavar="NAME",
        help="names of driftar.build_model (default: the base size of each family that has one)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="per model (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=int,
        help="iterations and sampler steps instead of the published ones, for a quick look",
    )
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS}/<this machine>")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or (options.steps is not None and options.steps < 2):
        parser.error("--rounds must be at least 1 and --steps at least 2")
    info = machine.describe()
    directory = options.output or RESULTS / machine.directory_name(info)
    directory.mkdir(parents=True, exist_ok=True)
    measurements = []
    with tqdm(total=2 * (options.rounds + 1) * len(options.models), unit="image") as bar:
        for name in options.models:
            bar.set_description(name)
            settings = _settings_of(name)
            if options.steps is not None:
                settings = {key: type(value)(options.steps) for key, value in settings.items()}
            measurements.append(measure(name, settings, options.rounds, bar))
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    page = to_markdown(measurements, info, date, options.rounds)
    record = {
        "date": date,
        "rounds": options.rounds,
        "machine": info,
        "measurements": [asdict(m) for m in measurements],
    }
    (directory / "families.md").write_text(page, encoding="utf-8")
    (directory / "families.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    bars = {
        f"{entry.model}\n{variant}": entry.seconds[variant]
        for entry in measurements
        for variant in (OURS, PEER)
    }
    draw_stages(bars, STAGES, directory / "families.png")
    print(page)
    return 0


def _can_generate(name: str) -> bool:
    return hasattr(model_class(name), "generate_with_stats")


def _settings_of(name: str) -> dict[str, Any]:
    families = [family for family in SETTINGS if name == family or name.startswith(f"{family}_")]
    return dict(SETTINGS[max(families, key=len)]) if families else {}


if __name__ == "__main__":
    sys.exit(main())
