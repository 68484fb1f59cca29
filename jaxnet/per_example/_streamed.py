"""Per-example gradients over a data set that comes in batches: what reduces over examples, batch after batch."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.per_example._gradients import PerExampleGradients, gradients


@dataclasses.dataclass(frozen=True)
class StreamedGradients:
    """The methods of `PerExampleGradients` that need no two examples at once, in passes over the batches on the host.

    Attributes:
      loss: the loss E; E_n is its value on a batch of one.
      params: the point ω.
      batches: of the examples, in any lengths.
    """

    loss: Loss
    params: ArrayTree
    batches: Iterable[ArrayTree]

    def _each(self) -> Iterator[PerExampleGradients]:
        for batch in self.batches:
            yield gradients(self.loss, self.params, batch)

    @property
    def num_examples(self) -> int:
        """N, by a pass over the batches."""
        return sum(map(contract.num_examples, self.batches))

    def _sum(self, of: Callable[[PerExampleGradients], ArrayTree]) -> tuple[ArrayTree, int]:
        total, n = jax.tree.map(jnp.zeros_like, self.params), 0
        for grads in self._each():
            total, n = jax.tree.map(jnp.add, total, of(grads)), n + grads.num_examples
        if n == 0:
            raise ValueError("batch: expected at least one batch, got none")
        return total, n

    def _mean(self, of: Callable[[PerExampleGradients], ArrayTree]) -> ArrayTree:
        """The batches' means, weighted by their numbers of examples."""
        total, n = self._sum(lambda g: jax.tree.map(lambda x: g.num_examples * x, of(g)))
        return jax.tree.map(lambda x: x / n, total)

    def _joined(self, of: Callable[[PerExampleGradients], Array]) -> Array:
        return jnp.concatenate([of(grads) for grads in self._each()])

    def mean(self) -> ArrayTree:
        """ḡ = (1/N) Σ g_n, like params."""
        return self._mean(lambda grads: grads.mean())

    def second_moment(self) -> ArrayTree:
        """(1/N) Σ g_n², elementwise, like params."""
        return self._mean(lambda grads: grads.second_moment())

    def variance(self) -> ArrayTree:
        """Σ (g_n − ḡ)²/(N − 1), elementwise and unbiased, like params; two passes.

        Raises:
          ValueError: N is 1.
        """
        mean = self.mean()
        total, n = self._sum(lambda grads: grads.sum_of_deviations(mean))
        if n < 2:
            raise ValueError("variance: expected two examples or more, got 1")
        return jax.tree.map(lambda x: x / (n - 1), total)

    def norms(self) -> Array:
        """‖g_n‖ over all leaves, (N,)."""
        return self._joined(lambda grads: grads.norms())

    def vdot(self, tree: ArrayTree) -> Array:
        """g_n·v for a vector v like params, (N,)."""
        return self._joined(lambda grads: grads.vdot(tree))

    def distances(self, tree: ArrayTree) -> Array:
        """‖g_n − v‖ over all leaves, for a vector v like params, (N,)."""
        return self._joined(lambda grads: grads.distances(tree))
