"""Settings of an experiment: frozen dataclasses with defaults for the digits."""

from __future__ import annotations

from dataclasses import dataclass, field

# The published temperatures suit ImageNet features; on small grey images they collapse every class
# to a point.
_TEMPERATURES = {"digits": (0.2,)}
PUBLISHED_TEMPERATURES = (0.02, 0.05, 0.2)


def default_temperatures(dataset: str) -> tuple[float, ...]:
    """Drift temperatures that suit a data set; the published ones where nothing better is known."""
    return _TEMPERATURES.get(dataset, PUBLISHED_TEMPERATURES)


@dataclass(frozen=True)
class MARTrainingConfig:
    """Training of the masked-AR backbone with its diffusion head."""

    model: str = "mar_tiny"  # name for driftar.build_model
    num_steps: int = 2000  # optimiser steps
    batch_size: int = 64  # images per step
    learning_rate: float = 2e-3  # peak
    warmup_steps: int = 100  # linear warm-up
    decay_from: float = 0.0  # fraction of the run after which the rate follows a half cosine
    final_learning_rate: float = 0.01  # of the peak, at the end
    weight_decay: float = 0.02  # on matrices, not on biases and norms
    gradient_clip: float = 3.0  # largest gradient norm
    ema_decay: float = 0.999  # of the averaged copy that samples
    label_drop: float = 0.1  # rate of unconditional images
    mask_rate_min: float = 0.7  # lower end of the mask rate
    mask_rate_std: float = 0.25  # of the normal around 1 that the mask rate is drawn from
    diffusion_batch_mul: int = 2  # noise levels per masked token


@dataclass(frozen=True)
class DriftTrainingConfig:
    """Training of Drift-AR on a trained backbone."""

    model: str = "drift_ar_mar_tiny"  # name for driftar.build_model
    num_steps: int = 1400  # optimiser steps, both phases
    classes_per_step: int = 0  # classes drawn for a step; 0 takes all of them
    generated_per_class: int = 16  # samples of a drift group
    positives_per_class: int = 128  # real images a group is drawn to
    negatives_per_class: int = 0  # earlier generated images of any class that repel a group
    positive_bank: int = 128  # real images kept per class
    bank_feed: int = 32  # real images that enter the positive bank per step
    negative_bank: int = 1000  # generated images kept
    drift_groups: tuple[str, ...] = ("tokens", "flattened")  # kinds of groups, losses summed
    temperatures: tuple[float, ...] | None = None  # None: default_temperatures(dataset)
    alpha_0: float = 0.95  # first weight of the AR losses (Eq. 9)
    freeze_fraction: float = 0.8  # of the run, after which the AR prior is frozen (Eq. 10)
    learning_rate: float = 3e-3  # peak, decoder
    ar_learning_rate_scale: float = 0.3  # rate of everything else, in units of learning_rate
    warmup_steps: int = 30  # linear warm-up
    decay_from: float = 0.4  # fraction of the run after which the rate follows a half cosine
    final_learning_rate: float = 0.02  # of the peak, at the end
    weight_decay: float = 0.01  # on matrices, not on biases and norms
    gradient_clip: float = 2.0  # largest gradient norm
    ema_decay: float = 0.995  # of the averaged copy that samples
    label_drop: float = 0.1  # rate at which a class's group becomes unconditional
    check_every: int = 25  # steps between looks at the within-class variance
    collapse_threshold: float = 0.3  # warn when generated / real within-class variance is below


@dataclass(frozen=True)
class SamplingConfig:
    """How trained models are sampled."""

    num_iter: int = 16  # autoregressive steps of MAR
    num_sampling_steps: str = "100"  # diffusion steps per token
    temperature: float = 1.0  # of the diffusion head
    mar_cfg: float = 2.0  # guidance of MAR (linear schedule)
    drift_cfg: float = 1.5  # guidance of Drift-AR
    samples_per_class: int = 50  # images per class for the metrics
    batch_size: int = 500  # images per call


@dataclass(frozen=True)
class ExperimentConfig:
    """A whole experiment."""

    dataset: str = "digits"  # name for driftar.data.load_dataset
    seed: int = 0  # of initialisation, training and sampling
    mar: MARTrainingConfig = field(default_factory=MARTrainingConfig)
    drift: DriftTrainingConfig = field(default_factory=DriftTrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
