"""The largest eigenvalue of the Hessian, with a bound from above."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.curvature import _bound, _rounding
from jaxnet.curvature._follow import LEADING, Leading, followed
from jaxnet.curvature._hessian import chosen, hessian, quadratic_forms
from jaxnet.curvature._operators import LinearOperator, flattened, inner, unflattened
from jaxnet.curvature._products import Differences, HessianProduct, by_derivatives, words_of
from jaxnet.curvature._search import Eigensolver
from jaxnet.mesh import check_together

# Examples whose own Hessian products are taken together.
_AT_ONCE = 64
# With products off by this share of λ_max, by an estimate, nothing is certified.
_ROUGH = 0.1


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sharpness:
    """The largest algebraic eigenvalue λ_max of the loss's Hessian.

    Attributes:
      value: θ <= λ_max, so that 2/θ is the optimistic rate. `jax.grad` of it works where λ_max is simple.
      residual_norm: ‖Hv − θv‖.
      upper_bound: at least λ_max with probability 1 − failure_probability, so that 2/upper_bound is safe; NaN
        after a warm start, for which the bound does not hold, where the loss goes through half precision, and where
        ``product_error`` is more than a tenth of the value. It holds as far as that does, by which it is widened
        √num_matvecs times. Params and a batch in half precision are taken as the same numbers in float32, and λ_max is
        of that matrix.
      num_matvecs: Hessian products spent.
      converged: whether θ was found to be within the tolerance, ``product_error`` included.
      leading: a unit eigenvector and the two Ritz vectors next to it, leaves (3, ...), from which a check nearby
        starts: one alone would hide what has overtaken it. The eigenvector alone where ``ncv`` was given.
      sampling_error: the standard error of vᵀHv over the examples, √(Var vᵀH_n v/N): how far, to first order, λ_max of
        the distribution that the batch was drawn from may be; NaN unless asked for.
      product_error: an estimate of how far a product may be from Hv, for a unit v, by how far the products disagree on
        entries of a symmetric matrix, beyond the rounding of any product. Mostly 0; not so where the loss is all but 0
        and its Hessian the difference of larger numbers, or where it rounds within. Of differences, or the most by
        which those of twice the step differ along ``leading``, if that is more.
      product: how Hv was had, "forward over reverse", "reverse over reverse" or "differences of gradients".
    """

    value: Array
    residual_norm: Array
    upper_bound: Array
    num_matvecs: Array
    converged: Array
    leading: ArrayTree
    sampling_error: Array
    product_error: Array
    product: str = dataclasses.field(metadata={"static": True})

    @property
    def vector(self) -> ArrayTree:
        """A unit eigenvector, like params."""
        return jax.tree.map(lambda x: x[0], self.leading)


@contract.takes_loss
@dataset.on_automatic_axes
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
    product: HessianProduct = by_derivatives,
) -> Sharpness:
    """λ_max of ∂²E/∂ω∂ω′: gradient descent on E is stable at ω for rates below 2/λ_max.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point ω.
      batch: the examples that E is a mean over; or a data set in batches, as for `hessian`.
      key: a `jax.random.key` for the start vector.
      tol: relative accuracy of the value.
      max_matvecs: a limit on the Hessian products; by default enough for any gap that the dtype resolves.
      v0: a start, such as ``leading`` of a result nearby, or one vector like params. The check is then a warm one, of
        about five products: Rayleigh–Ritz in the span of these vectors, widened by residuals.
      ncv: how many Lanczos vectors are kept at most; 4 are the low-memory mode (see `eigsh`).
      failure_probability: δ of ``upper_bound``, over the random start.
      subsample: start from the eigenvector of this many examples, drawn at random. It saves half of the products with
        all of the data or more, which alone are counted; the start is then a warm one.
      sampling_error: whether to measure it, by one more product an example.
      product: how Hv is had, as for `hessian`; where there are no derivatives, `Differences` are taken without a word
        but that in the result.

    Returns:
      A `Sharpness`.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract, or a number is out of range.

    Reference:
      LeCun, Simard & Pearlmutter, "Automatic Learning Rate Maximization by On-Line Estimation of the Hessian's
      Eigenvectors", NIPS 1992; the bound: van Dorsselaer, Hochstenbach & van der Vorst, SIMAX 2000, theorem 3.1.

    Examples:
      >>> loss = lambda w, batch: losses.squared_error(batch[0] @ w, batch[1]).mean()
      >>> sharp = curvature.sharpness(loss, jnp.zeros(2), data.two_gaussians_exact(), key=jax.random.key(0))
      >>> print(f"λ_max = {sharp.value:.2f}, so gradient descent is stable below {2 / sharp.value:.2f}")
      λ_max = 0.84, so gradient descent is stable below 2.38
    """
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability: expected a number in (0, 1), got {failure_probability}")
    contract.check_tolerance(tol)
    batch = dataset.of(batch)
    op = hessian(loss, params, batch, product=product)
    if subsample is not None:
        if v0 is not None:
            raise ValueError("subsample: the start is v0 already; give one of the two")
        v0 = _from_subsample(loss, params, batch, subsample, key, tol, product)
    check_together(params=op.operands[0], v0=v0)
    target = _bound.log_inverse_share(op.space.size, failure_probability)
    flat = flattened(op)
    solver = Eigensolver(flat.space, max_matvecs=max_matvecs, ncv=ncv)
    return _measure(loss, flat, v0, key, tol, target, solver, sampling_error)


@functools.partial(dataset.jit, static_argnames=("loss", "solver", "sampling_error"))
def _measure(
    loss: Loss,
    op: LinearOperator,
    v0: ArrayTree | None,
    key: Array,
    tol: Array | float,
    target: Array | float,
    solver: Eigensolver,
    sampling_error: bool,
) -> Sharpness:
    matrix, way = chosen(inner(op))
    op = flattened(matrix, op.operands[1])
    if v0 is None:
        pairs, end = solver.search(op, solver.start(key), tol)
        num_leading = LEADING if solver.ncv is None else 1
        found = Leading(
            pairs.values[0],
            unflattened(op, solver.leading(end, num_leading)),
            pairs.residual_norms[0],
            pairs.num_matvecs,
            pairs.converged,
            _rounding.product_error(end.lanczos.scale, end.lanczos.disagreement),
        )
        bound = _bound.upper_bound(end.polynomials, lax.stop_gradient(found.value), target)
        rough = end.rough | (found.product_error > _ROUGH * jnp.abs(found.value))
        bound = jnp.where(rough, jnp.nan, bound)
    else:
        found = followed(op, v0, tol, key, solver.max_matvecs)
        bound = jnp.full_like(found.value, jnp.nan)
    apart = _of_differences(matrix, way, found.vectors) if isinstance(way, Differences) else jnp.zeros_like(found.value)
    error = jnp.maximum(found.product_error, apart)
    vector = jax.tree.map(lambda x: x[0], found.vectors)
    spread = jnp.full_like(bound, jnp.nan)
    if sampling_error:
        forms = quadratic_forms(matrix, vector, size=_AT_ONCE)
        # One example has no spread: NaN.
        spread = jnp.std(forms) / jnp.sqrt(forms.size - 1.0)
    return Sharpness(
        value=found.value,
        residual_norm=found.residual_norm,
        # What the products miss is what those of another matrix would, and that is as near in norm as all misses
        # together (Kahan, Parlett & Jiang 1982); its λ_max is as near.
        upper_bound=bound + jnp.sqrt(found.num_matvecs.astype(bound.dtype)) * error,
        num_matvecs=found.num_matvecs,
        converged=found.converged & (apart <= tol * jnp.abs(found.value)),
        leading=found.vectors,
        sampling_error=spread,
        product_error=error,
        product=words_of(way),
    )


def _of_differences(op: LinearOperator, way: Differences, vectors: ArrayTree) -> Array:
    params, data = op.operands
    other = hessian(op.product.of_batch.loss, params, data, product=way.doubled)  # type: ignore[attr-defined]
    apart = dataset.map(lambda v: optax.tree.norm((op - other) @ v), vectors, data=data)
    return lax.stop_gradient(apart.max())


def _from_subsample(
    loss: Loss, params: ArrayTree, batch: Any, size: int, key: Array, tol: float, product: HessianProduct
) -> ArrayTree:
    dataset.check_in_memory("subsample", batch, "pass the eigenvector of one of its batches as v0")
    n = contract.num_examples(batch)
    if not 1 <= size <= n:
        raise ValueError(f"subsample: expected 1 to {n}, the number of examples, got {size}")
    rows = jax.random.choice(jax.random.fold_in(key, 1), n, (size,), replace=False)
    part = jax.tree.map(lambda x: jnp.asarray(x)[rows], batch)
    return sharpness(loss, params, part, key=key, tol=tol, product=product).leading
