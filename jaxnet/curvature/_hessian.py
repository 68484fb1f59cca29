"""The Hessian of a loss."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.curvature._operators import LinearOperator, OverExamples, over_examples
from jaxnet.curvature._space import Space


@contract.takes_loss
def hessian(loss: Loss, params: ArrayTree, batch: Any) -> LinearOperator:
    """H = ∂²E/∂ω∂ω′ of the loss E at ``params``, by forward over reverse differentiation.

    One product costs about two gradients, and no matrix is formed. Of a function with a rule for reverse
    differentiation only (a `jax.custom_vjp` whose rule calls itself) the product is taken by reverse over reverse,
    which is as exact, and takes more memory.

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
        # At params that are not finite there is no curvature, also where the product does not read them; nor where the
        # loss is not, whatever its derivatives say.
        finite = jnp.stack([jnp.isfinite(p).all() for p in Space.of(params).ravel(params)]).all()

        def known(p: ArrayTree) -> Array:
            value = self.loss(p, batch)
            holds = finite & jnp.isfinite(lax.stop_gradient(value))
            return value * jnp.where(holds, 1, jnp.nan).astype(value.dtype)

        gradient = jax.grad(known)
        forward = lambda params, v: jax.jvp(gradient, (params,), (v,))[1]
        closed, like = jax.make_jaxpr(forward, return_shape=True)(params, v)
        if "custom_lin[" in str(closed.jaxpr) and not _compiles(closed):
            return jax.vjp(gradient, params)[1](v)[0]
        return jax.tree.unflatten(jax.tree.structure(like), jaxpr_as_fun(closed)(*jax.tree.leaves((params, v))))


def quadratic_form(op: LinearOperator, v: ArrayTree) -> Array:
    """vᵀAv; of a Hessian by differentiation forwards only, which is half of a product's work and of its compilation.

    Raises:
      ValueError: ``v`` has not the structure and shapes of the space.
    """
    if isinstance(op.product, OverExamples) and isinstance(op.product.of_batch, _HessianProduct):
        op.space.check("v", v)
        return jnp.asarray(OverExamples(HessianForm(op.product.of_batch.loss))(op.operands, v))
    return optax.tree.vdot(v, op @ v)


@dataclasses.dataclass(frozen=True)
class HessianForm:
    """vᵀHv on a batch, twice forwards: half of a product's work. By a product where a function has a rule for reverse
    differentiation only."""

    loss: Loss

    def __call__(self, batch: Any, params: ArrayTree, v: ArrayTree) -> Array:
        """The form, a scalar."""
        if "custom_vjp_call" in str(jax.make_jaxpr(self.loss)(params, batch).jaxpr):
            return optax.tree.vdot(v, _HessianProduct(self.loss)(batch, params, v))
        slope = lambda p: jax.jvp(lambda p: self.loss(p, batch), (p,), (v,))[1]
        return jax.jvp(slope, (params,), (v,))[1]


def _compiles(closed: ClosedJaxpr) -> bool:
    """Whether a product by forward differentiation meets no function that has a reverse rule only; what is not used of
    one does not matter, so that it is not enough to look."""
    try:
        jax.jit(jaxpr_as_fun(closed)).lower(*closed.in_avals)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        return False
    return True
