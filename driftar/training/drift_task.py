"""Training of Drift-AR in two phases on a trained autoregressive backbone (arXiv 2603.28049)."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from driftar.models.drift_ar_mar import DriftARMAR
from driftar.models.mar import MAR
from driftar.models.registry import build_model, model_class
from driftar.models.sizes import backbone_config

from . import losses, schedule
from .banks import ClassBank
from .config import DriftTrainingConfig, default_temperatures
from .optimisation import clipped_backward, global_seed, parameter_groups, seeded_generator

if TYPE_CHECKING:
    from driftar.data import ImageDataset


FEED_CHUNK = 1024  # images whose features are computed at a time when the bank is filled


class DriftARTask:
    """One run of Drift-AR training; follows the training loop's task protocol.

    Phase I minimises ``alpha (L_reg + L_entropy) + (1 - alpha) L_drift`` with alpha falling to 0;
    Phase II freezes and detaches the AR model, its projection to the prior and the draft, and
    trains the decoder on L_drift alone. The feature map (``token_to_enc_proj`` and phi) is frozen
    throughout, so that the drift is measured in one fixed space and banked features never go stale.

    Args:
        dataset: images ``[N, C, H, W]`` in [-1, 1] that fit the model.
        backbone: trained MAR; its weights are copied.
        config: settings.
        seed: of initialisation and every random draw.

    Raises:
        ValueError: settings that do not fit, a class without images, or a model that is no
            Drift-AR on a MAR.
    """

    name = "drift_ar"

    def __init__(
        self, dataset: ImageDataset, backbone: MAR, config: DriftTrainingConfig, seed: int
    ) -> None:
        _check_config(config, dataset.num_classes)
        self.config, self.num_steps = config, config.num_steps
        self.temperatures = config.temperatures or default_temperatures(dataset.name)
        generator = seeded_generator(seed)
        settings = backbone_config(backbone.config)
        with global_seed(generator):
            # phi and the draft copy blocks of the backbone, so it must carry its weights by then.
            model: DriftARMAR = build_model(config.model, backbone=settings)
            weights = backbone.state_dict()
            model.backbone.load_state_dict(
                {key: weights[key] for key in model.backbone.state_dict()}
            )
            model.initialise_copies()
        model.token_to_enc_proj.requires_grad_(False)
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self._tokens = model.patchify(dataset.images)
        self._labels = dataset.labels
        self._classes = dataset.num_classes
        self._real_variance = self._class_variances()

        width = model.seq_len * (model.token_channels + model.feature_width)
        self.positives = ClassBank(self._classes, config.positive_bank, width)
        # Images enter the bank in one fixed order, over and over, so that it never holds duplicates
        # while distinct images are to be had.
        self._feed_order = torch.randperm(len(self._labels), generator=generator)
        for part in self._feed_order.split(FEED_CHUNK):
            self._feed(part)
        self.modules: dict[str, nn.Module] = {
            "model": model,
            "ema": self.average,
            "positives": self.positives,
        }
        self.negatives: ClassBank | None = None
        if config.negatives_per_class:
            self.negatives = self.modules["negatives"] = ClassBank(1, config.negative_bank, width)
        optimizer = torch.optim.AdamW(
            parameter_groups(
                [(model.drift_decoder, 1.0), (model, config.ar_learning_rate_scale)],
                config.weight_decay,
            ),
            lr=config.learning_rate,
            betas=(0.9, 0.95),
        )
        self.optimizers: dict[str, torch.optim.Optimizer] = {"model": optimizer}
        self.generators: dict[str, torch.Generator] = {"training": generator}
        self._collapse_warned = False

    def step(self, step: int) -> dict[str, float]:
        """One optimisation step; returns the scalars to log.

        Every ``check_every`` steps they include the drift norm of each group kind and temperature
        ("drift_norm/<kind>/<temperature>") and the within-class variance ratio ("variance_ratio").
        """
        config, optimizer = self.config, self.optimizers["model"]
        generator = self.generators["training"]
        rate = schedule.follow(optimizer, config, step)
        frozen = schedule.in_phase_two(
            step, config.num_steps, freeze_fraction=config.freeze_fraction
        )
        alpha = schedule.annealing_weight(
            step,
            config.num_steps,
            alpha_0=config.alpha_0,
            freeze_fraction=config.freeze_fraction,
        )
        labels = self._draw_labels()
        self.model.train()
        with global_seed(generator):
            z, entropy, tokens = self._generate(labels, frozen)
            features = self.model.phi(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        check = step % config.check_every == 0 or step == config.num_steps - 1
        drift, norms = losses.drift_objective(
            config.drift_groups,
            (tokens, features),
            self._split(self.positives.draw(labels, config.positives_per_class, generator)),
            self._negative_groups(len(labels)),
            self.temperatures,
            with_norms=check,
        )
        loss, metrics = drift, {"drift_loss": drift}
        if not frozen:
            regression = losses.draft_regression_loss(self.model.draft(z.detach()), z)
            spread = losses.entropy_loss(entropy)
            loss = alpha * (regression + spread) + (1 - alpha) * drift
            metrics |= {"draft_loss": regression, "entropy_loss": spread}
        logged = {name: float(value.detach()) for name, value in ({"loss": loss} | metrics).items()}
        logged |= {"alpha": alpha, "phase": 2.0 if frozen else 1.0, "learning_rate": rate}
        norm = clipped_backward(loss, optimizer, config.gradient_clip)
        if norm is None:
            return logged | {"skipped": 1.0}
        optimizer.step()
        schedule.update_average(self.average, self.model, step, decay=config.ema_decay)
        turns = step * config.bank_feed + torch.arange(config.bank_feed)
        self._feed(self._feed_order[turns % len(self._feed_order)])
        if self.negatives is not None:
            flat = torch.cat([tokens.detach().flatten(2), features.detach().flatten(2)], dim=2)
            self.negatives.push(flat.flatten(0, 1), torch.zeros(flat[..., 0].numel()).long())
        logged |= {"grad_norm": norm, "entropy_mean": float(entropy.detach().mean())}
        if check:
            logged |= self._watch(step, labels, tokens.detach(), norms)
        return logged

    def extra_state(self) -> dict[str, Any]:
        """What is neither a module, an optimiser nor a generator."""
        return {"collapse_warned": self._collapse_warned}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Counterpart of :meth:`extra_state`."""
        self._collapse_warned = bool(state["collapse_warned"])

    def _draw_labels(self) -> Tensor:
        """Classes of this step's groups; some become unconditional (-1)."""
        config, generator = self.config, self.generators["training"]
        labels = torch.arange(self._classes)
        if config.classes_per_step:
            chosen = torch.randperm(self._classes, generator=generator)
            labels = labels[chosen[: config.classes_per_step]]
        dropped = torch.rand(len(labels), generator=generator) < config.label_drop
        return labels.masked_fill(dropped, -1)

    def _generate(self, labels: Tensor, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
        """z ``[K, L, D]``, entropy ``[K, L]`` and generated tokens ``[K, N, L, C]``."""
        model, count = self.model, self.config.generated_per_class
        shape = (len(labels) * count, model.seq_len, model.token_channels)
        noise = torch.randn(shape, generator=self.generators["training"])
        with torch.set_grad_enabled(not frozen):
            # One AR pass per class: z and entropy depend on nothing else.
            z, entropy = model.features(model.condition(labels))
            repeated = z.repeat_interleave(count, 0), entropy.repeat_interleave(count, 0)
            x0 = model.prior(*repeated, noise)
        tokens = model.decode(x0, *repeated)
        return z, entropy, tokens.unflatten(0, (len(labels), count))

    def _feed(self, chosen: Tensor) -> None:
        """Put real images (indices ``[n]``) into the positive bank."""
        tokens = self._tokens[chosen]
        with torch.no_grad():
            features = self.model.phi(tokens)
        self.positives.push(
            torch.cat([tokens.flatten(1), features.flatten(1)], dim=1), self._labels[chosen]
        )

    def _split(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Banked vectors ``[K, P, S]`` as tokens ``[K, P, L, C]`` and features ``[K, P, L, D]``."""
        length = self.model.seq_len
        sizes = [length * self.model.token_channels, length * self.model.feature_width]
        tokens, features = vectors.split(sizes, dim=2)
        return tokens.unflatten(2, (length, -1)), features.unflatten(2, (length, -1))

    def _negative_groups(self, groups: int) -> tuple[Tensor, Tensor] | None:
        if self.negatives is None or int(self.negatives.counts) == 0:
            return None
        drawn = self.negatives.draw(
            torch.zeros(groups, dtype=torch.long),
            self.config.negatives_per_class,
            self.generators["training"],
        )
        return self._split(drawn)

    def _class_variances(self) -> Tensor:
        """Mean pixel variance of every class's real images, ``[classes]``."""
        rows = []
        for label in range(self._classes):
            members = self._tokens[self._labels == label]
            if len(members) < 2:
                raise ValueError(
                    "dataset must hold at least 2 images of every class, "
                    f"class {label} has {len(members)}"
                )
            rows.append(losses.within_class_variance(members[None]))
        return torch.stack(rows)

    def _watch(
        self, step: int, labels: Tensor, tokens: Tensor, norms: dict[str, Tensor]
    ) -> dict[str, float]:
        """Drift norms and variance ratio of this step, with a warning on collapse."""
        watched = {
            f"drift_norm/{kind}/{temperature:g}": float(value)
            for kind, values in norms.items()
            for temperature, value in zip(self.temperatures, values, strict=True)
        }
        known = labels >= 0
        if tokens.shape[1] < 2 or not bool(known.any()):
            return watched
        real = self._real_variance[labels[known]].mean()
        ratio = float(losses.within_class_variance(tokens[known]) / real)
        watched["variance_ratio"] = ratio
        settled = step >= self.num_steps // 4
        low = ratio < self.config.collapse_threshold
        if settled and low and not self._collapse_warned:
            warnings.warn(
                f"step {step}: generated images vary within a class {ratio:.3f} times as much as "
                f"real ones (threshold {self.config.collapse_threshold}): the classes collapse. "
                f"Larger drift temperatures than {self.temperatures} help.",
                RuntimeWarning,
                stacklevel=2,
            )
        # A recovered run may warn again.
        self._collapse_warned = settled and low
        return watched


def _check_config(config: DriftTrainingConfig, num_classes: int) -> None:
    if model_class(config.model) is not DriftARMAR:
        raise ValueError(f"model must name a Drift-AR on MAR, got {config.model!r}")
    counts = {
        "num_steps": config.num_steps,
        "generated_per_class": config.generated_per_class,
        "positives_per_class": config.positives_per_class,
        "positive_bank": config.positive_bank,
        "bank_feed": config.bank_feed,
        "check_every": config.check_every,
    }
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if config.negatives_per_class < 0:
        raise ValueError(f"negatives_per_class must be >= 0, got {config.negatives_per_class}")
    if not 0 <= config.classes_per_step <= num_classes:
        raise ValueError(
            f"classes_per_step must lie in 0..{num_classes}, got {config.classes_per_step}"
        )
    if not config.drift_groups:
        raise ValueError("drift_groups must name at least one kind of group")
    for kind in config.drift_groups:
        if kind not in losses.DRIFT_GROUPS:
            raise ValueError(f"drift_groups must be of {losses.DRIFT_GROUPS}, got {kind!r}")
    if not 0 <= config.alpha_0 <= 1 or not 0 < config.freeze_fraction <= 1:
        raise ValueError(
            "alpha_0 must lie in [0, 1] and freeze_fraction in (0, 1], got "
            f"{config.alpha_0} and {config.freeze_fraction}"
        )
