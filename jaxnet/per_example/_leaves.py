"""The N gradients of one leaf of the params, as they are held, and what is computed from them.

For a kernel that is used once, as a matrix K (d, p), example n has the gradient G_n = A_nᵀΔ_n with A_n (T, d) and
Δ_n (T, p). Where T is 1 everything follows from A (N, d) and Δ (N, p): ‖G_n‖² = ‖a_n‖²‖δ_n‖², Σ G_n² = (A∘A)ᵀ(Δ∘Δ), the
Gram matrix (AAᵀ)∘(ΔΔᵀ). For larger T products go over pairs of positions or over the entries of G_n, whichever is
cheaper; where G_n has fewer entries than its factors it is held itself, and none of this is asked.

Reference:
  Dangel, Kunstner & Hennig, "BackPACK: Packing More into Backprop", ICLR 2020, appendix A.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet import dataset
from jaxnet.contract import Array, ArrayTree
from jaxnet.per_example._rules import View, leaf_of


def at_once(size: int) -> int:
    """Of how many examples ``size`` numbers each are worked on at a time: as many as stay in the cache."""
    return max(1, 2**20 // max(1, size))


def wide(x: Array) -> Array:
    """The same in float32 at least: in half precision a sum stands still, and a square overflows."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.inexact) else x


Leaves = tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Formed:
    """The gradients of some leaves, formed a chunk of examples at a time for whatever is asked of them.

    Attributes:
      examples: a pytree with a leading axis N.
      form: ``form(chunk)``, the gradients of n of the examples: for each leaf (n, ...), in float32 at least.
      at_once: how many at a time.
    """

    examples: ArrayTree
    form: Callable[[Any], Leaves]
    at_once: int

    def _over(self, entries: Callable[[Leaves], Any], sums: Callable[[Leaves], Any] = lambda g: ()) -> tuple[Any, Any]:
        def both(chunk: Any) -> tuple[Any, Any]:
            grads = self.form(chunk)
            return entries(grads), sums(grads)

        return dataset.rows_and_total(both, self.examples, size=self.at_once)

    def squares(self) -> Leaves:
        """‖g_n‖² of each leaf, (N,)."""
        return self._over(lambda grads: tuple(map(_squares, grads)))[0]

    def vdot(self, v: Leaves) -> Leaves:
        """g_n·v of each leaf, (N,)."""
        return self._over(lambda grads: tuple(_flat(g) @ x.reshape(-1) for g, x in zip(grads, v, strict=True)))[0]

    def weighted_sum(self, weights: Array) -> Leaves:
        """Σ w_n g_n, like the leaves."""

        def summed(chunk: Any) -> Leaves:
            examples, w = chunk
            return tuple(jnp.tensordot(w.astype(g.dtype), g, 1) for g in self.form(examples))

        return dataset.total(summed, (self.examples, weights), size=self.at_once)

    def sum_of_squares(self) -> Leaves:
        """Σ g_n², like the leaves."""
        return self._over(lambda grads: (), lambda grads: tuple(jnp.square(g).sum(axis=0) for g in grads))[1]

    def deviations(self, centre: Leaves) -> tuple[Leaves, Leaves]:
        """‖g_n − c‖² of each leaf, (N,), and Σ (g_n − c)², like the leaves; to expand the square would cancel."""
        apart = lambda grads: [jnp.square(g - c) for g, c in zip(grads, centre, strict=True)]
        return self._over(
            lambda grads: tuple(_flat(d).sum(axis=1) for d in apart(grads)),
            lambda grads: tuple(d.sum(axis=0) for d in apart(grads)),
        )

    def rows(self, start: int, stop: int) -> "Formed":
        """Those of some of the examples."""
        return dataclasses.replace(self, examples=jax.tree.map(lambda x: x[start:stop], self.examples))

    def products(self, other: "Formed") -> Array:
        """g_n·g_m with the gradients of M others, (N, M)."""
        # Wide chunks, since those of the others are formed again for each. Leaf by leaf, since a bias's product is
        # often one that its kernel needs too, and then is found once.
        size = 16 * self.at_once

        def of_chunk(chunk: Any) -> Array:
            mine = self.form(chunk)

            def with_others(theirs: Any) -> Any:
                return sum(_flat(y) @ _flat(x).T for x, y in zip(mine, other.form(theirs), strict=True))

            return dataset.rows(with_others, other.examples, size=size).T

        return dataset.rows(of_chunk, self.examples, size=size)

    def dense(self) -> Leaves:
        """All g_n, for each leaf (N, ...)."""
        return self._over(lambda grads: grads)[0]


@dataclasses.dataclass(frozen=True)
class Factored:
    """The gradients of one leaf, Σ_t a_nt δ_ntᵀ as the matrix K that is a rearrangement of it.

    Attributes:
      a: (N, T, d), real, in float32 at least.
      delta: (N, T, p), likewise.
      matrix: from the leaf to K (d, p).
      like: the leaf's shape, and the dtype of what is like it.
    """

    a: Array
    delta: Array
    matrix: View
    like: jax.ShapeDtypeStruct

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        (n, t, d), p = self.a.shape, self.delta.shape[-1]
        return n, t, d, p

    def _leaf(self, kernel: Array) -> Array:
        return leaf_of(self.matrix, self.like, kernel)

    @property
    def formed(self) -> Formed:
        """The same gradients, formed by chunks."""
        _, _, d, p = self._sizes
        form = lambda chunk: (jax.vmap(self._leaf)(jnp.einsum("ntd,ntp->ndp", *chunk)),)
        return Formed((self.a, self.delta), form, at_once(d * p))

    def squares(self) -> Leaves:
        """‖g_n‖² = Σ_ts (a_t·a_s)(δ_t·δ_s), (N,)."""
        _, t, _, _ = self._sizes
        if t == 1:
            return (_squares(self.a) * _squares(self.delta),)

        def over_pairs(chunk: tuple[Array, Array]) -> Array:
            a, delta = (jnp.einsum("nti,nsi->nts", x, x) for x in chunk)
            return jnp.sum(a * delta, axis=(1, 2))

        return (dataset.rows(over_pairs, (self.a, self.delta), size=at_once(2 * t * t)),)

    def vdot(self, v: Leaves) -> Leaves:
        """Σ_t a_tᵀ V δ_t, (N,)."""
        return (jnp.sum((self.a @ self.matrix(v[0])) * self.delta, axis=(1, 2)),)

    def weighted_sum(self, weights: Array) -> Leaves:
        """Aᵀ diag(w) Δ."""
        weighted = self.delta * weights.astype(self.delta.dtype)[:, None, None]
        return (self._leaf(jnp.tensordot(self.a, weighted, ((0, 1), (0, 1)))),)

    def sum_of_squares(self) -> Leaves:
        """(A∘A)ᵀ(Δ∘Δ) where T = 1."""
        if self._sizes[1] > 1:
            return self.formed.sum_of_squares()
        return (self._leaf(jnp.tensordot(jnp.square(self.a), jnp.square(self.delta), ((0, 1), (0, 1)))),)

    def deviations(self, centre: Leaves) -> tuple[Leaves, Leaves]:
        """‖g_n − v‖², (N,), and Σ (g_n − v)², like the leaf.

        Where T = 1, with the means ā, δ̄ and what is left, a_n = ā + α_n and δ_n = δ̄ + β_n, the gradient is
        āδ̄ᵀ + (a_nβ_nᵀ + α_nδ̄ᵀ): the bracket is small where the gradients are alike, and nothing cancels.
        """
        if self._sizes[1] > 1:
            return self.formed.deviations(centre)
        # To expand ‖g_n − v‖² = ‖g_n‖² − 2g_n·v + ‖v‖² would subtract numbers of the gradients' own size, and leave the
        # rounding error of those where the gradients are alike. So the factors are centred first, and all that is
        # added below is of the order of the deviations, or of v − āδ̄ᵀ ("apart").
        a, delta = self.a[:, 0], self.delta[:, 0]
        mean_a, mean_delta = a.mean(axis=0), delta.mean(axis=0)
        alpha, beta = a - mean_a, delta - mean_delta
        apart = self.matrix(centre[0]) - jnp.outer(mean_a, mean_delta)
        # ‖bracket_n‖², with the bracket's two rank-one terms and their product; and its product with "apart".
        bracket = _squares(a) * _squares(beta) + _squares(alpha) * jnp.sum(mean_delta**2)
        bracket += 2 * jnp.sum(a * alpha, axis=1) * (beta @ mean_delta)
        along = jnp.sum((a @ apart) * beta, axis=1) + alpha @ (apart @ mean_delta)
        # Σ of the bracket (its first-order terms sum to 0) and of its square, entry by entry.
        total, squares = alpha.T @ beta, (alpha**2).T @ (beta**2)
        squares += jnp.outer(mean_a**2, (beta**2).sum(axis=0)) + jnp.outer((alpha**2).sum(axis=0), mean_delta**2)
        squares += 2 * (jnp.outer(mean_a, mean_delta) * total)
        squares += 2 * (mean_a[:, None] * (alpha.T @ beta**2) + mean_delta * ((alpha**2).T @ beta))
        squares += len(a) * apart**2 - 2 * apart * total
        return (jnp.maximum(bracket - 2 * along + jnp.sum(apart**2), 0),), (self._leaf(jnp.maximum(squares, 0)),)

    def rows(self, start: int, stop: int) -> "Factored":
        """Those of some of the examples."""
        return dataclasses.replace(self, a=self.a[start:stop], delta=self.delta[start:stop])

    def products(self, other: "Factored") -> Array:
        """Σ_ts (a_nt·a_ms)(δ_nt·δ_ms) with M others, (N, M)."""
        n, t, d, p = self._sizes
        m = len(other.a)
        if t == 1:
            return (self.a[:, 0] @ other.a[:, 0].T) * (self.delta[:, 0] @ other.delta[:, 0].T)
        if 2 * n * m * t * t * (d + p) > (n + m) * t * d * p + 2 * n * m * d * p:
            return self._products_by_entries(other)
        row = lambda x: jnp.einsum("ti,msi->mts", x[0], other.a) * jnp.einsum("ti,msi->mts", x[1], other.delta)
        return lax.map(lambda x: row(x).sum(axis=(1, 2)), (self.a, self.delta))

    def _products_by_entries(self, other: "Factored") -> Array:
        """G_n·G_m a few rows of the matrices at a time, so that all of them are never held."""
        n, _, d, p = self._sizes
        count = max(1, min(d, 2**20 // (n * p)))
        split = lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, -d % count))).reshape(*a.shape[:2], -1, count)
        form = lambda block, delta: jnp.einsum("ntd,ntp->ndp", block, delta).reshape(len(delta), -1)

        def add(total: Array, blocks: tuple[Array, ...]) -> tuple[Array, None]:
            return total + form(blocks[0], self.delta) @ form(blocks[1], other.delta).T, None

        blocks = tuple(jnp.moveaxis(split(a), 2, 0) for a in (self.a, other.a))
        return lax.scan(add, jnp.zeros((n, len(other.a)), self.delta.dtype), blocks)[0]

    def dense(self) -> Leaves:
        """All g_n, (N, ...)."""
        return self.formed.form((self.a, self.delta))


def _flat(g: Array) -> Array:
    return g.reshape(g.shape[0], -1)


def _squares(g: Array) -> Array:
    return jnp.square(_flat(g)).sum(axis=1)
