"""The N gradients of the N examples' own losses, without keeping N copies of the params."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnet import contract, dataset, losses
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.per_example import _taps
from jaxnet.per_example._held import Factors, Held, described, factors_of, hold, over_leaves
from jaxnet.per_example._leaves import at_once, wide

# Factors of up to so many numbers are held; of more, those of a chunk of examples at a time.
_HELD = 2**22
# A clipped gradient takes a quarter of the batch at a time, since its factors are about twice what a plain gradient
# keeps, but not fewer than so many: then it would be slower.
_FEW = 64


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerExampleGradients:
    """g_n = ∂E_n/∂ω for each example n, where E = (1/N) Σ E_n.

    Of a data set in batches every method but ``gram`` and ``dense`` is a pass over the batches, on the host. Whatever
    the params' precision, all is squared and summed in float32 at least; results that are gradients (`mean`,
    `weighted_sum`, `clipped_mean`) then take the params' dtypes. Every method can be differentiated, by the params,
    the weights and what else it is given.

    Attributes:
      loss: the loss E; E_n is its value on a batch of one.
      params: the point ω.
      batch: the N examples.
      factors: what is held of each leaf's gradients (see ``.plan``); None where that is found anew for each method, a
        chunk of examples at a time, because all of it would not stay in the cache.
    """

    loss: Loss = dataclasses.field(metadata={"static": True})
    params: ArrayTree
    batch: Any
    factors: Factors | None

    @property
    def num_examples(self) -> int:
        """N; of a data set in batches, by a pass over them."""
        return dataset.num_examples(self.batch)

    @property
    def plan(self) -> dict[str, str]:
        """For each leaf of params, by its name, how its gradients are held, and why."""
        batch = dataset.first(self.batch)
        found = _taps.trace(self.loss, self.params, batch)
        factors = self.factors or _shapes(self.loss, self.params, batch)
        names = contract.leaf_names(self.params)
        return {name: described(tap, held) for name, tap, held in zip(names, found.taps, factors, strict=True)}

    @dataset.on_automatic_axes
    def rows(self, method: Callable[..., Any], *given: Any) -> Any:
        """``method(held, *given)``, entries (N, ...) for the examples, of their `Held` gradients."""
        if self.factors is not None:
            return method(Held(self.loss, self.params, self.batch, self.factors), *given)
        return dataset.rows(_OfBatch(self.loss, method, dataset.rows), self.batch, self.params, *given)

    @dataset.on_automatic_axes
    def total(self, method: Callable[..., Any], *given: Any, weights: Array | None = None) -> Any:
        """The sum over examples that ``method(held, *given)`` gives; or ``method(held, part of weights, *given)``."""
        weighted = weights is not None
        if self.factors is not None:
            held = Held(self.loss, self.params, self.batch, self.factors)
            return method(held, weights, *given) if weighted else method(held, *given)
        data = dataset.with_rows(self.batch, weights) if weighted else self.batch
        return dataset.total(_OfBatch(self.loss, method, dataset.total, weighted), data, self.params, *given)

    @dataset.jit
    def weighted_sum(self, weights: Array) -> ArrayTree:
        """Σ_n w_n g_n, like params, for weights (N,).

        Raises:
          TypeError, ValueError: the weights are no array, or not (N,).
        """
        if isinstance(weights, (list, tuple)):
            raise TypeError(f"weights: expected an array, got a {type(weights).__name__}")
        if not dataset.on_host(self.batch) and jnp.shape(weights) != (self.num_examples,):
            raise ValueError(f"weights: expected shape ({self.num_examples},), got {jnp.shape(weights)}")
        return self._like_params(self.total(Held.weighted_sum, weights=jnp.asarray(weights)))

    @dataset.jit
    def mean(self) -> ArrayTree:
        """ḡ = (1/N) Σ g_n, the gradient of E, like params."""
        if self.factors is None:
            return dataset.mean(contract.ValueAndGrad(self.loss), self.batch, self.params)[1]
        return self._like_params(self.wide_mean())

    @dataset.jit
    def wide_mean(self) -> ArrayTree:
        """ḡ in float32 at least, to be subtracted: params of half precision would round it by more than g_n − ḡ."""
        return optax.tree.scale(1 / self.num_examples, self.total(_sum))

    def _like_params(self, tree: ArrayTree) -> ArrayTree:
        return jax.tree.map(lambda x, p: x.astype(p.dtype), tree, self.params)

    @dataset.jit
    def vdot(self, tree: ArrayTree) -> Array:
        """g_n·v for a vector v like params, (N,)."""
        contract.check_alike("tree", tree, self.params)
        return self.rows(Held.vdot, tree)

    @dataset.jit
    def norms(self) -> Array:
        """‖g_n‖ over all leaves, (N,)."""
        return self.rows(lengths)

    @dataset.jit
    def leaf_norms(self) -> ArrayTree:
        """‖g_n‖ of each leaf by itself, a pytree like params of (N,)."""
        return jax.tree.map(_root, self.rows(Held.squares))

    @dataset.jit
    def cosine(self, tree: ArrayTree) -> Array:
        """g_n·v / ‖g_n‖‖v‖ for a vector v like params, (N,); NaN where a norm is 0."""
        contract.check_alike("tree", tree, self.params)
        along, squares = self.rows(_products_and_squares, tree)
        return along / (jnp.sqrt(squares) * optax.tree.norm(jax.tree.map(lambda x: wide(jnp.asarray(x)), tree)))

    def clipped_mean(self, max_norm: Array | float) -> ArrayTree:
        """(1/N) Σ g_n min(1, max_norm/‖g_n‖), like params; `clipped_grad` adds noise, and holds less at a time.

        Raises:
          ValueError: ``max_norm`` is negative.

        Reference:
          Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, algorithm 1, without its noise.
        """
        check_norm("max_norm", max_norm)
        return self._clipped_mean(jnp.asarray(max_norm))

    @dataset.jit
    def _clipped_mean(self, max_norm: Array) -> ArrayTree:
        summed = self.total(_clip, max_norm)
        return self._like_params(optax.tree.scale(1 / self.num_examples, summed))

    @dataset.jit
    def distances(self, tree: ArrayTree) -> Array:
        """‖g_n − v‖ over all leaves, for a vector v like params, (N,)."""
        contract.check_alike("tree", tree, self.params)
        return _root(self.rows(_squared_distance, tree))

    @dataset.jit
    def second_moment(self) -> ArrayTree:
        """(1/N) Σ g_n², elementwise, like params."""
        return jax.tree.map(lambda x: x / self.num_examples, self.total(Held.sum_of_squares))

    @dataset.jit
    def variance(self) -> ArrayTree:
        """Σ (g_n − ḡ)²/(N − 1), elementwise and unbiased, like params.

        Raises:
          ValueError: N is 1.
        """
        n = self.num_examples
        if n < 2:
            raise ValueError("variance: expected two examples or more, got 1")
        return jax.tree.map(lambda x: x / (n - 1), self.sum_of_deviations(self.wide_mean()))

    @dataset.jit
    def sum_of_deviations(self, tree: ArrayTree) -> ArrayTree:
        """Σ (g_n − v)², elementwise, for a vector v like params."""
        contract.check_alike("tree", tree, self.params)
        return self.total(Held.sum_of_deviations, tree)

    def gram(self) -> Array:
        """g_n·g_m, (N, N).

        Raises:
          TypeError: the examples are a data set in batches.
        """
        dataset.check_in_memory("gram", self.batch, "every pair of examples meets: take fewer of them as one batch")
        return _gram(self)

    @dataset.jit
    def _dense(self) -> ArrayTree:
        return self.rows(Held.dense)

    def dense(self) -> ArrayTree:
        """All g_n, leaves (N, ...): N copies of the params.

        Raises:
          TypeError: the examples are a data set in batches.
        """
        dataset.check_in_memory("dense", self.batch, "take the gradients of one batch after the other")
        return self._dense()


@dataset.jit
def _gram(grads: PerExampleGradients) -> Array:
    # Every pair of examples meets: all factors are needed at once.
    factors = grads.factors or hold(grads.loss, grads.params, grads.batch)[0]
    return Held(grads.loss, grads.params, grads.batch, factors).gram()


def _products_and_squares(held: Held, tree: ArrayTree) -> tuple[Array, Any]:
    return held.vdot(tree), over_leaves(held.squares())


def _sum(held: Held) -> ArrayTree:
    return held.weighted_sum(jnp.ones(contract.num_examples(held.batch)))


def check_norm(name: str, value: Array | float) -> None:
    """Raise where a length that is known as a number is negative or NaN.

    Raises:
      ValueError: it is.
    """
    if not isinstance(value, jax.core.Tracer) and not float(value) >= 0:
        raise ValueError(f"{name}: expected a number of 0 or more, got {value}")


def _clip(held: Held, max_norm: Array) -> ArrayTree:
    return clipped_sum(held, lengths(held), max_norm)


def clipped_sum(held: Held, norms: Array, max_norm: Array) -> ArrayTree:
    """Σ g_n min(1, max_norm/‖g_n‖), for those norms."""
    above = ~(norms <= max_norm)  # so that a NaN is handed on
    return held.weighted_sum(jnp.where(above, max_norm / jnp.where(above, norms, 1), 1))


def lengths(held: Held) -> Array:
    """‖g_n‖ over all leaves, (N,)."""
    return _root(over_leaves(held.squares()))


def _squared_distance(held: Held, tree: ArrayTree) -> Array:
    return over_leaves(held.squared_distances(tree))


def _root(squares: Array) -> Array:
    """√x; at 0, where it has no derivative, with the one that a length may be given there: 0."""
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))  # of a NaN it is NaN


@dataclasses.dataclass(frozen=True)
class _OfBatch:
    """What a method of `Held` gives for a batch, of which a chunk's factors are held at a time if it is large."""

    loss: Loss
    method: Callable[..., Any]
    reduce: Callable[..., Any]
    weighted: bool = False

    def __call__(self, data: Any, params: ArrayTree, *given: Any) -> Any:
        def of_chunk(chunk: Any) -> Any:
            batch, *weights = chunk if self.weighted else (chunk,)
            factors, _ = hold(self.loss, params, batch)
            return self.method(Held(self.loss, params, batch, factors), *weights, *given)

        batch = data[0] if self.weighted else data
        return self.reduce(of_chunk, data, size=chunk_size(self.loss, params, batch))


@contract.takes_loss
@dataset.on_automatic_axes
def gradients(loss: Loss, params: ArrayTree, batch: Any) -> PerExampleGradients:
    """The gradients of the N examples' own losses, as a value whose methods reduce over them.

    By definition g_n is the gradient of the loss on the batch that holds example n alone. A leaf of params that matrix
    products, convolutions or lookups consume is held by two factors, found in the trace of the loss; small ones are
    carried; for any other, `jax.vmap` of `jax.grad` runs over chunks of examples: ``.plan`` tells which way each went.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples (see `check_independent`).
      params: the point ω.
      batch: N examples, or a data set in batches.

    Returns:
      `PerExampleGradients`; its methods can be used inside `jax.jit`.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract.

    Examples:
      >>> loss = lambda w, batch: losses.squared_error(batch[0] @ w, batch[1]).mean()
      >>> grads = per_example.gradients(loss, jnp.zeros(2), (jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.ones(2)))
      >>> print(grads.norms(), grads.mean())
      [5. 1.] [-1.5 -2.5]
    """
    contract.check_params(params)
    params, batch = jax.tree.map(jnp.asarray, params), dataset.of(batch)
    if dataset.on_host(batch):
        losses.check_parts(loss, params, batch)
        return PerExampleGradients(loss, params, batch, None)
    batch = jax.tree.map(jnp.asarray, batch)
    # Where shardings are types, factors would come back as copies on every device.
    held = chunk_size(loss, params, batch) is None and not dataset.on_explicit_axes(params, batch)
    return PerExampleGradients(loss, params, batch, _hold(loss, params, batch)[0] if held else None)


_hold, _factors_of = (jax.jit(function, static_argnames="loss") for function in (hold, factors_of))


def _one(batch: ArrayTree) -> ArrayTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch)


def _shapes(loss: Loss, params: ArrayTree, batch: ArrayTree) -> Factors:
    """What is held of one example, in shape; a second call with new values traces nothing."""
    return _hold.eval_shape(loss, params, _one(batch))[0]


def _size_of_one(loss: Loss, params: ArrayTree, batch: ArrayTree) -> int:
    return sum(x.size for x in jax.tree.leaves(_factors_of.eval_shape(loss, params, _one(batch))))


def few_at_once(loss: Loss, params: ArrayTree, batch: ArrayTree) -> int:
    """Of how many examples clipping holds the gradients at a time: a number that divides N where one is near."""
    n = contract.num_examples(batch)
    most = min(n, at_once(_size_of_one(loss, params, batch)), max(_FEW, n // 4))
    even = max(size for size in range(1, most + 1) if n % size == 0)
    return even if 2 * even > most else most


def chunk_size(loss: Loss, params: ArrayTree, batch: ArrayTree) -> int | None:
    """Of how many examples gradients are found at a time; None is all."""
    size = _size_of_one(loss, params, batch)
    return None if contract.num_examples(batch) * size <= _HELD else at_once(size)
