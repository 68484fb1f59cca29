"""Networks as pairs of pure functions, ``init(key, input_shape)`` and ``apply(params, x, *, key=None)``."""

from jaxnet.nn._attention import self_attention
from jaxnet.nn._conv import avg_pool, conv, max_pool
from jaxnet.nn._dense import dense
from jaxnet.nn._embed import embed
from jaxnet.nn._layer import Layer, activation, dropout, flatten, remat, residual, serial
from jaxnet.nn._networks import lenet, linear_neuron, mlp, transformer
from jaxnet.nn._norm import group_norm, layer_norm

__all__ = [
    "Layer",
    "activation",
    "avg_pool",
    "conv",
    "dense",
    "dropout",
    "embed",
    "flatten",
    "group_norm",
    "layer_norm",
    "lenet",
    "linear_neuron",
    "max_pool",
    "mlp",
    "remat",
    "residual",
    "self_attention",
    "serial",
    "transformer",
]


def __dir__() -> list[str]:
    return sorted(__all__)
