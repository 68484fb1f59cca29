"""Products with the inverse of an operator."""

import dataclasses
import functools

import jax
import optax
from jax import lax

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree
from jaxnet.curvature._lanczos import norm
from jaxnet.curvature._operators import LinearOperator, check_one_batch, flattened, inner, shift, unflattened


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    """What `solve` found.

    Attributes:
      x: the solution, like params.
      residual_norm: ‖b − (A + c I)x‖, of a product taken for it.
      converged: whether it is within the tolerance times ‖b‖.
    """

    x: ArrayTree
    residual_norm: Array
    converged: Array


@dataset.on_automatic_axes
def solve(
    op: LinearOperator,
    b: ArrayTree,
    *,
    damping: Array | float = 0.0,
    tol: Array | float = 1e-5,
    max_matvecs: int | None = None,
) -> Solution:
    """(A + c I)⁻¹ b by conjugate gradients: a Newton step of a damped Hessian, an influence.

    Args:
      op: a symmetric operator A, with A + c I positive definite: a Gauss–Newton or Fisher matrix with c > 0, or a
        Hessian with c above −λ_min. Where it is not, the iteration may find no solution, and ``converged`` says so.
      b: the right-hand side, a pytree like params.
      damping: c.
      tol: of the residual, relative to ‖b‖.
      max_matvecs: a limit on the products; by default ten times the number of params.

    Returns:
      A `Solution`. It can be differentiated by b, and by the operator's params and operands, implicitly.

    Raises:
      TypeError: it is an operator of a data set in batches.
      ValueError: b has not the structure and shapes of params, or a number is out of range.

    Reference:
      Hestenes & Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952; Martens, "Deep Learning via
      Hessian-Free Optimization", ICML 2010.
    """
    check_one_batch("solve", op)
    contract.check_tolerance(tol)
    op.space.check("b", b)
    if max_matvecs is not None:
        contract.check_count("max_matvecs", max_matvecs)
    return _solve(flattened(op), b, damping, tol, max_matvecs)


@functools.partial(jax.jit, static_argnames="max_matvecs")
def _solve(
    op: LinearOperator, b: ArrayTree, damping: Array | float, tol: Array | float, max_matvecs: int | None
) -> Solution:
    damped, given = shift(op, damping), inner(op).space.ravel(b)
    right = jax.tree.map(lambda x, zero: x.astype(zero.dtype), given, op.space.zeros())
    x, _ = jax.scipy.sparse.linalg.cg(damped, right, tol=tol, maxiter=max_matvecs)
    residual = norm(lax.stop_gradient(optax.tree.sub(right, damped @ x)))
    # The recurrence's own residual, by which it ends, drifts from the true one by rounding: hence a margin of 2.
    return Solution(unflattened(op, x), residual, residual <= 2 * tol * norm(lax.stop_gradient(right)))
