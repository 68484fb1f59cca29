"""The N gradients of the N examples' own losses, without keeping N copies of the params."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree, Loss

# Examples whose gradients are held at once where a method reduces over them.
_AT_ONCE = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerExampleGradients:
    """g_n = ∂E_n/∂ω for each example n, where E = (1/N) Σ E_n.

    Attributes:
      loss: the loss E; E_n is its value on a batch of one.
      params: the point ω.
      batch: the N examples.
    """

    loss: Loss = dataclasses.field(metadata={"static": True})
    params: ArrayTree
    batch: ArrayTree

    @property
    def num_examples(self) -> int:
        """N."""
        return contract.num_examples(self.batch)

    def _losses(self, params: ArrayTree) -> Array:
        return jax.vmap(lambda example: self._one(params, example))(self.batch)

    def _one(self, params: ArrayTree, example: ArrayTree) -> Array:
        return self.loss(params, jax.tree.map(lambda x: x[None], example))

    def _gradient(self, example: ArrayTree) -> ArrayTree:
        return jax.grad(self._one)(self.params, example)

    def _map(self, fn: Callable[[ArrayTree], Any]) -> Any:
        return lax.map(lambda x: fn(self._gradient(x)), self.batch, batch_size=min(_AT_ONCE, self.num_examples))

    def weighted_sum(self, weights: Array) -> ArrayTree:
        """Σ_n w_n g_n, like params, for weights (N,).

        Raises:
          ValueError: the weights are not (N,).
        """
        if jnp.shape(weights) != (self.num_examples,):
            raise ValueError(f"weights: expected shape ({self.num_examples},), got {jnp.shape(weights)}")
        weights = lax.stop_gradient(jnp.asarray(weights))
        return jax.grad(lambda p: jnp.vdot(weights.astype(jnp.result_type(float)), self._losses(p)))(self.params)

    def mean(self) -> ArrayTree:
        """ḡ = (1/N) Σ g_n, the gradient of E, like params."""
        return jax.grad(self.loss)(self.params, self.batch)

    def vdot(self, tree: ArrayTree) -> Array:
        """g_n·v for a vector v like params, (N,)."""
        return jax.jvp(self._losses, (self.params,), (tree,))[1]

    def norms(self) -> Array:
        """‖g_n‖ over all leaves, (N,)."""
        return self._map(optax.tree.norm)

    def cosine(self, tree: ArrayTree) -> Array:
        """g_n·v / ‖g_n‖‖v‖ for a vector v like params, (N,); NaN where a norm is 0."""
        return self.vdot(tree) / (self.norms() * optax.tree.norm(tree))

    def clipped_mean(self, max_norm: float) -> ArrayTree:
        """(1/N) Σ g_n min(1, max_norm/‖g_n‖), like params.

        Reference:
          Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, algorithm 1, without its noise.
        """
        norms = self.norms()
        return self.weighted_sum(jnp.minimum(1, max_norm / jnp.where(norms > 0, norms, 1)) / self.num_examples)

    def distances(self, tree: ArrayTree) -> Array:
        """‖g_n − v‖ over all leaves, for a vector v like params, (N,)."""
        return self._map(lambda g: optax.tree.norm(optax.tree.sub(g, tree)))

    def second_moment(self) -> ArrayTree:
        """(1/N) Σ g_n², elementwise, like params."""
        total = self._sum_of_squares(jax.tree.map(jnp.zeros_like, self.params))
        return jax.tree.map(lambda x: x / self.num_examples, total)

    def _sum_of_squares(self, centre: ArrayTree) -> ArrayTree:
        """Σ (g_n − centre)², elementwise, a chunk of examples at a time."""
        n = self.num_examples
        size = min(_AT_ONCE, n)

        def summed(examples: ArrayTree) -> ArrayTree:
            grads = jax.vmap(self._gradient)(examples)
            return jax.tree.map(lambda g, c: jnp.square(g - c).sum(axis=0), grads, centre)

        whole = n // size * size
        chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), self.batch)
        zero = jax.tree.map(jnp.zeros_like, self.params)
        total, _ = lax.scan(lambda acc, c: (jax.tree.map(jnp.add, acc, summed(c)), None), zero, chunks)
        if whole < n:
            rest = summed(jax.tree.map(lambda x: x[whole:], self.batch))
            total = jax.tree.map(jnp.add, total, rest)
        return total

    def variance(self) -> ArrayTree:
        """Σ (g_n − ḡ)²/(N − 1), elementwise and unbiased, like params.

        Raises:
          ValueError: N is 1.
        """
        n = self.num_examples
        if n < 2:
            raise ValueError("variance: expected two examples or more, got 1")
        return jax.tree.map(lambda x: x / (n - 1), self._sum_of_squares(self.mean()))

    def gram(self) -> Array:
        """g_n·g_m, (N, N)."""
        flat = jax.tree.map(lambda g: g.reshape(g.shape[0], -1), self.dense())
        return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(lambda g: g @ g.T, flat)))

    def dense(self) -> ArrayTree:
        """All g_n, leaves (N, ...): N copies of the params."""
        return jax.vmap(self._gradient)(self.batch)


def gradients(loss: Loss, params: ArrayTree, batch: ArrayTree) -> PerExampleGradients:
    """The gradients of the N examples' own losses, as a value whose methods reduce over them.

    By definition g_n is the gradient of the loss on the batch that holds example n alone.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples.
      params: the point ω.
      batch: N examples.

    Returns:
      `PerExampleGradients`; its methods can be used inside `jax.jit`.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract.
    """
    contract.check_params(params)
    contract.num_examples(batch)
    return PerExampleGradients(loss, jax.tree.map(jnp.asarray, params), batch)
