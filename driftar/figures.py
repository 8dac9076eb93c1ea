"""The pictures of a report: class grids, entropy maps and training curves.

Colours are Okabe and Ito's, which stay apart for colour-blind readers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from driftar.files import write_atomically

matplotlib.use("Agg")

from matplotlib import pyplot as plt

__all__ = ["draw_class_grid", "draw_entropy", "draw_losses"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DPI = 150
_SMOOTHING_SHARE = 50


def draw_class_grid(path: Path, images: Tensor, labels: Tensor, title: str) -> None:
    """One row of images for each class that occurs, labelled with the class, as a PNG.

    images: float ``[N, C, H, W]`` in [-1, 1] (clamped), C = 1 or 3; labels: int64 ``[N]``.
    Raises ValueError for another number of channels, no images or non-finite values.
    """
    tiles = _as_pixels(images)
    classes = torch.unique(labels).tolist()
    rows = [tiles[(labels == label).numpy()] for label in classes]
    columns = max(len(row) for row in rows)
    height, width = tiles.shape[1] + 1, tiles.shape[2] + 1
    mosaic = np.ones((len(rows) * height - 1, columns * width - 1, tiles.shape[3]))
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            mosaic[i * height : (i + 1) * height - 1, j * width : (j + 1) * width - 1] = tile
    figure, axes = plt.subplots(
        figsize=(1.0 + 0.45 * columns, 0.8 + 0.45 * len(rows)), layout="constrained"
    )
    axes.imshow(_squeeze(mosaic), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks([(i + 0.5) * height - 1 for i in range(len(rows))], [str(c) for c in classes])
    axes.set_xticks([])
    axes.set_ylabel("class")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title)
    _save(figure, path)


def draw_entropy(path: Path, images: Tensor, labels: Tensor, entropy: Tensor) -> None:
    """Each image beside the heat map of its tokens' normalised attention entropy, as a PNG.

    images: float ``[N, C, H, W]`` in [-1, 1]; labels: int64 ``[N]``; entropy: float ``[N, L]`` in
    [0, 1], L a square number (tokens in row-major order).
    """
    side = math.isqrt(entropy.shape[1])
    if side * side != entropy.shape[1]:
        raise ValueError(f"entropy must have a square number of tokens, got {entropy.shape[1]}")
    tiles = _as_pixels(images)
    maps = entropy.reshape(-1, side, side).numpy()
    count = len(tiles)
    figure, axes = plt.subplots(
        2, count, figsize=(1.1 * count + 1.4, 2.9), layout="constrained", squeeze=False
    )
    # One scale for all maps, from the data: the causal rows' entropies lie close together. The
    # first row sees one token, so its entropy is 0 by construction and stays out of the scale.
    shown = maps.copy()
    shown[:, 0, 0] = np.nan
    others = entropy[:, 1:]
    low, high = (float(others.min()), float(others.max())) if others.numel() else (0.0, 1.0)
    colours = plt.get_cmap("viridis").with_extremes(bad="lightgrey")
    heat = None
    for i in range(count):
        axes[0, i].imshow(_squeeze(tiles[i]), cmap="gray", vmin=0, vmax=1)
        axes[0, i].set_title(f"class {int(labels[i])}", fontsize=9)
        heat = axes[1, i].imshow(shown[i], cmap=colours, vmin=low, vmax=high)
        for cell in axes[:, i]:
            cell.set_xticks([])
            cell.set_yticks([])
    axes[0, 0].set_ylabel("sample")
    axes[1, 0].set_ylabel("entropy")
    if heat is not None:
        figure.colorbar(heat, ax=axes[1, :].tolist(), label="share of log n", pad=0.01)
    figure.suptitle(
        "Attention entropy of the AR pass, token by token (grey: the first, 0 by construction)",
        fontsize=11,
    )
    _save(figure, path)


def draw_losses(
    path: Path,
    mar_log: Sequence[Mapping[str, Any]],
    drift_log: Sequence[Mapping[str, Any]],
    freeze_step: int | None,
) -> None:
    """Curves of both trainings from their step logs, as a PNG of four panels.

    Losses of the baseline; losses of Drift-AR; drift norm of every temperature (what shows
    progress, as the drift loss is flat by construction); annealing weight and variance ratio.
    freeze_step: where Phase II begins, marked in the panels of Drift-AR.
    """
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    panels = (
        (axes[0, 0], mar_log, "MAR: losses", lambda key: "loss" in key, True),
        (axes[0, 1], drift_log, "Drift-AR: losses", lambda key: "loss" in key, True),
        (
            axes[1, 0],
            drift_log,
            "Drift-AR: drift norms",
            lambda key: key.startswith("drift_norm"),
            True,
        ),
        (
            axes[1, 1],
            drift_log,
            "Drift-AR: annealing weight, variance ratio",
            lambda key: key == "alpha" or "variance_ratio" in key,
            False,
        ),
    )
    for place, log, title, wanted, logarithmic in panels:
        keys = sorted({key for record in log for key in record if key != "step" and wanted(key)})
        for i, key in enumerate(keys):
            _curve(place, log, key, i)
        place.set_title(title)
        place.set_xlabel("step")
        if logarithmic and keys and _all_positive(log, keys):
            place.set_yscale("log")
        if log is drift_log and freeze_step is not None:
            place.axvline(freeze_step, color="#555555", linestyle="--", label="Phase II begins")
        if place.get_legend_handles_labels()[0]:
            place.legend(fontsize=8)
        place.grid(alpha=0.25)
    _save(figure, path)


def _curve(axes: Any, log: Sequence[Mapping[str, Any]], key: str, index: int) -> None:
    points = [(record["step"], record[key]) for record in log if record.get(key) is not None]
    if not points:
        return
    steps, values = np.array(points, dtype=float).T
    colour = _COLOURS[index % len(_COLOURS)]
    window = max(1, len(values) // _SMOOTHING_SHARE)
    if window > 1:
        axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
        values = np.convolve(values, np.full(window, 1 / window), mode="valid")
        steps = steps[window - 1 :]
    label = key.removeprefix("drift_norm/").replace("_", " ")
    style = "-" if index < len(_COLOURS) else ":"
    axes.plot(steps, values, style, color=colour, linewidth=1.4, label=label)


def _all_positive(log: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> bool:
    return all(record[key] > 0 for record in log for key in keys if record.get(key) is not None)


def _as_pixels(images: Tensor) -> np.ndarray:
    if images.dim() != 4 or images.shape[0] == 0 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must be a non-empty [N, 1 or 3, H, W], got shape {tuple(images.shape)}"
        )
    if not bool(images.isfinite().all()):
        raise ValueError("images must be finite to be drawn")
    pixels: np.ndarray = ((images.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def _squeeze(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def _save(figure: Any, path: Path) -> None:
    try:
        write_atomically(path, lambda target: figure.savefig(target, dpi=_DPI))
    finally:
        plt.close(figure)
