"""The Hessian of a loss."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.curvature._operators import LinearOperator, Space, over_examples


@contract.takes_loss
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
    return over_examples(_HessianProduct(loss), loss, params, batch)


@dataclasses.dataclass(frozen=True)
class _HessianProduct:
    loss: Loss

    def __call__(self, batch: ArrayTree, params: ArrayTree, v: ArrayTree) -> ArrayTree:
        contract.check(self.loss, params, batch)
        tangent = jax.tree.map(lambda p, t: jnp.asarray(t, jnp.result_type(p)), params, v)
        # At params that are not finite there is no curvature, also where the product does not read them; nor where the
        # loss is not, whatever its derivatives say.
        finite = jnp.stack([jnp.isfinite(p).all() for p in Space.of(params).ravel(params)]).all()

        def known(p: ArrayTree) -> Array:
            value = self.loss(p, batch)
            holds = finite & jnp.isfinite(lax.stop_gradient(value))
            return value * jnp.where(holds, 1, jnp.nan).astype(value.dtype)

        gradient = jax.grad(known)
        return jax.jvp(gradient, (params,), (tangent,))[1]
