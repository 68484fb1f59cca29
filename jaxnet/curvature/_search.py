"""The search for eigenvalues: Lanczos steps and thick restarts, until the wanted Ritz values are vouched for.

An `Eigensolver` is a value with a few pure functions of a `Search`, the state: the same search runs inside a `jit` or,
for a data set that comes in batches, on the host.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree
from jaxnet.curvature import _bound, _lanczos, _rounding
from jaxnet.curvature._operators import LinearOperator, OverExamples, Seen, check_deterministic, inner
from jaxnet.curvature._space import Space

WHICH = ("LA", "SA", "LM", "BE")

# The chance, over random starts, that an eigenvalue is still unseen when a search ends.
_UNSEEN = 0.02
# Where the estimate has been small for this many steps, the unseen eigenvalue need not be excluded from as near as the
# tolerance, but beyond this share of the gap between the outermost Ritz values, and this share of the norm, only.
_IN_A_ROW, _OF_GAP, _OF_NORM = 4, 0.3, 0.04
# Then an eigenvalue that has not been told apart from the one found lies within the residual, of which the tolerance is
# to leave this share: two come in unequal parts.
_ALONE = 0.3
# Of a warm start no chance is known; the estimate alone decides.
_WARM_IN_A_ROW = 2
# Steps from which on rounding adds up.
_MANY = 1000
# How many discarded Ritz values the bound remembers.
_ROOM = 512
# Products after which a search ends at the latest.
_PATIENCE = 100_000
# The share of a random vector in a warm start.
_BLEND = 0.01


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eigenpairs:
    """What `eigsh` found.

    Attributes:
      values: (k,) eigenvalues, descending; NaN where a product was not finite. Where simple, they can be
        differentiated (dλ = vᵀ(dA)v) by the operator's params and operands, and by what its loss closes over; the other
        fields count as constants.
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
      told: whether the tolerance is above what rounding leaves of the values.
      failed: whether a product was not finite.
      rough: whether products go through half precision, so that no bound on the eigenvalues holds.
    """

    lanczos: _lanczos.Lanczos
    found: _lanczos.Ritz
    discarded: Array
    num_discarded: Array
    log_betas: Array
    num_matvecs: Array
    agreed: Array
    settled: Array
    told: Array
    failed: Array
    rough: bool

    @property
    def polynomials(self) -> _bound.Polynomials:
        """Of the start, for the a posteriori bound."""
        found = self.found
        return _bound.Polynomials(
            found.values, found.residual_norms, found.filled, self.discarded, self.num_discarded, self.log_betas
        )


@dataclasses.dataclass(frozen=True)
class Eigensolver:
    """Thick-restart Lanczos for a few eigenvalues at one end, or both ends; what is fixed before a search.

    `search` is the whole of it. A loop of one's own goes from ``init`` by ``step`` while not ``done``, with a
    ``restart`` where the basis is ``full`` and at the end, to ``result``.

    Attributes:
      space: of the operator's vectors.
      k: how many eigenvalues are wanted.
      which: which of them, "LA", "SA", "LM" or "BE", as for `eigsh`.
      max_matvecs: a limit on the products; by default enough for any gap that the dtype resolves.
      ncv: how many Lanczos vectors are kept at most, beside one to go on with; by default 2k + 12.
      warm: whether the start is a given one, of which no chance is known.
    """

    space: Space
    k: int = 1
    which: str = "LA"
    max_matvecs: int | None = None
    ncv: int | None = None
    warm: bool = False

    def __post_init__(self) -> None:
        """Raise unless the numbers fit the space."""
        for name, value in {"k": self.k, "max_matvecs": self.max_matvecs, "ncv": self.ncv}.items():
            if value is not None:
                contract.check_count(name, value)
        if not 1 <= self.k <= self.space.size:
            raise ValueError(f"k: expected 1 to {self.space.size}, the number of parameters, got {self.k}")
        if self.which not in WHICH:
            raise ValueError(f"which: expected one of {', '.join(WHICH)}, got {self.which!r}")
        if self.ncv is not None and not self.k + 2 <= self.ncv:
            raise ValueError(f"ncv: expected at least k + 2 = {self.k + 2} Lanczos vectors, got {self.ncv}")

    @property
    def basis(self) -> int:
        """How many Lanczos vectors are kept at most."""
        return min(self.space.size, 2 * self.k + 12 if self.ncv is None else self.ncv)

    @property
    def limit(self) -> int:
        """On the products."""
        if self.max_matvecs is not None:
            return self.max_matvecs
        # A gap of a rounding error takes about 1/√eps products; in double precision nobody waits for it.
        eps = float(jnp.finfo(jnp.result_type(*self.space.dtypes)).eps)
        return min(int(8 / eps**0.5), _PATIENCE)

    @property
    def kept(self) -> int:
        """How many Ritz vectors survive a restart; all where there is none but the last."""
        return self.basis if self.basis == self.space.size else self.k + (self.basis - self.k) // 2

    @property
    def certified(self) -> bool:
        """Whether a bound on the outermost eigenvalues is one on all that are wanted."""
        return not self.warm and (self.k == 1 or (self.which, self.k) == ("BE", 2))

    @functools.partial(jax.jit, static_argnums=0)
    def start(self, key: Array, v0: ArrayTree | None = None) -> ArrayTree:
        """A random vector; or one near v0 that no invariant subspace holds, so that what has overtaken it is found."""
        random = self.space.random(key)
        if v0 is None:
            return random
        self.space.check("v0", v0)
        size, noise = _lanczos.norm(v0), _lanczos.norm(random)
        usable = (size > 0) & jnp.isfinite(size)
        scale = jnp.where(usable, 1 / jnp.where(usable, size, 1), 0)

        def blended(v: Array, r: Array) -> Array:
            given = jnp.where(usable, jnp.asarray(v, r.dtype) * scale.astype(r.dtype), 0)
            return given + (_BLEND / noise).astype(r.dtype) * r

        return jax.tree.map(blended, v0, random)

    def search(self, op: LinearOperator, start: ArrayTree, tol: Array | float) -> tuple[Eigenpairs, Search]:
        """The eigenpairs, and the state that the search ended in, restarted: its basis begins with their vectors.

        A start that is not finite fails at once. An operator of a data set in batches is searched on the host.

        Raises:
          ValueError: the operator is not the same matrix twice, because its loss is random.
        """
        seen, of = check_deterministic(op), inner(op)
        if isinstance(of.product, OverExamples):
            # At params that are not finite there is nothing to find: the start says so. Besides, XLA then holds a
            # vector less at the peak, since it makes the start in the place where it is read.
            point = of.operands[0] if of is op else of.space.ravel(of.operands[0])
            start = jax.tree.map(lambda x, p: x + 0 * p, start, point)
        streamed = dataset.on_host(op)
        # The loop is not differentiated: an eigenvalue's derivative needs its vector only.
        fixed, start = (op, start) if streamed else lax.stop_gradient((op, start))
        going_on, step = lambda state: ~self.done(state), lambda state: self.step(fixed, state, tol)
        room_left = lambda state: ~self.done(state) & ~self.full(state)
        fill = lambda state: self.restart(dataset.while_loop(room_left, step, state, data=op))
        end = dataset.while_loop(going_on, fill, self.init(start), data=op)
        pairs, end = self.result(end), end._replace(rough=seen.rough)
        if streamed:
            return pairs, end
        return dataclasses.replace(pairs, values=values_of(op, pairs.values, pairs.vectors, seen)), end

    @functools.partial(jax.jit, static_argnums=0)
    def init(self, start: ArrayTree) -> Search:
        """The state before the first step, from a start that is not zero."""
        state = _lanczos.init(start, self.basis)
        zero, dtype = jnp.zeros((), jnp.int32), state.projected.dtype
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(_lanczos.ritz, state))
        room = jnp.zeros(min(self.limit, _ROOM), dtype)
        failed = ~jnp.isfinite(_lanczos.norm(start))
        no = jnp.array(False)
        return Search(state, nothing, room, zero, jnp.zeros((), dtype), zero, zero, no, no, failed, False)

    def done(self, search: Search) -> Array:
        """Whether it has found what it wants, has failed, or has spent its products."""
        return search.settled | search.failed | (search.num_matvecs >= self.limit)

    def full(self, search: Search) -> Array:
        """Whether the basis has no room for another step."""
        return search.lanczos.size >= self.basis

    def step(self, op: LinearOperator, search: Search, tol: Array | float) -> Search:
        """One product, and the verdict on the Ritz values that follow."""
        return self._absorb(search, op @ _next(search), tol)

    @functools.partial(jax.jit, static_argnums=0)
    def _absorb(self, search: Search, product: ArrayTree, tol: Array | float) -> Search:
        state = _lanczos.extend(search.lanczos, product)
        found = _lanczos.ritz(state)
        search = search._replace(
            lanczos=state,
            found=found,
            log_betas=search.log_betas + jnp.log(state.beta),
            num_matvecs=search.num_matvecs + 1,
            failed=~jnp.isfinite(state.beta),
        )
        wanted = rank(self.which, found)[: self.k]
        small, alone = _accurate(found, wanted, _rounding.of_value(state.scale, state.disagreement), tol)
        near, far = (False, False) if self.warm else _seen(self, search, tol)
        agreed = jnp.where(small if self.warm else alone & far, search.agreed + 1, 0)
        exhausted = (state.size == self.basis) & (self.basis == self.space.size)
        settled = exhausted | (agreed >= (_WARM_IN_A_ROW if self.warm else _IN_A_ROW))
        if self.certified:
            settled = settled | (small & near)
        summed = jnp.sqrt(1 + search.num_matvecs / _MANY)
        asked = tol * jnp.abs(found.values[wanted]).min()
        told = exhausted | (asked >= summed * _rounding.of_norm(state.scale))
        told &= asked >= _rounding.product_error(state.scale, state.disagreement)
        return search._replace(agreed=agreed, settled=settled, told=told)

    @functools.partial(jax.jit, static_argnums=0)
    def restart(self, search: Search) -> Search:
        """Keep the best Ritz vectors; the values of the others are remembered, unless the search ends here."""
        order = rank(self.which, search.found)
        others = search.found.values[order[self.kept :]]
        return search._replace(
            lanczos=_lanczos.restart(search.lanczos, search.found, order[: self.kept]),
            # One that lies beyond the room is not written.
            discarded=search.discarded.at[search.num_discarded + jnp.arange(others.size)].set(others, mode="drop"),
            num_discarded=search.num_discarded + jnp.where(self.done(search), 0, others.size),
        )

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def leading(self, search: Search, count: int) -> ArrayTree:
        """The Ritz vectors that ``which`` asks for first, leaves (count, ...), of a state that has been restarted.

        Fewer where a restart keeps fewer; those that a search of few steps does not hold are 0.
        """
        held = search.found.filled[rank(self.which, search.found)[: min(count, self.kept)]]
        masked = lambda q: jnp.where(held.reshape(-1, *[1] * (q.ndim - 1)), q[: held.size], 0)
        return jax.tree.map(masked, search.lanczos.basis)

    @functools.partial(jax.jit, static_argnums=0)
    def result(self, search: Search) -> Eigenpairs:
        """The wanted eigenpairs of a state that has been restarted."""
        found = search.found
        wanted = rank(self.which, found)[: self.k]
        order = jnp.argsort(-found.values[wanted])
        wanted = wanted[order]
        filled = found.filled[wanted] & ~search.failed
        values = jnp.where(filled, found.values[wanted], jnp.nan)
        return Eigenpairs(
            values=values,
            vectors=jax.tree.map(lambda q: q[order], search.lanczos.basis),
            residual_norms=jnp.where(filled, found.residual_norms[wanted], jnp.nan),
            num_matvecs=search.num_matvecs,
            converged=search.settled & search.told & filled.all() & jnp.isfinite(values).all(),
        )


@jax.jit
def _next(search: Search) -> ArrayTree:
    return _lanczos.current(search.lanczos)


def values_of(op: LinearOperator, values: Array, vectors: ArrayTree, seen: Seen) -> Array:
    """The eigenvalues as functions of the operator: dλ = vᵀ(dA)v of a simple one with unit vector v."""
    if not seen.beside:
        return _of_operands(op, values, vectors)
    # Only the form itself knows of what is read beside the operands; it costs a product a value.
    values, vectors = lax.stop_gradient((values, vectors))
    forms = _forms(op, vectors)
    return values + (forms - lax.stop_gradient(forms)).astype(values.dtype)


def _forms(op: LinearOperator, vectors: ArrayTree) -> Array:
    return lax.map(lambda v: optax.tree.vdot(v, op @ v), vectors)


@jax.custom_jvp
def _of_operands(op: LinearOperator, values: Array, vectors: ArrayTree) -> Array:
    return values


@_of_operands.defjvp
def _of_operands_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    op, values, vectors = primals
    return values, jax.jvp(lambda op: _forms(op, vectors), (op,), tangents[:1])[1].astype(values.dtype)


def rank(which: str, found: _lanczos.Ritz) -> Array:
    """Indices of the Ritz values, those that ``which`` asks for first; fillers come last."""
    m = found.values.shape[0]
    position = jnp.arange(m)
    from_bottom = position - jnp.sum(~found.filled)
    from_top = m - 1 - position
    order = {
        "LA": from_top,
        "SA": from_bottom,
        "LM": -jnp.abs(found.values),
        "BE": jnp.minimum(2 * from_top, 2 * from_bottom + 1),
    }[which]
    return jnp.argsort(jnp.where(found.filled, order, jnp.inf))


def _accurate(found: _lanczos.Ritz, wanted: Array, rounding: Array, tol: Array | float) -> tuple[Array, Array]:
    """Whether the estimate min(r, r²/gap) of every wanted value's error is within the tolerance, and whether r is."""
    values, residuals = found.values[wanted], found.residual_norms[wanted]
    distance = jnp.abs(found.values[None, :] - values[:, None])
    others = found.filled[None, :] & (jnp.arange(distance.shape[1])[None, :] != wanted[:, None])
    gap = jnp.min(jnp.where(others, distance, jnp.inf), axis=1)
    # A lone Ritz value has seen no gap: only its residual counts.
    estimate = jnp.where(jnp.isinf(gap), residuals, jnp.minimum(residuals, residuals * (residuals / gap)))
    # Twins at rounding distance leave gap = 0 and an estimate of NaN or inf: the residual decides.
    estimate = jnp.where(jnp.isfinite(estimate), estimate, residuals)
    allowed = jnp.maximum(tol * jnp.abs(values), rounding)
    here = found.filled[wanted].all()
    return here & (estimate <= allowed).all(), here & (residuals <= _ALONE * allowed).all()


def _seen(solver: Eigensolver, search: Search, tol: Array | float) -> tuple[Array, Array]:
    """Whether an unseen eigenvalue is unlikely: as near beyond the outermost as the tolerance, or further out."""
    values, target = search.found.values, _bound.log_inverse_share(solver.space.size, _UNSEEN)
    lowest = jnp.argmax(search.found.filled)
    top, bottom = values[-1], values[lowest]
    norm = jnp.maximum(jnp.abs(top), jnp.abs(bottom))
    ends = []
    if solver.which != "SA":
        ends.append((1, top, top - values[-2:][0]))
    if solver.which != "LA":
        ends.append((-1, bottom, values[jnp.minimum(lowest + 1, solver.basis - 1)] - bottom))
    near = far = jnp.array(True)
    for sign, end, gap in ends:
        # Of the largest magnitude, what lies within that magnitude does not matter.
        end = sign * norm if solver.which == "LM" else end
        tolerated = jnp.maximum(tol * jnp.abs(end), _rounding.of_value(norm, search.lanczos.disagreement))
        wider = jnp.maximum(tolerated, jnp.minimum(_OF_GAP * gap, _OF_NORM * norm))
        near &= _bound.log_sum(search.polynomials, end + sign * tolerated) > target
        far &= _bound.log_sum(search.polynomials, end + sign * wider) > target
    # After many products the bound is given up, and the estimate alone decides.
    return near, far | (search.num_discarded > search.discarded.size)
