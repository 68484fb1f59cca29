"""The experiments by name."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxnet.lab._progress import Share, unseen
from jaxnet.lab._task import check_seed, known
from jaxnet.lab.experiments import (
    backprop,
    batch_size,
    catapult,
    centring,
    edge_of_stability,
    inference,
    learning_rate_sweep,
    local_minima,
    noise_floor,
    one_dimension,
    one_epoch,
    online_sharpness,
    overfitting,
    path,
    redundancy,
    second_order,
    stochastic_vs_batch,
    two_gaussians,
)
from jaxnet.lab.record import Record

# In the order of the lectures, with about the seconds that each takes on two cores.
_MODULES = {
    inference: 1,
    backprop: 2,
    one_dimension: 1,
    two_gaussians: 4,
    path: 4,
    centring: 9,
    one_epoch: 3,
    redundancy: 8,
    noise_floor: 20,
    batch_size: 80,
    local_minima: 7,
    second_order: 8,
    stochastic_vs_batch: 25,
    learning_rate_sweep: 80,
    online_sharpness: 30,
    edge_of_stability: 20,
    catapult: 4,
    overfitting: 20,
}
_BY_NAME = {module.__name__.rpartition(".")[2]: module for module in _MODULES}


def names() -> list[str]:
    """The experiments' names, in the order of the lectures."""
    return list(_BY_NAME)


def question(name: str) -> str:
    """What an experiment asks, in a sentence.

    Raises:
      UserError: the name is unknown.
    """
    return _BY_NAME[known("experiment", name, _BY_NAME)].QUESTION


def parts(chosen: Sequence[str]) -> list[float]:
    """The share of the work that is done before each of several experiments, about, and 1."""
    seconds = np.array([_MODULES[_BY_NAME[name]] for name in chosen])
    return [0.0, *(np.cumsum(seconds) / seconds.sum()).tolist()]


def run(name: str, *, seed: int = 0, share: Share = unseen, **config: Any) -> Record:
    """Run an experiment.

    Args:
      name: one of `names`.
      seed: of all its randomness.
      share: told how much of it is done, by those that take long.
      **config: its own options, as its ``run`` names them.

    Returns:
      Its `Record`: measurements, claims with their verdicts, and panels to draw.

    Raises:
      UserError: the name or an option is unknown.
    """
    function: Callable[..., Record] = _BY_NAME[known("experiment", name, _BY_NAME)].run
    taken = inspect.signature(function).parameters
    check_seed(seed)
    for option in config:
        known(f"option of experiment {name}", option, [option for option in taken if option not in ("seed", "share")])
    return function(seed=seed, **config, **({"share": share} if "share" in taken else {}))
