"""Where training really loses stability, found from gradients alone on a ladder of rates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree, Loss

# The oscillation's growth is taken between these steps: after the first, faster modes have died out, and up to
# the last, what negative curvature makes of rounding errors stays small.
_FROM, _TO = 4, 12
_FILTER_STEPS = 100
# Of the start from ω₀, relative, in units of √(rounding), where truncation and rounding errors meet.
_DISTANCE = 0.3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ladder:
    """Gradient descent at each of R rates, twice: about a fixed point, and plainly.

    Attributes:
      rates: (R,) ascending η.
      growth: (D, R) factor a step by which the oscillation about the fixed point grows, for D random starts; NaN
        where the iterates do not oscillate.
      limits: (D,) the rate at which the growth passes 1; NaN where the ladder does not hold it.
      plain_loss: (R, T + 1) the loss along plain training, from step 0 on.
      plain_bracket: (2,) the largest rate up to which every run ended below its initial loss, and the next on
        the ladder, the first that failed; NaN for an end that the ladder does not hold.
    """

    rates: Array
    growth: Array
    limits: Array
    plain_loss: Array
    plain_bracket: Array

    @property
    def limit(self) -> Array:
        """The measured limit of stability, the mean over the random starts."""
        return self.limits.mean()

    @property
    def limit_error(self) -> Array:
        """The spread of ``limits`` over the random starts, one standard deviation."""
        return self.limits.std(ddof=1) if self.limits.size > 1 else jnp.full((), jnp.nan)


def measure_limits(
    loss: Loss,
    params: ArrayTree,
    batch: ArrayTree,
    rates: ArrayLike,
    *,
    key: Array,
    num_starts: int = 3,
    num_steps: int = 60,
) -> Ladder:
    """Measure the limit of stability at ``params``, and where plain training fails, without any Hessian product.

    On the tilted loss E(ω) − ⟨g(ω₀), ω⟩ the point ω₀ is a fixed point of gradient descent. Started beside it, the
    part of the iterates that alternates in sign from step to step grows beyond η = 2/λ_max and dies below.
    The start is a random vector after 100 steps of gradient *ascent* on the tilted loss, which multiply a direction of
    curvature λ by 1 + λ/λ_max each: that leaves the sharp directions. (Negative curvature leaves ω₀ at any
    rate, without alternating; from an unfiltered start it would drown the rest.) Beside it runs plain training on E
    itself at the same rates: what it survives is not the local limit, since training moves to flatter places.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: ω₀.
      batch: the examples, all of them at each step.
      rates: (R,) ascending; their geometric middle should be near the limit expected.
      key: a `jax.random.key` for the random starts.
      num_starts: D, how many starts; their spread is the error of the limit.
      num_steps: T, the steps of plain training.

    Returns:
      A `Ladder`.

    Raises:
      TypeError: the params are in half precision.
      ValueError: the rates are not ascending, positive and finite, or fewer than 3.

    Reference:
      The tilt: Wu, Ma & E, "How SGD Selects the Global Minima", NeurIPS 2018, section 2 (linear stability of a fixed
      point); plain failure: Lewkowycz et al., "The Large Learning Rate Phase of Deep Learning", 2020.
    """
    contract.check_params(params)
    values = np.asarray(rates, dtype=np.float64)
    if values.ndim != 1 or len(values) < 3 or not (values > 0).all() or not (np.diff(values) > 0).all():
        raise ValueError(f"rates: expected 3 or more positive numbers in ascending order, got {rates}")
    if not np.isfinite(values).all():
        raise ValueError(f"rates: expected finite numbers, got {rates}")
    dtype = jnp.result_type(*jax.tree.leaves(params))
    if jnp.finfo(dtype).eps > jnp.finfo(jnp.float32).eps:
        raise TypeError(f"params: the differences of gradients need float32 or float64, got {dtype}")
    along, plain = _ladder(
        loss,
        params,
        batch,
        jnp.asarray(values, dtype),
        jax.random.split(key, num_starts),
        num_steps=num_steps,
    )
    along, plain = np.asarray(along, np.float64), np.asarray(plain)
    growth = _growth(along)
    limits = np.array([_crossing(values, row) for row in growth])
    failed = ~(plain[:, -1] < plain[:, 0])
    first = int(np.argmax(failed)) if failed.any() else len(values)
    ends = np.concatenate([[np.nan], values, [np.nan]])
    return Ladder(
        jnp.asarray(values), jnp.asarray(growth), jnp.asarray(limits), jnp.asarray(plain),
        jnp.asarray(ends[[first, first + 1]]),
    )  # fmt: skip


@jax.jit(static_argnames=("loss", "num_steps"))
def _ladder(
    loss: Loss, params: ArrayTree, batch: ArrayTree, rates: Array, keys: Array, *, num_steps: int
) -> tuple[Array, Array]:
    """The starts' components along themselves, (D, R, steps), and plain training's losses, (R, T + 1)."""
    contract.check(loss, params, batch)
    gradient = jax.grad(loss)
    at_start = gradient(params, batch)
    size = jnp.maximum(optax.tree.norm(params), 1)
    distance = _DISTANCE * jnp.finfo(rates.dtype).eps ** 0.5
    middle = jnp.exp(jnp.mean(jnp.log(rates)))

    def tilted(d: ArrayTree) -> ArrayTree:
        moved = optax.tree.add(params, d)
        return optax.tree.sub(gradient(moved, batch), at_start)

    def resized(d: ArrayTree) -> ArrayTree:
        return optax.tree.scale(distance * size / optax.tree.norm(d), d)

    def filtered(key: Array) -> ArrayTree:
        ascend = lambda _, d: resized(jax.tree.map(lambda x, g: x + middle / 2 * g, d, tilted(d)))
        start = resized(optax.tree.random_like(key, params, jax.random.normal))
        return jax.lax.fori_loop(0, _FILTER_STEPS, ascend, start)

    def beside(start: ArrayTree, rate: Array) -> Array:
        def step(d: ArrayTree, _: None) -> tuple[ArrayTree, Array]:
            return jax.tree.map(lambda x, g: x - rate * g, d, tilted(d)), optax.tree.vdot(d, start)

        return jax.lax.scan(step, start, None, length=_TO + 1)[1]

    def plainly(rate: Array) -> Array:
        def step(p: ArrayTree, _: None) -> tuple[ArrayTree, Array]:
            value, grad = jax.value_and_grad(loss)(p, batch)
            return jax.tree.map(lambda x, g: x - (rate * g).astype(x.dtype), p, grad), value

        last, values = jax.lax.scan(step, params, None, length=num_steps)
        return jnp.append(values, loss(last, batch))

    starts = jax.lax.map(filtered, keys)
    along = jax.lax.map(lambda start: jax.vmap(lambda rate: beside(start, rate))(rates), starts)
    return along, jax.vmap(plainly)(rates)


def _growth(along: np.ndarray) -> np.ndarray:
    window = along[..., _FROM : _TO + 1]
    # Near η = 1/λ_max the start is gone within the first steps, and the signs of what is left are chance.
    seen = np.abs(window[..., 0]) > 1e-4 * np.abs(along[..., 0])
    alternates = seen & (window[..., 1:] * window[..., :-1] < 0).all(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        growth = np.abs(window[..., -1] / window[..., 0]) ** (1 / (_TO - _FROM))
    return np.where(alternates, growth, np.nan)


def _crossing(rates: np.ndarray, growth: np.ndarray) -> float:
    """Where the growth passes 1, between two rates that oscillate; the factor ηλ − 1 is linear in η."""
    for i in range(len(rates) - 1):
        low, high = growth[i], growth[i + 1]
        if low <= 1 < high:
            return float(rates[i] + (1 - low) / (high - low) * (rates[i + 1] - rates[i]))
    return float("nan")
