"""The Hessian of a loss."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.curvature._operators import LinearOperator, OverExamples, over_examples
from jaxnet.curvature._products import (
    Gradient,
    HessianProduct,
    by_derivatives,
    forward_over_reverse,
    reverse_over_reverse,
    way_of,
)
from jaxnet.curvature._space import Space


@contract.takes_loss
def hessian(loss: Loss, params: ArrayTree, batch: Any, *, product: HessianProduct = by_derivatives) -> LinearOperator:
    """H = ∂²E/∂ω∂ω′ of the loss E at ``params``, by forward over reverse differentiation.

    One product costs about two gradients, and no matrix is formed. Of a function with a rule for reverse
    differentiation only (a `jax.custom_vjp` whose rule calls itself) the product is taken by reverse over reverse,
    which is as exact, and takes more memory. Where that rule cannot be differentiated either (fused attention, a
    callback) ``product=Differences()`` takes differences of gradients; of the two `sharpness` tells the error.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point ω.
      batch: the examples that E is a mean over; or a data set in batches that does not fit memory: a list of batches
        or a data loader, gone through once a product.
      product: how Hv is had from the gradient: `by_derivatives`, `forward_over_reverse`, `reverse_over_reverse`,
        `Differences`, or a hashable function ``product(gradient, params, v)``.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract; or, at a product, there is no such derivative.

    Reference:
      Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 1994, eq. 2.

    Examples:
      >>> loss = lambda w, batch: losses.squared_error(batch[0] @ w, batch[1]).mean()
      >>> op = curvature.hessian(loss, jnp.zeros(2), data.two_gaussians_exact())
      >>> first = op @ jnp.array([1.0, 0.0])
      >>> print(f"{first[0]:.2f} {first[1]:.2f}")
      0.20 0.32
    """
    contract.check_function("product", product)
    return over_examples(_OfBatch(loss, product), loss, params, batch)


def chosen(op: LinearOperator) -> tuple[LinearOperator, HessianProduct]:
    """A Hessian whose product is by derivatives, by the first way there is, differences included; any other as it is.

    And the way, decided once, by a look at the first batch.
    """
    of_batch = op.product.of_batch  # type: ignore[attr-defined]
    if of_batch.product is not by_derivatives:
        return op, of_batch.product
    params, data = op.operands
    batch = contract.widened(dataset.first(data))
    way = way_of(of_batch.gradient(batch, params), params, params)
    return LinearOperator(OverExamples(_OfBatch(of_batch.loss, way)), op.space, op.operands), way


@dataclasses.dataclass(frozen=True)
class _OfBatch:
    loss: Loss
    product: HessianProduct

    def __call__(self, batch: ArrayTree, params: ArrayTree, v: ArrayTree) -> ArrayTree:
        return self.product(self.gradient(batch, params), params, v)

    def gradient(self, batch: ArrayTree, params: ArrayTree) -> Gradient:
        return jax.grad(_known(self.loss, params, batch))


def _known(loss: Loss, params: ArrayTree, batch: ArrayTree) -> Callable[[ArrayTree], Array]:
    """E as a function of params; NaN, and so are its derivatives, where the point or E is not finite.

    At params that are not finite there is no curvature, also where the product does not read them; nor where the loss
    is not, whatever its derivatives say.
    """
    contract.check(loss, params, batch)
    finite = jnp.stack([jnp.isfinite(p).all() for p in Space.of(params).ravel(params)]).all()

    def known(p: ArrayTree) -> Array:
        value = loss(p, batch)
        holds = finite & jnp.isfinite(lax.stop_gradient(value))
        return value * jnp.where(holds, 1, jnp.nan).astype(value.dtype)

    return known


@dataset.on_automatic_axes
def quadratic_form(op: LinearOperator, v: ArrayTree) -> Array:
    """vᵀAv; of a Hessian by differentiation forwards only, which is half of a product's work and of its compilation.

    Raises:
      ValueError: ``v`` has not the structure and shapes of the space.
    """
    if isinstance(op.product, OverExamples) and isinstance(op.product.of_batch, _OfBatch):
        op.space.check("v", v)
        of_batch = op.product.of_batch
        return jnp.asarray(OverExamples(_HessianForm(of_batch.loss, of_batch.product)).mean(op.operands, v))
    return optax.tree.vdot(v, op @ v)


@dataset.on_automatic_axes
def quadratic_forms(op: LinearOperator, v: ArrayTree, *, size: int | None = None) -> Array:
    """vᵀH_nv (N,) of each example's own Hessian, by differentiation forwards only; their mean is the `quadratic_form`.

    Args:
      op: of `hessian`.
      v: a vector like params.
      size: how many examples are worked on at once; by default all of them.

    Raises:
      TypeError: the operator is no Hessian of a loss.
      ValueError: ``v`` has not the structure and shapes of the space.
    """
    if not (isinstance(op.product, OverExamples) and isinstance(op.product.of_batch, _OfBatch)):
        raise TypeError("quadratic_forms: expected an operator of jaxnet.curvature.hessian")
    op.space.check("v", v)
    of_batch, (params, data) = op.product.of_batch, op.operands
    v = jax.tree.map(lambda p, x: jnp.asarray(x, p.dtype), params, v)
    return dataset.rows(_Forms(_HessianForm(of_batch.loss, of_batch.product), size), data, params, v)


@dataclasses.dataclass(frozen=True)
class _Forms:
    form: "_HessianForm"
    size: int | None

    def __call__(self, batch: Any, params: ArrayTree, v: ArrayTree) -> Array:
        one = lambda example: self.form(jax.tree.map(lambda x: x[None], example), params, v)
        examples = jax.tree.map(jnp.asarray, contract.widened(batch))
        return dataset.rows(jax.vmap(one), examples, size=self.size)


@dataclasses.dataclass(frozen=True)
class _HessianForm:
    """vᵀHv on a batch, twice forwards: half of a product's work. By a product where that is by differences, or where a
    function has a rule for reverse differentiation only."""

    loss: Loss
    product: HessianProduct

    def __call__(self, batch: Any, params: ArrayTree, v: ArrayTree) -> Array:
        """The form, a scalar."""
        by_derivative = self.product in (by_derivatives, forward_over_reverse, reverse_over_reverse)
        if not by_derivative or "custom_vjp_call" in str(jax.make_jaxpr(self.loss)(params, batch).jaxpr):
            return optax.tree.vdot(v, _OfBatch(self.loss, self.product)(batch, params, v))
        known = _known(self.loss, params, batch)
        slope = lambda p: jax.jvp(known, (p,), (v,))[1]
        return jax.jvp(slope, (params,), (v,))[1]
