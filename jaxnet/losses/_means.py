"""The mean of a criterion over examples as a loss, whole, by chunks or in another precision."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxnet import dataset
from jaxnet.contract import Array, ArrayTree, Loss, as_written, check_count, check_function, hashable, num_examples
from jaxnet.losses._coupled import check_mean
from jaxnet.losses._criteria import Apply, Criterion
from jaxnet.losses._rounded import Rounded


@dataclasses.dataclass(frozen=True)
class MeanLoss:
    """(1/N) Σ_n criterion(apply(params, x_n), t_n): hashable, so that equal losses share one compilation.

    A batch is ``(inputs, targets)``, or ``(inputs, targets, keys)`` with one `jax.random.key` an example for
    networks that are random in training (dropout): then each example draws its own noise.
    """

    _WITHIN: ClassVar = "apply"
    apply: Apply
    criterion: Criterion

    def outputs(self, params: ArrayTree, batch: Any) -> Array:
        """The network's outputs on ``batch``, (N, ...)."""
        if len(batch) == 2:
            return self.apply(params, batch[0])
        inputs, _, keys = batch
        one = lambda x, key: self.apply(params, x[None], key=key)[0]
        return jax.vmap(one)(inputs, keys)

    def __call__(self, params: ArrayTree, batch: Any) -> Array:
        """The mean over the batch's N examples, a scalar."""
        values = self.criterion(self.outputs(params, batch), batch[1])
        if values.shape != jnp.shape(batch[1])[:1]:
            raise ValueError(f"criterion: expected one value an example, {jnp.shape(batch[1])[:1]}, got {values.shape}")
        return jnp.mean(values)


def mean_loss(apply: Apply, criterion: Criterion) -> MeanLoss:
    """The library's contract from a network and a criterion: ``loss(params, (inputs, targets)) -> scalar``.

    Args:
      apply: ``apply(params, inputs) -> outputs``, over a batch; ``key=`` too if the batch carries keys.
      criterion: ``criterion(outputs, targets) -> (N,)``, such as `softmax_cross_entropy`.

    Returns:
      A frozen, hashable callable that keeps its two parts as ``.apply`` and ``.criterion``.

    Raises:
      TypeError: one of them is no function.

    Examples:
      >>> model = nn.linear_neuron()
      >>> loss = losses.mean_loss(model.apply, losses.squared_error)
      >>> params = {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}
      >>> print(loss(params, data.two_gaussians_exact()))  # targets are ±1
      0.5
    """
    check_function("apply", apply)
    check_function("criterion", criterion)
    return MeanLoss(hashable(apply), hashable(criterion))


@dataclasses.dataclass(frozen=True)
class ChunkedLoss:
    """A mean loss accumulated over chunks; see `chunked`."""

    _WITHIN: ClassVar = "loss"
    loss: Loss
    size: int

    def __call__(self, params: ArrayTree, batch: ArrayTree) -> Array:
        """The same mean over the batch's N examples, a scalar."""
        dataset.check_in_memory("chunked", batch, "a function that goes through one gives its loss batch by batch")
        if num_examples(batch) <= self.size:
            return self.loss(params, batch)  # one chunk: nothing to save by computing it twice
        check_mean(self.loss, params, batch)
        return self._over_chunks(params, batch)

    @dataset.on_automatic_axes
    def _over_chunks(self, params: ArrayTree, batch: ArrayTree) -> Array:
        # Rematerialised, so that the backward pass holds one chunk's intermediates and not all of them.
        one = jax.checkpoint(self.loss)
        return dataset.mean(lambda chunk, params: one(params, chunk), batch, params, size=self.size)


def parts_of(loss: Loss) -> tuple[MeanLoss, int | None]:
    """The network and the criterion of a loss that keeps them apart, and the size of its chunks if it has them.

    Raises:
      TypeError: it is not made by `mean_loss`, nor a chunked one of these.
    """
    inner, size = (loss.loss, loss.size) if isinstance(loss, ChunkedLoss) else (loss, None)
    if not isinstance(inner, MeanLoss):
        raise TypeError(
            "loss: expected one whose network and criterion are known apart; make it with jaxnet.losses.mean_loss, "
            f"got {type(as_written(loss)).__name__}"
        )
    return inner, size


def chunked(loss: Loss, size: int) -> ChunkedLoss:
    """The same loss, Σ_c (N_c/N) loss(params, chunk c), in the memory of one chunk.

    Gradients and Hessian products go through the same scan: their memory does not grow with N.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over the batch.
      size: examples a chunk; the last holds what is left, and counts for as much.

    Returns:
      A hashable loss.

    Raises:
      TypeError, ValueError: ``size`` is no whole number from 1 on. The loss itself raises a UserError, where it is
        called with values and is no mean over independent examples; inside `jax.jit` and `jax.grad` nothing checks
        that.
    """
    check_function("loss", loss)
    check_count("size", size)
    return ChunkedLoss(hashable(loss), size)


def mixed_precision(loss: Loss, dtype: Any = jnp.bfloat16) -> Loss:
    """The same loss, computed in another precision: params and floating inputs are rounded to it at each call.

    What is held stays as it was: params, the updates, the gradients (those of the rounding are taken as 1), their means
    over examples and Krylov vectors. Of a loss of `mean_loss` the network alone is computed in ``dtype``; its outputs
    meet the criterion, and the mean is taken, in the params' own precision.

    Curvature is then that of the rounded computation, known to a few units of ``dtype``: ask for a tolerance of 0.01,
    not 1e-3, and no bound is certified. For limits and rates measure the loss itself.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over the batch.
      dtype: of the computation, a floating one.

    Returns:
      A hashable loss; of the same kind where the loss is of `mean_loss` or `chunked`.

    Raises:
      TypeError: ``dtype`` is not a floating one.

    Reference:
      Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.1; no loss scale, which bfloat16 needs not.
    """
    check_function("loss", loss)
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"mixed_precision: expected a floating dtype, got {dtype}")
    if isinstance(loss, ChunkedLoss):
        return ChunkedLoss(mixed_precision(loss.loss, dtype), loss.size)
    if isinstance(loss, MeanLoss):
        return MeanLoss(Rounded(loss.apply, dtype), loss.criterion)
    return Rounded(hashable(loss), dtype)


def check_parts(loss: Loss, params: ArrayTree, data: Any) -> None:
    """Raise where examples are taken apart, by chunks or by batches, of a loss that couples them.

    Of values only, as by `jaxnet.per_example.check_independent`; of a batch taken whole nothing is asked.

    Raises:
      UserError: the loss is no mean over independent examples.
    """
    if dataset.on_host(data) or isinstance(loss, ChunkedLoss):
        check_mean(loss.loss if isinstance(loss, ChunkedLoss) else loss, params, dataset.first(data))
