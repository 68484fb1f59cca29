"""The Hessian of a loss."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet import contract
from jaxnet.contract import ArrayTree, Loss
from jaxnet.curvature._operators import LinearOperator, over_examples


def hessian(loss: Loss, params: ArrayTree, batch: Any) -> LinearOperator:
    """H = ∂²E/∂ω∂ω′ of the loss E at ``params``, by forward over reverse differentiation.

    One product costs about two gradients, and no matrix is formed.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point ω.
      batch: the examples that E is a mean over; or a data set in batches that does not fit memory: a list of batches
        or a data loader, gone through once a product.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract.

    Reference:
      Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 1994, eq. 2.
    """
    return over_examples(_HessianProduct(loss), params, batch)


@dataclasses.dataclass(frozen=True)
class _HessianProduct:
    loss: Loss

    def __call__(self, batch: ArrayTree, params: ArrayTree, v: ArrayTree) -> ArrayTree:
        contract.check(self.loss, params, batch)
        tangent = jax.tree.map(lambda p, t: jnp.asarray(t, jnp.result_type(p)), params, v)
        # At params that are not finite there is no curvature, also where the product does not read them.
        finite = jnp.stack([jnp.isfinite(p).all() for p in jax.tree.leaves(params)]).all()
        tangent = jax.tree.map(lambda t: jnp.where(finite, t, jnp.nan), tangent)
        return jax.jvp(lambda p: jax.grad(self.loss)(p, batch), (params,), (tangent,))[1]
