"""How noisy a mini-batch's gradient is, measured from the gradients of single examples."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.per_example._gradients import PerExampleGradients, gradients
from jaxnet.per_example._held import Held, over_leaves
from jaxnet.per_example._independent import check_independent


@contract.result
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseScale:
    """The gradient's noise against its size.

    Attributes:
      value: B_simple = S/|G|², the batch size at which a mini-batch's noise is as large as the gradient.
      standard_error: of ``value``, by the delete-one jackknife.
      trace: S = Σ|g_n − ḡ|²/(N − 1), the trace of the examples' covariance.
      gradient_squared: |G|² = |ḡ|² − S/N, unbiased for the distribution that the examples were drawn from; it
        can come out negative.
      mean_squared: |ḡ|², exact for these examples.
      resolved: whether |G|² is above twice its own standard error; otherwise ``value`` means nothing.
    """

    value: Array
    standard_error: Array
    trace: Array
    gradient_squared: Array
    mean_squared: Array
    resolved: Array

    @classmethod
    def of(cls, grads: PerExampleGradients) -> "NoiseScale":
        """From gradients at hand, of 3 examples or more that are known to be independent; see `noise_scale`."""
        return _of_gradients(grads)


@contract.takes_loss
def noise_scale(loss: Loss, params: ArrayTree, batch: Any) -> NoiseScale:
    """B_simple = S/|G|²: a ratio of two unbiased averages over the examples.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples.
      params: the point at which the gradients are taken.
      batch: N >= 3 examples, a sample of the distribution meant; or a data set in batches that does not fit memory: a
        list of batches or a data loader, gone through three times.

    Returns:
      A `NoiseScale`, with its standard error.

    Raises:
      ValueError: N is below 3, too few for a spread and its error.
      UserError: the loss couples its examples; inside `jax.jit` nothing checks that.

    Reference:
      McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", 2018, eqs. 2.9 and A.2.
    """
    check_independent(loss, params, batch)
    return NoiseScale.of(gradients(loss, params, batch))


@dataset.jit
def _of_gradients(grads: PerExampleGradients) -> NoiseScale:
    return _from_deviations(*map(over_leaves, _by_leaves(grads)))


def layer_noise_scale(
    loss: Loss, params: ArrayTree, batch: Any, *, layer_of: Callable[[str], str] = contract.layer_of
) -> dict[str, NoiseScale]:
    """B_simple of each layer's own gradient, by one pass over the examples.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples.
      params: the point at which the gradients are taken.
      batch: N >= 3 examples, or a data set in batches, as for `noise_scale`.
      layer_of: from a leaf's name, such as ``"0/kernel"``, to the name of the group that it belongs to: ``lambda name:
        name`` takes each leaf by itself. By default the leaves that lie together are a group, which has their path as
        its name.

    Returns:
      The `NoiseScale` of each group, by its name; the traces, and the |ḡ|², add up to those of `noise_scale`.

    Raises:
      ValueError, UserError: as for `noise_scale`.
    """
    check_independent(loss, params, batch)
    parts = _by_leaves(gradients(loss, params, batch))
    layers = list(map(layer_of, contract.leaf_names(params)))
    of = lambda layer: [
        over_leaves([x for x, other in zip(jax.tree.leaves(part), layers, strict=True) if other == layer])
        for part in parts
    ]
    return {layer: _from_deviations(*of(layer)) for layer in dict.fromkeys(layers)}


@dataset.jit
def _by_leaves(grads: PerExampleGradients) -> tuple[ArrayTree, ArrayTree, ArrayTree]:
    """|ḡ|², |g_n − ḡ|² and g_n·ḡ of each leaf."""
    mean = grads.wide_mean()
    return jax.tree.map(lambda x: jnp.vdot(x, x), mean), *grads.rows(_about, mean)


def _about(held: Held, mean: ArrayTree) -> tuple[ArrayTree, ArrayTree]:
    """|g_n − ḡ|² and g_n·ḡ, in one pass: a stream that shuffles gives each pass another order."""
    return held.squared_distances(mean), held.vdots(mean)


@dataset.jit
def _from_deviations(mean_squared: Array, squares: Array, along: Array) -> NoiseScale:
    """From |g_n − ḡ|², not |g_n|²: |g_n|² − |ḡ|² would cancel where the gradients are alike."""
    n = squares.size
    if n < 3:
        raise ValueError(f"batch: the noise scale needs 3 examples or more, got {n}: one alone shows no noise")
    along = along - mean_squared
    trace = squares.sum() / (n - 1)
    gradient_squared = mean_squared - trace / n
    # The same two numbers with each example left out in turn, in closed form.
    mean_without = mean_squared - 2 * along / (n - 1) + squares / (n - 1.0) ** 2
    trace_without = (squares.sum() - squares * (n / (n - 1))) / (n - 2)
    squared_without = mean_without - trace_without / (n - 1)
    deviation = lambda x: jnp.sqrt((n - 1) / n * jnp.square(x - x.mean()).sum())
    return NoiseScale(
        value=trace / gradient_squared,
        standard_error=deviation(trace_without / squared_without),
        trace=trace,
        gradient_squared=gradient_squared,
        mean_squared=mean_squared,
        resolved=gradient_squared > 2 * deviation(squared_without),
    )
