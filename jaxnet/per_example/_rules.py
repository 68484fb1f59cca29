"""How a leaf of the params is the kernel of one primitive, and the two factors of its gradient there: a rule each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxnet.contract import Array

Path = tuple[int, ...]
"""An equation by its index, and those of the equations that enclose it, outermost first."""
View = Callable[[Array], Array]
"""A rearrangement of a leaf's entries."""


@dataclasses.dataclass(frozen=True)
class Tap:
    """The one use of a leaf as a kernel.

    Attributes:
      path: of the equation.
      operand: which of its two operands is the other one.
      output: the output's shape and dtype, those of ε.
      rows: ``rows(other operand, δ of the output)`` to ``(a (S, T, d), δ (S, T, p))``.
      matrix: the leaf as its kernels' matrices (S, d, p): S = 1, or the layers that a scan passes through.
      description: what it is, for people.
    """

    path: Path
    operand: int
    output: jax.ShapeDtypeStruct
    rows: Callable[[Array, Array], tuple[Array, Array]]
    matrix: View
    description: str


def _shape(v: Any) -> tuple[int, ...]:
    return v.aval.shape


def _output(eqn: core.JaxprEqn) -> jax.ShapeDtypeStruct:
    aval: Any = eqn.outvars[0].aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _dot_general(eqn: core.JaxprEqn, position: int, before: View, path: Path) -> Tap | None:
    """K (d, p) of a product without batch dimensions: the output's axes are the free ones, left before right."""
    contracting, batching = eqn.params["dimension_numbers"]
    if any(map(len, batching)):
        return None
    other = 1 - position
    mine, theirs = tuple(contracting[position]), tuple(contracting[other])
    free = tuple(i for i in range(len(_shape(eqn.invars[position]))) if i not in mine)
    rest = tuple(i for i in range(len(_shape(eqn.invars[other]))) if i not in theirs)

    def rows(a: Array, delta: Array) -> tuple[Array, Array]:
        a = jnp.transpose(a, (*rest, *theirs))
        d = int(np.prod(a.shape[len(rest) :]))
        if position == 0:
            delta = jnp.moveaxis(delta, range(len(free)), range(-len(free), 0))
        steps = int(np.prod(delta.shape[: len(rest)]))
        return a.reshape(1, steps, d), delta.reshape(1, steps, -1)

    def matrix(leaf: Array) -> Array:
        kernel = jnp.transpose(before(leaf), (*mine, *free))
        return kernel.reshape(1, int(np.prod(kernel.shape[: len(mine)])), -1)

    return Tap(path, other, _output(eqn), rows, matrix, "a matrix product")


def _conv_general_dilated(eqn: core.JaxprEqn, position: int, before: View, path: Path) -> Tap | None:
    """A convolution is the product of the input's patches (T, d) with the kernel as a matrix (d, p)."""
    options = eqn.params
    if position == 0 or options["feature_group_count"] != 1 or options["batch_group_count"] != 1:
        return None
    numbers = options["dimension_numbers"]
    kernel_spec, out_spec = numbers.rhs_spec, numbers.out_spec
    window = [_shape(eqn.invars[1])[i] for i in kernel_spec[2:]]

    def rows(a: Array, delta: Array) -> tuple[Array, Array]:
        # Channels first: the patches' entries then come in the order (channel, window).
        patches = lax.conv_general_dilated_patches(
            jnp.transpose(a, numbers.lhs_spec),
            window,
            options["window_strides"],
            options["padding"],
            options["lhs_dilation"],
            options["rhs_dilation"],
        )
        last = lambda x: jnp.moveaxis(x, 1, -1).reshape(1, -1, x.shape[1])
        return last(patches), last(jnp.transpose(delta, out_spec))

    def matrix(leaf: Array) -> Array:
        kernel = jnp.transpose(before(leaf), kernel_spec)
        return kernel.reshape(kernel.shape[0], -1).T[None]

    return Tap(path, 0, _output(eqn), rows, matrix, "a convolution")


RULES = {"dot_general": _dot_general, "conv_general_dilated": _conv_general_dilated}
