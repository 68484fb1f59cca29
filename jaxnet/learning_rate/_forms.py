"""The curvature of single examples along given directions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet import dataset, losses
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.curvature import LinearOperator, gauss_newton, hessian, pushforward
from jaxnet.losses import MeanLoss


def parts_known(loss: Loss) -> bool:
    """Whether the network and the criterion are known apart, so that there is a Gauss–Newton matrix."""
    try:
        losses.parts_of(loss)
    except TypeError:
        return False
    return True


def curvature(loss: Loss, params: ArrayTree, data: Any) -> LinearOperator:
    """C: the Gauss–Newton matrix, which is not negative where a network starts; of other losses the Hessian."""
    return (gauss_newton if parts_known(loss) else hessian)(loss, params, data)


def forms(loss: Loss, params: ArrayTree, data: Any, left: ArrayTree, right: ArrayTree, *, size: int) -> Array:
    """v′C_n w (N, K) of each example's C_n, for K pairs of directions: derivatives forwards only, where there are.

    Args:
      loss: a mean over independent examples.
      params: the point.
      data: N examples, or a `dataset.Stream`.
      left: the v, like params with a leading axis K.
      right: the w, likewise.
      size: examples worked on at once.
    """
    return dataset.rows(_Forms(loss), data, params, left, right, size=size)


@dataclasses.dataclass(frozen=True)
class _Forms:
    loss: Loss

    def __call__(self, batch: Any, params: ArrayTree, left: ArrayTree, right: ArrayTree) -> Array:
        one = _of_outputs if parts_known(self.loss) else _of_losses
        pairs = jax.tree.map(lambda p, *xs: jnp.stack([x.astype(p.dtype) for x in xs], axis=1), params, left, right)
        return lax.map(lambda pair: one(self.loss, batch, params, pair), pairs).T


def _of_outputs(loss: Loss, batch: Any, params: ArrayTree, pair: ArrayTree) -> Array:
    """(J_n v)′ (∂²ℓ_n/∂o∂o′) J_n w."""
    parts: MeanLoss = losses.parts_of(loss)[0]
    network = lambda p: parts.outputs(p, batch)
    # One after the other by one kernel, so that it is compiled once.
    outputs, (along, other) = lax.map(lambda v: pushforward(network, params, v), pair)
    slopes = jax.grad(lambda o: parts.criterion(o, batch[1]).sum())
    curved = jax.jvp(slopes, (outputs[0],), (other,))[1]
    return (along * curved).reshape(along.shape[0], -1).sum(axis=1)


def _of_losses(loss: Loss, batch: Any, params: ArrayTree, pair: ArrayTree) -> Array:
    """∂²E_n(ω + av + bw)/∂a∂b."""
    values = lambda p: jax.vmap(lambda example: loss(p, jax.tree.map(lambda x: x[None], example)))(batch)
    v, w = (jax.tree.map(lambda x: x[i], pair) for i in range(2))
    slope = lambda p: pushforward(values, p, v)[1]
    return jnp.asarray(pushforward(slope, params, w)[1])
