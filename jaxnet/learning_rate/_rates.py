"""Learning rates in closed form."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnet import contract, dataset, losses
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.curvature import hessian, quadratic_form, quadratic_forms
from jaxnet.per_example import PerExampleGradients, gradients


def optimal(largest: Array | float, smallest: Array | float | None = None) -> Array:
    """η_opt = 1/λ_max; or 2/(λ_max + λ_min), the best constant rate on a quadratic, where both ends are known.

    Args:
      largest: λ_max, in units of the loss over params squared.
      smallest: λ_min, if known.

    Returns:
      The rate; inf for zero curvature, NaN where the curvature is negative and no rate follows from it.

    Reference:
      LeCun et al., "Efficient BackProp", 1998, eqs. 21 and 33.

    Examples:
      >>> print(learning_rate.optimal(4.0), learning_rate.optimal(4.0, smallest=1.0))
      0.25 0.4
    """
    curvature = jnp.asarray(largest) if smallest is None else (jnp.asarray(largest) + smallest) / 2
    return _inverse(curvature)


def maximal(sharpness: Array | float, *, momentum: float = 0.0, nesterov: bool = False) -> Array:
    """The rate beyond which gradient descent diverges along the sharpest direction of a quadratic.

    2/λ without momentum; (2 + 2β)/λ for the heavy ball; (2 + 2β)/((1 + 2β)λ) for Nesterov.

    Args:
      sharpness: λ_max.
      momentum: β in [0, 1), as `optax.sgd` means it.
      nesterov: which of the two.

    Returns:
      The rate; inf for zero curvature, NaN where it is negative.

    Raises:
      ValueError: the momentum is not in [0, 1).

    Reference:
      Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability", 2021, eq. 1.

    Examples:
      >>> print(learning_rate.maximal(4.0), f"{learning_rate.maximal(4.0, momentum=0.9):.2f}")
      0.5 0.95
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
    factor = (2 + 2 * momentum) / (1 + 2 * momentum if nesterov else 1)
    return factor * _inverse(jnp.asarray(sharpness))


def _inverse(curvature: Array) -> Array:
    curvature = curvature.astype(jnp.promote_types(curvature.dtype, jnp.float32))
    return jnp.where(curvature < 0, jnp.nan, 1 / jnp.abs(curvature))


def linear_to_zero(peak: float, num_steps: int, *, limit: float = float("inf")) -> optax.Schedule:
    """A schedule for a run of so many steps: from a peak down to 0 in a straight line.

    Where the peak is above the limit of stability at the start, it is led up from 0 first, over a tenth of the steps:
    the landscape has to flatten before it bears the rate.

    Args:
      peak: the rate.
      num_steps: of the run.
      limit: the largest rate that is stable at the start; where it is not known, NaN or infinity.

    Raises:
      TypeError, ValueError: ``num_steps`` is no whole number from 1 on.
    """
    contract.check_count("num_steps", num_steps)
    if not peak > limit:
        return optax.linear_schedule(peak, 0.0, num_steps)
    rising = max(1, num_steps // 10)
    parts = optax.linear_schedule(0.0, peak, rising), optax.linear_schedule(peak, 0.0, num_steps - rising)
    return optax.join_schedules(parts, [rising])


@contract.takes_loss
def greedy(loss: Loss, params: ArrayTree, batch: Any) -> Array:
    """η = g·g / g·Hg, which minimises the quadratic model of the loss along its own gradient g.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point.
      batch: the examples, or a data set in batches.

    Returns:
      The rate; NaN where g·Hg is negative.

    Reference:
      McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, eq. 2.5 (ε_max).
    """
    squared, curved = _greedy_parts(loss, params, dataset.of(batch))
    return squared * _inverse(curved)


@functools.partial(dataset.jit, static_argnames="loss")
def _greedy_parts(loss: Loss, params: ArrayTree, data: Any) -> tuple[Array, Array]:
    # A gradient in half precision would be rounded by more than its products are.
    params, data = contract.widened(params), data if dataset.on_host(data) else contract.widened(data)
    gradient = dataset.mean(contract.ValueAndGrad(loss), data, params)[1]
    return optax.tree.norm(gradient, squared=True), quadratic_form(hessian(loss, params, data), gradient)


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoisyCurvature:
    """What one step of SGD sees of curvature: on average E falls by η|g|² − ½η²(g·Hg + tr(HΣ)/B).

    Attributes:
      gradient_squared: |g|².
      along_gradient: g·Hg.
      along_noise: tr(HΣ), with the covariance Σ of the examples' gradients.
      standard_error: of ``along_noise``, over its probes.
    """

    gradient_squared: Array
    along_gradient: Array
    along_noise: Array
    standard_error: Array

    @property
    def greedy(self) -> Array:
        """ε_max = |g|²/g·Hg, the best rate for a step without noise."""
        return self.gradient_squared * _inverse(self.along_gradient)

    @property
    def noise_scale(self) -> Array:
        """B_noise = tr(HΣ)/g·Hg, from which batch size on larger ones buy little; NaN unless noise and gradient both
        meet positive curvature, without which neither says what a step loses.
        """
        return self._over_gradient(self.along_noise)

    @property
    def noise_scale_error(self) -> Array:
        """Its standard error, over the probes of tr(HΣ)."""
        return self._over_gradient(self.standard_error)

    def _over_gradient(self, value: Array) -> Array:
        known = (self.along_gradient > 0) & (self.along_noise >= 0)
        return jnp.where(known, value / self.along_gradient, jnp.nan)


@contract.takes_loss
def noisy_curvature(loss: Loss, params: ArrayTree, batch: Any, *, key: Array, num_probes: int = 32) -> NoisyCurvature:
    """g·g, g·Hg and tr(HΣ) at a point, without N Hessian products.

    A probe is u = Σ_n z_n (g_n − ḡ)/√(N − 1) with random signs z: its covariance is Σ, so u·Hu averages to tr(HΣ).

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples.
      params: the point.
      batch: N >= 2 examples, or a data set in batches, gone through twice a probe.
      key: a `jax.random.key` for the signs.
      num_probes: how many u to average over.

    Returns:
      A `NoisyCurvature`.

    Raises:
      ValueError: N is 1, which shows no noise.

    Reference:
      McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, eqs. 2.7 and 2.8.
    """
    return of_gradients(gradients(loss, params, batch), key, num_probes)[0]


@functools.partial(dataset.jit, static_argnames="num_probes")
def of_gradients(
    grads: PerExampleGradients, key: Array, num_probes: int, leading: ArrayTree | None = None
) -> tuple[NoisyCurvature, Array]:
    """The same from gradients at hand; and λ_max's sampling error, by its eigenvector, the first of ``leading``.

    For that all forms are found example by example, so that they are compiled once.
    """
    n, loss = grads.num_examples, grads.loss
    if n < 2:
        raise ValueError("batch: the gradient's noise needs 2 examples or more, got 1")
    op = hessian(loss, grads.params, grads.batch)
    size = loss.size if isinstance(loss, losses.ChunkedLoss) else None

    def sizes(row: tuple[Array, Array]) -> tuple[Array, ...]:
        weights, share = row
        u = contract.widened(grads.weighted_sum(weights))
        if leading is None:
            return optax.tree.norm(u, squared=True), quadratic_form(op, u), jnp.full_like(share, jnp.nan)
        forms = quadratic_forms(op, jax.tree.map(lambda u, v: u + share * v[0], u, leading), size=size)
        return optax.tree.norm(u, squared=True), forms.mean(), forms.std(ddof=1) / n**0.5

    # Σ z_n (g_n − ḡ) is one weighted sum: the mean's share moves into the weights. The first one is ḡ itself; where
    # there is an eigenvector, the last one is nothing beside it.
    signs = jax.random.rademacher(key, (num_probes, n), dtype=jnp.result_type(float))
    probes = (signs - signs.mean(axis=1, keepdims=True)) / jnp.sqrt(n - 1.0)
    rows = jnp.concatenate([jnp.full((1, n), 1 / n), probes, jnp.zeros((0 if leading is None else 1, n))])
    shares = jnp.where(jnp.arange(len(rows)) > num_probes, 1.0, 0.0)
    squares, values, spreads = dataset.map(sizes, (rows, shares), data=grads.batch)
    found = NoisyCurvature(
        gradient_squared=squares[0],
        along_gradient=values[0],
        along_noise=values[1 : num_probes + 1].mean(),
        standard_error=values[1 : num_probes + 1].std(ddof=1) / num_probes**0.5,
    )
    return found, spreads[-1]


def for_batch_size(
    rate: Array | float, noise_scale: Array | float, batch_size: Array | int, *, num_examples: int | None = None
) -> Array:
    """η(B) = ε_max/(1 + B_noise/B): proportional to B for small batches, ε_max for large ones.

    Args:
      rate: ε_max, the best rate without noise.
      noise_scale: B_noise, in examples; see `noisy_curvature`.
      batch_size: B >= 1, or several.
      num_examples: N, where batches are drawn from N examples without replacement: (N − B)/(B(N − 1)) then replaces
        1/B, so that the whole set has no noise.

    Returns:
      The rate for each B; NaN where ``rate`` or ``noise_scale`` is NaN, the noise is negative, or B is below 1 or
      above N.

    Reference:
      McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, eq. 2.6.

    Examples:
      >>> print(learning_rate.for_batch_size(1.0, 24.0, jnp.array([1, 8, 24])))
      [0.04 0.25 0.5 ]
    """
    noise_scale, size = jnp.asarray(noise_scale), jnp.asarray(batch_size)
    share = 1 / size
    if num_examples is not None and num_examples > 1:
        share = share * (num_examples - size) / (num_examples - 1)
    known = (noise_scale >= 0) & (size >= 1) & (share >= 0)
    return jnp.where(known, rate / (1 + noise_scale * share), jnp.nan)
