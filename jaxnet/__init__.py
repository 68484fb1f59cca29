"""jaxnet: a functional neural-net library for JAX in which the learning rate is derived, not guessed."""

from jaxnet import (
    curvature,
    data,
    experiments,
    learning_rate,
    losses,
    nn,
    per_example,
    plots,
    record,
    training,
)

__version__ = "0.1.0"

__all__ = [
    "curvature",
    "data",
    "experiments",
    "learning_rate",
    "losses",
    "nn",
    "per_example",
    "plots",
    "record",
    "training",
]
