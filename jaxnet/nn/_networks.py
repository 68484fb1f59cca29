"""Whole networks."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxnet.contract import Array, ArrayTree
from jaxnet.nn._attention import self_attention
from jaxnet.nn._conv import Pair, avg_pool, conv
from jaxnet.nn._dense import dense, lecun_normal
from jaxnet.nn._embed import embed, standard_normal
from jaxnet.nn._layer import Layer, Shape, activation, flatten, layer_maker, remat, residual, serial
from jaxnet.nn._norm import layer_norm


def mlp(features: Sequence[int], *, activation: Callable[[Array], Array] = jnp.tanh) -> Layer:
    """Dense layers with an activation between them, none after the last.

    Args:
      features: the widths of the layers, outputs last.
      activation: applied elementwise after each layer but the last.

    Returns:
      A `Layer` on inputs (N, in).

    Raises:
      ValueError: there is no layer, or a width is not positive.

    Examples:
      >>> params = nn.mlp([32, 10]).init(jax.random.key(0), (64,))
      >>> [x.shape for x in jax.tree.leaves(params)]
      [(32,), (64, 32), (10,), (32, 10)]
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


def _positions(max_length: int) -> Layer:
    """y[n, t] = x[n, t] + P[t], with a learned P (max_length, features)."""

    def init(key: Array, input_shape: Shape) -> dict[str, Array]:
        return {"embedding": standard_normal(key, (max_length, input_shape[-1]))}

    def apply(params: ArrayTree, x: Array, *, key: Array | None = None) -> Array:
        if x.ndim != 3 or x.shape[1] > max_length:
            raise ValueError(
                f"transformer: expected tokens (N, T) with T <= max_length = {max_length}, got {x.shape[:-1]}"
            )
        return x + params["embedding"][: x.shape[1]]

    return Layer(init, apply)


@layer_maker
def transformer(
    vocabulary: int,
    *,
    features: int,
    num_heads: int,
    num_layers: int,
    hidden: int,
    max_length: int,
    remat_layers: bool = False,
) -> Layer:
    """A decoder: at each position of a text, the logits of the next token, from the tokens so far.

    h₀ = E[x] + P; in each layer l, a = h + attention(norm(h)) and h' = a + W₂ gelu(W₁ norm(a) + b₁) + b₂;
    the logits are W norm(h) + b. Norms come first, inside the branches, and once more before the logits.

    Args:
      vocabulary: the number of different tokens V.
      features: the width d of a position.
      num_heads: of each attention; divides d.
      num_layers: the number of pairs of attention and dense layers.
      hidden: the width between the two dense layers, commonly 4d.
      max_length: the number of rows of P, the longest text.
      remat_layers: keep the inputs of the layers alone for the backward pass, as `remat` does.

    Returns:
      A `Layer` on integers (N, T), T up to ``max_length``, to logits (N, T, V). A token outside 0…V − 1 makes the
      logits of its own example NaN.

    Raises:
      TypeError: the tokens are not integers.
      ValueError: a size is not positive, the heads do not divide the features, or the text is too long.

    Reference:
      Xiong et al., "On Layer Normalization in the Transformer Architecture", ICML 2020, table 1, on the right (Pre-LN).
    """
    sizes = {"vocabulary": vocabulary, "features": features, "num_heads": num_heads}
    sizes |= {"num_layers": num_layers, "hidden": hidden, "max_length": max_length}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"transformer: expected {name} >= 1, got {size}")
    if features % num_heads:
        raise ValueError(f"transformer: expected num_heads to divide features, got {num_heads} and {features}")
    attend = residual(serial(layer_norm(), self_attention(num_heads)))
    rework = residual(serial(layer_norm(), dense(hidden), activation(jax.nn.gelu), dense(features)))
    block = serial(attend, rework)
    blocks = [remat(block) if remat_layers else block] * num_layers
    return serial(embed(vocabulary, features), _positions(max_length), *blocks, layer_norm(), dense(vocabulary))
