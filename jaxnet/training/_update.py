"""One step of training, as a pure function."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree, Loss, MakeOptimizer, check_params
from jaxnet.training._optimizer import ValueFn, check_state, renewed, with_extra_args

Metrics: TypeAlias = dict[str, Array]


@contract.result
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


def with_rate(make_optimizer: MakeOptimizer, state: TrainState, learning_rate: Any) -> TrainState:
    """``state`` to go on from at another rate, for `trajectory` or a loop of one's own; `fit` does it by itself.

    An optimizer wrapped in `optax.inject_hyperparams` steps by the rate that its state keeps, not by the one it is
    made with. What is kept there and depends on the rate becomes what a fresh state would hold; other hyperparameters,
    and schedules, stay.

    Args:
      make_optimizer: the maker, such as ``optax.inject_hyperparams(optax.sgd)``.
      state: the `TrainState`.
      learning_rate: a number.

    Raises:
      ValueError: the state belongs to another optimizer.
    """
    check_state(make_optimizer, learning_rate, state.opt_state, state.params)
    return state._replace(opt_state=renewed(make_optimizer, state.opt_state, state.params, learning_rate))


def make_update(
    loss: Loss, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, ArrayTree], tuple[TrainState, Metrics]]:
    """ω ← ω + u with optax's update u of the gradient ∂E/∂ω; for `optax.sgd`, ω ← ω − η ∂E/∂ω.

    The rule is the same for one example, a mini-batch or the whole set: only the batch it is given differs.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      optimizer: any optax transformation. ``value``, ``grad`` and ``value_fn`` are handed to those that ask, through
        wrappers too; under `optax.masked` or `optax.partition` ``value_fn`` is a function of the params that are shown,
        the others held. `optax.lookahead`, which steps a pair of params, is refused.

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
    _check_one_copy(state.opt_state)
    whole = ValueFn(value_fn, state.params)
    updates, opt_state = with_extra_args(optimizer).update(
        grad, state.opt_state, state.params,
        value=value, grad=grad, value_fn=whole, grad_fn=lambda params, _: jax.grad(whole)(params),
    )  # fmt: skip
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.step + 1), {"loss": value}


def _check_one_copy(opt_state: Any) -> None:
    pair = lambda node: isinstance(node, optax.LookaheadState)
    if any(map(pair, jax.tree.leaves(opt_state, is_leaf=pair))):
        raise TypeError(
            "optimizer: optax.lookahead steps a pair of params, fast and slow, of which loss(params, batch) knows one; "
            "take its fast optimizer alone"
        )
