"""Networks as pairs of pure functions, ``init(key, input_shape)`` and ``apply(params, x, *, key=None)``."""

from jaxnet.nn.attention import self_attention
from jaxnet.nn.conv import avg_pool, conv, max_pool
from jaxnet.nn.dense import dense
from jaxnet.nn.embed import embed
from jaxnet.nn.layer import Layer, activation, dropout, flatten, residual, serial
from jaxnet.nn.networks import lenet, linear_neuron, mlp, transformer
from jaxnet.nn.norm import group_norm, layer_norm

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
    "residual",
    "self_attention",
    "serial",
    "transformer",
]
