"""The N gradients of the N examples' own losses, without keeping N copies of the params."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.per_example import taps
from jaxnet.per_example.leaves import Factored, Formed, Leaves, at_once
from jaxnet.per_example.taps import Tap

# Leaves of so many numbers are carried as they are, N copies of them: biases and scales.
_SMALL = 4096


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerExampleGradients:
    """g_n = ∂E_n/∂ω for each example n, where E = (1/N) Σ E_n.

    Attributes:
      loss: the loss E; E_n is its value on a batch of one.
      params: the point ω.
      batch: the N examples.
      factors: for each leaf of params that is one product's kernel ``(a (N, T, d), δ (N, T, p))``, for a small one its
        gradients ``(N, ...)``, for any other None.
    """

    loss: Loss = dataclasses.field(metadata={"static": True})
    params: ArrayTree
    batch: ArrayTree
    factors: tuple[Any, ...]

    @property
    def num_examples(self) -> int:
        """N."""
        return contract.num_examples(self.batch)

    @property
    def plan(self) -> dict[str, str]:
        """For each leaf of params, how its gradients are held, and why."""
        found = taps.trace(self.loss, self.params, self.batch)
        paths = [f"params{jax.tree_util.keystr(p)}" for p, _ in jax.tree_util.tree_leaves_with_path(self.params)]
        return {path: _words(tap, held) for path, tap, held in zip(paths, found.taps, self.factors, strict=True)}

    @property
    def _groups(self) -> list[tuple[list[int], Factored | Formed]]:
        """Leaves that are held alike, by their positions."""
        leaves = jax.tree.leaves(self.params)
        found = taps.trace(self.loss, self.params, self.batch)
        groups: list[tuple[list[int], Factored | Formed]] = []
        for i, (leaf, tap, held) in enumerate(zip(leaves, found.taps, self.factors, strict=True)):
            if isinstance(held, tuple) and isinstance(tap, Tap):
                like = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                groups.append(([i], Factored(held[0], held[1], tap.matrix, like)))
        small = [i for i, held in enumerate(self.factors) if isinstance(held, jax.Array)]
        if small:
            groups.append((small, Formed(tuple(self.factors[i] for i in small), lambda g: g, self.num_examples)))
        others = [i for i, held in enumerate(self.factors) if held is None]
        if others:
            size = sum(leaves[i].size for i in others)
            groups.append((others, Formed(self.batch, jax.vmap(self._gradient_of(others)), at_once(size))))
        return groups

    def _gradient_of(self, chosen: list[int]) -> Callable[[ArrayTree], Leaves]:
        leaves, structure = jax.tree.flatten(self.params)

        def one(some: Leaves, example: ArrayTree) -> Array:
            replaced = list(leaves)
            for i, leaf in zip(chosen, some, strict=True):
                replaced[i] = leaf
            return self.loss(jax.tree.unflatten(structure, replaced), jax.tree.map(lambda x: x[None], example))

        return lambda example: jax.grad(one)(tuple(leaves[i] for i in chosen), example)

    def _gather(
        self, method: Callable[[Factored | Formed, Leaves], Leaves], tree: ArrayTree | None = None
    ) -> ArrayTree:
        """Of a method that gives something for each leaf: a pytree like params."""
        leaves, structure = jax.tree.flatten(self.params)
        given = leaves if tree is None else jax.tree.leaves(tree)
        result: list[Any] = [None] * len(leaves)
        for chosen, group in self._groups:
            for i, x in zip(chosen, method(group, tuple(given[i] for i in chosen)), strict=True):
                result[i] = x
        return jax.tree.unflatten(structure, result)

    def _total(self, method: Callable[[Factored | Formed, Leaves], Array], tree: ArrayTree | None = None) -> Array:
        """Of a method that gives one array for each group of leaves: their sum."""
        given = jax.tree.leaves(self.params if tree is None else tree)
        return sum((method(g, tuple(given[i] for i in chosen)) for chosen, g in self._groups), start=jnp.zeros(()))

    @jax.jit
    def weighted_sum(self, weights: Array) -> ArrayTree:
        """Σ_n w_n g_n, like params, for weights (N,).

        Raises:
          ValueError: the weights are not (N,).
        """
        if jnp.shape(weights) != (self.num_examples,):
            raise ValueError(f"weights: expected shape ({self.num_examples},), got {jnp.shape(weights)}")
        weights = lax.stop_gradient(jnp.asarray(weights))
        return self._gather(lambda group, _: group.weighted_sum(weights))

    @jax.jit
    def mean(self) -> ArrayTree:
        """ḡ = (1/N) Σ g_n, the gradient of E, like params."""
        n = self.num_examples
        return self.weighted_sum(jnp.full(n, 1 / n))

    @jax.jit
    def vdot(self, tree: ArrayTree) -> Array:
        """g_n·v for a vector v like params, (N,)."""
        return self._total(lambda group, v: group.vdot(v), tree)

    @jax.jit
    def norms(self) -> Array:
        """‖g_n‖ over all leaves, (N,)."""
        return jnp.sqrt(sum(jax.tree.leaves(self._squares())))

    @jax.jit
    def leaf_norms(self) -> ArrayTree:
        """‖g_n‖ of each leaf by itself, a pytree like params of (N,)."""
        return jax.tree.map(jnp.sqrt, self._squares())

    def _squares(self) -> ArrayTree:
        return self._gather(lambda group, _: group.squares())

    @jax.jit
    def cosine(self, tree: ArrayTree) -> Array:
        """g_n·v / ‖g_n‖‖v‖ for a vector v like params, (N,); NaN where a norm is 0."""
        return self.vdot(tree) / (self.norms() * optax.tree.norm(tree))

    @jax.jit
    def clipped_mean(self, max_norm: Array | float) -> ArrayTree:
        """(1/N) Σ g_n min(1, max_norm/‖g_n‖), like params.

        Reference:
          Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, algorithm 1, without its noise.
        """
        norms = self.norms()
        return self.weighted_sum(jnp.minimum(1, max_norm / jnp.where(norms > 0, norms, 1)) / self.num_examples)

    @jax.jit
    def distances(self, tree: ArrayTree) -> Array:
        """‖g_n − v‖ over all leaves, for a vector v like params, (N,)."""
        return jnp.sqrt(self._total(lambda group, v: group.deviations(v)[0], tree))

    @jax.jit
    def second_moment(self) -> ArrayTree:
        """(1/N) Σ g_n², elementwise, like params."""
        total = self._gather(lambda group, _: group.sum_of_squares())
        return jax.tree.map(lambda x: x / self.num_examples, total)

    @jax.jit
    def variance(self) -> ArrayTree:
        """Σ (g_n − ḡ)²/(N − 1), elementwise and unbiased, like params.

        Raises:
          ValueError: N is 1.
        """
        n = self.num_examples
        if n < 2:
            raise ValueError("variance: expected two examples or more, got 1")
        return jax.tree.map(lambda x: x / (n - 1), self.sum_of_deviations(self.mean()))

    @jax.jit
    def sum_of_deviations(self, tree: ArrayTree) -> ArrayTree:
        """Σ (g_n − v)², elementwise, for a vector v like params."""
        return self._gather(lambda group, centre: group.deviations(centre)[1], tree)

    @jax.jit
    def gram(self) -> Array:
        """g_n·g_m, (N, N)."""
        return self._total(lambda group, _: group.gram())

    @jax.jit
    def dense(self) -> ArrayTree:
        """All g_n, leaves (N, ...): N copies of the params."""
        return self._gather(lambda group, _: group.dense())


def _words(tap: Tap | str, held: Any) -> str:
    if isinstance(held, tuple) and isinstance(tap, Tap):
        return f"factors of {tap.words}, T = {held[0].shape[1]}"
    why = tap if isinstance(tap, str) else tap.words
    return f"carried: small; {why}" if held is not None else f"vmap(grad): {why}"


def gradients(loss: Loss, params: ArrayTree, batch: ArrayTree) -> PerExampleGradients:
    """The gradients of the N examples' own losses, as a value whose methods reduce over them.

    By definition g_n is the gradient of the loss on the batch that holds example n alone. A leaf of params that one
    matrix product or convolution consumes is held by two factors, found in the trace of the loss; small ones are
    carried; for any other, `jax.vmap` of `jax.grad` runs over chunks of examples: ``.plan`` tells which way each went.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples (see `check_independent`).
      params: the point ω.
      batch: N examples.

    Returns:
      `PerExampleGradients`; its methods can be used inside `jax.jit`.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract.
    """
    contract.check_params(params)
    contract.num_examples(batch)
    return _hold(loss, jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, batch))


@jax.jit(static_argnames="loss")
def _hold(loss: Loss, params: ArrayTree, batch: ArrayTree) -> PerExampleGradients:
    contract.check(loss, params, batch)
    found, leaves = taps.trace(loss, params, batch), jax.tree.leaves(params)
    tapped = {i: tap for i, tap in enumerate(found.taps) if isinstance(tap, Tap)}
    small = [i for i, leaf in enumerate(leaves) if i not in tapped and leaf.size <= _SMALL]

    def one(example: ArrayTree) -> tuple[dict[int, Any], dict[int, Array]]:
        def value(epsilons: dict[int, Array], carried: dict[int, Array]) -> tuple[Array, dict[int, Array]]:
            replaced = [carried.get(i, leaf) for i, leaf in enumerate(leaves)]
            return found.evaluate(replaced, example, epsilons)

        epsilons = {i: jnp.zeros(tap.output.shape, tap.output.dtype) for i, tap in tapped.items()}
        (deltas, carried), others = jax.grad(value, argnums=(0, 1), has_aux=True)(
            epsilons, {i: leaves[i] for i in small}
        )
        return {i: tap.rows(others[i], deltas[i]) for i, tap in tapped.items()}, carried

    factors, carried = jax.vmap(one)(batch)
    return PerExampleGradients(loss, params, batch, tuple({**factors, **carried}.get(i) for i in range(len(leaves))))
