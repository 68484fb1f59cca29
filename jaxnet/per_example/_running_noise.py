"""The noise scale along training, from gradients that a step has at hand."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree
from jaxnet.per_example._leaves import wide
from jaxnet.per_example._noise import NoiseScale


@contract.result
class NoiseAverage(NamedTuple):
    """Exponential averages of S and of |G|², apart, over steps; made by `noise_average`.

    A ratio of averages, since the average of the steps' ratios is far off where |G|² is hardly above its noise.
    """

    decay: Array
    weight: Array
    squared_weight: Array
    means: Array  # of S, |G|² and |ḡ|²
    products: Array  # of S and |G|², (2, 2)

    def add(self, trace: Array, mean_squared: Array, batch_size: Array | int) -> "NoiseAverage":
        """With what one step saw.

        Args:
          trace: S, an unbiased estimate such as `NoiseScale.trace`.
          mean_squared: |ḡ|² of the step's mean gradient.
          batch_size: over how many examples that mean is.
        """
        trace, mean_squared = (jnp.asarray(x, self.means.dtype) for x in (trace, mean_squared))
        new = jnp.stack([trace, mean_squared - trace / batch_size, mean_squared])
        averaged = lambda old, new: self.decay * old + (1 - self.decay) * new
        return NoiseAverage(
            self.decay,
            averaged(self.weight, 1.0),
            self.decay**2 * self.squared_weight + (1 - self.decay) ** 2,
            averaged(self.means, new),
            averaged(self.products, jnp.outer(new[:2], new[:2])),
        )

    @property
    def noise_scale(self) -> NoiseScale:
        """B_simple with its standard error, by the spread of the steps as if they were independent; NaN before two."""
        means = self.means / self.weight
        trace, gradient_squared, mean_squared = means
        ratio = trace / gradient_squared
        covariance = self.products / self.weight - jnp.outer(means[:2], means[:2])
        # The sum of the squared weights where the weights sum to 1: one over the number of steps that they amount to.
        share = self.squared_weight / self.weight**2
        error = lambda along: jnp.sqrt(jnp.maximum(along @ covariance @ along, 0) * share / (1 - share))
        return NoiseScale(
            value=ratio,
            standard_error=error(jnp.stack([jnp.ones_like(ratio), -ratio])) / jnp.abs(gradient_squared),
            trace=trace,
            gradient_squared=gradient_squared,
            mean_squared=mean_squared,
            resolved=gradient_squared > 2 * error(jnp.array([0.0, 1.0], means.dtype)),
        )


def noise_average(decay: float = 0.99) -> NoiseAverage:
    """An average of the noise scale over steps, before the first: ``average = average.add(...)`` in a training loop.

    Args:
      decay: of the exponential averages, in [0, 1): .99 remembers about 200 steps' worth.

    Returns:
      A `NoiseAverage`, a pytree; ``.noise_scale`` reads it.

    Raises:
      ValueError: ``decay`` is not in [0, 1).

    Reference:
      McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", 2018, appendix A.1.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay: expected a number from 0 to below 1, got {decay}")
    zero = jnp.zeros(())
    return NoiseAverage(jnp.asarray(decay, zero.dtype), zero, zero, jnp.zeros(3), jnp.zeros((2, 2)))


@contract.result
class WithNoiseScaleState(NamedTuple):
    """The state of `with_noise_scale`.

    Attributes:
      multi_steps: `optax.MultiStepsState`.
      deviations: Σ|g_i − ḡ|² over the micro-batches so far.
      average: the `NoiseAverage` over the updates so far.
    """

    multi_steps: Any
    deviations: Array
    average: NoiseAverage


def with_noise_scale(
    optimizer: optax.GradientTransformation, every_k: int, *, micro_batch_size: int, decay: float = 0.99
) -> optax.GradientTransformationExtraArgs:
    """``optax.MultiSteps(optimizer, every_k)``, which also tells the noise scale, at no gradient more.

    Of k micro-batches of b examples, S = b Σ|g_i − ḡ|²/(k − 1) and |G|² = |ḡ|² − S/(k b) are unbiased; with two sizes,
    b and k b, they are the estimator of the reference. The params stand still over the k, so that only sampling is
    seen. A step whose gradients are not finite is left out of the averages. Read it by `running_noise_scale`.

    Args:
      optimizer: any optax transformation; it sees the mean of k gradients.
      every_k: k >= 2, the number of micro-batches to one update.
      micro_batch_size: b, the examples in each: what ``fit`` calls ``batch_size``.
      decay: of the averages over updates, see `noise_average`.

    Returns:
      A transformation, for ``fit`` (``lambda rate: with_noise_scale(optax.sgd(rate), 4, micro_batch_size=32)``) or any
      loop.

    Raises:
      ValueError: a number is out of its range.

    Reference:
      McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", 2018, appendix A.1.
    """
    if every_k < 2:
        raise ValueError(f"every_k: expected 2 micro-batches or more, of which the spread is seen, got {every_k}")
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size: expected 1 or more, got {micro_batch_size}")
    average, steps = noise_average(decay), optax.MultiSteps(optimizer, every_k)

    def init(params: ArrayTree) -> WithNoiseScaleState:
        return WithNoiseScaleState(steps.init(params), jnp.zeros(()), average)

    def update(updates: ArrayTree, state: WithNoiseScaleState, params: ArrayTree | None = None, **given: Any) -> Any:
        before = state.multi_steps
        i, mean = before.mini_step, before.acc_grads
        apart = jax.tree.map(lambda g, m: wide(g) - m, updates, mean)
        squared = lambda tree: optax.tree.norm(tree, squared=True)
        # Welford's recurrence: Σ|g|² − k|ḡ|² would cancel where the gradients are alike.
        deviations = jnp.where(i > 0, state.deviations, 0) + squared(apart) * i / (i + 1)
        trace = micro_batch_size * deviations / (every_k - 1)
        mean_squared = squared(jax.tree.map(lambda m, x: m + x / (i + 1), mean, apart))
        done = (i == every_k - 1) & jnp.isfinite(trace) & jnp.isfinite(mean_squared)
        added = state.average.add(trace, mean_squared, every_k * micro_batch_size)
        kept = jax.tree.map(lambda new, old: jnp.where(done, new, old), added, state.average)
        results, after = steps.update(updates, before, params, **given)
        return results, WithNoiseScaleState(after, deviations.astype(state.deviations.dtype), kept)

    return optax.GradientTransformationExtraArgs(init, update)


def running_noise_scale(opt_state: Any) -> NoiseScale:
    """What `with_noise_scale` has seen, of an optimizer's state that holds its own anywhere within.

    Raises:
      ValueError: it holds none, or several.
    """
    ours = lambda node: isinstance(node, WithNoiseScaleState)
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=ours) if ours(node)]
    if len(found) != 1:
        raise ValueError(f"opt_state: expected one state of with_noise_scale, found {len(found)}")
    return found[0].average.noise_scale
