"""The search for eigenvalues: Lanczos steps and thick restarts, until the wanted Ritz values are vouched for.

Each state follows from the last by pure functions, so that the same search runs in a `lax.while_loop` or, for a data
set that comes in batches, in a loop on the host.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnet.contract import Array, ArrayTree
from jaxnet.curvature import _bound, _lanczos

WHICH = ("LA", "SA", "LM", "BE")

# The chance, over random starts, that an eigenvalue is still unseen when a search ends.
_UNSEEN = 0.02
# Where the estimate has been small for this many steps, the unseen eigenvalue need not be excluded from as near as the
# tolerance, but beyond this share of the gap between the outermost Ritz values, and this share of the norm, only.
_IN_A_ROW, _OF_GAP, _OF_NORM = 4, 0.3, 0.04
# Of a warm start no chance is known; the estimate alone decides.
_WARM_IN_A_ROW = 2
# How many discarded Ritz values the bound remembers.
_ROOM = 512


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed before a search: its compiled program is one a plan.

    Attributes:
      n: the dimension.
      k: how many eigenvalues are wanted.
      which: which of them.
      basis: how many Lanczos vectors are kept at most.
      limit: on the products.
      warm: whether the start was given.
    """

    n: int
    k: int
    which: str
    basis: int
    limit: int
    warm: bool

    @property
    def kept(self) -> int:
        """How many Ritz vectors survive a restart; all where there is none but the last."""
        return self.basis if self.basis == self.n else self.k + (self.basis - self.k) // 2

    @property
    def certified(self) -> bool:
        """Whether a bound on the outermost eigenvalues is one on all that are wanted."""
        return self.k == 1 or (self.which, self.k) == ("BE", 2)


class Search(NamedTuple):
    """The state of a search.

    Attributes:
      lanczos: the recurrence's.
      found: its Ritz pairs.
      discarded: (room,) the Ritz values that restarts have discarded.
      num_discarded: how many.
      log_betas: Σ log β.
      num_matvecs: products spent.
      agreed: steps in a row for which the estimate was small and vouched for.
      settled: whether the search has found what it wants.
      failed: whether a product was not finite.
    """

    lanczos: _lanczos.Lanczos
    found: _lanczos.Ritz
    discarded: Array
    num_discarded: Array
    log_betas: Array
    num_matvecs: Array
    agreed: Array
    settled: Array
    failed: Array

    @property
    def polynomials(self) -> _bound.Polynomials:
        """Of the start, for the a posteriori bound."""
        found = self.found
        return _bound.Polynomials(
            found.values, found.residual_norms, found.held, self.discarded, self.num_discarded, self.log_betas
        )


def run(
    plan: Plan, matvec: Callable[[ArrayTree], ArrayTree], start: ArrayTree, tol: Array | float, while_loop: Any
) -> Search:
    """Search from ``start``, in a `lax.while_loop` or a loop of the host; a start that is not finite fails at once.

    The state that it ends in has been restarted: its basis begins with the wanted Ritz vectors.
    """
    room_left = lambda search: _going_on(plan, search) & (search.lanczos.size < plan.basis)

    def step(search: Search) -> Search:
        return _absorb(plan, search, matvec(_lanczos.current(search.lanczos)), tol)

    def cycle(search: Search) -> Search:
        return _restart(plan, while_loop(room_left, step, search))

    return while_loop(functools.partial(_going_on, plan), cycle, _begin(plan, start))


def host_while(going_on: Callable[[Search], Array], body: Callable[[Search], Search], search: Search) -> Search:
    """`lax.while_loop` without tracing."""
    while going_on(search):
        search = body(search)
    return search


@functools.partial(jax.jit, static_argnums=0)
def _begin(plan: Plan, start: ArrayTree) -> Search:
    state = _lanczos.init(start, plan.basis)
    zero, dtype = jnp.zeros((), jnp.int32), state.projected.dtype
    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(_lanczos.ritz, state))
    room = jnp.zeros(min(plan.limit, _ROOM), dtype)
    failed = ~jnp.isfinite(_lanczos.norm(start))
    return Search(state, nothing, room, zero, jnp.zeros((), dtype), zero, zero, jnp.array(False), failed)


def _going_on(plan: Plan, search: Search) -> Array:
    return ~search.settled & ~search.failed & (search.num_matvecs < plan.limit)


@functools.partial(jax.jit, static_argnums=0)
def _restart(plan: Plan, search: Search) -> Search:
    """Keep the best Ritz vectors; the values of the others are remembered, unless the search ends here."""
    order = rank(plan.which, search.found)
    others = search.found.values[order[plan.kept :]]
    return search._replace(
        lanczos=_lanczos.restart(search.lanczos, search.found, order[: plan.kept]),
        # One that lies beyond the room is not written.
        discarded=search.discarded.at[search.num_discarded + jnp.arange(others.size)].set(others, mode="drop"),
        num_discarded=search.num_discarded + jnp.where(_going_on(plan, search), others.size, 0),
    )


@functools.partial(jax.jit, static_argnums=0)
def _absorb(plan: Plan, search: Search, product: ArrayTree, tol: Array | float) -> Search:
    """One step of the recurrence, and the verdict on its Ritz values."""
    state = _lanczos.extend(search.lanczos, product)
    found = _lanczos.ritz(state)
    search = search._replace(
        lanczos=state,
        found=found,
        log_betas=search.log_betas + jnp.log(state.beta),
        num_matvecs=search.num_matvecs + 1,
        failed=~jnp.isfinite(state.beta),
    )
    wanted = rank(plan.which, found)[: plan.k]
    small = _accurate(found, wanted, state.scale, tol)
    near, far = (True, True) if plan.warm else _seen(plan, search, tol)
    agreed = jnp.where(small & far, search.agreed + 1, 0)
    exhausted = (state.size == plan.basis) & (plan.basis == plan.n)
    settled = exhausted | (agreed >= (_WARM_IN_A_ROW if plan.warm else _IN_A_ROW))
    if plan.certified and not plan.warm:
        settled = settled | (small & near)
    return search._replace(agreed=agreed, settled=settled)


def rank(which: str, found: _lanczos.Ritz) -> Array:
    """Indices of the Ritz values, those that ``which`` asks for first; fillers come last."""
    m = found.values.shape[0]
    position = jnp.arange(m)
    from_bottom = position - jnp.sum(~found.held)
    from_top = m - 1 - position
    order = {
        "LA": from_top,
        "SA": from_bottom,
        "LM": -jnp.abs(found.values),
        "BE": jnp.minimum(2 * from_top, 2 * from_bottom + 1),
    }[which]
    return jnp.argsort(jnp.where(found.held, order, jnp.inf))


def _accurate(found: _lanczos.Ritz, wanted: Array, scale: Array, tol: Array | float) -> Array:
    """Whether the estimate min(r, r²/gap) of every wanted value's error is within the tolerance."""
    values, residuals = found.values[wanted], found.residual_norms[wanted]
    distance = jnp.abs(found.values[None, :] - values[:, None])
    others = found.held[None, :] & (jnp.arange(distance.shape[1])[None, :] != wanted[:, None])
    gap = jnp.min(jnp.where(others, distance, jnp.inf), axis=1)
    # A lone Ritz value has seen no gap: only its residual counts.
    estimate = jnp.where(jnp.isinf(gap), residuals, jnp.minimum(residuals, residuals * (residuals / gap)))
    # Twins at rounding distance leave gap = 0 and an estimate of NaN or inf: the residual decides.
    estimate = jnp.where(jnp.isfinite(estimate), estimate, residuals)
    rounding = 4 * jnp.finfo(values.dtype).eps * scale
    return found.held[wanted].all() & (estimate <= jnp.maximum(tol * jnp.abs(values), rounding)).all()


def _seen(plan: Plan, search: Search, tol: Array | float) -> tuple[Array, Array]:
    """Whether an unseen eigenvalue is unlikely: as near beyond the outermost as the tolerance, or further out."""
    values, target = search.found.values, _bound.log_inverse_share(plan.n, _UNSEEN)
    lowest = jnp.argmax(search.found.held)
    top, bottom = values[-1], values[lowest]
    norm = jnp.maximum(jnp.abs(top), jnp.abs(bottom))
    ends = []
    if plan.which != "SA":
        ends.append((1, top, top - values[-2:][0]))
    if plan.which != "LA":
        ends.append((-1, bottom, values[jnp.minimum(lowest + 1, plan.basis - 1)] - bottom))
    near = far = jnp.array(True)
    for sign, end, gap in ends:
        # Of the largest magnitude, what lies within that magnitude does not matter.
        end = sign * norm if plan.which == "LM" else end
        tolerated = jnp.maximum(tol * jnp.abs(end), 4 * jnp.finfo(norm.dtype).eps * norm)
        wider = jnp.maximum(tolerated, jnp.minimum(_OF_GAP * gap, _OF_NORM * norm))
        near &= _bound.log_sum(search.polynomials, end + sign * tolerated) > target
        far &= _bound.log_sum(search.polynomials, end + sign * wider) > target
    # After many products the bound is given up, and the estimate alone decides.
    return near, far | (search.num_discarded > search.discarded.size)
