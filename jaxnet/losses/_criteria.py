"""Criteria, one value an example.

Each maps outputs and targets of N examples to N values; where an example has further axes (positions of a sequence),
`softmax_cross_entropy` averages over them and the others sum.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
import optax

from jaxnet import dataset
from jaxnet.contract import Array, ArrayTree

Criterion: TypeAlias = Callable[[Array, Array], Array]
"""``criterion(outputs, targets) -> (N,)``."""
Apply: TypeAlias = Callable[..., Array]
"""``apply(params, inputs) -> outputs``, over a batch; with ``key=`` where a network is random."""


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
