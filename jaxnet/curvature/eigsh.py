"""A few eigenpairs of a symmetric operator, to a stated accuracy."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree
from jaxnet.curvature import bound, lanczos
from jaxnet.curvature.operators import LinearOperator

WHICH = ("LA", "SA", "LM", "BE")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eigenpairs:
    """What `eigsh` found.

    Attributes:
      values: (k,) eigenvalues, descending; NaN where a product was not finite. Where simple, they can be
        differentiated by the operator's params and operands (dλ = vᵀ(dA)v); the other fields count as constants.
      vectors: leaves (k, ...), orthonormal eigenvectors.
      residual_norms: (k,) ‖Av − θv‖, each a bound on the distance to some eigenvalue.
      num_matvecs: products spent.
      converged: whether the error of every value was found to be within the tolerance.
    """

    values: Array
    vectors: ArrayTree
    residual_norms: Array
    num_matvecs: Array
    converged: Array


class Search(NamedTuple):
    """The loop's state; alpha and beta are the first cycle's tridiagonal, for the a posteriori bound."""

    lanczos: lanczos.Lanczos
    found: lanczos.Ritz
    alpha: Array
    beta: Array
    num_matvecs: Array
    agreed: Array
    failed: Array


def eigsh(
    op: LinearOperator,
    k: int = 1,
    *,
    which: str = "LA",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    key: Array,
    v0: ArrayTree | None = None,
) -> Eigenpairs:
    """The k eigenvalues at one end, or both ends, of a symmetric operator's spectrum, with their vectors.

    The error of a Ritz value θ with residual r and gap g to the next is at most min(r, r²/g). The search ends when r
    is within tol·|θ|, or r²/g for several steps in a row: while two close eigenvalues are still one Ritz value, g is
    the distance to a third. For the largest eigenvalue from a random start, the Lanczos polynomials must also leave a
    chance of at most 1 % that a larger one, beyond θ(1 + 20 tol), is still unseen; then two steps in a row are enough.
    Distinct eigenvalues are found; how often one occurs is not claimed.

    Args:
      op: a `LinearOperator`.
      k: how many.
      which: "LA" the largest, "SA" the smallest, "LM" the largest in magnitude, "BE" half from each end.
      tol: relative accuracy of the eigenvalues.
      max_matvecs: a limit on the products; by default enough for any gap that the dtype resolves.
      key: a `jax.random.key` for the start vector.
      v0: a start vector like params, such as the last eigenvector found nearby; a hundredth of a random one is added.

    Returns:
      `Eigenpairs`. Inside a jit too, ``converged`` tells what an exception could not.

    Raises:
      ValueError: k, which, tol or max_matvecs is out of range.

    Reference:
      Parlett, "The Symmetric Eigenvalue Problem", 1998, sections 11.7 and 13.2.
    """
    check_tolerance(tol)
    return search(op, v0, key, tol, k=k, which=which, max_matvecs=max_matvecs)[0]


@jax.custom_jvp
def _values_of(op: LinearOperator, values: Array, vectors: ArrayTree) -> Array:
    return values


@_values_of.defjvp
def _values_of_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """dλ = vᵀ(dA)v for a simple eigenvalue with unit vector v, which needs no derivative of v."""
    op, values, vectors = primals

    def form(op: LinearOperator) -> Array:
        along = lambda v: optax.tree.vdot(v, op.product(op.params, op.operands, v))
        return lax.map(along, vectors)

    return values, jax.jvp(form, (op,), tangents[:1])[1].astype(values.dtype)


def check_tolerance(tol: Array | float) -> None:
    """Raise unless a tolerance that is known as a number is positive."""
    if isinstance(tol, (int, float)) and not tol > 0:
        raise ValueError(f"tol: expected a positive number, got {tol}")


# Steps in a row at which the estimate must be small; the second where a bound or a warm start vouches for them.
_ALONE, _VOUCHED = 4, 2
# The share of a random vector in a warm start.
_BLEND = 0.01
# The chance of a larger eigenvalue, and how far beyond θ it would lie in units of tol, that end a search.
_UNSEEN, _BEYOND = 0.01, 20


@functools.partial(jax.jit, static_argnames=("k", "which", "max_matvecs"))
def search(
    op: LinearOperator,
    v0: ArrayTree | None,
    key: Array,
    tol: Array | float,
    *,
    k: int,
    which: str,
    max_matvecs: int | None,
) -> tuple[Eigenpairs, Search]:
    """`eigsh`, with the state that it ended in."""
    n = _check(op, k, which, max_matvecs)
    limit = max(1000, 20 * k) if max_matvecs is None else max_matvecs
    # The loop is not differentiated: an eigenvalue's derivative needs its vector only.
    given, (op, v0) = op, lax.stop_gradient((op, v0))
    random = lanczos.random_like(key, op.params)
    start = random if v0 is None else _blended(v0, random)
    in_a_row = _ALONE if v0 is None else _VOUCHED
    bounded = v0 is None and k == 1 and which == "LA"
    log_share = bound.log_inverse_share(n, _UNSEEN)
    m = min(n, 2 * k + 18)
    kept = min(k + (m - k) // 2, m - 1)
    state = lanczos.init(start, m, jax.random.fold_in(key, 1))
    zero, dtype = jnp.zeros((), jnp.int32), state.projected.dtype
    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lanczos.ritz, state))
    begin = Search(state, nothing, jnp.zeros(m, dtype), jnp.zeros(m, dtype), zero, zero, jnp.array(False))

    def going_on(search: Search) -> Array:
        settled = (search.agreed >= in_a_row) | ((search.lanczos.size == m) & (m == n))
        return ~settled & ~search.failed & (search.num_matvecs < limit)

    def body(search: Search) -> Search:
        state = search.lanczos
        if m < n:
            full = state.size == m
            state = lax.cond(full, lambda s: _restarted(s, search.found, kept, which), lambda s: s, state)
        first_cycle = search.num_matvecs < m
        j = state.size
        state = lanczos.step(op, state)
        alpha = jnp.where(first_cycle, search.alpha.at[j].set(state.projected[j, j]), search.alpha)
        beta = jnp.where(first_cycle, search.beta.at[j].set(state.beta), search.beta)
        found = lanczos.ritz(state)
        within, exact = _accuracy(found, state, k, which, tol)
        steps = search.num_matvecs + 1
        # A small residual proves an eigenvalue, not the one wanted: from a given start it is no more than a vote.
        at_once = in_a_row if v0 is None else search.agreed + 1
        agreed = jnp.where(exact, at_once, jnp.where(within, search.agreed + 1, 0))
        if bounded:
            top = found.values[-1]
            seen = bound.log_sum(top + _BEYOND * tol * jnp.abs(top), alpha, beta, steps) > log_share
            seen = seen | (state.beta == 0)
            vouched = jnp.where(seen & (agreed >= _VOUCHED), in_a_row, jnp.minimum(agreed, _VOUCHED))
            agreed = jnp.where(first_cycle, vouched, agreed)
        return Search(state, found, alpha, beta, steps, agreed, ~jnp.isfinite(state.beta))

    end = lax.while_loop(going_on, body, begin)
    found = end.found
    wanted = _wanted(found, k, which)
    wanted = wanted[jnp.argsort(-found.values[wanted])]
    held = found.held[wanted] & ~end.failed
    values = jnp.where(held, found.values[wanted], jnp.nan)
    basis = jax.tree.map(lambda q: q[:m], end.lanczos.basis)
    exhausted = (end.lanczos.size == m) & (m == n)
    converged = ((end.agreed >= in_a_row) | exhausted) & held.all() & jnp.isfinite(values).all()
    vectors = lanczos.combine(basis, found.coefficients[:, wanted])
    residuals = jnp.where(held, found.residual_norms[wanted], jnp.nan)
    values = _values_of(given, values, vectors)
    return Eigenpairs(values, vectors, residuals, end.num_matvecs, converged), end


def _check(op: LinearOperator, k: int, which: str, max_matvecs: int | None) -> int:
    """The number of parameters, if the arguments fit it."""
    contract.check_params(op.params)
    n = sum(x.size for x in jax.tree.leaves(op.params))
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to {n}, the number of parameters, got {k}")
    if which not in WHICH:
        raise ValueError(f"which: expected one of {', '.join(WHICH)}, got {which!r}")
    if max_matvecs is not None and max_matvecs < 1:
        raise ValueError(f"max_matvecs: expected 1 or more, got {max_matvecs}")
    return n


def _blended(v0: ArrayTree, random: ArrayTree) -> ArrayTree:
    """A start near v0 that no invariant subspace holds, so that an eigenvalue which has overtaken v0's can be found."""
    size, noise = lanczos.norm(v0), lanczos.norm(random)
    usable = (size > 0) & jnp.isfinite(size)
    scale = jnp.where(usable, 1 / jnp.where(usable, size, 1), 0)

    def leaf(v: Array, r: Array) -> Array:
        given = jnp.where(usable, jnp.asarray(v, r.dtype) * scale.astype(r.dtype), 0)
        return given + (_BLEND / noise).astype(r.dtype) * r

    return jax.tree.map(leaf, v0, random)


def _restarted(state: lanczos.Lanczos, found: lanczos.Ritz, kept: int, which: str) -> lanczos.Lanczos:
    return lanczos.restart(state, found, _wanted(found, kept, which))


def _wanted(found: lanczos.Ritz, count: int, which: str) -> Array:
    """Indices of the ``count`` Ritz values that ``which`` asks for first; fillers come last."""
    m = found.values.shape[0]
    position = jnp.arange(m)
    from_bottom = position - jnp.sum(~found.held)
    from_top = m - 1 - position
    rank = {
        "LA": from_top,
        "SA": from_bottom,
        "LM": -jnp.abs(found.values),
        "BE": jnp.minimum(2 * from_top, 2 * from_bottom + 1),
    }[which]
    return jnp.argsort(jnp.where(found.held, rank, jnp.inf))[:count]


def _accuracy(
    found: lanczos.Ritz, state: lanczos.Lanczos, k: int, which: str, tol: Array | float
) -> tuple[Array, Array]:
    """Whether all wanted values look accurate, and whether their residuals alone prove it."""
    wanted = _wanted(found, k, which)
    values, residuals = found.values[wanted], found.residual_norms[wanted]
    distance = jnp.abs(found.values[None, :] - values[:, None])
    others = found.held[None, :] & (jnp.arange(distance.shape[1])[None, :] != wanted[:, None])
    gap = jnp.min(jnp.where(others, distance, jnp.inf), axis=1)
    # A lone Ritz value has seen no gap: only its residual counts.
    estimate = jnp.where(jnp.isinf(gap), residuals, jnp.minimum(residuals, residuals * (residuals / gap)))
    # Twins at rounding distance leave gap = 0 and an estimate of NaN or inf: the residual decides.
    estimate = jnp.where(jnp.isfinite(estimate), estimate, residuals)
    rounding = 4 * jnp.finfo(values.dtype).eps * state.scale
    allowed = jnp.maximum(tol * jnp.abs(values), rounding)
    held = found.held[wanted].all()
    return held & (estimate <= allowed).all(), held & (residuals <= allowed).all()
