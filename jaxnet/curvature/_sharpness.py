"""The largest eigenvalue of the Hessian, with a bound from above."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.curvature import _bound
from jaxnet.curvature._eigsh import check_tolerance, find, make_plan
from jaxnet.curvature._operators import LinearOperator, StreamedOperator, hessian
from jaxnet.curvature._search import Plan


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
      sampling_error: the standard error of vᵀHv over the examples, √(Var vᵀH_n v/N): how far, to first order, λ_max of
        the distribution that the batch was drawn from may be; NaN unless asked for.
    """

    value: Array
    vector: ArrayTree
    residual_norm: Array
    upper_bound: Array
    num_matvecs: Array
    converged: Array
    sampling_error: Array


def sharpness(
    loss: Loss,
    params: ArrayTree,
    batch: Any,
    *,
    key: Array,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    v0: ArrayTree | None = None,
    ncv: int | None = None,
    failure_probability: float = 0.05,
    subsample: int | None = None,
    sampling_error: bool = False,
) -> Sharpness:
    """λ_max of ∂²E/∂ω∂ω′: gradient descent on E is stable at ω for rates below 2/λ_max.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point ω.
      batch: the examples that E is a mean over; or a data set in batches, as for `hessian`.
      key: a `jax.random.key` for the start vector.
      tol: relative accuracy of the value.
      max_matvecs: a limit on the Hessian products; by default enough for any gap that the dtype resolves.
      v0: a start vector like params, such as the eigenvector at a point nearby.
      ncv: how many Lanczos vectors are kept at most; 4 are the low-memory mode (see `eigsh`).
      failure_probability: δ of ``upper_bound``, over the random start.
      subsample: start from the eigenvector of this many examples, drawn at random. It saves half of the products with
        all of the data or more, which alone are counted; the start is then a warm one.
      sampling_error: whether to measure it, by one more product an example.

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
    if isinstance(op, StreamedOperator) and (sampling_error or subsample is not None):
        raise ValueError("subsample, sampling_error: of one batch only, not of a data set in batches")
    if subsample is not None:
        if v0 is not None:
            raise ValueError("subsample: the start is v0 already; give one of the two")
        v0 = _from_subsample(loss, params, batch, subsample, key, tol)
    plan = make_plan(op, 1, "LA", max_matvecs, ncv, v0 is not None)
    target = _bound.log_inverse_share(plan.n, failure_probability)
    if isinstance(op, StreamedOperator):
        return _measure(loss, op, v0, key, tol, target, plan, sampling_error)
    return _compiled(loss, op, v0, key, tol, target, plan, sampling_error)


def _measure(
    loss: Loss,
    op: LinearOperator,
    v0: ArrayTree | None,
    key: Array,
    tol: Array | float,
    target: Array | float,
    plan: Plan,
    sampling_error: bool,
) -> Sharpness:
    pairs, end = find(op, v0, key, tol, plan)
    value, vector = pairs.values[0], jax.tree.map(lambda x: x[0], pairs.vectors)
    if not isinstance(op, StreamedOperator):
        # A loss that is not finite has no curvature, whatever its derivatives say.
        value += 0 * lax.stop_gradient(loss(op.params, op.operands)).astype(value.dtype)
    unknown = jnp.full_like(value, jnp.nan)
    return Sharpness(
        value=value,
        vector=vector,
        residual_norm=pairs.residual_norms[0],
        upper_bound=unknown if plan.warm else _bound.upper_bound(end.polynomials, lax.stop_gradient(value), target),
        num_matvecs=pairs.num_matvecs,
        converged=pairs.converged & jnp.isfinite(value),
        sampling_error=_sampling_error(loss, op.params, op.operands, vector) if sampling_error else unknown,
    )


_compiled = jax.jit(_measure, static_argnames=("loss", "plan", "sampling_error"))


def _from_subsample(loss: Loss, params: ArrayTree, batch: ArrayTree, size: int, key: Array, tol: float) -> ArrayTree:
    n = contract.num_examples(batch)
    if not 1 <= size <= n:
        raise ValueError(f"subsample: expected 1 to {n}, the number of examples, got {size}")
    rows = jax.random.choice(jax.random.fold_in(key, 1), n, (size,), replace=False)
    part = jax.tree.map(lambda x: jnp.asarray(x)[rows], batch)
    return sharpness(loss, params, part, key=key, tol=tol).vector


def _sampling_error(loss: Loss, params: ArrayTree, batch: ArrayTree, vector: ArrayTree) -> Array:
    def form(example: ArrayTree) -> Array:
        return optax.tree.vdot(vector, hessian(loss, params, jax.tree.map(lambda x: x[None], example))(vector))

    forms = lax.map(form, jax.tree.map(jnp.asarray, batch), batch_size=64)
    # One example has no spread: NaN.
    return jnp.std(forms) / jnp.sqrt(forms.size - 1.0)
