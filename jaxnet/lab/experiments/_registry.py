"""The experiments by name."""

import inspect
from collections.abc import Callable
from typing import Any

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

_MODULES = (
    inference,
    backprop,
    one_dimension,
    two_gaussians,
    path,
    centring,
    one_epoch,
    redundancy,
    noise_floor,
    batch_size,
    local_minima,
    second_order,
    stochastic_vs_batch,
    learning_rate_sweep,
    online_sharpness,
    edge_of_stability,
    catapult,
    overfitting,
)
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


def run(name: str, *, seed: int = 0, **config: Any) -> Record:
    """Run an experiment.

    Args:
      name: one of `names`.
      seed: of all its randomness.
      **config: its own options, as its ``run`` names them.

    Returns:
      Its `Record`: measurements, claims with their verdicts, and panels to draw.

    Raises:
      UserError: the name or an option is unknown.
    """
    function: Callable[..., Record] = _BY_NAME[known("experiment", name, _BY_NAME)].run
    options = [option for option in inspect.signature(function).parameters if option != "seed"]
    check_seed(seed)
    for option in config:
        known(f"option of experiment {name}", option, options)
    return function(seed=seed, **config)
