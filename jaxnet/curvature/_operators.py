"""Matrices that are known by their products, over pytrees of params."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss

Product = Callable[[Any, Any, Any], Any]


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

    product: Product = dataclasses.field(metadata={"static": True})
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

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        """The sum A + B of two operators over the same params."""
        if jax.tree.map(jnp.shape, self.params) != jax.tree.map(jnp.shape, other.params):
            raise ValueError("a sum needs two operators over params of the same structure and shapes")
        return LinearOperator(_Sum(self.product, other.product), self.params, (self, other))


@dataclasses.dataclass(frozen=True)
class _Sum:
    left: Product
    right: Product

    def __call__(self, params: ArrayTree, operands: Any, v: ArrayTree) -> ArrayTree:
        left, right = operands
        return jax.tree.map(jnp.add, left(v), right(v))


@dataclasses.dataclass(frozen=True)
class _HessianProduct:
    loss: Loss

    def __call__(self, params: ArrayTree, batch: ArrayTree, v: ArrayTree) -> ArrayTree:
        contract.check(self.loss, params, batch)
        gradient = lambda p: jax.grad(self.loss)(p, batch)
        tangent = jax.tree.map(lambda p, t: jnp.asarray(t, jnp.result_type(p)), params, v)
        return jax.jvp(gradient, (params,), (tangent,))[1]


@functools.partial(jax.jit, static_argnames="product")
def _add_product(product: Product, total: ArrayTree, params: ArrayTree, batch: ArrayTree, v: ArrayTree) -> ArrayTree:
    n = contract.num_examples(batch)
    return jax.tree.map(lambda t, x: t + n * x, total, product(params, batch, v))


@dataclasses.dataclass(frozen=True)
class StreamedOperator(LinearOperator):
    """The mean of a matrix over batches, its operands, each weighted by its number of examples.

    A product goes once through the batches, on the host: it is no pytree and not for `jit`. `eigsh` and `sharpness`
    take it.
    """

    def __call__(self, v: ArrayTree) -> ArrayTree:
        """The product Av.

        Raises:
          ValueError: there is no batch, or one does not fit.
        """
        total, n = jax.tree.map(jnp.zeros_like, self.params), 0
        for batch in self.operands:
            total = _add_product(self.product, total, self.params, batch, v)
            n += contract.num_examples(batch)
        if n == 0:
            raise ValueError("batch: expected at least one batch, got none")
        return jax.tree.map(lambda t: t / n, total)


def mean_operator(product: Product, params: ArrayTree, batch: Any) -> LinearOperator:
    """The operator of a product that is a mean over examples, for one batch or a stream of them.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract.
    """
    contract.check_params(params)
    params = jax.tree.map(jnp.asarray, params)
    if dataset.on_host(dataset.of(batch)):
        return StreamedOperator(product, params, batch)
    contract.num_examples(batch)
    return LinearOperator(product, params, batch)


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
    return mean_operator(_HessianProduct(loss), params, batch)


def one_batch(name: str, op: LinearOperator) -> None:
    """Raise where a data set in batches cannot serve."""
    if isinstance(op, StreamedOperator):
        raise TypeError(f"{name}: needs an operator of one batch, got one of a data set in batches")


@dataclasses.dataclass(frozen=True)
class _Shifted:
    product: Product

    def __call__(self, params: ArrayTree, operands: Any, v: ArrayTree) -> ArrayTree:
        op, by = operands
        return jax.tree.map(lambda a, x: a + jnp.asarray(by, x.dtype) * x, op(v), v)


def shift(op: LinearOperator, by: Array | float) -> LinearOperator:
    """A + c I."""
    return LinearOperator(_Shifted(op.product), op.params, (op, jnp.asarray(by)))


@dataclasses.dataclass(frozen=True)
class _Restricted:
    product: Product
    kept: tuple[bool, ...]

    def __call__(self, params: ArrayTree, op: LinearOperator, v: ArrayTree) -> ArrayTree:
        leaves, structure = jax.tree.flatten(op.params)
        given = iter(jax.tree.leaves(v))
        filled = [next(given) if keep else jnp.zeros_like(x) for keep, x in zip(self.kept, leaves, strict=True)]
        result = jax.tree.leaves(op(jax.tree.unflatten(structure, filled)))
        return jax.tree.unflatten(jax.tree.structure(v), [x for keep, x in zip(self.kept, result, strict=True) if keep])


def restrict(op: LinearOperator, mask: ArrayTree) -> LinearOperator:
    """The diagonal block of A that belongs to some leaves of params: one layer, or weights without biases.

    Args:
      op: the operator A.
      mask: a pytree of bools like params, or a prefix of it (one bool for a whole layer): True keeps.

    Returns:
      An operator over params in which the leaves left out are None.

    Raises:
      ValueError: the mask does not fit params, or keeps nothing.
    """
    try:
        kept = jax.tree.map(lambda keep, part: jax.tree.map(lambda _: bool(keep), part), mask, op.params)
    except (ValueError, TypeError) as error:
        raise ValueError(f"mask: expected a pytree of bools like params or a prefix of it; {error}") from None
    if not any(jax.tree.leaves(kept)):
        raise ValueError("mask: expected at least one leaf that is kept")
    params = jax.tree.map(lambda keep, x: x if keep else None, kept, op.params)
    return LinearOperator(_Restricted(op.product, tuple(jax.tree.leaves(kept))), params, op)


@dataclasses.dataclass(frozen=True)
class _Preconditioned:
    product: Product

    def __call__(self, params: ArrayTree, operands: Any, v: ArrayTree) -> ArrayTree:
        op, root = operands
        return jax.tree.map(jnp.divide, op(jax.tree.map(jnp.divide, v, root)), root)


def precondition(op: LinearOperator, diagonal: ArrayTree) -> LinearOperator:
    """P^-½ A P^-½ for a positive diagonal P: symmetric, with the eigenvalues of P⁻¹A.

    Args:
      op: the operator A.
      diagonal: P's entries, a pytree like params; positive, or the eigenvalues are NaN.

    Raises:
      ValueError: the diagonal has not the structure and shapes of params.
    """
    if jax.tree.map(jnp.shape, op.params) != jax.tree.map(jnp.shape, diagonal):
        raise ValueError("diagonal: expected a pytree with the structure and shapes of params")
    return LinearOperator(_Preconditioned(op.product), op.params, (op, jax.tree.map(jnp.sqrt, diagonal)))


def materialize(op: LinearOperator) -> Array:
    """The dense matrix (n, n) of an operator over n numbers, in the order of `jax.flatten_util.ravel_pytree`."""
    flat, unravel = ravel_pytree(op.params)
    columns = jax.lax.map(lambda v: ravel_pytree(op(unravel(v)))[0], jnp.eye(flat.size, dtype=flat.dtype))
    return columns.T


def check_deterministic(op: LinearOperator) -> None:
    """Raise if the product is not the same function twice: then it has no eigenvalues.

    A function of params and batch has no randomness of its own, unless a key or a generator from outside moves while it
    is traced: so it is traced twice. Streamed batches are gone through twice.

    Raises:
      ValueError: the two differ.
    """
    remedy = "a loss must be a function of params and batch alone: fix its dropout key, or put a key into the batch"
    if isinstance(op, StreamedOperator):
        v = jax.tree.map(jnp.ones_like, op.params)
        passes = zip(jax.tree.leaves(op(v)), jax.tree.leaves(op(v)), strict=True)
        # A loader may shuffle, which changes a sum by rounding only.
        if not all(jnp.allclose(a, b, rtol=1e-3, atol=1e-3 * jnp.abs(a).max(), equal_nan=True) for a, b in passes):
            raise ValueError(f"loss: two passes over the batches differ; {remedy}, and let the batches stay the same")
        return
    try:
        one, two = (jax.make_jaxpr(lambda *a: op.product(*a))(op.params, op.operands, op.params) for _ in range(2))
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(f"loss: it keeps a traced value outside of itself, such as a key; {remedy}") from error
    same = str(one.jaxpr) == str(two.jaxpr) and len(one.consts) == len(two.consts)
    if not (same and all(map(_same_constant, one.consts, two.consts))):
        raise ValueError(f"loss: two evaluations at the same params and batch differ; {remedy}")


def _same_constant(a: Any, b: Any) -> bool:
    if a is b or isinstance(a, jax.core.Tracer):
        return a is b
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.array_equal(a, b, equal_nan=True)
