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
from jaxnet.per_example import _taps
from jaxnet.per_example._held import Factors, Held, hold, words
from jaxnet.per_example._leaves import at_once, over_chunks

# Factors of up to so many numbers are held; of more, those of a chunk of examples at a time.
_HELD = 2**22


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerExampleGradients:
    """g_n = ∂E_n/∂ω for each example n, where E = (1/N) Σ E_n.

    Attributes:
      loss: the loss E; E_n is its value on a batch of one.
      params: the point ω.
      batch: the N examples.
      factors: what is held of each leaf's gradients (see ``.plan``); None where that is found anew for each method, a
        chunk of examples at a time, because all of it would not stay in the cache.
    """

    loss: Loss = dataclasses.field(metadata={"static": True})
    params: ArrayTree
    batch: ArrayTree
    factors: Factors | None

    @property
    def num_examples(self) -> int:
        """N."""
        return contract.num_examples(self.batch)

    @property
    def plan(self) -> dict[str, str]:
        """For each leaf of params, how its gradients are held, and why."""
        found = _taps.trace(self.loss, self.params, self.batch)
        factors = self.factors or _shapes(self.loss, self.params, self.batch)
        paths = [f"params{jax.tree_util.keystr(p)}" for p, _ in jax.tree_util.tree_leaves_with_path(self.params)]
        return {path: words(tap, held) for path, tap, held in zip(paths, found.taps, factors, strict=True)}

    def _reduce(self, method: Callable[[Held, Any], tuple[Any, Any]], given: Any = ()) -> tuple[Any, Any]:
        """``method(held, given) -> (an entry an example, a sum over them)``, by chunks if need be."""
        if self.factors is not None:
            return method(Held(self.loss, self.params, self.batch, self.factors), given)

        def of_chunk(chunk: Any) -> tuple[Any, Any]:
            batch, part = chunk
            return method(Held(self.loss, self.params, batch, hold(self.loss, self.params, batch)), part)

        return over_chunks(of_chunk, (self.batch, given), at_once(_size(self.loss, self.params, self.batch)))

    @jax.jit
    def weighted_sum(self, weights: Array) -> ArrayTree:
        """Σ_n w_n g_n, like params, for weights (N,).

        Raises:
          ValueError: the weights are not (N,).
        """
        if jnp.shape(weights) != (self.num_examples,):
            raise ValueError(f"weights: expected shape ({self.num_examples},), got {jnp.shape(weights)}")
        weights = lax.stop_gradient(jnp.asarray(weights))
        return self._reduce(lambda held, weights: ((), held.weighted_sum(weights)), weights)[1]

    @jax.jit
    def mean(self) -> ArrayTree:
        """ḡ = (1/N) Σ g_n, the gradient of E, like params."""
        if self.factors is None:
            return jax.grad(self.loss)(self.params, self.batch)
        n = self.num_examples
        return self.weighted_sum(jnp.full(n, 1 / n))

    @jax.jit
    def vdot(self, tree: ArrayTree) -> Array:
        """g_n·v for a vector v like params, (N,)."""
        return self._reduce(lambda held, _: (held.vdot(tree), ()))[0]

    @jax.jit
    def norms(self) -> Array:
        """‖g_n‖ over all leaves, (N,)."""
        return jnp.sqrt(sum(jax.tree.leaves(self._squares())))

    @jax.jit
    def leaf_norms(self) -> ArrayTree:
        """‖g_n‖ of each leaf by itself, a pytree like params of (N,)."""
        return jax.tree.map(jnp.sqrt, self._squares())

    def _squares(self) -> ArrayTree:
        return self._reduce(lambda held, _: (held.squares(), ()))[0]

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
        return jnp.sqrt(self._reduce(lambda held, _: (held.squared_distances(tree), ()))[0])

    @jax.jit
    def second_moment(self) -> ArrayTree:
        """(1/N) Σ g_n², elementwise, like params."""
        total = self._reduce(lambda held, _: ((), held.sum_of_squares()))[1]
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
        return self._reduce(lambda held, _: ((), held.sum_of_deviations(tree)))[1]

    @jax.jit
    def gram(self) -> Array:
        """g_n·g_m, (N, N)."""
        # Every pair of examples meets: all factors are needed at once.
        factors = self.factors or hold(self.loss, self.params, self.batch)
        return Held(self.loss, self.params, self.batch, factors).gram()

    @jax.jit
    def dense(self) -> ArrayTree:
        """All g_n, leaves (N, ...): N copies of the params."""
        return self._reduce(lambda held, _: (held.dense(), ()))[0]


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
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    held = contract.num_examples(batch) * _size(loss, params, batch) <= _HELD
    return PerExampleGradients(loss, params, batch, _hold(loss, params, batch) if held else None)


_hold = jax.jit(hold, static_argnames="loss")


def _shapes(loss: Loss, params: ArrayTree, batch: ArrayTree) -> Factors:
    """The factors of one example, in shape."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch)
    return jax.eval_shape(functools.partial(hold, loss), params, one)


def _size(loss: Loss, params: ArrayTree, batch: ArrayTree) -> int:
    """How many numbers the factors of an example are."""
    return sum(x.size for x in jax.tree.leaves(_shapes(loss, params, batch)))
