"""How a leaf of the params is the kernel of one primitive, and the two factors of its gradient there: a rule each."""

import dataclasses
from collections.abc import Callable, Sequence
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


def leaf_of(view: View, like: jax.ShapeDtypeStruct, matrix: Array) -> Array:
    """The leaf of which ``matrix`` is a view: what rearranges is its own transpose's inverse."""
    return jax.linear_transpose(view, like)(matrix.astype(like.dtype))[0]


@dataclasses.dataclass(frozen=True)
class Tap:
    """A use of a leaf as a kernel.

    Attributes:
      path: of the equation.
      operand: which of its two operands is the other one.
      output: the output's shape and dtype, those of ε.
      rows: ``rows(other operand, δ of the output)`` to ``(a (S, T, d), δ (S, T, p))``; of a lookup the rows' numbers,
        (S, T, 1) and d where there is none, stand for the unit vectors a.
      matrix: the leaf as its kernels' matrices (S, d, p): S = 1, or the layers that a scan passes through, or groups.
      description: what it is, for people.
      lookup: whether it is one.
    """

    path: Path
    operand: int
    output: jax.ShapeDtypeStruct
    rows: Callable[[Array, Array], tuple[Array, Array]]
    matrix: View
    description: str
    lookup: bool = False


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


def _patches(a: Array, window: Sequence[int], options: dict[str, Any]) -> Array:
    """What a convolution's window sees at each place of (1, C, *lengths), as (1, C·|window|, *places).

    By slices along one axis after the other: `lax.conv_general_dilated_patches` convolves with unit vectors, which
    takes ten times as long on a CPU.
    """
    around = zip(options["padding"], options["lhs_dilation"], strict=True)
    pads = [(low, high, dilation - 1) for (low, high), dilation in around]
    a = lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0), (0, 0, 0), *pads])
    for i, size in enumerate(window):
        axis, stride, dilation = 2 + 2 * i, options["window_strides"][i], options["rhs_dilation"][i]
        last = a.shape[axis] - dilation * (size - 1)
        seen = [lax.slice_in_dim(a, j * dilation, j * dilation + last, stride, axis) for j in range(size)]
        a = jnp.stack(seen, axis=2 + i)
    return a.reshape(1, -1, *a.shape[2 + len(window) :])


def _conv_general_dilated(eqn: core.JaxprEqn, position: int, before: View, path: Path) -> Tap | None:
    """A convolution is the product of the input's patches (T, d) with the kernel as a matrix (d, p)."""
    options = eqn.params
    if position == 0 or options["batch_group_count"] != 1:
        return None
    groups = options["feature_group_count"]
    numbers = options["dimension_numbers"]
    kernel_spec, out_spec = numbers.rhs_spec, numbers.out_spec
    window = [_shape(eqn.invars[1])[i] for i in kernel_spec[2:]]

    def rows(a: Array, delta: Array) -> tuple[Array, Array]:
        # Channels first: the patches' entries then come in the order (channel, window).
        patches = _patches(jnp.transpose(a, numbers.lhs_spec), window, options)
        # Each group's channels by themselves: (1, channels, ...) to (groups, T, channels of one).
        last = lambda x: jnp.moveaxis(x.reshape(groups, x.shape[1] // groups, -1), 1, -1)
        return last(patches), last(jnp.transpose(delta, out_spec))

    def matrix(leaf: Array) -> Array:
        kernel = jnp.transpose(before(leaf), kernel_spec)
        return jnp.swapaxes(kernel.reshape(groups, kernel.shape[0] // groups, -1), 1, 2)

    return Tap(path, 0, _output(eqn), rows, matrix, "a convolution")


def _gather(eqn: core.JaxprEqn, position: int, before: View, path: Path) -> Tap | None:
    """Rows of a table, which the product with unit vectors would give: K is the table (d, p)."""
    numbers, sizes, mode = (eqn.params[name] for name in ("dimension_numbers", "slice_sizes", "mode"))
    if position != 0 or numbers.operand_batching_dims:
        return None
    shape, starts = _shape(eqn.invars[0]), numbers.start_index_map
    cut = [i for i, size in enumerate(sizes) if size != shape[i]]
    if len(cut) != 1 or sizes[cut[0]] != 1 or cut[0] not in starts:
        return None
    axis, offsets = cut[0], numbers.offset_dims
    d, highest = shape[axis], np.array([shape[i] - sizes[i] for i in starts])

    def rows(indices: Array, delta: Array) -> tuple[Array, Array]:
        delta = jnp.moveaxis(delta, offsets, range(-len(offsets), 0)).reshape(1, indices[..., 0].size, -1)
        ids = indices[..., starts.index(axis)].reshape(1, -1, 1)
        if mode == lax.GatherScatterMode.CLIP:
            return jnp.clip(ids, 0, d - 1).astype(jnp.int32), delta
        inside = ((indices >= 0) & (indices <= highest)).all(axis=-1).reshape(1, -1, 1)
        return jnp.where(inside, ids.astype(jnp.int32), d), delta

    def matrix(leaf: Array) -> Array:
        return jnp.moveaxis(before(leaf), axis, 0).reshape(1, d, -1)

    return Tap(path, 1, _output(eqn), rows, matrix, "a lookup", lookup=True)


RULES = {"dot_general": _dot_general, "conv_general_dilated": _conv_general_dilated, "gather": _gather}
