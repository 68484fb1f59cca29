"""A clipped gradient with noise, to take the plain one's place."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxnet import contract, dataset, losses
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.per_example._gradients import check_norm, clipped_sum, few_at_once, lengths
from jaxnet.per_example._held import Held, hold


@contract.result
class Clipping(NamedTuple):
    """What a clipped gradient was made of: of single examples, and so not private.

    Attributes:
      values: E_n, the examples' losses, (N,).
      norms: ‖g_n‖ before clipping, (N,).
      share: of the examples that are no padding, the share that was clipped, in [0, 1].
    """

    values: Array
    norms: Array
    share: Array


@dataclasses.dataclass(frozen=True, eq=False)
class ClippedGrad:
    """``grad(params, batch, *, key=None, is_padding_example=None)``; see `clipped_grad`."""

    loss: Loss
    max_norm: Array | float
    noise_multiplier: Array | float
    normalise_by: float | None
    microbatch_size: int | None
    has_aux: bool

    def __call__(
        self, params: ArrayTree, batch: Any, *, key: Array | None = None, is_padding_example: Array | None = None
    ) -> Any:
        """The gradient, like params; with ``has_aux`` a pair of it and its `Clipping`.

        Args:
          params: the point.
          batch: N examples, or a data set in batches.
          key: a `jax.random.key` for the noise, another one at each step.
          is_padding_example: booleans (N,): examples that fill a batch up and count as 0. By default none.

        Raises:
          TypeError: there is noise and no key, or ``is_padding_example`` is not boolean.
          ValueError: ``is_padding_example`` is not (N,), or what is given does not fit the contract.
        """
        noisy = _noisy(self.noise_multiplier)
        if noisy and key is None:
            raise TypeError("key: expected a jax.random.key for the noise, got None")
        contract.check_params(params)
        params, batch = jax.tree.map(jnp.asarray, params), dataset.of(batch)
        losses.check_parts(self.loss, params, batch)
        n = dataset.num_examples(batch)
        padding = jnp.zeros(n, bool) if is_padding_example is None else jnp.asarray(is_padding_example)
        if padding.dtype != bool:
            raise TypeError(f"is_padding_example: expected booleans, got {padding.dtype}")
        if padding.shape != (n,):
            raise ValueError(f"is_padding_example: expected shape ({n},), got {padding.shape}")
        max_norm = jnp.asarray(self.max_norm)
        (values, norms), summed = _sum(self.loss, self.microbatch_size, params, batch, padding, max_norm)
        noise = self.noise_multiplier * max_norm if noisy else None
        gradient = _noised(summed, params, n if self.normalise_by is None else self.normalise_by, noise, key)
        if not self.has_aux:
            return gradient
        clipped = jnp.sum(~(norms <= max_norm) & ~padding)
        return gradient, Clipping(values, norms, clipped / jnp.maximum(jnp.sum(~padding), 1))


def _noisy(multiplier: Array | float) -> bool:
    """Whether there is noise; of a number that is not known yet, yes."""
    return isinstance(multiplier, jax.core.Tracer) or float(multiplier) > 0


@contract.takes_loss
def clipped_grad(
    loss: Loss,
    max_norm: Array | float,
    *,
    noise_multiplier: Array | float = 0.0,
    normalise_by: float | None = None,
    microbatch_size: int | None = None,
    has_aux: bool = False,
) -> ClippedGrad:
    """(1/M) [Σ_n g_n min(1, C/‖g_n‖) + σ C ξ] with ξ standard normal: the gradient of differentially private descent.

    It takes the place of ``jax.grad(loss)`` in any training step, inside `jax.jit` too, at about the same time and in
    less memory, since the clipped sum is found from the factors of one backward pass.

    The sum changes by C at most, in length, when one example is added, removed or made padding, and by 2C when one
    is replaced by another; the gradient by a M-th of that. ``noise_multiplier`` is in units of C: an accountant that
    means neighbours by replacement takes half of it. This holds for any loss, since g_n is the gradient of example n
    alone, and whatever an example holds: one whose gradient is not finite counts as 0, and shows in `Clipping.norms`.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over independent examples.
      max_norm: C > 0, or 0; infinity clips nothing.
      noise_multiplier: σ, the noise's standard deviation in units of C.
      normalise_by: M; by default the number of rows in the batch, padding included, so that M tells nothing of the
        data. For batches drawn at random (Poisson) it is their expected size; 1 gives the sum.
      microbatch_size: how many examples' gradients are held at a time; by default as many as keep time and memory
        near those of a plain gradient.
      has_aux: whether a `Clipping` comes with the gradient.

    Returns:
      ``grad(params, batch, *, key=None, is_padding_example=None)``, see `ClippedGrad`.

    Raises:
      ValueError: a number is out of its range.

    Reference:
      Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, algorithm 1; Bu et al., "Differentially Private
      Optimization on Large Model at Small Cost", ICML 2023, for the sum from factors.
    """
    check_norm("max_norm", max_norm)
    check_norm("noise_multiplier", noise_multiplier)
    if _noisy(noise_multiplier) and not isinstance(max_norm, jax.core.Tracer) and float(max_norm) == math.inf:
        raise ValueError("max_norm: expected a finite number where there is noise, got infinity")
    if normalise_by is not None and not normalise_by > 0:
        raise ValueError(f"normalise_by: expected a positive number, got {normalise_by}")
    if microbatch_size is not None:
        contract.check_count("microbatch_size", microbatch_size)
    return ClippedGrad(loss, max_norm, noise_multiplier, normalise_by, microbatch_size, has_aux)


@dataclasses.dataclass(frozen=True)
class _OfBatch:
    """Of a batch and its padding: the examples' losses and norms, and the clipped sum."""

    loss: Loss
    size: int | None

    def __call__(self, data: Any, params: ArrayTree, max_norm: Array) -> tuple[tuple[Array, Array], ArrayTree]:
        def of_chunk(chunk: Any) -> tuple[tuple[Array, Array], ArrayTree]:
            batch, padding = chunk
            factors, values = hold(self.loss, params, batch)
            held = Held(self.loss, params, batch, factors)
            norms = lengths(held)
            counted = jnp.isfinite(norms) & ~padding
            return (values, norms), clipped_sum(held.only(counted), jnp.where(counted, norms, 0), max_norm)

        size = self.size or few_at_once(self.loss, params, data[0])
        return dataset.rows_and_total(of_chunk, data, size=size)


@functools.partial(dataset.jit, static_argnames=("loss", "size"))
def _sum(loss: Loss, size: int | None, params: ArrayTree, batch: Any, padding: Array, max_norm: Array) -> Any:
    data = dataset.with_rows(batch, padding)
    return dataset.rows_and_total(_OfBatch(loss, size), data, params, max_norm)


@dataset.jit
def _noised(summed: ArrayTree, params: ArrayTree, divisor: Array, scale: Array | None, key: Array | None) -> ArrayTree:
    if scale is not None:
        noise = optax.tree.random_like(key, summed, jax.random.normal)
        summed = jax.tree.map(lambda x, e: x + scale.astype(x.dtype) * e, summed, noise)
    return jax.tree.map(lambda x, p: (x / divisor).astype(p.dtype), summed, params)
