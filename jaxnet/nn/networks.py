"""Whole networks."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxnet.contract import Array
from jaxnet.nn.conv import Pair, avg_pool, conv
from jaxnet.nn.dense import dense, lecun_normal
from jaxnet.nn.layer import Layer, activation, flatten, layer_maker, serial


def mlp(features: Sequence[int], *, activation: Callable[[Array], Array] = jnp.tanh) -> Layer:
    """Dense layers with an activation between them, none after the last.

    Args:
      features: the widths of the layers, outputs last.
      activation: applied elementwise after each layer but the last.

    Returns:
      A `Layer` on inputs (N, in).

    Raises:
      ValueError: there is no layer, or a width is not positive.
    """
    if not features:
        raise ValueError("mlp: expected at least one width, got none")
    return _mlp(tuple(features), activation)


@layer_maker
def _mlp(features: tuple[int, ...], fn: Callable[[Array], Array]) -> Layer:
    hidden = [layer for width in features[:-1] for layer in (dense(width), activation(fn))]
    return serial(*hidden, dense(features[-1]))


@layer_maker
def lenet(num_classes: int, *, kernel_size: Pair = 5, activation: Callable[[Array], Array] = jnp.tanh) -> Layer:
    """LeNet-5: two convolutions (6 and 16 channels) with average pooling, then dense layers 120, 84, classes.

    Args:
      num_classes: the number of outputs.
      kernel_size: of both convolutions; the first pads, the second does not. 5 needs images from 12 × 12 on,
        3 from 8 × 8 on.
      activation: applied after each layer but the last.

    Returns:
      A `Layer` on images (N, height, width, channels); with 28 × 28 × 1 it has 61 706 parameters.

    Reference:
      LeCun, Bottou, Bengio & Haffner, "Gradient-Based Learning Applied to Document Recognition", 1998, fig. 2
      (here with full connections in the second convolution and a softmax in place of radial basis functions).
    """
    return _lenet(num_classes, kernel_size, activation)


def _lenet(num_classes: int, kernel_size: Pair, fn: Callable[[Array], Array]) -> Layer:
    act = activation(fn)
    return serial(
        *(conv(6, kernel_size, padding="SAME"), act, avg_pool(2)),
        *(conv(16, kernel_size, padding="VALID"), act, avg_pool(2)),
        *(flatten(), dense(120), act, dense(84), act, dense(num_classes)),
    )


@layer_maker
def linear_neuron(*, kernel_init: jax.nn.initializers.Initializer = lecun_normal) -> Layer:
    """y = x·w + b, one number an example: outputs (N,), to meet targets (N,).

    Args:
      kernel_init: a `jax.nn.initializers` function for w.

    Returns:
      A `Layer` with params ``{"kernel": (in, 1), "bias": (1,)}``.
    """
    neuron = dense(1, kernel_init=kernel_init)
    return Layer(neuron.init, lambda params, x, *, key=None: neuron.apply(params, x)[..., 0])
