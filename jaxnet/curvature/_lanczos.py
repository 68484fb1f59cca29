"""The Lanczos recurrence with full orthogonalisation and thick restarts, over pytrees.

After j steps the basis Q = [q_0 … q_{j−1}] is orthonormal, T = QᵀAQ, and AQ = QT + β q_j e_{j−1}ᵀ. Its T is kept as
a dense matrix whose columns are the coefficients of the orthogonalisation, so that a restart needs no case
of its own.

Reference:
  Wu & Simon, "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems", SIMAX 2000.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet.contract import Array, ArrayTree

# Columns of a flat basis that a restart works on at a time.
_BLOCK = 2**14


class Lanczos(NamedTuple):
    """The recurrence's state.

    Attributes:
      basis: leaves (m + 1, ...); row j is the next vector, the rows from j + 1 on are not used.
      projected: (m, m) T, of which the leading (j, j) block is filled.
      beta: the norm of the last residual; 0 after a breakdown.
      size: j, how many steps the basis holds.
      scale: the largest norm of a product so far, an estimate of ‖A‖ from below.
      coupling: (m,) Qᵀ A q_j of the next vector, as the products before have it, since A is symmetric.
      disagreement: the most by which the product itself had that otherwise; in exact arithmetic 0.
    """

    basis: ArrayTree
    projected: Array
    beta: Array
    size: Array
    scale: Array
    coupling: Array
    disagreement: Array


class Ritz(NamedTuple):
    """Eigenpairs of T, ascending; the last j are those of the basis, the first m − j fillers below them all.

    Attributes:
      values: (m,) θ.
      coefficients: (m, m), column i gives the Ritz vector Q s_i.
      residual_norms: (m,) ‖A Q s_i − θ_i Q s_i‖ = β |s_{j−1,i}|.
      filled: (m,) which entries are Ritz values of the basis.
    """

    values: Array
    coefficients: Array
    residual_norms: Array
    filled: Array


# No leaf is reshaped: one that lies in parts on several devices stays where it is, and sums alone are sent.
def _precise_vdot(a: Array, b: Array) -> Array:
    return jnp.tensordot(a, b, axes=a.ndim, precision=lax.Precision.HIGHEST)


def norm(v: ArrayTree) -> Array:
    """‖v‖ over all leaves, without overflow or underflow of the squares."""
    leaves = jax.tree.leaves(v)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0).astype(_dtype(v)) for x in leaves]))
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    scaled = [x / unit.astype(x.dtype) for x in leaves]
    return unit * jnp.sqrt(sum(_precise_vdot(x, x).astype(unit.dtype) for x in scaled))


def _dtype(v: ArrayTree) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(*jax.tree.leaves(v)), jnp.float32)


def coefficients(basis: ArrayTree, v: ArrayTree) -> Array:
    """Qᵀv (rows,)."""

    def leaf(q: Array, x: Array) -> Array:
        axes = tuple(range(x.ndim))
        return jnp.tensordot(q, x, axes=(tuple(i + 1 for i in axes), axes), precision=lax.Precision.HIGHEST)

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(leaf, basis, v))).astype(_dtype(v))


def combine(basis: ArrayTree, coefficients: Array) -> ArrayTree:
    """Q c for coefficients (rows,), or one combination a column for (rows, columns)."""

    def leaf(q: Array) -> Array:
        return jnp.tensordot(coefficients.astype(q.dtype).T, q, axes=1, precision=lax.Precision.HIGHEST)

    return jax.tree.map(leaf, basis)


def positions(shape: tuple[int, ...], first: int) -> Array:
    """Of each entry of an array, in the order of its memory, counted from ``first``."""
    stride, found = 1, jnp.full(shape, first, jnp.uint32)
    for axis in reversed(range(len(shape))):
        found += jnp.uint32(stride % 2**32) * lax.broadcasted_iota(jnp.uint32, shape, axis)
        stride *= shape[axis]
    return found


def _generic_like(v: ArrayTree, seed: Array | int) -> ArrayTree:
    """A vector in general position, by an integer hash of each entry's index: no invariant subspace holds it."""
    leaves, structure = jax.tree.flatten(v)
    hashed, first = [], 0
    for x in leaves:
        bits = positions(x.shape, first) * jnp.uint32(2654435761)
        bits = (bits ^ jnp.asarray(seed, jnp.uint32)) * jnp.uint32(2246822519)
        bits = (bits ^ (bits >> 15)) * jnp.uint32(3266489917)
        hashed.append(((bits >> 16).astype(jnp.float32) / 2**15 - 1).astype(x.dtype))
        first += x.size
    return jax.tree.unflatten(structure, hashed)


def scaled(v: ArrayTree, length: Array) -> ArrayTree:
    """v over its length, which may be 0."""
    return jax.tree.map(lambda x: x / jnp.where(length > 0, length, 1).astype(x.dtype), v)


def _set_row(basis: ArrayTree, row: Array | int, v: ArrayTree) -> ArrayTree:
    return jax.tree.map(lambda q, x: q.at[row].set(x.astype(q.dtype)), basis, v)


def init(start: ArrayTree, num_steps: int) -> Lanczos:
    """The state before the first of ``num_steps`` steps, from a start that is not zero."""
    basis = jax.tree.map(lambda x: jnp.zeros((num_steps + 1, *x.shape), x.dtype), start)
    zero = jnp.zeros((), _dtype(start))
    return Lanczos(
        basis=_set_row(basis, 0, scaled(start, norm(start))),
        projected=jnp.zeros((num_steps, num_steps), zero.dtype),
        beta=zero,
        size=jnp.zeros((), jnp.int32),
        scale=zero,
        coupling=jnp.zeros(num_steps, zero.dtype),
        disagreement=zero,
    )


def current(state: Lanczos) -> ArrayTree:
    """The vector that A is to be applied to next."""
    return jax.tree.map(lambda q: q[state.size], state.basis)


class _Pass(NamedTuple):
    w: ArrayTree
    column: Array
    beta: Array
    length: Array
    passes: Array


def extend(state: Lanczos, product: ArrayTree) -> Lanczos:
    """Extend the basis and T by one, given A times the `current` vector.

    Two passes of classical Gram–Schmidt: the second removes what rounding left of the first. Where nothing is left
    of the product, the basis spans an invariant subspace: β is 0, and two more passes make the next vector from a
    generic one. All are passes of one loop, which is compiled once.
    """
    j = state.size
    # The product is its components along the basis and what is left of it.
    size_of = lambda at: jnp.maximum(state.scale, norm((at.column, at.beta)))
    broken = lambda at: at.beta <= 10 * jnp.finfo(at.beta.dtype).eps * size_of(at)

    zero = jnp.zeros_like(state.beta)
    column = jnp.zeros(state.projected.shape[0] + 1, zero.dtype)

    def sweep(at: _Pass) -> _Pass:
        w = lax.cond(at.passes == 2, lambda: _generic_like(at.w, j), lambda: at.w)
        overlap = jnp.where(jnp.arange(column.size) <= j, coefficients(state.basis, w), 0)
        w = jax.tree.map(jnp.subtract, w, combine(state.basis, overlap))
        length = norm(w)
        own = at.passes < 2
        summed = jnp.where(own, at.column + overlap, at.column)
        return _Pass(w, summed, jnp.where(own, length, at.beta), length, at.passes + 1)

    more = lambda at: (at.passes < 2) | (broken(at) & (at.passes < 4))
    end = lax.while_loop(more, sweep, _Pass(product, column, zero, zero, jnp.zeros((), jnp.int32)))
    column, beta = end.column[:-1], jnp.where(broken(end), 0, end.beta)
    # After a breakdown nothing is known: what was dropped of the product may show here.
    apart = jnp.where((jnp.arange(column.size) < j) & (state.beta > 0), column - state.coupling, 0)
    return Lanczos(
        basis=_set_row(state.basis, j + 1, scaled(end.w, end.length)),
        projected=state.projected.at[:, j].set(column).at[j, :].set(column),
        beta=beta,
        size=j + 1,
        scale=size_of(end),
        coupling=jnp.zeros_like(column).at[j].set(beta),
        disagreement=jnp.maximum(state.disagreement, norm(apart)),
    )


def step(matvec: Callable[[ArrayTree], ArrayTree], state: Lanczos) -> Lanczos:
    """One product, and `extend`."""
    return extend(state, matvec(current(state)))


def eigenpairs(projected: Array, size: Array) -> tuple[Array, Array]:
    """The eigenvalues and vectors of T's leading block, ascending and last; fillers below them all."""
    filled = jnp.arange(projected.shape[0]) < size
    block = jnp.where(filled[:, None] & filled[None, :], projected, 0)
    # At the eigenvalues' scale, so that they cost no accuracy.
    bound = jnp.abs(block).sum(axis=1).max()
    filler = -2 * jnp.where(bound > 0, bound, 1)
    return jnp.linalg.eigh(block + jnp.diag(jnp.where(filled, 0, filler)))


def ritz(state: Lanczos) -> Ritz:
    """The eigenpairs of T with their residuals."""
    m, j = state.projected.shape[0], state.size
    values, vectors = eigenpairs(state.projected, j)
    last = vectors[jnp.maximum(j - 1, 0)]
    return Ritz(values, vectors, state.beta * jnp.abs(last), jnp.arange(m) >= m - j)


def restart(state: Lanczos, found: Ritz, kept: Array) -> Lanczos:
    """Keep the Ritz vectors at the indices ``kept`` and the next vector; T becomes their diagonal of values."""
    p, m = kept.shape[0], state.projected.shape[0]
    # In place: no slice of the basis, which would be a copy, and no write before all that reads what it replaces.
    rows = jnp.pad(found.coefficients[:, kept], ((0, 1), (0, 1))).at[m, p].set(1)

    def leaf(q: Array) -> Array:
        columns = q.size // q.shape[0]
        if q.ndim > 2 or columns < 2 * _BLOCK or jax.device_count() > 1:
            return q.at[: p + 1].set(combine(q, rows))

        # A block of columns at a time, so that the new vectors never lie beside the basis.
        def block(i: Array, q: Array) -> Array:
            # The last block overlaps the one before: what that has done is not done again.
            start = jnp.minimum(i * _BLOCK, columns - _BLOCK)
            part = lax.dynamic_slice_in_dim(q, start, _BLOCK, axis=1)
            fresh = start + jnp.arange(_BLOCK) >= i * _BLOCK
            new = jnp.where(fresh, combine(part, rows), part[: p + 1])
            return lax.dynamic_update_slice(q, new, (0, start))

        return lax.fori_loop(0, -(-columns // _BLOCK), block, q)

    return state._replace(
        basis=jax.tree.map(leaf, state.basis),
        projected=jnp.zeros_like(state.projected).at[jnp.arange(p), jnp.arange(p)].set(found.values[kept]),
        size=jnp.array(p, jnp.int32),
        coupling=jnp.zeros_like(state.coupling).at[:p].set(state.beta * found.coefficients[state.size - 1, kept]),
    )
