"""Matrices that are known by their products, over pytrees of params."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree, Loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearOperator:
    """A symmetric matrix A over pytrees shaped like ``params``: ``op(v)`` is Av.

    Attributes:
      product: ``product(params, operands, v) -> Av``; static and hashable, so that operators of equal losses
        share one compilation.
      params: the point at which the matrix is taken, and the structure of its vectors.
      operands: what else the product reads, such as the batch.
    """

    product: Callable[[Any, Any, Any], Any] = dataclasses.field(metadata={"static": True})
    params: ArrayTree
    operands: ArrayTree

    def __call__(self, v: ArrayTree) -> ArrayTree:
        """The product Av.

        Raises:
          ValueError: ``v`` has not the structure and shapes of ``params``.
        """
        expected, got = jax.tree.map(jnp.shape, self.params), jax.tree.map(jnp.shape, v)
        if expected != got:
            raise ValueError(f"v: expected a pytree like params, {expected}, got {got}")
        return self.product(self.params, self.operands, v)


@dataclasses.dataclass(frozen=True)
class _HessianProduct:
    loss: Loss

    def __call__(self, params: ArrayTree, batch: ArrayTree, v: ArrayTree) -> ArrayTree:
        gradient = lambda p: jax.grad(self.loss)(p, batch)
        tangent = jax.tree.map(lambda p, t: jnp.asarray(t, jnp.result_type(p)), params, v)
        return jax.jvp(gradient, (params,), (tangent,))[1]


def hessian(loss: Loss, params: ArrayTree, batch: ArrayTree) -> LinearOperator:
    """H = ∂²E/∂ω∂ω′ of the loss E at ``params``, by forward over reverse differentiation.

    One product costs about two gradients, and no matrix is formed.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point ω.
      batch: the examples that E is a mean over.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract.

    Reference:
      Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 1994, eq. 2.
    """
    contract.check_params(params)
    contract.num_examples(batch)
    return LinearOperator(_HessianProduct(loss), jax.tree.map(jnp.asarray, params), batch)


def materialize(op: LinearOperator) -> Array:
    """The dense matrix (n, n) of an operator over n numbers, in the order of `jax.flatten_util.ravel_pytree`."""
    flat, unravel = ravel_pytree(op.params)
    columns = jax.lax.map(lambda v: ravel_pytree(op(unravel(v)))[0], jnp.eye(flat.size, dtype=flat.dtype))
    return columns.T
