"""Normalisation of each example by itself."""

import jax.numpy as jnp

from jaxnet.contract import Array, ArrayTree
from jaxnet.nn.layer import Layer, Shape, layer_maker


@layer_maker
def layer_norm(*, epsilon: float = 1e-6) -> Layer:
    """y = γ(x − μ)/√(σ² + ε) + β, with mean μ and variance σ² over the last axis.

    Args:
      epsilon: ε, added to the variance.

    Returns:
      A `Layer` with params ``{"scale": γ, "bias": β}``, each of the last axis's length; ones and zeros at first.

    Reference:
      Ba, Kiros & Hinton, "Layer Normalization", 2016, eq. 4.
    """

    def init(key: Array, input_shape: Shape) -> dict[str, Array]:
        return {"scale": jnp.ones(input_shape[-1:]), "bias": jnp.zeros(input_shape[-1:])}

    def apply(params: ArrayTree, x: Array, *, key: Array | None = None) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        return params["scale"] * centred / jnp.sqrt(variance + epsilon) + params["bias"]

    return Layer(init, apply)
