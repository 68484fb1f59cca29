"""The N gradients of a table of which each example reads a few rows: a few rows too, never N tables.

Example n has the gradient Σ_t e_r δ_tᵀ with r = r_nt, the number of the row that it reads at t. Rows that are read more
than once are merged first, so that the numbers r_nt of one example differ, and what is left over has r_nt = d, beyond
the table, and δ = 0. Then the squares and the products of the δ are those of the gradients.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet import dataset
from jaxnet.contract import Array
from jaxnet.per_example._leaves import Leaves, at_once
from jaxnet.per_example._rules import View, leaf_of


def merged(ids: Array, delta: Array, d: int) -> tuple[Array, Array]:
    """One example's rows (T, 1) of a table of d, and their δ (T, p), with the δ of one row added up."""
    t, ids = len(ids), ids[:, 0]
    # XLA sorts one array of numbers many times faster than an array by the order of another.
    order = jnp.sort(ids * t + jnp.arange(t)) % t if (d + 1) * t < 2**31 else jnp.argsort(ids)
    sorted_ids = ids[order]
    place = jnp.cumsum(jnp.append(False, sorted_ids[1:] != sorted_ids[:-1]))
    delta = jnp.where(sorted_ids[:, None] < d, delta[order], 0)
    found = jnp.full(t, d, ids.dtype).at[place].set(sorted_ids)
    return found[:, None], jax.ops.segment_sum(delta, place, t, indices_are_sorted=True)


@dataclasses.dataclass(frozen=True)
class Looked:
    """The gradients of one leaf, few rows of the table K that is a rearrangement of it.

    Attributes:
      a: r (N, T, 1), as `merged` gives them.
      delta: (N, T, p), likewise.
      matrix: from the leaf to K (d, p).
      like: the leaf's shape, and the dtype of what is like it.
    """

    a: Array
    delta: Array
    matrix: View
    like: jax.ShapeDtypeStruct

    @property
    def _table(self) -> tuple[int, ...]:
        return jax.eval_shape(self.matrix, self.like).shape

    def _leaf(self, table: Array) -> Array:
        return leaf_of(self.matrix, self.like, table)

    def _summed(self, rows: Array) -> Array:
        """Σ_nt of rows (N, T, p), each at its place of a table (d, p)."""
        zeros = jnp.zeros((self._table[0], *rows.shape[2:]), rows.dtype)
        return zeros.at[self.a[..., 0]].add(rows, mode="drop")

    def _read(self, table: Array) -> Array:
        """The rows (N, T, p) of a table."""
        return table.at[self.a[..., 0]].get(mode="fill", fill_value=0)

    def squares(self) -> Leaves:
        """‖g_n‖² = Σ_t ‖δ_t‖², (N,)."""
        return (jnp.square(self.delta).sum(axis=(1, 2)),)

    def vdot(self, v: Leaves) -> Leaves:
        """Σ_t V_r · δ_t, (N,)."""
        return (jnp.sum(self._read(self.matrix(v[0])) * self.delta, axis=(1, 2)),)

    def weighted_sum(self, weights: Array) -> Leaves:
        """Σ w_n g_n, like the leaf."""
        return (self._leaf(self._summed(self.delta * weights.astype(self.delta.dtype)[:, None, None])),)

    def sum_of_squares(self) -> Leaves:
        """Σ g_n², like the leaf."""
        return (self._leaf(self._summed(jnp.square(self.delta))),)

    def deviations(self, centre: Leaves) -> tuple[Leaves, Leaves]:
        """‖g_n − v‖², (N,), and Σ (g_n − v)², like the leaf: of the rows that are read, and of all others v²."""
        table = self.matrix(centre[0])
        apart, squares = jnp.square(self.delta - self._read(table)), jnp.square(table)
        d, n = len(table), len(self.a)

        def of_others(ids: Array) -> Array:
            unread = jnp.ones((len(ids), d), squares.dtype).at[jnp.arange(len(ids))[:, None], ids].set(0, mode="drop")
            return unread @ squares.sum(axis=1)

        others = dataset.rows(of_others, self.a[..., 0], size=at_once(d))
        count = n - self._summed(jnp.ones((*self.a.shape[:2], 1), squares.dtype))
        return (others + apart.sum(axis=(1, 2)),), (self._leaf(self._summed(apart) + count * squares),)

    def rows(self, start: int, stop: int) -> "Looked":
        """Those of some of the examples."""
        return dataclasses.replace(self, a=self.a[start:stop], delta=self.delta[start:stop])

    def products(self, other: "Looked") -> Array:
        """g_n·g_m with M others, (N, M): one table at a time, of which the others' rows are read."""

        def with_others(mine: tuple[Array, Array]) -> Array:
            ids, delta = mine
            table = dataclasses.replace(self, a=ids[None], delta=delta[None])._summed(delta[None])
            return jnp.sum(other._read(table) * other.delta, axis=(1, 2))

        return lax.map(with_others, (self.a, self.delta))

    def dense(self) -> Leaves:
        """All g_n, (N, ...)."""
        one = lambda ids, delta: dataclasses.replace(self, a=ids[None], delta=delta[None]).weighted_sum(jnp.ones(1))[0]
        return (jax.vmap(one)(self.a, self.delta),)
