"""Criteria, one value an example, and the mean that makes a loss of them."""

from jaxnet.losses._coupled import check_mean
from jaxnet.losses._criteria import (
    Apply,
    Criterion,
    accuracy,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    squared_error,
)
from jaxnet.losses._labels import check_labels
from jaxnet.losses._means import (
    ChunkedLoss,
    MeanLoss,
    check_parts,
    chunked,
    mean_loss,
    mixed_precision,
    parts_of,
)

__all__ = [
    "Apply",
    "ChunkedLoss",
    "Criterion",
    "MeanLoss",
    "accuracy",
    "check_labels",
    "check_mean",
    "check_parts",
    "chunked",
    "mean_loss",
    "mixed_precision",
    "parts_of",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
]


def __dir__() -> list[str]:
    return sorted(__all__)
