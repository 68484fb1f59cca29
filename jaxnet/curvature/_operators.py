"""An algebra of matrices that are known by their products, over pytrees."""

import dataclasses
import fnmatch
import numbers
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxnet import contract, dataset, losses
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.curvature._space import Space
from jaxnet.mesh import check_together, laid_out_like

Product = Callable[[Any, Any], Any]


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearOperator:
    """A symmetric matrix A over a space of pytrees: ``A @ v`` is the product, ``A + B``, ``A - B``, ``-A``, ``2 * A``.

    Attributes:
      product: ``product(operands, v) -> Av``; static and hashable, so that operators of equal losses share one
        compilation.
      space: the `Space` of its vectors.
      operands: what the product reads: the point at which the matrix is taken, a batch, other operators.
    """

    product: Product = dataclasses.field(metadata={"static": True})
    space: Space = dataclasses.field(metadata={"static": True})
    operands: Any

    @dataset.on_automatic_axes
    def __matmul__(self, v: ArrayTree) -> ArrayTree:
        """The product Av.

        Raises:
          ValueError: ``v`` has not the structure and shapes of the space.
        """
        self.space.check("v", v)
        return self.product(self.operands, v)

    def __call__(self, v: ArrayTree) -> ArrayTree:
        """The same, for what takes a matrix as a function."""
        return self @ v

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        """A + B, over one space."""
        if not isinstance(other, LinearOperator):
            return NotImplemented
        if (self.space.structure, self.space.shapes) != (other.space.structure, other.space.shapes):
            raise ValueError("a sum needs two operators over params of the same structure and shapes")
        return LinearOperator(_sum, self.space, (self, other))

    def __sub__(self, other: "LinearOperator") -> "LinearOperator":
        """A − B."""
        return self + -other if isinstance(other, LinearOperator) else NotImplemented

    def __neg__(self) -> "LinearOperator":
        """−A."""
        return -1 * self

    def __rmul__(self, factor: Array | float) -> "LinearOperator":
        """c A for a number c."""
        is_number = isinstance(factor, numbers.Number) or getattr(factor, "shape", None) == ()
        if not is_number or jnp.iscomplexobj(factor):
            return NotImplemented
        return LinearOperator(_multiple, self.space, (self, jnp.asarray(factor)))

    __mul__ = __rmul__
    # NumPy's numbers leave the product to the operator.
    __array_ufunc__ = None


def _sum(operands: Any, v: ArrayTree) -> ArrayTree:
    left, right = operands
    return jax.tree.map(jnp.add, left @ v, right @ v)


def _multiple(operands: Any, v: ArrayTree) -> ArrayTree:
    op, factor = operands
    return jax.tree.map(lambda x: factor.astype(x.dtype) * x, op @ v)


def shift(op: LinearOperator, by: Array | float) -> LinearOperator:
    """A + c I."""
    return LinearOperator(_shifted, op.space, (op, jnp.asarray(by)))


def _shifted(operands: Any, v: ArrayTree) -> ArrayTree:
    op, by = operands
    return jax.tree.map(lambda a, x: a + by.astype(x.dtype) * x, op @ v, v)


def flattened(op: LinearOperator, starts: tuple[Any, ...] | None = None) -> LinearOperator:
    """The same matrix over vectors as `Space.ravel` lays them out, which compile once and not once a leaf.

    Make it outside of `jit` and hand it in, or hand in its space's ``starts``: they are operands, and an argument then.
    """
    check_operator(op)
    return LinearOperator(_flattened, op.space.flat, (op, op.space.starts if starts is None else starts))


def _flattened(operands: Any, v: tuple[Array, ...]) -> tuple[Array, ...]:
    op, starts = operands
    return op.space.ravel(op @ op.space.unravel(v, starts))


def unflattened(op: LinearOperator, v: tuple[Array, ...]) -> ArrayTree:
    """What a vector of an operator that `flattened` made stands for; or several, with a leading axis."""
    return inner(op).space.unravel(v, op.operands[1])


def restrict(op: LinearOperator, mask: ArrayTree | str) -> LinearOperator:
    """The diagonal block of A that belongs to some leaves of params: one layer, or weights without biases.

    Args:
      op: the operator A.
      mask: a pytree of bools like params, or a prefix of it (one bool for a whole layer): True keeps. Or a pattern of
        the leaves' names, as ``op.space.names`` lists them, such as ``"0/*"`` or ``"*/kernel"``, in which a star stands
        for any characters.

    Returns:
      An operator over params in which the leaves left out are None.

    Raises:
      TypeError: an entry of the mask is no bool.
      ValueError: the mask does not fit params, or keeps nothing.
    """
    if isinstance(mask, str):
        names = op.space.names
        matching = [fnmatch.fnmatchcase(name, mask) for name in names]
        if not any(matching):
            raise ValueError(f"mask: no leaf's name is like {mask!r}; they are {', '.join(names)}")
        mask = jax.tree.unflatten(op.space.structure, matching)
    for entry in jax.tree.leaves(mask):
        if not isinstance(entry, (bool, np.bool_)):
            raise TypeError(f"mask: expected bools, got {type(entry).__name__}")
    places = jax.tree.unflatten(op.space.structure, range(op.space.structure.num_leaves))
    try:
        kept = jax.tree.leaves(jax.tree.map(lambda keep, part: jax.tree.map(lambda _: bool(keep), part), mask, places))
    except (ValueError, TypeError) as error:
        raise ValueError(f"mask: expected a pytree of bools like params or a prefix of it; {error}") from None
    if not any(kept):
        raise ValueError("mask: expected at least one leaf that is kept")
    only = lambda entries: tuple(entry for entry, keep in zip(entries, kept, strict=True) if keep)
    left = jax.tree.unflatten(op.space.structure, [0 if keep else None for keep in kept])
    space = Space(jax.tree.structure(left), only(op.space.shapes), only(op.space.dtypes), op.space.apart)
    return LinearOperator(_Restricted(tuple(kept)), space, op)


@dataclasses.dataclass(frozen=True)
class _Restricted:
    kept: tuple[bool, ...]

    def __call__(self, op: LinearOperator, v: ArrayTree) -> ArrayTree:
        given, structure = jax.tree.flatten(v)
        parts = iter(given)
        zeros = jax.tree.leaves(op.space.zeros())
        filled = [next(parts) if keep else zero for keep, zero in zip(self.kept, zeros, strict=True)]
        result = jax.tree.leaves(op @ jax.tree.unflatten(op.space.structure, filled))
        return jax.tree.unflatten(structure, [x for keep, x in zip(self.kept, result, strict=True) if keep])


def precondition(op: LinearOperator, diagonal: ArrayTree) -> LinearOperator:
    """P^-½ A P^-½ for a positive diagonal P: symmetric, with the eigenvalues of P⁻¹A.

    Args:
      op: the operator A.
      diagonal: P's entries, a pytree like params; positive, or the eigenvalues are NaN.

    Raises:
      ValueError: the diagonal has not the structure and shapes of params.
    """
    op.space.check("diagonal", diagonal)
    return LinearOperator(_preconditioned, op.space, (op, jax.tree.map(jnp.sqrt, diagonal)))


def _preconditioned(operands: Any, v: ArrayTree) -> ArrayTree:
    op, root = operands
    return jax.tree.map(jnp.divide, op @ jax.tree.map(jnp.divide, v, root), root)


@dataset.on_automatic_axes
def materialize(op: LinearOperator) -> Array:
    """The dense matrix (n, n) of an operator over n numbers, in the order of `jax.flatten_util.ravel_pytree`.

    Raises:
      TypeError: it is an operator of a data set in batches.
    """
    check_one_batch("materialize", op)
    flat, unravel = ravel_pytree(op.space.zeros())
    columns = jax.lax.map(lambda v: ravel_pytree(op @ unravel(v))[0], jnp.eye(flat.size, dtype=flat.dtype))
    return columns.T


def check_operator(op: Any) -> None:
    """Raise unless it is an operator.

    Raises:
      TypeError: it is something else, such as a pytree.
    """
    if not isinstance(op, LinearOperator):
        raise TypeError(f"op: expected an operator, such as hessian(loss, params, batch), got {type(op).__name__}")


def check_one_batch(name: str, op: LinearOperator) -> None:
    """Raise where a data set in batches cannot serve."""
    check_operator(op)
    dataset.check_in_memory(name, op, "take the operator of a sample that fits in memory, or eigsh of this one")


@dataclasses.dataclass(frozen=True)
class OverExamples:
    """The product of a matrix that is a mean over examples, from ``of_batch(batch, params, v)``."""

    of_batch: Callable[[Any, Any, Any], Any]

    def __call__(self, operands: Any, v: ArrayTree) -> ArrayTree:
        """Of the operands ``(params, data)``."""
        return laid_out_like(operands[0], self.mean(operands, v))

    def mean(self, operands: Any, v: ArrayTree) -> Any:
        """The same of any shape, where ``of_batch`` gives something else than a product."""
        params, data = operands
        v = jax.tree.map(lambda p, t: jnp.asarray(t, jnp.result_type(p)), params, v)
        return dataset.mean(_Widened(self.of_batch), data, params, laid_out_like(params, v))


@dataclasses.dataclass(frozen=True)
class _Widened:
    of_batch: Callable[[Any, Any, Any], Any]

    def __call__(self, batch: Any, params: ArrayTree, v: ArrayTree) -> ArrayTree:
        return self.of_batch(contract.widened(batch), params, v)


def over_examples(
    of_batch: Callable[[Any, Any, Any], Any], loss: Loss, params: ArrayTree, batch: Any
) -> LinearOperator:
    """The operator of such a matrix of a loss, for one batch or a data set in batches.

    Params and a batch in half precision are taken as the same numbers in float32: a product in half precision is too
    rough for an eigenvalue, and nothing could be certified by it.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract.
    """
    contract.check_params(params)
    params = contract.widened(params)
    space, batch = Space.of(params), dataset.of(batch)
    if not dataset.on_host(batch):
        contract.num_examples(batch)
        batch = contract.widened(batch)
    check_together(params=params, batch=batch)
    losses.check_parts(loss, params, batch)
    return LinearOperator(OverExamples(of_batch), space, (jax.tree.map(jnp.asarray, params), batch))


class Seen(NamedTuple):
    """What a trace tells of an operator.

    Attributes:
      rough: whether a number on the way is in half precision.
      beside: whether it reads tracers that are none of its operands, as a loss does that closes over one.
    """

    rough: bool
    beside: bool


def check_deterministic(op: LinearOperator) -> Seen:
    """Raise if the product is not the same function twice: then it has no eigenvalues.

    A function of params and batch has no randomness of its own, unless a key or a generator from outside moves while it
    is traced: so it is traced twice. Streamed batches are gone through twice.

    Raises:
      ValueError: the two differ.
    """
    remedy = "a loss must be a function of params and batch alone: fix its dropout key, or put a key into the batch"
    if dataset.on_host(op):
        v = jax.tree.map(jnp.ones_like, op.space.zeros())
        passes = zip(jax.tree.leaves(op @ v), jax.tree.leaves(op @ v), strict=True)
        # A loader may shuffle, which changes a sum by rounding only.
        if not all(jnp.allclose(a, b, rtol=1e-3, atol=1e-3 * jnp.abs(a).max(), equal_nan=True) for a, b in passes):
            raise ValueError(f"loss: two passes over the batches differ; {remedy}, and let the batches stay the same")
        return Seen(False, False)
    function, given = _to_trace(inner(op))
    try:
        one, two = (jax.make_jaxpr(lambda *a: function(*a))(*given) for _ in range(2))
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(f"loss: it keeps a traced value outside of itself, such as a key; {remedy}") from error
    first, second = str(one.jaxpr), str(two.jaxpr)
    if first != second or len(one.consts) != len(two.consts) or not all(map(_same_constant, one.consts, two.consts)):
        raise ValueError(f"loss: two evaluations at the same params and batch differ; {remedy}")
    rough = re.search(r"\b(bf16|f16|f8\w*|f4\w*)\[", first) is not None
    return Seen(rough, any(isinstance(x, jax.core.Tracer) for x in one.consts))


def inner(op: LinearOperator) -> LinearOperator:
    """The operator that `flattened` made this of, or itself."""
    return op.operands[0] if op.product is _flattened else op


def _to_trace(op: LinearOperator) -> tuple[Callable[..., Any], Any]:
    """What of an operator may be random, and its arguments: of a matrix over examples the loss alone is traced, which
    takes a fifth of the product's time. As it was written: what is traced once is the same for ever."""
    if isinstance(op.product, OverExamples) and hasattr(op.product.of_batch, "loss"):
        return contract.as_written(op.product.of_batch.loss), op.operands
    return op.product, (op.operands, op.space.zeros())


def _same_constant(a: Any, b: Any) -> bool:
    if a is b or isinstance(a, jax.core.Tracer):
        return a is b
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.array_equal(a, b, equal_nan=True)
