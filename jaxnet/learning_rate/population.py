"""Where SGD really loses stability, found from gradients alone on a population of runs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.data.orders import check_batch_size

Follow = Callable[[Array, Array], tuple[Array, Array]]
"""``follow(key, factors) -> (log of the growth, whom to follow)``, from each run's factor of |δ|² in a step."""

# Of the start from ω₀, relative, in units of √(rounding), where truncation and rounding errors meet.
_DISTANCE = 0.3
# Steps uphill before the first: flat directions, in which δ neither grows nor dies, would hide for long what grows.
_UPHILL = 20


def in_mean_square(key: Array, factors: Array) -> tuple[Array, Array]:
    """log of the mean factor; runs are split or dropped in proportion to theirs.

    Runs that grow much carry the mean and are too rare to be met by chance: splitting keeps them in the population.
    """
    n = factors.size
    at = (jnp.arange(n) + jax.random.uniform(key)) / n
    followed = jnp.searchsorted(jnp.cumsum(factors) / factors.sum(), at)
    return jnp.log(factors.mean()), jnp.minimum(followed, n - 1)


def one_by_one(key: Array, factors: Array) -> tuple[Array, Array]:
    """The mean log of the factors, every run followed: what almost every single trajectory does in the long run."""
    return jnp.log(factors).mean(), jnp.arange(factors.size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SgdLimit:
    """The rate from which SGD's distance from a point grows, by bisection, R times.

    Attributes:
      limits: (R,) the rate at which the factor passes 1.
      rates: (H, R) those tried.
      growth: (H, R) the factor a step of |δ|² at each.
    """

    limits: Array
    rates: Array
    growth: Array

    @property
    def limit(self) -> Array:
        """The measured limit, the mean over the repeats."""
        return self.limits.mean()

    @property
    def limit_error(self) -> Array:
        """Its standard error, from repeat to repeat."""
        r = self.limits.size
        return self.limits.std(ddof=1) / r**0.5 if r > 1 else jnp.full((), jnp.nan)


def measure_sgd_limit(
    loss: Loss,
    params: ArrayTree,
    data: ArrayTree,
    batch_size: int,
    *,
    highest: float,
    key: Array,
    replace: bool = True,
    follow: Follow = in_mean_square,
    num_particles: int = 512,
    num_steps: int = 400,
    num_repeats: int = 3,
    num_halvings: int = 11,
) -> SgdLimit:
    """Measure the rate from which SGD about ``params`` grows apart from them, without any Hessian product.

    Many runs start at ω₀ + δ, each with batches of its own, and each step is held against the same step from ω₀:
    δ ← δ − η(g_B(ω₀ + δ) − g_B(ω₀)), so that ω₀ need not be a minimum. After a step every δ is brought back to its
    small length; the factors by which their squares grew, and which runs go on, are ``follow``'s. The growth is the
    mean over the second half of the steps. Along a direction of negative curvature it exceeds 1 at any rate.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples.
      params: ω₀.
      data: N examples.
      batch_size: B from 1 to N.
      highest: the upper end of the bisection, a rate that grows; its lower end is 0.
      key: a `jax.random.key` for starts, batches and splits.
      replace: whether a batch is drawn with replacement.
      follow: `in_mean_square`, the limit of `sgd_maximal`, or `one_by_one`, that of single trajectories.
      num_particles: how many runs.
      num_steps: of each at each rate.
      num_repeats: R, whose spread is the error.
      num_halvings: H; the resolution is ``highest``/2^H.

    Returns:
      An `SgdLimit`.

    Raises:
      ValueError: B is not in 1…N, or ``highest`` is not positive and finite.

    Reference:
      The splitting: Del Moral, "Feynman-Kac Formulae", 2004, section 2.5; the two limits of products of random
      matrices: Furstenberg & Kesten, "Products of Random Matrices", 1960.
    """
    check_batch_size(batch_size, contract.check(loss, params, data))
    if not 0 < highest < np.inf:
        raise ValueError(f"highest: expected a positive and finite rate, got {highest}")
    log_growth = functools.partial(
        _log_growth, loss, params, data, batch_size=batch_size, replace=replace, follow=follow,
        num_particles=num_particles, num_steps=num_steps,
    )  # fmt: skip
    keys = jax.random.split(key, num_repeats)
    low, high = np.zeros(num_repeats), np.full(num_repeats, float(highest))
    rates, growth = [], []
    for _ in range(num_halvings):
        middle = (low + high) / 2
        values = np.asarray(log_growth(jnp.asarray(middle), keys))
        # What is not finite has grown.
        low, high = np.where(values < 0, middle, low), np.where(values < 0, high, middle)
        rates.append(middle)
        growth.append(np.exp(values))
    return SgdLimit(jnp.asarray((low + high) / 2), jnp.asarray(rates), jnp.asarray(growth))


@jax.jit(static_argnames=("loss", "batch_size", "replace", "follow", "num_particles", "num_steps"))
def _log_growth(
    loss: Loss, params: ArrayTree, data: ArrayTree, rates: Array, keys: Array, *, batch_size: int, replace: bool,
    follow: Follow, num_particles: int, num_steps: int,
) -> Array:  # fmt: skip
    """The log of the factor a step of |δ|², for each rate with its key."""
    n, dtype = contract.num_examples(data), jnp.result_type(*jax.tree.leaves(params))
    length = _DISTANCE * jnp.finfo(dtype).eps ** 0.5 * jnp.maximum(optax.tree.norm(params), 1)
    gradient = jax.grad(loss)

    def draw(key: Array) -> Array:
        if replace:
            # Of one draw each: integers would take two, and the draws are most of the work for a small model.
            return (n * jax.random.uniform(key, (num_particles, batch_size), jnp.float32)).astype(jnp.int32)
        rows = lambda key: jax.random.permutation(key, n)[:batch_size]
        return jax.vmap(rows)(jax.random.split(key, num_particles))

    def resized(d: ArrayTree) -> tuple[ArrayTree, Array]:
        """δ at its length, and the square of what it had in units of that."""
        grown = optax.tree.norm(d) / length
        return optax.tree.scale(1 / grown, d), grown**2

    def one(d: ArrayTree, rows: Array, rate: Array) -> tuple[ArrayTree, Array]:
        batch = jax.tree.map(lambda x: jnp.asarray(x)[rows], data)
        slope = optax.tree.sub(gradient(optax.tree.add(params, d), batch), gradient(params, batch))
        return resized(jax.tree.map(lambda x, g: x - rate.astype(x.dtype) * g, d, slope))

    def at_rate(rate: Array, key: Array) -> Array:
        def step(d: ArrayTree, given: tuple[Array, Array]) -> tuple[ArrayTree, Array]:
            key, signed_rate = given
            draw_key, follow_key = jax.random.split(key)
            d, factors = jax.vmap(one, in_axes=(0, 0, None))(d, draw(draw_key), signed_rate)
            value, followed = follow(follow_key, factors)
            return jax.tree.map(lambda x: x[followed], d), value

        start_key, key = jax.random.split(key)
        random: Any = lambda key: resized(optax.tree.random_like(key, params, jax.random.rademacher))[0]
        start = jax.vmap(random)(jax.random.split(start_key, num_particles))
        signed_rates = jnp.append(jnp.full(_UPHILL, -rate / 2), jnp.full(num_steps, rate))
        values = jax.lax.scan(step, start, (jax.random.split(key, signed_rates.size), signed_rates))[1]
        return values[-num_steps // 2 :].mean()

    return jax.vmap(at_rate)(rates, keys)
