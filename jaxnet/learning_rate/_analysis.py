"""All that curvature and noise say of the learning rate at a point, in one value."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss, MakeOptimizer, UserError, check_batch_size
from jaxnet.curvature import Sharpness, sharpness
from jaxnet.learning_rate._derived import DerivedRates, derive, three_keys
from jaxnet.learning_rate._rates import NoisyCurvature, linear_to_zero, maximal, of_gradients, optimal
from jaxnet.per_example import NoiseScale, check_independent, gradients


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Analysis:
    """What the loss's curvature and its gradient's noise say of the learning rate.

    Attributes:
      sharpness: λ_max of the full-batch Hessian, certified, with its sampling error.
      noise: the gradient's noise scale, from per-example gradients.
      curvature: g·g, g·Hg and tr(HΣ).
      derived: the optimizer's rates and limits at each of its batch sizes.
      num_examples: N.
      optimizer: what the rates are for, by its maker's name.
    """

    sharpness: Sharpness
    noise: NoiseScale
    curvature: NoisyCurvature
    derived: DerivedRates
    num_examples: int = dataclasses.field(metadata={"static": True})
    optimizer: str = dataclasses.field(metadata={"static": True})

    @property
    def optimal(self) -> Array:
        """η_opt = 1/λ_max, of gradient descent."""
        return optimal(self.sharpness.value)

    @property
    def maximal(self) -> Array:
        """η_max = 2/λ_max of gradient descent, from the eigenvalue found, which is never above the true one."""
        return maximal(self.sharpness.value)

    @property
    def safe_maximal(self) -> Array:
        """2 over the upper bound of λ_max: the limit of gradient descent that holds with the bound's probability."""
        return maximal(self.sharpness.upper_bound)

    @property
    def critical_batch_size(self) -> Array:
        """B_crit = B_noise = tr(HΣ)/g·Hg at these params, from which on larger batches buy little.

        NaN unless both are positive. It grows along training; this is a snapshot.
        """
        return self.curvature.noise_scale

    @property
    def critical_batch_size_error(self) -> Array:
        """Its standard error, over the probes of tr(HΣ)."""
        return self.curvature.noise_scale_error

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Those that were looked at; between them values are interpolated."""
        return self.derived.batch_sizes

    def limit(self, batch_size: int | None) -> Array:
        """η_max here for batches of B: 2/(λ + p q), where the mean square of the distance begins to grow.

        λ is the largest curvature that the optimizer's alternating steps meet, p = (N − B)/(B(N − 1)), and q is what
        the scatter of the examples' curvatures adds; see `DerivedRates`. None is the full batch. An estimate, within
        `bracket`. NaN for an optimizer that takes signs: its steps do not shrink with the gradient, so that it stays at
        a distance in proportion to any rate.

        Raises:
          ValueError: B is none of those between the least and the largest looked at.
        """
        return self._at(self.derived.limit, batch_size)

    def bracket(self, batch_size: int | None) -> tuple[Array, Array]:
        """Two rates around the limit here, as far as the examples used tell.

        By the second moments of the distance, followed over a few examples and over many: the lower rate takes the few
        for all, so that each weighs too much, the higher one leaves out the directions that the few do not span. Both
        are estimates, with a margin found by trial, where an example's matrix has a rank above four. Where they are not
        at hand, by the example of the largest curvature and by the sharpest direction: a wide bracket, whose lower end
        needs Gauss–Newton matrices, so a loss of `mean_loss`, and is NaN for batches of any other.

        Raises:
          ValueError: as `limit`.
        """
        low, high = (self._at(end, batch_size) for end in (self.derived.low, self.derived.high))
        return low, high

    def rate(self, batch_size: int | None) -> Array:
        """The rate to train at with batches of B: √(η₁ · ½η_max), None being the full batch.

        η₁ is the best single step from here, which is too long or too short for a run by as much as the landscape
        changes; η_max is `limit` where a short run at η₁ has led, and half of it is to a run what 1/λ_max is to
        gradient descent. See `DerivedRates`.

        Raises:
          ValueError: as `limit`.
        """
        return self._at(self.derived.rate, batch_size)

    def rate_error(self, batch_size: int | None) -> Array:
        """The standard error of `rate`, over the random directions and the examples used."""
        relative = jnp.asarray(self.derived.rate_error) / self.derived.rate
        return self._at(relative, batch_size, logs=False) * self.rate(batch_size)

    def _at(self, values: Array, batch_size: int | None, *, logs: bool = True) -> Array:
        """Interpolated in log B, by the values' logarithms or by themselves."""
        sizes = self.batch_sizes
        size = self.num_examples if batch_size is None else check_batch_size(batch_size, self.num_examples)
        if not sizes[0] <= size <= sizes[-1]:
            raise ValueError(
                f"batch_size: expected {sizes[0]} to {sizes[-1]}, the sizes that were looked at, got {size}; "
                "name it in batch_sizes"
            )
        if size in sizes:
            return jnp.asarray(values)[sizes.index(size)]
        at = lambda of: jnp.interp(jnp.log(size), jnp.log(jnp.array(sizes)), of)
        return jnp.exp(at(jnp.log(jnp.asarray(values)))) if logs else at(jnp.asarray(values))

    def schedule(self, batch_size: int | None, num_steps: int) -> optax.Schedule:
        """A schedule for a run of so many steps: from `rate` down to 0, by `linear_to_zero` with the limit here.

        Args:
          batch_size: B, or None for the full batch.
          num_steps: of the run.

        Raises:
          ValueError: as `limit`; or there are no steps.
          UserError: no rate follows.
        """
        peak = float(self.rate(batch_size))
        if not peak > 0:
            raise UserError(self.reason(batch_size))
        return linear_to_zero(peak, num_steps, limit=float(self.limit(batch_size)))

    def reason(self, batch_size: int | None) -> str:
        """Why `rate` recommends what it does, in words."""
        rate, error = float(self.rate(batch_size)), float(self.rate_error(batch_size))
        greedy, later = (float(self._at(x, batch_size)) for x in (self.derived.greedy, self.derived.later_limit))
        batch = "the full batch" if batch_size in (None, self.num_examples) else f"batches of {batch_size}"
        if not rate > 0:
            return f"{self.optimizer} on {batch}: no rate follows, since no step from here was seen to lower the loss"
        begins = f"{self.optimizer} on {batch}: η = {rate:.3g} ± {error:.1g}, "
        if not np.isfinite(self.derived.probe_losses[0]):
            return f"{begins}half of the limit of stability in this state, {later:.3g}"
        limit = float(self.limit(batch_size))
        of_what = "the limit of its steps as noise smooths them" if self.derived.signs else "the limit of stability"
        words = (
            f"{begins}midway between the best single step here, "
            f"{greedy:.3g}, and half of {of_what} where a short run leads, {later:.3g}"
        )
        if rate > limit:
            words += f"; above the limit here, {limit:.3g}, so warm it up"
        return words

    def is_stable(self, rate: float, batch_size: int | None = None) -> str:
        """Whether training at a constant rate is stable here: "yes", "no" or "not resolved", as far as `bracket` holds.

        For gradient descent on the full batch: yes below 2 over λ_max's upper bound, no above 2/λ_max. For an optimizer
        that takes signs there is no limit, and the answer is always "not resolved".

        Raises:
          ValueError: the rate is not positive and finite, or B is none of those looked at.
        """
        if not 0 < rate < float("inf"):
            raise ValueError(f"rate: expected positive and finite, got {rate}")
        low, high = (float(x) for x in self.bracket(batch_size))
        # The certificate is on H: as far as the optimizer's λ is a multiple of it, it is one on that.
        low *= float(self.sharpness.value / self.sharpness.upper_bound)
        if rate > high:
            return "no" if self.sharpness.converged else "not resolved"
        return "yes" if rate < low else "not resolved"

    def rows(self) -> list[tuple[str, Any, str]]:
        """The lines of its table: (quantity, value, remark)."""
        s, d = self.sharpness, self.derived
        verdict = "converged" if s.converged else "NOT converged"
        if not s.converged and s.product_error > s.residual_norm:
            verdict += f": products are off by {float(s.product_error / abs(s.value)):.1g} of it, take float64"
        simple = "|G|² resolved" if self.noise.resolved else "|G|² not resolved: no figure"
        smallest, name = d.batch_sizes[0], self.optimizer
        recommended = [
            (
                f"η, {name}, {'full batch' if size == self.num_examples else f'B = {size}'}",
                float(self.rate(size)),
                f"± {float(self.rate_error(size)):.1g}; {self._limit_here(size)}",
            )
            for size in d.batch_sizes
        ]
        bracketed = [] if d.signs else [(f"limit, B = {smallest}", float(self.limit(smallest)), self._within(smallest))]
        return [
            *recommended,
            (
                "λ_max",
                float(s.value),
                f"{verdict}, {int(s.num_matvecs)} products, residual {float(s.residual_norm):.1e}",
            ),
            ("λ_max, upper bound", float(s.upper_bound), "certified, for a random start"),
            *self._of_gradient_descent(),
            (
                "B_simple = S/|G|²",
                float(self.noise.value),
                f"± {float(self.noise.standard_error):.2g}, {simple}",
            ),
            (
                "critical batch size",
                float(self.critical_batch_size),
                f"± {float(self.critical_batch_size_error):.2g} at these params: larger ones buy little"
                if np.isfinite(self.critical_batch_size)
                else "no figure: the gradient or its noise meets no positive curvature here",
            ),
            *bracketed,
        ]

    def _of_gradient_descent(self) -> list[tuple[str, Any, str]]:
        """What 1/λ_max says: of gradient descent, with momentum or without; to others it is nothing."""
        if not re.match(r"sgd(\(|$)", self.optimizer):
            return []
        # λ_max of what the optimizer's alternating steps meet is a multiple of the Hessian's.
        limit, value = 2 / float(self.derived.largest[-1]), float(self.sharpness.value)
        plain, c = self.optimizer == "sgd", f"{limit * value:.3g}"
        safe, name = limit * value / float(self.sharpness.upper_bound), "gradient descent" if plain else self.optimizer
        best = [("1/λ_max", float(self.optimal), "gradient descent, full batch: optimal on a quadratic")]
        return [
            *(best if plain else []),
            (f"{c}/λ_max", limit, f"{name}, full batch: limit of stability"),
            (f"{c}/upper bound", safe, "the same, safe"),
            ("ε_max = g·g/g·Hg", float(self.curvature.greedy), "best single step along the gradient"),
        ]

    def _limit_here(self, batch_size: int) -> str:
        if self.derived.signs:
            return "it takes signs, so there is no limit"
        return f"limit here {float(self.limit(batch_size)):.3g}"

    def _within(self, batch_size: int) -> str:
        low, high = (float(end) for end in self.bracket(batch_size))
        return f"here; between {low:.3g} and {high:.3g}" if np.isfinite(low) else f"here; at most {high:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """All of it as names and numbers."""
        s = self.sharpness
        parts = ("value", "residual_norm", "upper_bound", "num_matvecs", "converged", "sampling_error", "product_error")
        return {
            "optimizer": self.optimizer,
            "sharpness": {name: getattr(s, name) for name in parts},
            "rates": {
                "optimal": self.optimal,
                "maximal": self.maximal,
                "safe_maximal": self.safe_maximal,
                "greedy": self.curvature.greedy,
                "recommended": self.derived.rate[-1],
                "reason": self.reason(self.batch_sizes[-1]),
            },
            "noise": dataclasses.asdict(self.noise),
            "curvature": dataclasses.asdict(self.curvature),
            "critical_batch_size": self.critical_batch_size,
            "critical_batch_size_error": self.critical_batch_size_error,
            "derived": dataclasses.asdict(self.derived),
            "batch_sizes": self.batch_sizes,
            "limits": [self.limit(size) for size in self.batch_sizes],
            "recommended": [self.rate(size) for size in self.batch_sizes],
            "num_examples": self.num_examples,
        }

    def __str__(self) -> str:
        """The recommendation, and the table as plain text."""
        lines = [f"{name:28} {value:12.5g}  {remark}" for name, value, remark in self.rows()]
        return "\n".join([f"recommended: {self.reason(self.derived.probe_batch_size)}", *lines])


@contract.takes_loss
@dataset.on_automatic_axes
def analyse(
    loss: Loss,
    params: ArrayTree,
    batch: Any,
    *,
    key: Array,
    make_optimizer: MakeOptimizer = optax.sgd,
    batch_sizes: Sequence[int] | None = None,
    opt_state: Any = None,
    tol: float = 1e-3,
    num_probes: int = 32,
    second_moments: bool = True,
) -> Analysis:
    """The learning rates that curvature and noise allow an optimizer that begins at ``params``.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples. One of `jaxnet.losses.mean_loss` is
        looked at by its Gauss–Newton matrices, any other by its Hessians.
      params: the point where training begins.
      batch: N >= 3 examples, or a data set in batches; that is gone through once a Hessian product and twice a probe,
        and its batches are the steps of the probe run.
      key: a `jax.random.key` for start vectors, probes and the order of the probe run.
      make_optimizer: what trains, as `jaxnet.training.fit` takes it: `optax.sgd`, `optax.adamw`, or a function of the
        rate that makes a chain; see the table of optimizers in the documentation. Its update is to be in proportion to
        the rate. Clipping is taken as not in force, and a schedule at its height.
      batch_sizes: the B to look at; by default 1, 8, 64, … and N.
      opt_state: the optimizer's state where training is under way at ``params``; its second moments are then taken as
        they are, there is no probe run, and the rate is half of the limit here.
      tol: relative accuracy of λ_max.
      num_probes: random probes for tr(HΣ).
      second_moments: narrow the bracket of each limit by them, which takes a few seconds.

    Returns:
      An `Analysis`; printed, it is a table.

    Raises:
      TypeError: the arguments do not fit the contract, or the optimizer is none of those.
      ValueError: a batch size is not in 1…N; or the state is another optimizer's, or of one that takes signs.
      UserError: the loss or its curvature is not finite; or there is no positive curvature, so that no rate follows
        from it; or the loss is no mean of independent examples.
    """
    batch = dataset.of(batch)
    contract.check(loss, params, dataset.first(batch))
    params = jax.tree.map(jnp.asarray, params)
    n = dataset.num_examples(batch)
    sizes = _sizes(batch_sizes, n)
    if opt_state is not None:
        fresh = jax.eval_shape(lambda: make_optimizer(1.0).init(params))
        structures: list[Any] = [jax.tree.structure(state) for state in (fresh, opt_state)]
        if structures[0] != structures[1]:
            raise ValueError("opt_state: expected the state of this maker's optimizer, got one of another structure")
    curvature_key, probe_key, derived_key = three_keys(key)
    check_independent(loss, params, batch, key=key)
    sharp = sharpness(loss, params, batch, key=curvature_key, tol=tol)
    grads = gradients(loss, params, batch)
    noise, value = NoiseScale.of(grads), float(sharp.value)
    if not (np.isfinite(value) and np.isfinite(float(noise.trace))):
        where = _not_finite(loss, params, batch) or ["the gradient or the Hessian of the loss at these params"]
        raise UserError(f"not finite: {', '.join(where)}")
    if value <= 0:
        raise UserError(
            f"loss: its largest Hessian eigenvalue is {value:.3g}, not positive, so no rate follows from it; "
            "is the loss flat or concave at these params?"
        )
    curvature, spread = of_gradients(grads, probe_key, num_probes, sharp.leading)
    sharp = dataclasses.replace(sharp, sampling_error=spread)
    derived = derive(
        loss, params, batch, make_optimizer, sizes, opt_state=opt_state, key=derived_key, tol=tol, top=value,
        second_moments=second_moments,
    )  # fmt: skip
    return Analysis(sharp, noise, curvature, derived, n, name_of(make_optimizer))


def _sizes(batch_sizes: Sequence[int] | None, n: int) -> tuple[int, ...]:
    if batch_sizes is None:
        return (*(8**i for i in range(10) if 8**i < n), n)
    if isinstance(batch_sizes, str) or not isinstance(batch_sizes, (Sequence, np.ndarray)):
        raise TypeError(f"batch_sizes: expected a list of batch sizes, got {batch_sizes!r}")
    if not len(batch_sizes):
        raise ValueError("batch_sizes: expected at least one")
    return tuple(sorted({check_batch_size(size, n) for size in batch_sizes}))


def name_of(make_optimizer: Any) -> str:
    """A maker's name, with what a partial gives it."""
    if isinstance(make_optimizer, functools.partial):
        given = ", ".join(f"{name}={value}" for name, value in make_optimizer.keywords.items())
        return f"{name_of(make_optimizer.func)}({given})"
    return str(getattr(make_optimizer, "__name__", type(make_optimizer).__name__))


def _not_finite(loss: Loss, params: ArrayTree, batch: Any) -> list[str]:
    """Where the first value that is not finite stands, of the params, the batches and the loss."""
    for part in batch if dataset.on_host(batch) else [batch]:
        where = contract.not_finite(params=params, batch=part, loss=loss(params, part))
        if where:
            return where
    return []
