"""Criteria, one value an example, and the mean that makes a loss of them.

Each criterion maps outputs and targets of N examples to N values; where an example has further axes
(positions of a sequence), `softmax_cross_entropy` averages over them and the others sum.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss, hashable, num_examples, takes_loss

__all__ = [
    "ChunkedLoss",
    "MeanLoss",
    "accuracy",
    "check_labels",
    "check_mean",
    "check_parts",
    "chunked",
    "mean_loss",
    "mixed_precision",
    "parts_of",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
]

# Sets of examples on which a loss is tried, and how many there are in one.
_DRAWS, _ROWS = 4, 32

Criterion = Callable[[Array, Array], Array]
Apply = Callable[..., Array]


def __dir__() -> list[str]:
    return sorted(__all__)


def _same_shape(name: str, output: Array, target: Array) -> None:
    # (N, 1) against (N,) would broadcast to (N, N): the classic silent error.
    if jnp.shape(output) != jnp.shape(target):
        raise ValueError(
            f"{name}: output and target must have the same shape, got {jnp.shape(output)} and {jnp.shape(target)}"
        )
    if jnp.ndim(output) == 0:
        raise ValueError(f"{name}: expected a leading axis of examples, got scalars")


def _sum_of_example(values: Array) -> Array:
    return values.reshape(values.shape[0], math.prod(values.shape[1:])).sum(axis=1)


def _nan_unless(known: Array, values: Array) -> Array:
    # A factor, so that the gradient is NaN with the value.
    return values * jnp.where(known, 1.0, jnp.nan).astype(values.dtype)


def squared_error(output: Array, target: Array) -> Array:
    """½‖o − t‖² of each example.

    Args:
      output: (N, ...) outputs o.
      target: (N, ...) targets t, of the same shape.

    Returns:
      (N,) values, in squared units of the target.

    Raises:
      ValueError: the shapes differ.

    Examples:
      >>> print(losses.squared_error(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.zeros((2, 2))))
      [2.5 0.5]
    """
    _same_shape("squared_error", output, target)
    return _sum_of_example(optax.losses.l2_loss(output, target))


def softmax_cross_entropy(logits: Array, labels: Array) -> Array:
    """−Σ_c t_c log softmax(z)_c of each example, in nats, finite for any finite logits.

    Args:
      logits: (N, ..., C) unnormalised log-probabilities z.
      labels: integers (N, ...) in 0…C−1, or probabilities (N, ..., C).

    Returns:
      (N,) values, averaged over any axes between the first and the last. A label outside 0…C−1 gives NaN
      (and a NaN gradient), never the value of another class.

    Raises:
      ValueError: the shapes do not fit, or integer labels have the logits' shape.

    Examples:
      >>> print(losses.softmax_cross_entropy(jnp.zeros((1, 2)), jnp.array([0])))
      [0.6931472]
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == bool:
        if logits.ndim < 2 or labels.shape != logits.shape[:-1]:
            raise ValueError(
                "softmax_cross_entropy: integer labels must have the logits' shape without its last axis, "
                f"got logits {logits.shape} and labels {labels.shape}"
            )
        # Bytes compare as bytes: 256 classes would wrap to none.
        labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
        known = (labels >= 0) & (labels < logits.shape[-1])
        values = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32))
        values = _nan_unless(known, values)
    else:
        _same_shape("softmax_cross_entropy", logits, labels)
        values = optax.losses.softmax_cross_entropy(logits, labels)
    return values.reshape(values.shape[0], -1).mean(axis=1)


def sigmoid_cross_entropy(logits: Array, labels: Array) -> Array:
    """−[y log p + (1 − y) log(1 − p)] with p = 1/(1 + e^−z), in nats, finite for any finite logits.

    Args:
      logits: (N, ...) log-odds z.
      labels: (N, ...) probabilities y in [0, 1], of the same shape.

    Returns:
      (N,) values, summed over further axes. A label outside [0, 1] gives NaN: targets ±1 are not probabilities.

    Raises:
      ValueError: the shapes differ.
    """
    _same_shape("sigmoid_cross_entropy", logits, labels)
    labels = jnp.asarray(labels)
    values = optax.losses.sigmoid_binary_cross_entropy(logits, labels)
    return _sum_of_example(_nan_unless((labels >= 0) & (labels <= 1), values))


@dataclasses.dataclass(frozen=True)
class MeanLoss:
    """(1/N) Σ_n criterion(apply(params, x_n), t_n): hashable, so that equal losses share one compilation.

    A batch is ``(inputs, targets)``, or ``(inputs, targets, keys)`` with one `jax.random.key` an example for
    networks that are random in training (dropout): then each example draws its own noise.
    """

    apply: Apply
    criterion: Criterion

    def outputs(self, params: ArrayTree, batch: Any) -> Array:
        """The network's outputs on ``batch``, (N, ...)."""
        if len(batch) == 2:
            return self.apply(params, batch[0])
        inputs, _, keys = batch
        one = lambda x, key: self.apply(params, x[None], key=key)[0]
        return jax.vmap(one)(inputs, keys)

    def __call__(self, params: ArrayTree, batch: Any) -> Array:
        """The mean over the batch's N examples, a scalar."""
        values = self.criterion(self.outputs(params, batch), batch[1])
        if values.shape != jnp.shape(batch[1])[:1]:
            raise ValueError(f"criterion: expected one value an example, {jnp.shape(batch[1])[:1]}, got {values.shape}")
        return jnp.mean(values)


def mean_loss(apply: Apply, criterion: Criterion) -> MeanLoss:
    """The library's contract from a network and a criterion: ``loss(params, (inputs, targets)) -> scalar``.

    Args:
      apply: ``apply(params, inputs) -> outputs``, over a batch; ``key=`` too if the batch carries keys.
      criterion: ``criterion(outputs, targets) -> (N,)``, such as `softmax_cross_entropy`.

    Returns:
      A frozen, hashable callable that keeps its two parts as ``.apply`` and ``.criterion``.

    Examples:
      >>> model = nn.linear_neuron()
      >>> loss = losses.mean_loss(model.apply, losses.squared_error)
      >>> params = {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}
      >>> print(loss(params, data.two_gaussians_exact()))  # targets are ±1
      0.5
    """
    return MeanLoss(hashable(apply), hashable(criterion))


@dataclasses.dataclass(frozen=True)
class ChunkedLoss:
    """A mean loss accumulated over chunks; see `chunked`."""

    loss: Loss
    size: int

    def __call__(self, params: ArrayTree, batch: ArrayTree) -> Array:
        """The same mean over the batch's N examples, a scalar."""
        dataset.check_in_memory("chunked", batch, "a function that goes through one gives its loss batch by batch")
        if num_examples(batch) <= self.size:
            return self.loss(params, batch)  # one chunk: nothing to save by computing it twice
        check_mean(self.loss, params, batch)
        return self._over_chunks(params, batch)

    @dataset.on_automatic_axes
    def _over_chunks(self, params: ArrayTree, batch: ArrayTree) -> Array:
        # Rematerialised, so that the backward pass holds one chunk's intermediates and not all of them.
        one = jax.checkpoint(self.loss)
        return dataset.mean(lambda chunk, params: one(params, chunk), batch, params, size=self.size)


def parts_of(loss: Loss) -> tuple[MeanLoss, int | None]:
    """The network and the criterion of a loss that keeps them apart, and the size of its chunks if it has them.

    Raises:
      TypeError: it is not made by `mean_loss`, nor a chunked one of these.
    """
    inner, size = (loss.loss, loss.size) if isinstance(loss, ChunkedLoss) else (loss, None)
    if not isinstance(inner, MeanLoss):
        raise TypeError(
            "loss: expected one whose network and criterion are known apart; make it with jaxnet.losses.mean_loss, "
            f"got {type(loss).__name__}"
        )
    return inner, size


@takes_loss
def chunked(loss: Loss, size: int) -> ChunkedLoss:
    """The same loss, Σ_c (N_c/N) loss(params, chunk c), in the memory of one chunk.

    Gradients and Hessian products go through the same scan: their memory does not grow with N.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over the batch.
      size: examples a chunk; the last holds what is left, and counts for as much.

    Returns:
      A hashable loss.

    Raises:
      ValueError: ``size`` is below 1. The loss itself raises a UserError, where it is called with values and is no mean
        over independent examples; inside `jax.jit` and `jax.grad` nothing checks that.
    """
    if size < 1:
        raise ValueError(f"chunked: expected a size of 1 or more, got {size}")
    return ChunkedLoss(loss, size)


@takes_loss
def mixed_precision(loss: Loss, dtype: Any = jnp.bfloat16) -> Loss:
    """The same loss, computed in another precision: params and floating inputs are rounded to it at each call.

    What is held stays as it was: params, the updates, the gradients (those of the rounding are taken as 1), their means
    over examples and Krylov vectors. Of a loss of `mean_loss` the network alone is computed in ``dtype``; its outputs
    meet the criterion, and the mean is taken, in the params' own precision.

    Curvature is then that of the rounded computation, known to a few units of ``dtype``: ask for a tolerance of 0.01,
    not 1e-3, and no bound is certified. For limits and rates measure the loss itself.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over the batch.
      dtype: of the computation, a floating one.

    Returns:
      A hashable loss; of the same kind where the loss is of `mean_loss` or `chunked`.

    Raises:
      TypeError: ``dtype`` is not a floating one.

    Reference:
      Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.1; no loss scale, which bfloat16 needs not.
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"mixed_precision: expected a floating dtype, got {dtype}")
    if isinstance(loss, ChunkedLoss):
        return ChunkedLoss(mixed_precision(loss.loss, dtype), loss.size)
    if isinstance(loss, MeanLoss):
        return MeanLoss(_Rounded(loss.apply, dtype), loss.criterion)
    return _Rounded(loss, dtype)


@dataclasses.dataclass(frozen=True)
class _Rounded:
    """A function of params and data, computed in another precision; its result is in the params' own."""

    function: Callable[..., Array]
    dtype: Any

    def __call__(self, params: ArrayTree, data: Any, **further: Any) -> Array:
        own = jnp.result_type(*jax.tree.leaves(params))
        cast = lambda x: x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        rounded = lambda tree: jax.tree.map(lambda x: cast(jnp.asarray(x)), tree)
        return self.function(rounded(params), rounded(data), **further).astype(own)


def check_mean(loss: Loss, params: ArrayTree, batch: ArrayTree, key: Array | None = None) -> None:
    """Raise unless E is, on a few examples, the mean of the examples' own losses, and so is its gradient.

    Several sets of examples are drawn, since those that lie together are often alike: sorted by class, say. By values,
    so that nothing is checked where one of them is a tracer.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point at which it is tried.
      batch: the examples, in memory.
      key: for the draw; by default the same rows at each call.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract.
      UserError: the loss is no such mean.
    """
    contract.check_params(params)
    n = contract.num_examples(batch)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, batch))):
        return
    size = min(n, _ROWS)
    rng = np.random.default_rng(0 if key is None else np.asarray(jax.random.key_data(key)))
    rows = [rng.choice(n, size, replace=False) for _ in range(_DRAWS)]
    tolerance = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(params))).eps) ** 0.5
    remedy = (
        "are its examples coupled, as by batch normalisation in training mode, or is it a sum? Use running statistics, "
        "or a normalisation within each example, and the mean over the batch"
    )
    for draw in rows:
        whole, mean, gradient, apart = map(float, _both_ways(loss, params, batch, draw))
        if abs(whole - mean) > tolerance * max(abs(whole), abs(mean)):
            got = f"on {size} examples it is {whole:.4g}, but the mean of their own losses is {mean:.4g}"
            raise contract.UserError(f"loss: {got}; {remedy}")
        if apart > 10 * tolerance * gradient:
            raise contract.UserError(
                f"loss: its gradient on {size} examples is not the mean of their own losses' gradients; {remedy}"
            )


@functools.partial(dataset.jit, static_argnames="loss")
def _both_ways(loss: Loss, params: ArrayTree, batch: ArrayTree, rows: Array) -> tuple[Array, Array, Array, Array]:
    """E on these rows, the mean of their own losses, the length of E's gradient, and how far that mean's is."""
    contract.check(loss, params, batch)
    few = jax.tree.map(lambda x: jnp.asarray(x)[rows], batch)
    one = lambda p, example: loss(p, jax.tree.map(lambda x: x[None], example))
    mean_of_own = lambda p, b: jax.vmap(one, in_axes=(None, 0))(p, b).mean()
    joined = lambda tree: ravel_pytree(tree)[0].astype(jnp.promote_types(jnp.result_type(float), jnp.float32))
    (whole, gradient), (mean, own) = (jax.value_and_grad(f)(params, few) for f in (loss, mean_of_own))
    gradient, own = joined(gradient), joined(own)
    return whole, mean, jnp.linalg.norm(gradient), jnp.linalg.norm(gradient - own)


@dataset.on_automatic_axes
def check_labels(loss: Loss, params: ArrayTree, batch: Any, name: str) -> None:
    """Raise where a criterion of this module is NaN by a label, whatever the network says.

    Of values at hand; of another loss nothing is asked.

    Raises:
      UserError: a target is not finite, or a label is out of its range; ``name`` is what the message calls the batch.
    """
    try:
        parts = parts_of(loss)[0]
    except TypeError:
        return
    targets = jnp.asarray(batch[1])
    if parts.criterion not in _CRITERIA or isinstance(targets, jax.core.Tracer):
        return
    highest: float = math.inf
    lowest = -highest
    if parts.criterion is softmax_cross_entropy and not jnp.issubdtype(targets.dtype, jnp.floating):
        lowest, highest = 0, jax.eval_shape(parts.outputs, params, batch).shape[-1] - 1
    if parts.criterion is sigmoid_cross_entropy:
        lowest, highest = 0, 1
    bad, first = jax.device_get(_outside(targets, lowest, highest))
    if bad:
        what = "finite numbers" if math.isinf(highest) else f"labels from {lowest} to {highest}"
        raise contract.UserError(
            f"{name}: expected {what} as targets of {parts.criterion.__name__}, got {bad} of {len(targets)} examples "
            f"with others, the first at index {first}; mend these labels, or leave them out"
        )


_CRITERIA = (squared_error, softmax_cross_entropy, sigmoid_cross_entropy)


@dataset.jit
def _outside(targets: Array, lowest: Array | float, highest: Array | float) -> tuple[Array, Array]:
    """How many examples have an entry that is not finite or outside of a range, and the first of them."""
    fine = jnp.isfinite(targets) & (targets >= lowest) & (targets <= highest)
    bad = ~fine.reshape(targets.shape[0], -1).all(axis=1)
    return bad.sum(), bad.argmax()


def check_parts(loss: Loss, params: ArrayTree, data: Any) -> None:
    """Raise where examples are taken apart, by chunks or by batches, of a loss that couples them.

    Of values only, as by `jaxnet.per_example.check_independent`; of a batch taken whole nothing is asked.

    Raises:
      UserError: the loss is no mean over independent examples.
    """
    if dataset.on_host(data) or isinstance(loss, ChunkedLoss):
        check_mean(loss.loss if isinstance(loss, ChunkedLoss) else loss, params, dataset.first(data))


def accuracy(apply: Apply, params: ArrayTree, batch: Any) -> Array:
    """The share of examples whose largest output is at the label, a scalar in [0, 1].

    Args:
      apply: ``apply(params, inputs) -> (N, C)`` outputs.
      params: the network's parameters.
      batch: ``(inputs, labels)``, labels integers (N,) or one-hot (N, C).

    Raises:
      ValueError: the outputs have no axis of classes, or the labels have neither shape.
    """
    dataset.check_in_memory("accuracy", batch, "average it over the batches, or let fit do so as one of its metrics")
    inputs, labels = batch[:2]
    outputs = apply(params, inputs)
    if outputs.ndim != 2:
        raise ValueError(f"accuracy: expected outputs of shape (N, C), got {outputs.shape}")
    labels = jnp.asarray(labels)
    if labels.shape == outputs.shape:
        labels = labels.argmax(axis=1)
    elif labels.shape != outputs.shape[:1]:
        raise ValueError(f"accuracy: expected labels (N,) or one-hot {outputs.shape}, got {labels.shape}")
    return jnp.mean(outputs.argmax(axis=1) == labels)
