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


class Lanczos(NamedTuple):
    """The recurrence's state.

    Attributes:
      basis: leaves (m + 1, ...); row j is the next vector, the rows from j + 1 on are zero.
      projected: (m, m) T, of which the leading (j, j) block is filled.
      beta: the norm of the last residual.
      size: j, how many steps the basis holds.
      scale: the largest norm of a product so far, an estimate of ‖A‖ from below.
      key: for the random vector that continues after a breakdown.
    """

    basis: ArrayTree
    projected: Array
    beta: Array
    size: Array
    scale: Array
    key: Array


class Ritz(NamedTuple):
    """Eigenpairs of T, ascending; the last j are those of the basis, the first m − j fillers below them all.

    Attributes:
      values: (m,) θ.
      coefficients: (m, m), column i gives the Ritz vector Q s_i.
      residual_norms: (m,) ‖A Q s_i − θ_i Q s_i‖ = β |s_{j−1,i}|.
      held: (m,) which entries are Ritz values of the basis.
    """

    values: Array
    coefficients: Array
    residual_norms: Array
    held: Array


def _precise_vdot(a: Array, b: Array) -> Array:
    return jnp.vdot(a, b, precision=lax.Precision.HIGHEST)


def norm(v: ArrayTree) -> Array:
    """‖v‖ over all leaves, without overflow or underflow of the squares."""
    leaves = jax.tree.leaves(v)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0).astype(_dtype(v)) for x in leaves]))
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    scaled = [x / unit.astype(x.dtype) for x in leaves]
    return unit * jnp.sqrt(sum(_precise_vdot(x, x).astype(unit.dtype) for x in scaled))


def _dtype(v: ArrayTree) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(*jax.tree.leaves(v)), jnp.float32)


def _coefficients(basis: ArrayTree, v: ArrayTree) -> Array:
    def leaf(q: Array, x: Array) -> Array:
        return jnp.matmul(q.reshape(q.shape[0], -1), x.reshape(-1), precision=lax.Precision.HIGHEST)

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(leaf, basis, v)))


def combine(basis: ArrayTree, coefficients: Array) -> ArrayTree:
    """Q c for coefficients (rows,), or one combination a column for (rows, columns)."""

    def leaf(q: Array) -> Array:
        c = coefficients.astype(q.dtype)
        mixed = jnp.matmul(c.T, q.reshape(q.shape[0], -1), precision=lax.Precision.HIGHEST)
        return mixed.reshape(*c.shape[1:], *q.shape[1:])

    return jax.tree.map(leaf, basis)


def _orthogonalise(basis: ArrayTree, v: ArrayTree) -> tuple[ArrayTree, Array]:
    """Two passes of classical Gram–Schmidt: the second removes what rounding left of the first."""
    first = _coefficients(basis, v)
    v = jax.tree.map(jnp.subtract, v, combine(basis, first))
    second = _coefficients(basis, v)
    return jax.tree.map(jnp.subtract, v, combine(basis, second)), first + second


def random_like(key: Array, v: ArrayTree) -> ArrayTree:
    """A standard normal vector with the structure of ``v``."""
    leaves, structure = jax.tree.flatten(v)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, jnp.shape(x), jnp.result_type(x)) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def _normalised(v: ArrayTree) -> ArrayTree:
    length = norm(v)
    return jax.tree.map(lambda x: x / length.astype(x.dtype), v)


def _set_row(basis: ArrayTree, row: Array | int, v: ArrayTree) -> ArrayTree:
    return jax.tree.map(lambda q, x: q.at[row].set(x.astype(q.dtype)), basis, v)


def init(start: ArrayTree, num_steps: int, key: Array) -> Lanczos:
    """The state before the first step: ``start`` made a unit vector, or a random one if it is zero."""
    key, draw = jax.random.split(key)
    usable = norm(start) > 0
    start = jax.tree.map(lambda x, r: jnp.where(usable, x, r), start, random_like(draw, start))
    basis = jax.tree.map(lambda x: jnp.zeros((num_steps + 1, *x.shape), x.dtype), start)
    zero = jnp.zeros((), _dtype(start))
    projected = jnp.zeros((num_steps, num_steps), zero.dtype)
    return Lanczos(_set_row(basis, 0, _normalised(start)), projected, zero, jnp.zeros((), jnp.int32), zero, key)


def step(matvec: Callable[[ArrayTree], ArrayTree], state: Lanczos) -> Lanczos:
    """One product: extend the basis and T by one. After a breakdown (β = 0) go on with a random vector."""
    j = state.size
    w = matvec(jax.tree.map(lambda q: q[j], state.basis))
    scale = jnp.maximum(state.scale, norm(w))
    w, column = _orthogonalise(state.basis, w)
    column = column[:-1].astype(state.projected.dtype)
    projected = state.projected.at[:, j].set(column).at[j, :].set(column)
    beta = norm(w)
    key, draw = jax.random.split(state.key)
    # Below this, what is left of w is rounding, and the basis spans an invariant subspace.
    broken = beta <= 10 * jnp.finfo(beta.dtype).eps * scale
    fresh = lambda: _orthogonalise(state.basis, random_like(draw, w))[0]
    next_vector = lax.cond(broken, fresh, lambda: w)
    length = norm(next_vector)
    unit = jax.tree.map(lambda x: x / jnp.where(length > 0, length, 1).astype(x.dtype), next_vector)
    return Lanczos(
        basis=_set_row(state.basis, j + 1, unit),
        projected=projected,
        beta=jnp.where(broken, 0, beta),
        size=j + 1,
        scale=scale,
        key=key,
    )


def ritz(state: Lanczos) -> Ritz:
    """The eigenpairs of T with their residuals."""
    m, j = state.projected.shape[0], state.size
    held = jnp.arange(m) < j
    block = jnp.where(held[:, None] & held[None, :], state.projected, 0)
    # Fillers lie below all eigenvalues, but at their scale, so that they cost no accuracy.
    bound = jnp.abs(block).sum(axis=1).max()
    filler = -2 * jnp.where(bound > 0, bound, 1)
    values, vectors = jnp.linalg.eigh(block + jnp.diag(jnp.where(held, 0, filler)))
    held = jnp.arange(m) >= m - j
    last = vectors[jnp.maximum(j - 1, 0)]
    return Ritz(values, vectors, state.beta * jnp.abs(last), held)


def restart(state: Lanczos, found: Ritz, kept: Array) -> Lanczos:
    """Keep the Ritz vectors at the indices ``kept`` and the next vector; T becomes their diagonal of values."""
    p, m = kept.shape[0], state.projected.shape[0]
    vectors = combine(jax.tree.map(lambda q: q[:m], state.basis), found.coefficients[:, kept])

    def leaf(q: Array, v: Array) -> Array:
        return jnp.zeros_like(q).at[:p].set(v.astype(q.dtype)).at[p].set(q[m])

    return state._replace(
        basis=jax.tree.map(leaf, state.basis, vectors),
        projected=jnp.zeros_like(state.projected).at[jnp.arange(p), jnp.arange(p)].set(found.values[kept]),
        size=jnp.array(p, jnp.int32),
    )
