"""Attention among the positions of a sequence."""

import math

import jax
import jax.numpy as jnp

from jaxnet.contract import Array, ArrayTree
from jaxnet.nn._dense import lecun_normal
from jaxnet.nn._layer import Layer, Shape, layer_maker


def _check(shape: Shape, num_heads: int) -> None:
    if len(shape) != 2:
        raise ValueError(f"self_attention: expected inputs (N, T, d), got (N, *{shape})")
    if shape[-1] % num_heads:
        raise ValueError(f"self_attention: expected num_heads to divide d, got {num_heads} and {shape[-1]}")


@layer_maker
def self_attention(
    num_heads: int, *, causal: bool = True, kernel_init: jax.nn.initializers.Initializer = lecun_normal
) -> Layer:
    """y = [head_1, …, head_H] W_O, where head_h = softmax(Q_h K_hᵀ/√(d/H)) V_h and Q, K, V = xW_Q, xW_K, xW_V.

    Head h has the h-th run of d/H columns of Q, K and V. The softmax is over the positions attended to.

    Args:
      num_heads: the number of heads H.
      causal: whether a position attends only to itself and those before it; otherwise to all.
      kernel_init: a `jax.nn.initializers` function for each W; by default variance 1/d.

    Returns:
      A `Layer` from (N, T, d) to (N, T, d) with params ``{"query": W_Q, "key": W_K, "value": W_V, "out": W_O}``,
      each (d, d).

    Raises:
      ValueError: ``num_heads`` is not positive or does not divide d, or the input is not (N, T, d) with the params' d.

    Reference:
      Vaswani et al., "Attention Is All You Need", NeurIPS 2017, eq. 1 and section 3.2.2.
    """
    if num_heads < 1:
        raise ValueError(f"self_attention: expected num_heads >= 1, got {num_heads}")
    names = ("query", "key", "value", "out")

    def init(key: Array, input_shape: Shape) -> dict[str, Array]:
        _check(input_shape, num_heads)
        shape = (input_shape[-1], input_shape[-1])
        return {name: kernel_init(k, shape) for name, k in zip(names, jax.random.split(key, 4), strict=True)}

    def apply(params: ArrayTree, x: Array, *, key: Array | None = None) -> Array:
        _check(x.shape[1:], num_heads)
        d = params["out"].shape[0]
        if x.shape[-1] != d:
            raise ValueError(f"self_attention: expected inputs (N, T, {d}) for its kernels, got {x.shape}")
        query, keys, values = ((x @ params[name]).reshape(*x.shape[:2], num_heads, -1) for name in names[:3])
        # Not jax.nn.dot_product_attention, which rounds the scores to float32.
        scores = jnp.einsum("nqhi,nkhi->nhqk", query, keys) / math.sqrt(d // num_heads)
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool)) if causal else None
        heads = jnp.einsum("nhqk,nkhi->nqhi", jax.nn.softmax(scores, where=seen), values)
        return heads.reshape(x.shape) @ params["out"]

    return Layer(init, apply)
