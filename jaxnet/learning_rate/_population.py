"""Where SGD really loses stability, found from gradients alone on a population of runs."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss, check_batch_size
from jaxnet.learning_rate._measured import starting_distance

Follow = Callable[[Array, Array], tuple[Array, Array]]
"""``follow(factors, u) -> (log of the growth, whom to follow)``: factors of |δ|² in a step, and u uniform in [0, 1)."""

# Steps uphill before the first: flat directions, in which δ neither grows nor dies, would hide for long what grows.
_UPHILL = 20


def in_mean_square(factors: Array, u: Array) -> tuple[Array, Array]:
    """log of the mean factor; runs are split or dropped in proportion to theirs.

    Runs that grow much carry the mean and are too rare to be met by chance: splitting keeps them in the population.
    """
    n = factors.size
    followed = jnp.searchsorted(jnp.cumsum(factors) / factors.sum(), (jnp.arange(n) + u) / n)
    return jnp.log(factors.mean()), jnp.minimum(followed, n - 1)


def one_by_one(factors: Array, u: Array) -> tuple[Array, Array]:
    """The mean log of the factors, every run followed: what almost every single trajectory does in the long run."""
    return jnp.log(factors).mean(), jnp.arange(factors.size)


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeasuredSgdStability:
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


@contract.takes_loss
@dataset.on_automatic_axes
def measure_sgd_stability(
    loss: Loss,
    params: ArrayTree,
    batch: ArrayTree,
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
) -> MeasuredSgdStability:
    """Measure the rate from which SGD about ``params`` grows apart from them, without any Hessian product.

    Many runs start at ω₀ + δ, each with batches of its own, and each step is held against the same step from ω₀:
    δ ← δ − η(g_B(ω₀ + δ) − g_B(ω₀)), so that ω₀ need not be a minimum. After a step every δ is brought back to its
    small length; the factors by which their squares grew, and which runs go on, are ``follow``'s. The growth is the
    mean over the second half of the steps. Along a direction of negative curvature it exceeds 1 at any rate.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples.
      params: ω₀.
      batch: N examples.
      batch_size: B from 1 to N.
      highest: the upper end of the bisection, a rate that grows; its lower end is 0.
      key: a `jax.random.key` for starts, batches and splits.
      replace: whether a batch is drawn with replacement.
      follow: `in_mean_square`, the limit of `sgd_stability`, or `one_by_one`, that of single trajectories.
      num_particles: how many runs.
      num_steps: of each at each rate.
      num_repeats: R, whose spread is the error.
      num_halvings: H; the resolution is ``highest``/2^H.

    Returns:
      A `MeasuredSgdStability`.

    Raises:
      ValueError: B is not in 1…N, or ``highest`` is not positive and finite.

    Reference:
      The splitting: Del Moral, "Feynman-Kac Formulae", 2004, section 2.5; the two limits of products of random
      matrices: Furstenberg & Kesten, "Products of Random Matrices", 1960.
    """
    dataset.check_in_memory("measure_sgd_stability", batch, "pass a sample that fits in memory")
    check_batch_size(batch_size, contract.check(loss, params, batch))
    if not 0 < highest < np.inf:
        raise ValueError(f"highest: expected a positive and finite rate, got {highest}")
    # The same draws at each rate: the growth is then a smooth function of it.
    shape = num_repeats, _UPHILL + num_steps, num_particles
    draws = _draw(params, key, contract.num_examples(batch), batch_size, replace, shape)
    low, high = np.zeros(num_repeats), np.full(num_repeats, float(highest))
    rates, growth = [], []
    for _ in range(num_halvings):
        middle = (low + high) / 2
        values = np.asarray(_log_growth(loss, params, batch, jnp.asarray(middle), draws, follow))
        # What is not finite has grown.
        low, high = np.where(values < 0, middle, low), np.where(values < 0, high, middle)
        rates.append(middle)
        growth.append(np.exp(values))
    return MeasuredSgdStability(jnp.asarray((low + high) / 2), jnp.asarray(rates), jnp.asarray(growth))


class _Draws(NamedTuple):
    """All that is random in R repeats of S steps: (R, P, …) starts, (R, S, P, B) rows of the data, (R, S) u."""

    starts: ArrayTree
    rows: Array
    u: Array


def _draw(params: ArrayTree, key: Array, n: int, size: int, replace: bool, shape: tuple[int, int, int]) -> _Draws:
    # By NumPy: the shapes are new at each call, and JAX takes far longer to compile a generator than to run it.
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    repeats, steps, particles = shape
    if replace:
        rows = rng.integers(n, size=(*shape, size), dtype=np.int32)
    else:
        permuted = lambda: rng.permuted(np.tile(np.arange(n, dtype=np.int32), (particles, 1)), axis=1)[:, :size]
        rows = np.stack([permuted() for _ in range(repeats * steps)]).reshape(*shape, size)
    start = lambda x: rng.normal(size=(repeats, particles, *np.shape(x))).astype(jnp.result_type(x))
    return _Draws(*jax.device_put((jax.tree.map(start, params), rows, rng.uniform(size=(repeats, steps)))))


@jax.jit(static_argnames=("loss", "follow"))
def _log_growth(loss: Loss, params: ArrayTree, data: ArrayTree, rates: Array, draws: _Draws, follow: Follow) -> Array:
    """The log of the factor a step of |δ|², for each repeat at its rate."""
    length = starting_distance(params)
    gradient = jax.grad(loss)

    def resized(d: ArrayTree) -> tuple[ArrayTree, Array]:
        """δ at its length, and the square of what it had in units of that."""
        grown = optax.tree.norm(d) / length
        return optax.tree.scale(1 / grown, d), grown**2

    def move(d: ArrayTree, rows: Array, rate: Array) -> tuple[ArrayTree, Array]:
        batch = jax.tree.map(lambda x: jnp.asarray(x)[rows], data)
        slope = optax.tree.sub(gradient(optax.tree.add(params, d), batch), gradient(params, batch))
        return resized(jax.tree.map(lambda x, g: x - rate.astype(x.dtype) * g, d, slope))

    def at_rate(rate: Array, given: _Draws) -> Array:
        def step(d: ArrayTree, drawn: tuple[Array, Array, Array]) -> tuple[ArrayTree, Array]:
            signed_rate, rows, u = drawn
            d, factors = jax.vmap(move, in_axes=(0, 0, None))(d, rows, signed_rate)
            value, followed = follow(factors, u)
            return jax.tree.map(lambda x: x[followed], d), value

        downhill = given.u.size - _UPHILL
        signed_rates = jnp.append(jnp.full(_UPHILL, -rate / 2), jnp.full(downhill, rate))
        starts = jax.vmap(resized)(given.starts)[0]
        return lax.scan(step, starts, (signed_rates, given.rows, given.u))[1][-downhill // 2 :].mean()

    return jax.vmap(at_rate)(rates, draws)
