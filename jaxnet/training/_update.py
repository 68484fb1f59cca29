"""One step of training, as a pure function."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxnet.contract import Array, ArrayTree, Loss, check_params

Metrics: TypeAlias = dict[str, Array]


class TrainState(NamedTuple):
    """What training carries from step to step.

    Attributes:
      params: the parameters.
      opt_state: the optimizer's state.
      step: the number of updates done, an int32 scalar.
    """

    params: Any
    opt_state: Any
    step: Array


def init_state(params: ArrayTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    Raises:
      TypeError, ValueError: ``params`` is not a non-empty pytree of floating arrays.
    """
    check_params(params)
    params = jax.tree.map(jnp.asarray, params)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_update(
    loss: Loss, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, ArrayTree], tuple[TrainState, Metrics]]:
    """ω ← ω + u with optax's update u of the gradient ∂E/∂ω; for `optax.sgd`, ω ← ω − η ∂E/∂ω.

    The rule is the same for one example, a mini-batch or the whole set: only the batch it is given differs.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      optimizer: any optax transformation. ``value``, ``grad`` and ``value_fn`` are handed to those that ask.

    Returns:
      ``update(state, batch) -> (state, metrics)``, pure; ``metrics["loss"]`` is the loss before the step.
    """

    def update(state: TrainState, batch: ArrayTree) -> tuple[TrainState, Metrics]:
        value, grad = jax.value_and_grad(loss)(state.params, batch)
        return apply_gradient(optimizer, state, value, grad, lambda p: loss(p, batch))

    return update


def apply_gradient(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    value: Array,
    grad: ArrayTree,
    value_fn: Callable[[ArrayTree], Array],
) -> tuple[TrainState, Metrics]:
    """The update once the gradient is known."""
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        grad, state.opt_state, state.params, value=value, grad=grad, value_fn=value_fn
    )
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.step + 1), {"loss": value}
