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
    "check_mean",
    "check_parts",
    "chunked",
    "mean_loss",
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
