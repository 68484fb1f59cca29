"""What optax's optimizers are handed at a step, and the rate that they may keep in their state."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnet import contract
from jaxnet.contract import Array, ArrayTree, MakeOptimizer


@contract.result
@dataclasses.dataclass(frozen=True, eq=False)
class ValueFn:
    """The loss as a function of the params alone, for optimizers that are shown a part of them.

    `optax.masked` and `optax.partition` put an `optax.MaskedNode` in place of what is hidden from an optimizer; here it
    is filled in, so that ``function`` always gets all of the params.

    Attributes:
      function: ``function(params) -> scalar``.
      params: where training is, all of it.
    """

    function: Callable[[ArrayTree], Array]
    params: ArrayTree

    def __call__(self, params: ArrayTree) -> Array:
        """The loss at ``params``, of which some may be masked.

        Raises:
          ValueError: ``params`` is laid out otherwise than those of training, as after `optax.flatten`.
        """
        choose = lambda shown, own: own if is_masked(shown) else shown
        whole = jax.tree.map(choose, params, self.params, is_leaf=is_masked)
        contract.check_alike("value_fn", whole, self.params)
        return self.function(whole)


def is_masked(node: Any) -> bool:
    """Whether a node stands for params that are hidden from an optimizer."""
    return isinstance(node, optax.MaskedNode)


def with_extra_args(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``optimizer`` with an ``update`` that takes any keyword, and hands on those that the optimizer asks for.

    By its signature and not by its type, as `optax.with_extra_args_support` goes: `optax.MultiSteps` passes keywords on
    and is of no such type, `optax.contrib.sam` is and takes one alone.
    """
    parameters = list(inspect.signature(optimizer.update).parameters.values())
    asked = {p.name for p in parameters[3:]}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        # optax's line searches refuse what their loss does not take.
        asked |= {"value", "grad", "value_fn"} - {p.name for p in parameters[:3]}

    def update(updates: ArrayTree, state: Any, params: ArrayTree | None = None, **given: Any) -> tuple[ArrayTree, Any]:
        return optimizer.update(updates, state, params, **{name: x for name, x in given.items() if name in asked})

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def check_state(make_optimizer: MakeOptimizer, learning_rate: Any, opt_state: Any, params: ArrayTree) -> None:
    """Raise unless ``opt_state`` has the structure of a fresh one.

    Raises:
      ValueError: it has not.
    """
    wanted = jax.eval_shape(lambda: make_optimizer(learning_rate).init(params))
    structures: list[Any] = [jax.tree.structure(tree) for tree in (wanted, opt_state)]
    if structures[0] != structures[1]:
        raise ValueError("start: its opt_state belongs to another optimizer; go on with the same, or from start.params")


def renewed(make_optimizer: MakeOptimizer, opt_state: Any, params: ArrayTree, learning_rate: Any) -> Any:
    """``opt_state`` with those numbers that `optax.inject_hyperparams` keeps in it and the rate decides made anew."""
    leaves, structure = jax.tree.flatten(opt_state)
    kept = _kept(opt_state)
    if kept:
        for i, (new, decided) in zip(kept, _made(make_optimizer, params, learning_rate), strict=True):
            leaves[i] = jnp.where(decided, new, leaves[i]).astype(jnp.result_type(leaves[i]))
    return jax.tree.unflatten(structure, leaves)


def _kept(opt_state: Any) -> list[int]:
    injected = lambda path: any(getattr(entry, "name", None) == "hyperparams" for entry in path)
    return [i for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(opt_state)) if injected(path)]


@functools.partial(jax.jit, static_argnames="make_optimizer")
def _made(make_optimizer: MakeOptimizer, params: ArrayTree, learning_rate: Array) -> list[tuple[Array, Array]]:
    """Each number of a fresh state, and whether it is another one at another rate."""

    def at(rate: Array) -> list[Array]:
        state = make_optimizer(rate).init(params)
        leaves = jax.tree.leaves(state)
        return [jnp.asarray(leaves[i]) for i in _kept(state)]

    # Two other rates, far to either side: at one of them a maker may be at a bound that it keeps to.
    new, low, high = (at(learning_rate * 2.0**power) for power in (0, -10, 10))
    return [(x, (x != y) | (x != z)) for x, y, z in zip(new, low, high, strict=True)]
