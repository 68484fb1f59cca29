"""jaxnet: a functional neural-net library for JAX in which the learning rate is derived, not guessed."""

import importlib
from typing import Any

from jaxnet import curvature, data, dataset, learning_rate, losses, nn, per_example, training

__version__ = "0.1.0"

__all__ = [
    "curvature",
    "data",
    "dataset",
    "lab",
    "learning_rate",
    "losses",
    "nn",
    "per_example",
    "plot",
    "training",
]


def __getattr__(name: str) -> Any:
    """The laboratory, and ``plot`` from it, on first use: ``import jaxnet`` loads neither."""
    if name == "lab":
        return importlib.import_module("jaxnet.lab")
    if name == "plot":
        return importlib.import_module("jaxnet.lab.plots").plot
    raise AttributeError(f"module 'jaxnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
