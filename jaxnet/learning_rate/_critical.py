"""The rate at which one step stops to lower the loss, found from values of the loss alone."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss

# Doublings and halvings of the guess, after which there is no such rate.
_PATIENCE = 60
# What rounding leaves of a loss, in eps of its size: a mean of many terms.
_ROUNDING = 4


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CriticalSharpness:
    """The critical rate η_c along a direction, and the curvature that it stands for.

    Attributes:
      value: λ_c = 2/η_c, to be read beside λ_max: the two are equal for a step along the sharpest direction of a
        quadratic, and for any other step of gradient descent λ_c is below.
      rate: η_c; inf where the loss falls as far as was looked, NaN where no step was seen to lower it.
      bracket: (2,) rates: at the first the loss is below that at the start, at the second it is not.
      num_passes: evaluations of the loss on all examples, that at the start included.
      converged: whether the bracket is within the tolerance, and what the loss fell in between is above what rounding
        leaves of it.
    """

    value: Array
    rate: Array
    bracket: Array
    num_passes: Array
    converged: Array

    @property
    def error(self) -> Array:
        """The most by which λ_c can be off, by the bracket."""
        return jnp.abs(2 / self.bracket - self.value[..., None]).max(axis=-1)


class _Search(NamedTuple):
    """(η, E(η) − E(0)) at both ends of a bracket, 0 and inf where there is none; the least E(η) − E(0) seen."""

    low: tuple[Array, Array]
    high: tuple[Array, Array]
    least: Array
    num_passes: Array


@contract.takes_loss
def critical_sharpness(
    loss: Loss,
    params: ArrayTree,
    batch: Any,
    direction: ArrayTree | None = None,
    *,
    guess: Array | float = 1.0,
    tol: Array | float = 0.05,
) -> CriticalSharpness:
    """λ_c = 2/η_c with η_c the rate at which a step along u stops to lower the loss: E(ω + η_c u) = E(ω).

    A handful of forward passes, and no derivative where the direction is given, so that it serves models which are too
    large for Hessian products, or whose kernels have none. The guess is doubled or halved until the loss is above that
    at the start at one end of an octave and below it at the other; the octave is then halved. η_c is where the line
    through (E(η) − E(0))/η at both ends is 0, which on a quadratic is exact: there, with the slope g·u,
    η_c = −2 g·u/u·Hu, for gradient descent (u = −g) twice `greedy`. Where the loss crosses E(0) several times, it is
    one of the crossings.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      params: the point ω.
      batch: the examples, or a data set in batches, gone through once a pass.
      direction: u, like params: the update that an optimizer makes at a rate of 1, as in
        ``u, _ = optax.adam(1.0).update(gradient, opt_state, params)``; by default −g.
      guess: where to look first, such as the rate in use, or the last ``rate`` found; 1 where that is not positive and
        finite.
      tol: the width of the bracket, relative.

    Returns:
      A `CriticalSharpness`.

    Raises:
      TypeError, ValueError: the arguments do not fit the contract, or a number is out of range.

    Reference:
      Kalra et al., "A Scalable Measure of Loss Landscape Curvature for Analyzing the Training Dynamics of LLMs", 2026,
      section 3; Roulet et al., "Stepping on the Edge: Curvature Aware Learning Rate Tuners", NeurIPS 2024.
    """
    contract.check_tolerance(tol)
    if isinstance(guess, (int, float)) and not 0 < guess < float("inf"):
        raise ValueError(f"guess: expected a positive and finite rate, got {guess}")
    data = dataset.of(batch)
    contract.check_params(params)
    if direction is not None:
        contract.check_alike("direction", direction, params)
    return _critical(loss, params, data, direction, guess, tol)


@functools.partial(dataset.jit, static_argnames="loss")
def _critical(
    loss: Loss, params: ArrayTree, data: Any, direction: ArrayTree | None, guess: Array | float, tol: Array | float
) -> CriticalSharpness:
    contract.check(loss, params, dataset.first(data))
    # In half precision a short step would not move the params at all.
    params = contract.widened(params)
    if direction is None:
        direction = optax.tree.scale(-1, dataset.mean(contract.ValueAndGrad(loss), data, params)[1])
    value = lambda rate: jnp.asarray(dataset.mean(_Along(loss), data, params, direction, rate))
    dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(params)), jnp.float32)
    zero, infinity = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
    start = value(zero).astype(dtype)
    # The last rate found, if there was none, would be no place to look.
    guess = jnp.where((guess > 0) & (guess < jnp.inf), guess, 1).astype(dtype)

    def next_rate(search: _Search) -> Array:
        (low, _), (high, _) = search.low, search.high
        first = jnp.where(search.num_passes == 1, guess, jnp.where(low > 0, 2 * low, high / 2))
        return jnp.where((low > 0) & (high < jnp.inf), (low + high) / 2, first).astype(dtype)

    def step(search: _Search) -> _Search:
        rate = next_rate(search)
        change = value(rate).astype(dtype) - start
        # What is not finite has risen.
        falls = change < 0
        put = lambda here, ends: jax.tree.map(functools.partial(jnp.where, here), (rate, change), ends)
        return _Search(
            put(falls, search.low), put(~falls, search.high), jnp.fmin(search.least, change), search.num_passes + 1
        )

    def going_on(search: _Search) -> Array:
        return jnp.isfinite(start) & ~_narrow(search, tol) & (search.num_passes <= _PATIENCE)

    begun = _Search((zero, zero), (infinity, infinity), zero, jnp.ones((), jnp.int32))
    return _found(dataset.while_loop(going_on, step, begun, data=data), start, tol)


def _narrow(search: _Search, tol: Array | float) -> Array:
    (low, _), (high, _) = search.low, search.high
    return jnp.isfinite(high) & (high - low <= tol * high)


def _found(end: _Search, start: Array, tol: Array | float) -> CriticalSharpness:
    """What a search that has ended says, of a loss that was ``start``."""
    (low, fall), (high, rise) = end.low, end.high
    slopes = fall / jnp.where(low > 0, low, 1), rise / high
    between = low + (high - low) * jnp.where(jnp.isfinite(slopes[1]), -slopes[0] / (slopes[1] - slopes[0]), 0.5)
    rate = jnp.where(low > 0, jnp.where(high < jnp.inf, between, jnp.inf), jnp.nan)
    # E(η) − E(0) has at η_c the slope that it has at 0, four times its depth over η_c: so far rounding moves the root.
    limits = jnp.finfo(start.dtype)
    blurred = _ROUNDING * limits.eps * jnp.abs(start) / jnp.maximum(-4 * end.least, limits.tiny)
    return CriticalSharpness(
        value=2 / rate,
        rate=rate,
        bracket=jnp.stack([low, high]),
        num_passes=end.num_passes,
        converged=_narrow(end, tol) & (low > 0) & (blurred <= tol),
    )


@dataclasses.dataclass(frozen=True)
class _Along:
    """E(ω + ηu) on a batch."""

    loss: Loss

    def __call__(self, batch: Any, params: ArrayTree, direction: ArrayTree, rate: Array) -> Array:
        moved = jax.tree.map(lambda p, u: p + (rate * u).astype(p.dtype), params, direction)
        return self.loss(moved, contract.widened(batch))
