"""The N gradients of one leaf that holds several kernels, and of any leaf by its factors."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet.contract import Array
from jaxnet.per_example._leaves import Factored, Leaves
from jaxnet.per_example._looked import Looked
from jaxnet.per_example._rules import View, leaf_of


@dataclasses.dataclass(frozen=True)
class Stacked:
    """The gradients of one leaf that holds S kernels, the layers of a scan or the groups of a convolution.

    Attributes:
      a: (N, S, T, d), or the numbers of a lookup's rows (N, S, T, 1).
      delta: (N, S, T, p).
      matrices: from the leaf to (S, d, p).
      like: the leaf's shape, and the dtype of what is like it.
    """

    a: Array
    delta: Array
    matrices: View
    like: jax.ShapeDtypeStruct

    def _of_layers(self, method: Callable[..., Any], *given: Array) -> Any:
        """``method(layer, *given[s])`` of each layer s, (S, ...): one at a time, since a layer is a matrix's work."""
        like = jax.ShapeDtypeStruct(jax.eval_shape(self.matrices, self.like).shape[1:], self.like.dtype)

        def of_layer(parts: Any) -> Any:
            a, delta, given = parts
            return method(_one(a, delta, lambda x: x, like), *given)

        return lax.map(of_layer, (*(jnp.moveaxis(x, 1, 0) for x in (self.a, self.delta)), given))

    def _leaf(self, kernels: Array) -> Array:
        return leaf_of(self.matrices, self.like, kernels)

    def squares(self) -> Leaves:
        """‖g_n‖², (N,)."""
        return (self._of_layers(lambda layer: layer.squares()[0]).sum(axis=0),)

    def vdot(self, v: Leaves) -> Leaves:
        """g_n·v, (N,)."""
        return (self._of_layers(lambda layer, v: layer.vdot((v,))[0], self.matrices(v[0])).sum(axis=0),)

    def weighted_sum(self, weights: Array) -> Leaves:
        """Σ w_n g_n, like the leaf."""
        return (self._leaf(self._of_layers(lambda layer: layer.weighted_sum(weights)[0])),)

    def sum_of_squares(self) -> Leaves:
        """Σ g_n², like the leaf."""
        return (self._leaf(self._of_layers(lambda layer: layer.sum_of_squares()[0])),)

    def deviations(self, centre: Leaves) -> tuple[Leaves, Leaves]:
        """‖g_n − v‖², (N,), and Σ (g_n − v)², like the leaf."""
        squares, sums = self._of_layers(lambda layer, v: layer.deviations((v,)), self.matrices(centre[0]))
        return (squares[0].sum(axis=0),), (self._leaf(sums[0]),)

    def rows(self, start: int, stop: int) -> "Stacked":
        """Those of some of the examples."""
        return dataclasses.replace(self, a=self.a[start:stop], delta=self.delta[start:stop])

    def products(self, other: "Stacked") -> Array:
        """g_n·g_m with M others, (N, M)."""
        pair = lambda layer, a, delta: layer.products(dataclasses.replace(layer, a=a, delta=delta))
        return self._of_layers(pair, *(jnp.moveaxis(x, 1, 0) for x in (other.a, other.delta))).sum(axis=0)

    def dense(self) -> Leaves:
        """All g_n, (N, ...)."""
        return (jax.vmap(self._leaf, in_axes=1)(self._of_layers(lambda layer: layer.dense()[0])),)


def factored(a: Array, delta: Array, matrices: View, like: jax.ShapeDtypeStruct) -> Factored | Looked | Stacked:
    """The gradients of one leaf by its factors (N, S, T, ·)."""
    if a.shape[1] > 1:
        return Stacked(a, delta, matrices, like)
    return _one(a[:, 0], delta[:, 0], lambda leaf: matrices(leaf)[0], like)


def _one(a: Array, delta: Array, matrix: View, like: jax.ShapeDtypeStruct) -> Factored | Looked:
    return (Looked if jnp.issubdtype(a.dtype, jnp.integer) else Factored)(a, delta, matrix, like)
