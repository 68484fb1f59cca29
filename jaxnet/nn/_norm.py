"""Normalisation of each example by itself."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxnet.contract import Array, ArrayTree
from jaxnet.nn._layer import Layer, Shape, layer_maker


def _standardised(x: Array, axes: int | tuple[int, ...], epsilon: float) -> Array:
    """(x − μ)/√(σ² + ε), with mean μ and variance σ² over the axes."""
    centred = x - x.mean(axis=axes, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(axis=axes, keepdims=True) + epsilon)


def _check(name: str, shape: Shape, num_groups: int) -> None:
    if not shape:
        raise ValueError(f"{name}: expected examples with at least one axis, got scalars")
    if shape[-1] % num_groups:
        raise ValueError(f"{name}: expected num_groups to divide the channels, got {num_groups} and {shape[-1]}")


def _norm(name: str, num_groups: int, standardise: Callable[[Array], Array]) -> Layer:
    """y = γ standardise(x) + β, with γ and β along the last axis."""

    def init(key: Array, input_shape: Shape) -> dict[str, Array]:
        _check(name, input_shape, num_groups)
        return {"scale": jnp.ones(input_shape[-1:]), "bias": jnp.zeros(input_shape[-1:])}

    def apply(params: ArrayTree, x: Array, *, key: Array | None = None) -> Array:
        _check(name, x.shape[1:], num_groups)
        if x.shape[-1:] != params["scale"].shape:
            raise ValueError(f"{name}: expected inputs (N, ..., {params['scale'].size}) for its scale, got {x.shape}")
        return params["scale"] * standardise(x) + params["bias"]

    return Layer(init, apply)


@layer_maker
def layer_norm(*, epsilon: float = 1e-6) -> Layer:
    """y = γ(x − μ)/√(σ² + ε) + β, with mean μ and variance σ² over the last axis.

    Args:
      epsilon: ε, added to the variance.

    Returns:
      A `Layer` with params ``{"scale": γ, "bias": β}``, each of the last axis's length; ones and zeros at first.

    Raises:
      ValueError: the input has no axis to act on, or not the params' length.

    Reference:
      Ba, Kiros & Hinton, "Layer Normalization", 2016, eq. 4.
    """
    return _norm("layer_norm", 1, lambda x: _standardised(x, -1, epsilon))


@layer_maker
def group_norm(num_groups: int, *, epsilon: float = 1e-6) -> Layer:
    """y = γ(x − μ)/√(σ² + ε) + β, with μ and σ² over all positions and channels of one example's group of channels.

    Args:
      num_groups: the number of groups; each is a run of C/num_groups neighbouring channels.
      epsilon: ε, added to the variance.

    Returns:
      A `Layer` on inputs (N, ..., C) with params ``{"scale": γ, "bias": β}``, each (C,); ones and zeros at first.

    Raises:
      ValueError: ``num_groups`` is not positive or does not divide C, or the input has not the params' C.

    Reference:
      Wu & He, "Group Normalization", ECCV 2018, eqs. 1, 2, 6 and 7.
    """
    if num_groups < 1:
        raise ValueError(f"group_norm: expected num_groups >= 1, got {num_groups}")

    def standardise(x: Array) -> Array:
        groups = x.reshape(x.shape[0], -1, num_groups, x.shape[-1] // num_groups)
        return _standardised(groups, (1, 3), epsilon).reshape(x.shape)

    return _norm("group_norm", num_groups, standardise)
