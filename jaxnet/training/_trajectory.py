"""A trajectory of states: the pure loop that everything which steps shares."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet import dataset
from jaxnet.mesh import keep_pace

State = TypeVar("State")


def _metrics(state: Any, metrics: Any) -> Any:
    return metrics


def trajectory(
    update: Callable[[State, Any], tuple[State, Any]],
    state: State,
    batches: Any = None,
    *,
    num_steps: int | None = None,
    observe: Callable[[State, Any], Any] = _metrics,
    unroll: int = 1,
) -> tuple[State, Any]:
    """s_{t+1}, m_t = update(s_t, batch_t) for t = 0 … T − 1, and what is observed on the way.

    Pure: it can be jitted, vmapped, differentiated, and nested as the ``update`` of another trajectory.

    Args:
      update: ``update(state, batch) -> (state, metrics)``, such as `make_update` makes, or one's own.
      state: s_0, such as `init_state` makes.
      batches: a pytree whose leaves have a leading axis of T steps; or a data set in batches (see `jaxnet.dataset`),
        whose batches are the steps, gone through on the host with ``update`` called as it is; or, with ``num_steps``,
        the one batch of every step.
      num_steps: T, where all steps see the same batch.
      observe: ``observe(s_{t+1}, m_t)``, what to keep of each step; by default the metrics.
      unroll: steps an iteration of the compiled loop, where a step costs little more than the loop.

    Returns:
      s_T, and what was observed, each leaf with a leading axis T.
    """

    def step(state: State, batch: Any) -> tuple[State, Any]:
        state, metrics = update(state, batch)
        return state, observe(state, metrics)

    if num_steps is not None:
        return lax.scan(lambda state, _: step(state, batches), state, None, length=num_steps, unroll=unroll)
    batches = dataset.of(batches)
    if not dataset.on_host(batches):
        return lax.scan(step, state, batches, unroll=unroll)
    seen = []
    for batch in batches:
        state, observed = step(state, batch)
        seen.append(keep_pace(observed))
    return state, jax.tree.map(lambda *parts: jnp.stack(parts), *seen)
