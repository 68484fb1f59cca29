"""λ_max from vectors that were leading ones nearby: a few products where a search from anywhere takes twenty.

Rayleigh–Ritz in the span of the given vectors, which is then widened by the residual of the largest Ritz pair, one
product at a time. Started from one vector, a search would not see what has overtaken it: of a second eigenvalue 2 %
below, the start that is nearly the first one's vector holds next to nothing, and at the edge of stability the two
change places. Lanczos's recurrence has one residual for all Ritz pairs, which holds in a Krylov space only; here each
has its own, so that beside the vectors v their products Av are kept.

Reference:
  Davidson, "The Iterative Calculation of a Few of the Lowest Eigenvalues and Corresponding Eigenvectors of Large
  Real-Symmetric Matrices", Journal of Computational Physics 1975, without its preconditioner.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree
from jaxnet.curvature import _lanczos, _rounding
from jaxnet.curvature._operators import LinearOperator, check_deterministic, flattened, inner, unflattened
from jaxnet.curvature._search import values_of

LEADING = 3
"""How many vectors are followed from check to check."""
# Vectors kept at most; the share of a random one in the last of the starts.
_ROOM, _BLEND = 8, 0.03
# An eigenvalue's error is about the residual's square over the gap. But the gap is to what has been seen: so the
# residual is to be within so many tolerances, and within a share of the eigenvalue.
_TIMES, _SHARE = 3.0, 0.05


@contract.result
class Leading(NamedTuple):
    """The largest eigenvalue found.

    Attributes:
      value: θ.
      vectors: leaves (3, ...), orthonormal Ritz vectors of the three largest, from which to go on; in a space of one or
        two dimensions as many.
      residual_norm: ‖Av − θv‖ of the first.
      num_matvecs: products spent.
      converged: whether the estimate of θ's error is within the tolerance, and that is above what rounding leaves.
      product_error: how far rounding may take a product of a unit vector, as `Sharpness` has it.
    """

    value: Array
    vectors: ArrayTree
    residual_norm: Array
    num_matvecs: Array
    converged: Array
    product_error: Array


class _State(NamedTuple):
    """Q and AQ, rows from ``size`` on being 0; T = QᵀAQ; what to multiply next, and the verdict."""

    basis: Any
    images: Any
    projected: Array
    size: Array
    following: Any
    value: Array
    residual_norm: Array
    scale: Array
    disagreement: Array
    num_matvecs: Array
    settled: Array
    told: Array
    failed: Array


@dataset.on_automatic_axes
def follow(
    op: LinearOperator, starts: ArrayTree, tol: Array | float, *, key: Array, max_matvecs: int | None = None
) -> Leading:
    """The largest eigenvalue, from vectors that lead to it.

    Args:
      op: the operator.
      starts: one vector, or several with a leading axis; those that are 0 or not finite, and those missing of three,
        are random ones.
      tol: relative accuracy of the eigenvalue.
      key: for the random parts.
      max_matvecs: a limit on the products; by default 1000.

    Raises:
      ValueError: the starts do not fit, or the operator is not the same matrix twice, because its loss is random.
    """
    return followed(flattened(op), starts, tol, key, max_matvecs)


@functools.partial(dataset.jit, static_argnames="max_matvecs")
def followed(op: LinearOperator, starts: ArrayTree, tol: Array | float, key: Array, max_matvecs: int | None) -> Leading:
    """The same of an operator that `flattened` made."""
    seen = check_deterministic(op)
    limit = 1000 if max_matvecs is None else max_matvecs
    room = min(_ROOM, op.space.size)
    count = min(LEADING, room)
    streamed = dataset.on_host(op)
    # As in a search, the loop is not differentiated.
    fixed, given = (x if streamed else lax.stop_gradient(x) for x in (op, _starts(op, starts, count, key)))

    def done(state: _State) -> Array:
        return state.settled | state.failed | (state.num_matvecs >= limit)

    def step(state: _State) -> _State:
        state = _prepared(state, given, count)
        return _absorbed(state, fixed @ state.following, tol, count)

    end = dataset.while_loop(lambda state: ~done(state), step, _empty(given, room), data=op)
    end = _restarted(end, count)
    vectors = jax.tree.map(lambda q: jnp.where(end.failed, 0, q[:count]), end.basis)
    value = jnp.where(end.failed, jnp.nan, end.value)
    if not streamed:
        value = values_of(op, value[None], jax.tree.map(lambda x: x[:1], vectors), seen)[0]
    return Leading(
        value=value,
        vectors=unflattened(op, vectors),
        residual_norm=jnp.where(end.failed, jnp.nan, end.residual_norm),
        num_matvecs=end.num_matvecs,
        converged=end.settled & end.told & jnp.isfinite(value),
        product_error=_rounding.product_error(end.scale, end.disagreement),
    )


def _starts(op: LinearOperator, starts: ArrayTree, count: int, key: Array) -> Any:
    """``count`` unit vectors, flat: leaves (count, n)."""
    space = inner(op).space
    leaves = jax.tree.leaves(starts)
    several = [jnp.ndim(x) for x in leaves] == [len(shape) + 1 for shape in space.shapes]
    num = min(count, jnp.shape(leaves[0])[0]) if several else 1
    rows = [jax.tree.map(lambda x, i=i: x[i] if several else x, starts) for i in range(num)]
    random = [op.space.random(k) for k in jax.random.split(key, count)]
    found = []
    for i, other in enumerate(random):
        other = _unit(other)
        if i < num:
            space.check("v0", rows[i])
            own = _unit(jax.tree.map(lambda x, r: jnp.asarray(x, r.dtype), space.ravel(rows[i]), other))
            usable = jnp.isfinite(_lanczos.norm(own)) & (_lanczos.norm(own) > 0)
            share = jnp.where(usable, _BLEND if i == num - 1 else 0.0, 1.0)
            mix = lambda x, r, u=usable, s=share: jnp.where(u, x, 0) + s.astype(r.dtype) * r
            other = jax.tree.map(mix, own, other)
        found.append(other)
    return jax.tree.map(lambda *xs: jnp.stack(xs), *found)


def _unit(v: Any) -> Any:
    return _lanczos.scaled(v, _lanczos.norm(v))


def _empty(given: Any, room: int) -> _State:
    rows = lambda: jax.tree.map(lambda x: jnp.zeros((room, *x.shape[1:]), x.dtype), given)
    none, dtype = jnp.zeros((), jnp.int32), jnp.promote_types(jnp.result_type(*jax.tree.leaves(given)), jnp.float32)
    zero, no = jnp.zeros((), dtype), jnp.array(False)
    first = jax.tree.map(lambda x: x[0], given)
    return _State(rows(), rows(), jnp.zeros((room, room), dtype), none, first, zero, zero, zero, zero, none, no, no, no)


@functools.partial(jax.jit, static_argnames="count")
def _prepared(state: _State, given: Any, count: int) -> _State:
    """With room for a vector, and the next one orthonormal to the others."""
    room = state.projected.shape[0]
    full = state.size >= room
    state = lax.cond(full, lambda s: _restarted(s, count), lambda s: s, state)
    start = jax.tree.map(lambda x: x[jnp.minimum(state.num_matvecs, count - 1)], given)
    next_one = jax.tree.map(lambda x, y: jnp.where(state.num_matvecs < count, x, y), start, state.following)

    def sweep(_: int, v: Any) -> Any:
        return _unit(
            jax.tree.map(jnp.subtract, v, _lanczos.combine(state.basis, _lanczos.coefficients(state.basis, v)))
        )

    return state._replace(following=lax.fori_loop(0, 2, sweep, next_one))


@functools.partial(jax.jit, static_argnames="count")
def _absorbed(state: _State, image: Any, tol: Array | float, count: int) -> _State:
    """The next vector and its product taken in, the largest Ritz pair, and the verdict on it."""
    room, j = state.projected.shape[0], state.size
    put = lambda rows, v: jax.tree.map(lambda q, x: q.at[j].set(x.astype(q.dtype)), rows, v)
    basis, images = put(state.basis, state.following), put(state.images, image)
    column = _lanczos.coefficients(basis, image)
    # q_i·Aq_j and Aq_i·q_j are the same but for rounding: the residual says nothing below what they differ by.
    apart = jnp.where(jnp.arange(room) < j, column - _lanczos.coefficients(state.images, state.following), 0)
    disagreement = jnp.maximum(state.disagreement, _lanczos.norm(apart))
    projected = state.projected.at[:, j].set(column).at[j, :].set(column)
    values, coefficients = _lanczos.eigenpairs(projected, j + 1)
    top = coefficients[:, -1]
    along = lambda rows: _lanczos.combine(rows, top)
    residual = jax.tree.map(lambda w, q: w - values[-1].astype(w.dtype) * q, along(images), along(basis))
    length, num = _lanczos.norm(residual), state.num_matvecs + 1
    gap = values[-1] - values[max(room - 2, 0)]
    estimate = jnp.where(gap > 0, jnp.minimum(length, length * (length / jnp.where(gap > 0, gap, 1))), length)
    scale = jnp.maximum(state.scale, _lanczos.norm(image))
    rounding = _rounding.of_value(scale, disagreement)
    allowed = jnp.maximum(tol * jnp.abs(values[-1]), rounding)
    small = (estimate <= allowed) & (length <= jnp.maximum(allowed, jnp.minimum(_TIMES * allowed, _SHARE * values[-1])))
    exhausted = j + 1 >= sum(x.size for x in jax.tree.leaves(state.following))
    return state._replace(
        basis=basis,
        images=images,
        projected=projected,
        size=j + 1,
        following=residual,
        value=values[-1],
        residual_norm=length,
        scale=scale,
        disagreement=disagreement,
        num_matvecs=num,
        settled=small & (num > count) | exhausted,
        told=(tol * jnp.abs(values[-1]) >= rounding) | exhausted & (_rounding.product_error(scale, disagreement) == 0),
        failed=~jnp.isfinite(length),
    )


@functools.partial(jax.jit, static_argnames="count")
def _restarted(state: _State, count: int) -> _State:
    """Keep the leading Ritz vectors and their products."""
    values, coefficients = _lanczos.eigenpairs(state.projected, state.size)
    room = state.projected.shape[0]
    leading = jnp.flip(coefficients, axis=1)
    kept = jnp.arange(room) < jnp.minimum(count, state.size)
    mixed = jnp.where(kept, leading, 0)
    turned = lambda rows: _lanczos.combine(rows, mixed)
    return state._replace(
        basis=turned(state.basis),
        images=turned(state.images),
        projected=jnp.diag(jnp.where(kept, jnp.flip(values), 0)),
        size=jnp.minimum(count, state.size).astype(state.size.dtype),
    )
