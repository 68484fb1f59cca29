"""A few eigenpairs of a symmetric operator, to a stated accuracy."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree
from jaxnet.curvature import _lanczos, _search
from jaxnet.curvature._operators import LinearOperator, StreamedOperator, check_deterministic


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


def eigsh(
    op: LinearOperator,
    k: int = 1,
    *,
    which: str = "LA",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    key: Array,
    v0: ArrayTree | None = None,
    ncv: int | None = None,
) -> Eigenpairs:
    """The k eigenvalues at one end, or both ends, of a symmetric operator's spectrum, with their vectors.

    The error of a Ritz value θ with residual r and gap g to the next is about min(r, r²/g), if no eigenvalue near it is
    still unseen. So the search ends when that estimate is within tol·|θ| and, from a random start, the Lanczos
    polynomials leave a chance of at most 2 % that an eigenvalue lies further out than the tolerance; or when for four
    steps in a row the estimate is small, and none is likely to lie further out than a third of the gap. The second
    rule is an empirical one, and cheaper where the spectrum is dense.
    Distinct eigenvalues are found; how often one occurs is not claimed.

    Args:
      op: a `LinearOperator`.
      k: how many.
      which: "LA" the largest, "SA" the smallest, "LM" the largest in magnitude, "BE" half from each end.
      tol: relative accuracy of the eigenvalues.
      max_matvecs: a limit on the products; by default enough for any gap that the dtype resolves.
      key: a `jax.random.key` for the start vector.
      v0: a start vector like params, such as the last eigenvector found nearby; a hundredth of a random one is added.
      ncv: how many Lanczos vectors are kept at most, beside one to go on with; by default 2k + 12. With k + 3 of them
        extreme values are found in the least memory, by more products.

    Returns:
      `Eigenpairs`. Inside a jit too, ``converged`` tells what an exception could not.

    Raises:
      ValueError: k, which, tol or max_matvecs is out of range.

    Reference:
      Parlett, "The Symmetric Eigenvalue Problem", 1998, sections 11.7 and 13.2.
    """
    check_tolerance(tol)
    return find(op, v0, key, tol, make_plan(op, k, which, max_matvecs, ncv, v0 is not None))[0]


# Products after which a search ends at the latest.
_PATIENCE = 100_000
# The share of a random vector in a warm start.
_BLEND = 0.01


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


def make_plan(
    op: LinearOperator, k: int, which: str, max_matvecs: int | None, ncv: int | None, warm: bool
) -> _search.Plan:
    """The plan of a search, if the arguments fit the operator."""
    contract.check_params(op.params)
    n = sum(x.size for x in jax.tree.leaves(op.params))
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to {n}, the number of parameters, got {k}")
    if which not in _search.WHICH:
        raise ValueError(f"which: expected one of {', '.join(_search.WHICH)}, got {which!r}")
    if max_matvecs is not None and max_matvecs < 1:
        raise ValueError(f"max_matvecs: expected 1 or more, got {max_matvecs}")
    if ncv is not None and not k + 2 <= ncv:
        raise ValueError(f"ncv: expected at least k + 2 = {k + 2} Lanczos vectors, got {ncv}")
    # A gap of a rounding error takes about 1/√eps products; in double precision nobody waits for it.
    eps = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(op.params))).eps)
    limit = min(int(8 / eps**0.5), _PATIENCE) if max_matvecs is None else max_matvecs
    return _search.Plan(n, k, which, min(n, 2 * k + 12 if ncv is None else ncv), limit, warm)


def find(
    op: LinearOperator, v0: ArrayTree | None, key: Array, tol: Array | float, plan: _search.Plan
) -> tuple[Eigenpairs, _search.Search]:
    """`eigsh`, with the state that it ended in."""
    if not isinstance(op, StreamedOperator):
        return _compiled(op, v0, key, tol, plan)
    check_deterministic(op)
    end = _search.run(plan, op, _start(op.params, v0, key), tol, _search.host_while)
    return _pairs(plan, end), end


@functools.partial(jax.jit, static_argnames="plan")
def _compiled(
    op: LinearOperator, v0: ArrayTree | None, key: Array, tol: Array | float, plan: _search.Plan
) -> tuple[Eigenpairs, _search.Search]:
    check_deterministic(op)
    # The loop is not differentiated: an eigenvalue's derivative needs its vector only.
    fixed, v0 = lax.stop_gradient((op, v0))
    end = _search.run(plan, fixed, _start(fixed.params, v0, key), tol, lax.while_loop)
    pairs = _pairs(plan, end)
    return dataclasses.replace(pairs, values=_values_of(op, pairs.values, pairs.vectors)), end


@functools.partial(jax.jit, static_argnums=0)
def _pairs(plan: _search.Plan, end: _search.Search) -> Eigenpairs:
    found = end.found
    wanted = _search.rank(plan.which, found)[: plan.k]
    order = jnp.argsort(-found.values[wanted])
    wanted = wanted[order]
    held = found.held[wanted] & ~end.failed
    values = jnp.where(held, found.values[wanted], jnp.nan)
    return Eigenpairs(
        values=values,
        vectors=jax.tree.map(lambda q: q[order], end.lanczos.basis),
        residual_norms=jnp.where(held, found.residual_norms[wanted], jnp.nan),
        num_matvecs=end.num_matvecs,
        converged=end.settled & held.all() & jnp.isfinite(values).all(),
    )


@jax.jit
def _start(params: ArrayTree, v0: ArrayTree | None, key: Array) -> ArrayTree:
    random = _lanczos.random_like(key, params)
    start = random if v0 is None else _blended(v0, random)
    # At params that are not finite there is nothing to find: the start says so.
    return jax.tree.map(lambda x, p: x + 0 * p, start, params)


def _blended(v0: ArrayTree, random: ArrayTree) -> ArrayTree:
    """A start near v0 that no invariant subspace holds, so that an eigenvalue which has overtaken v0's can be found."""
    size, noise = _lanczos.norm(v0), _lanczos.norm(random)
    usable = (size > 0) & jnp.isfinite(size)
    scale = jnp.where(usable, 1 / jnp.where(usable, size, 1), 0)

    def leaf(v: Array, r: Array) -> Array:
        given = jnp.where(usable, jnp.asarray(v, r.dtype) * scale.astype(r.dtype), 0)
        return given + (_BLEND / noise).astype(r.dtype) * r

    return jax.tree.map(leaf, v0, random)
