"""Judging samples: Frechet distance, conditional accuracy and within-class variance."""

from driftar.evaluation.classifier import SmallClassifier, train_classifier
from driftar.evaluation.frechet import frechet_distance
from driftar.evaluation.metrics import ClassMetrics, SampleMetrics, evaluate_real, evaluate_samples

__all__ = [
    "ClassMetrics",
    "SampleMetrics",
    "SmallClassifier",
    "evaluate_real",
    "evaluate_samples",
    "frechet_distance",
    "train_classifier",
]
