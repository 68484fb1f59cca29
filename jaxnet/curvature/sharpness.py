"""The largest eigenvalue of the Hessian, with a bound from above."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.curvature import bound
from jaxnet.curvature.eigsh import check_tolerance, find, make_plan
from jaxnet.curvature.operators import hessian


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sharpness:
    """The largest algebraic eigenvalue λ_max of the loss's Hessian.

    Attributes:
      value: θ <= λ_max, so that 2/θ is the optimistic rate. `jax.grad` of it works where λ_max is simple.
      vector: a unit eigenvector, like params.
      residual_norm: ‖Hv − θv‖.
      upper_bound: at least λ_max with probability 1 − failure_probability, so that 2/upper_bound is safe; NaN
        after a warm start, for which the bound does not hold.
      num_matvecs: Hessian products spent.
      converged: whether θ was found to be within the tolerance.
    """

    value: Array
    vector: ArrayTree
    residual_norm: Array
    upper_bound: Array
    num_matvecs: Array
    converged: Array


def sharpness(
    loss: Loss,
    params: ArrayTree,
    batch: ArrayTree,
    *,
    key: Array,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    v0: ArrayTree | None = None,
    ncv: int | None = None,
    failure_probability: float = 0.05,
) -> Sharpness:
    """λ_max of ∂²E/∂ω∂ω′: gradient descent on E is stable at ω for rates below 2/λ_max.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point ω.
      batch: the examples that E is a mean over.
      key: a `jax.random.key` for the start vector.
      tol: relative accuracy of the value.
      max_matvecs: a limit on the Hessian products; by default enough for any gap that the dtype resolves.
      v0: a start vector like params, such as the eigenvector at a point nearby.
      ncv: how many Lanczos vectors are kept at most; 4 are the low-memory mode (see `eigsh`).
      failure_probability: δ of ``upper_bound``, over the random start.

    Returns:
      A `Sharpness`.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract, or a number is out of range.

    Reference:
      LeCun, Simard & Pearlmutter, "Automatic Learning Rate Maximization by On-Line Estimation of the Hessian's
      Eigenvectors", NIPS 1992; the bound: van Dorsselaer, Hochstenbach & van der Vorst, SIMAX 2000, theorem 3.1.
    """
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability: expected a number in (0, 1), got {failure_probability}")
    check_tolerance(tol)
    op = hessian(loss, params, batch)
    plan = make_plan(op, 1, "LA", max_matvecs, ncv, v0 is not None)
    pairs, end = find(op, v0, key, tol, plan)
    value = pairs.values[0]
    if v0 is None:
        target = bound.log_inverse_share(plan.n, failure_probability)
        upper = bound.upper_bound(end.polynomials, lax.stop_gradient(value), target)
    else:
        upper = jnp.full_like(value, jnp.nan)
    vector = jax.tree.map(lambda x: x[0], pairs.vectors)
    return Sharpness(value, vector, pairs.residual_norms[0], upper, pairs.num_matvecs, pairs.converged)
