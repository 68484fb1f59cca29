"""Curvature without the network's own second derivatives: never indefinite where the criterion is convex."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet import contract, dataset, losses
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.curvature._operators import LinearOperator, over_examples
from jaxnet.curvature._products import pushforward
from jaxnet.curvature._second_moment import empirical_fisher
from jaxnet.losses import MeanLoss


@dataclasses.dataclass(frozen=True)
class _GaussNewtonProduct:
    loss: Loss

    def __call__(self, batch: Any, params: ArrayTree, v: ArrayTree) -> ArrayTree:
        return _product(self.loss, batch, params, v)


@functools.partial(dataset.jit, static_argnames="loss")
def _product(loss: Loss, batch: Any, params: ArrayTree, v: ArrayTree) -> ArrayTree:
    parts, size = losses.parts_of(loss)

    def of_chunk(chunk: Any) -> ArrayTree:
        network = lambda p: parts.outputs(p, chunk)
        outputs, along = pushforward(network, params, v)
        slope = jax.grad(lambda o: jnp.mean(parts.criterion(o, chunk[1])))
        curved = jax.jvp(slope, (outputs,), (along,))[1]
        return jax.vjp(network, params)[1](curved)[0]

    return dataset.mean(of_chunk, batch, size=size)


@contract.takes_loss
def gauss_newton(loss: Loss, params: ArrayTree, batch: Any) -> LinearOperator:
    """G = (1/N) Σ J_nᵀ (∂²ℓ_n/∂o∂o′) J_n, with the network's Jacobian J_n and the criterion ℓ_n of its output o.

    Args:
      loss: a `jaxnet.losses.mean_loss`, or one chunked.
      params: the point.
      batch: ``(inputs, targets)``, or a data set in such batches, as for `hessian`.

    Raises:
      TypeError: the loss does not keep its two parts, or params are not floating.
      ValueError: the batch does not fit.

    Reference:
      Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent", 2002, section 3.
    """
    losses.parts_of(loss)
    return over_examples(_GaussNewtonProduct(loss), loss, params, batch)


def _draw_softmax(key: Array, outputs: Array, targets: Array) -> Array:
    labels = jax.random.categorical(key, outputs)
    # One-hot targets stay one-hot, so that the batch keeps its shape.
    return labels if targets.ndim < outputs.ndim else jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)


def _draw_normal(key: Array, outputs: Array, targets: Array) -> Array:
    return outputs + jax.random.normal(key, outputs.shape, outputs.dtype)


def _draw_bernoulli(key: Array, outputs: Array, targets: Array) -> Array:
    return jax.random.bernoulli(key, jax.nn.sigmoid(outputs)).astype(outputs.dtype)


# The distribution of targets of which each criterion is the negative log-likelihood.
_DRAW = {
    losses.softmax_cross_entropy: _draw_softmax,
    losses.squared_error: _draw_normal,
    losses.sigmoid_cross_entropy: _draw_bernoulli,
}


@contract.takes_loss
def fisher(loss: Loss, params: ArrayTree, batch: Any, *, key: Array) -> LinearOperator:
    """F = (1/N) Σ E[g_n g_nᵀ] over targets that the network itself predicts, estimated with one draw an example.

    Unbiased: averaged over keys it is the Fisher information, which for these criteria is the Gauss–Newton matrix.
    Where the softmax criterion averages over T positions of an example, it is 1/T of a negative log-likelihood, and F,
    in the loss's own scale, is T times that mean.

    Args:
      loss: a `jaxnet.losses.mean_loss` with one of the library's criteria, or one chunked.
      params: the point.
      batch: ``(inputs, targets)``, or a data set in such batches, always in one order; of the targets only the shape
        matters.
      key: a `jax.random.key` for the targets drawn.

    Raises:
      TypeError: the loss does not keep its two parts, or its criterion is no known negative log-likelihood.
      ValueError: the batch does not fit.

    Reference:
      Martens, "New Insights and Perspectives on the Natural Gradient Method", JMLR 2020, section 5.
    """
    parts, size = losses.parts_of(loss)
    if parts.criterion not in _DRAW:
        names = ", ".join(criterion.__name__ for criterion in _DRAW)
        raise TypeError(f"loss: expected a criterion that is a known negative log-likelihood, {names}")
    contract.check_params(params)
    data = dataset.of(batch)
    outputs, targets = _outputs(_OutputsAndTargets(parts), data, params, size)
    drawn = _DRAW[parts.criterion](key, outputs, targets)
    found = empirical_fisher(_AtDrawnTargets(loss), params, dataset.with_rows(data, drawn))
    # A mean over T positions is 1/T of a negative log-likelihood, and its gradients' squares 1/T² of that one's.
    positions = math.prod(outputs.shape[1:-1]) if parts.criterion is losses.softmax_cross_entropy else 1
    return found if positions == 1 else positions * found


@functools.partial(dataset.jit, static_argnames=("of_batch", "size"))
def _outputs(of_batch: Any, data: Any, params: ArrayTree, size: int | None) -> tuple[Array, Array]:
    return dataset.rows(of_batch, data, params, size=size)


@dataclasses.dataclass(frozen=True)
class _OutputsAndTargets:
    parts: MeanLoss

    def __call__(self, batch: Any, params: ArrayTree) -> tuple[Array, Array]:
        return self.parts.outputs(params, batch), jnp.asarray(batch[1])


@dataclasses.dataclass(frozen=True)
class _AtDrawnTargets:
    """The loss on ``(batch, drawn)``: the batch with other targets."""

    loss: Loss

    def __call__(self, params: ArrayTree, batch: Any) -> Array:
        (inputs, _, *others), drawn = batch
        return self.loss(params, (inputs, drawn, *others))
