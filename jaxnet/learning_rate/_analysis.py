"""All that curvature and noise say of the learning rate at a point, in one value."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss, UserError, check_batch_size
from jaxnet.curvature import Sharpness, sharpness
from jaxnet.learning_rate._rates import NoisyCurvature, for_batch_size, maximal, noisy_curvature, optimal
from jaxnet.per_example import NoiseScale, check_independent, noise_scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Analysis:
    """What the loss's curvature and its gradient's noise say of the learning rate.

    Attributes:
      sharpness: λ_max of the full-batch Hessian, certified, with its sampling error.
      noise: the gradient's noise scale, from per-example gradients.
      curvature: g·g, g·Hg and tr(HΣ).
      num_examples: N.
    """

    sharpness: Sharpness
    noise: NoiseScale
    curvature: NoisyCurvature
    num_examples: int = dataclasses.field(metadata={"static": True})

    @property
    def optimal(self) -> Array:
        """η_opt = 1/λ_max."""
        return optimal(self.sharpness.value)

    @property
    def maximal(self) -> Array:
        """η_max = 2/λ_max from the eigenvalue found, which is never above the true one: the optimistic limit."""
        return maximal(self.sharpness.value)

    @property
    def safe_maximal(self) -> Array:
        """2 over the upper bound of λ_max: the limit that holds with the bound's probability."""
        return maximal(self.sharpness.upper_bound)

    @property
    def critical_batch_size(self) -> Array:
        """B_crit = B_noise, from which on larger batches buy little: η(B) is half of the full batch's there.

        tr(HΣ)/g·Hg where both are positive, S/|ḡ|² elsewhere.
        """
        hessian_scale = self.curvature.noise_scale
        usable = (self.curvature.along_gradient > 0) & (self.curvature.along_noise > 0)
        return jnp.where(usable, hessian_scale, self.noise.trace / self.noise.mean_squared)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """1, 2, 4, … and N."""
        return (*(2**i for i in range((self.num_examples - 1).bit_length())), self.num_examples)

    def limit(self, batch_size: int | None) -> Array:
        """η_max for batches of B: 2λ/(λ² + p Var(vᵀH_nv)) with p = (N − B)/(B(N − 1)); None is the full batch.

        Where SGD's mean square along the sharpest direction v starts to grow. Beyond it SGD is unstable; another
        direction may be so before, which `sgd_stability` tells exactly where no curvature is negative.

        Raises:
          ValueError: B is not in 1…N.
        """
        if batch_size is None:
            return self.maximal
        n, value = self.num_examples, self.sharpness.value
        check_batch_size(batch_size, n)
        variance = self.sharpness.sampling_error**2 * (n - 1)
        return 2 * value / (value**2 + variance * (n - batch_size) / (batch_size * (n - 1)))

    def rate(self, batch_size: int | None) -> Array:
        """The rate to train at: 1/λ_max for the full batch (None), else min(1/λ_max, ε_max)/(1 + B_noise/B).

        For batches of these N examples without replacement, (N − B)/(B(N − 1)) stands in place of 1/B.
        McCandlish's ε_max is best for one step along the gradient, and can lie beyond 2/λ_max, where a run of steps is
        unstable: for a run, 1/λ_max caps it.

        Raises:
          ValueError: B is not in 1…N.
        """
        if batch_size is None:
            return self.optimal
        check_batch_size(batch_size, self.num_examples)
        # Where g·Hg is negative there is no greedy rate, and the cap alone decides.
        largest = jnp.fmin(self.optimal, self.curvature.greedy)
        return for_batch_size(largest, self.critical_batch_size, batch_size, num_examples=self.num_examples)

    def reason(self, batch_size: int | None) -> str:
        """Why `rate` recommends what it does, in words."""
        rate = float(self.rate(batch_size))
        if batch_size is None or batch_size == self.num_examples:
            return f"η = {rate:.3g}: 1/λ_max, half of the rate at which the sharpest direction grows"
        greedy = float(self.curvature.greedy)
        capped = not greedy < float(self.optimal)
        start = f"1/λ_max = {float(self.optimal):.3g}" if capped else f"ε_max = {greedy:.3g}"
        why = (
            "the gradient's noise adds more than curvature does"
            if rate < float(self.optimal) / 2
            else "noise adds little"
        )
        return (
            f"η = {rate:.3g}: {start} divided by 1 + B_noise/B, B_noise = {float(self.critical_batch_size):.3g}; {why}"
        )

    def is_stable(self, rate: float, batch_size: int | None = None) -> str:
        """Whether training at a constant rate is stable here: "yes", "no" or "not resolved".

        For the full batch: yes below 2 over λ_max's upper bound, no above 2/λ_max. For batches of B: no above `limit`;
        below it only the sharpest direction is known to be stable, and the answer is not resolved.

        Raises:
          ValueError: the rate is not positive and finite, or B is not in 1…N.
        """
        if not 0 < rate < float("inf"):
            raise ValueError(f"rate: expected positive and finite, got {rate}")
        if rate > self.limit(batch_size):
            return "no" if self.sharpness.converged else "not resolved"
        full = batch_size in (None, self.num_examples)
        return "yes" if full and rate < self.safe_maximal else "not resolved"

    def rows(self) -> list[tuple[str, Any, str]]:
        """The lines of its table: (quantity, value, remark)."""
        s = self.sharpness
        verdict = "converged" if s.converged else "NOT converged"
        simple = "|G|² resolved" if self.noise.resolved else "|G|² not resolved: no figure"
        return [
            (
                "λ_max",
                float(s.value),
                f"{verdict}, {int(s.num_matvecs)} products, residual {float(s.residual_norm):.1e}",
            ),
            ("λ_max, upper bound", float(s.upper_bound), "certified, for a random start"),
            ("η_opt = 1/λ_max", float(self.optimal), "full batch, optimal"),
            ("η_max = 2/λ_max", float(self.maximal), "full batch, limit of stability"),
            ("η_max, safe", float(self.safe_maximal), "2 / upper bound"),
            ("ε_max = g·g/g·Hg", float(self.curvature.greedy), "best single step along the gradient"),
            (
                "B_simple = S/|G|²",
                float(self.noise.value),
                f"± {float(self.noise.standard_error):.2g}, {simple}",
            ),
            (
                "B_noise = tr(HΣ)/g·Hg",
                float(self.curvature.noise_scale),
                "the critical batch size: larger ones buy little",
            ),
            ("η_max at B = 1", float(self.limit(1)), "stochastic, along the sharpest direction: no more is stable"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it as names and numbers."""
        s = self.sharpness
        parts = ("value", "residual_norm", "upper_bound", "num_matvecs", "converged", "sampling_error")
        return {
            "sharpness": {name: getattr(s, name) for name in parts},
            "rates": {
                "optimal": self.optimal,
                "maximal": self.maximal,
                "safe_maximal": self.safe_maximal,
                "greedy": self.curvature.greedy,
                "recommended": self.rate(None),
                "reason": self.reason(None),
            },
            "noise": dataclasses.asdict(self.noise),
            "curvature": {**dataclasses.asdict(self.curvature), "noise_scale": self.curvature.noise_scale},
            "critical_batch_size": self.critical_batch_size,
            "batch_sizes": self.batch_sizes,
            "limits": [self.limit(size) for size in self.batch_sizes],
            "recommended": [self.rate(size) for size in self.batch_sizes],
            "num_examples": self.num_examples,
        }

    def __str__(self) -> str:
        """The table as plain text, with the recommended rate."""
        lines = [f"{name:24} {value:12.5g}  {remark}" for name, value, remark in self.rows()]
        return "\n".join([*lines, f"recommended, full batch: {self.reason(None)}"])


def analyse(
    loss: Loss, params: ArrayTree, batch: Any, *, key: Array, tol: float = 1e-3, num_probes: int = 32
) -> Analysis:
    """The learning rates that curvature and noise allow at ``params``.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples.
      params: the point.
      batch: N >= 3 examples, or a data set in batches; that is gone through once a Hessian product and twice a probe.
      key: a `jax.random.key` for start vectors and probes.
      tol: relative accuracy of λ_max.
      num_probes: random probes for tr(HΣ).

    Returns:
      An `Analysis`; printed, it is a table.

    Raises:
      TypeError: the arguments do not fit the contract.
      UserError: the loss or its curvature is not finite; or there is no positive curvature, so that no rate follows
        from it; or the loss is no mean of independent examples.
    """
    batch = dataset.of(batch)
    contract.check(loss, params, dataset.first(batch))
    curvature_key, probe_key = jax.random.split(key)
    sharp = sharpness(loss, params, batch, key=curvature_key, tol=tol, sampling_error=True)
    noise = noise_scale(loss, params, batch)
    value = float(sharp.value)
    if not (jnp.isfinite(sharp.value) and jnp.isfinite(noise.trace)):
        where = _not_finite(loss, params, batch) or ["the gradient or the Hessian of the loss at these params"]
        raise UserError(f"not finite: {', '.join(where)}")
    if value <= 0:
        raise UserError(
            f"loss: its largest Hessian eigenvalue is {value:.3g}, not positive, so no rate follows from it; "
            "is the loss flat or concave at these params?"
        )
    check_independent(loss, params, batch)
    curvature = noisy_curvature(loss, params, batch, key=probe_key, num_probes=num_probes)
    return Analysis(sharp, noise, curvature, dataset.num_examples(batch))


def _not_finite(loss: Loss, params: ArrayTree, batch: Any) -> list[str]:
    """Where the first value that is not finite stands, of the params, the batches and the loss."""
    for part in batch if dataset.on_host(batch) else [batch]:
        where = contract.not_finite(params=params, batch=part, loss=loss(params, part))
        if where:
            return where
    return []
