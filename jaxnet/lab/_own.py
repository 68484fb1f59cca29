"""A loss, params and a batch of one's own, by the names that a module of one's own has for them."""

import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet import contract
from jaxnet.contract import ArrayTree, Loss, UserError


def of_ones_own(**names: str | None) -> tuple[Loss, ArrayTree, ArrayTree]:
    """``loss``, ``params`` and ``batch`` from ``module:name``; of the last two also functions without arguments.

    The module is one that is installed, or a file in the current folder.

    Raises:
      UserError: one of the three is not given, is not found, fails, or they do not fit the contract.
    """
    missing = [f"--{name}" for name, place in names.items() if not place]
    if missing:
        raise UserError(f"--loss, --params and --batch go together; give {' and '.join(missing)} too")
    loss, params, batch = (_found(name, str(place)) for name, place in names.items())
    if not callable(loss):
        raise UserError(f"--loss {names['loss']}: expected a function loss(params, batch), got {type(loss).__name__}")
    made = []
    for name, value in (("params", params), ("batch", batch)):
        try:
            value = value() if callable(value) and not jax.tree.leaves(value)[1:] else value
            made.append(jax.tree.map(jnp.asarray, value))
        except Exception as error:
            raise UserError(f"--{name} {names[name]}: {type(error).__name__}: {error}") from error
    try:
        contract.check(loss, *made)
    except Exception as error:  # whatever a loss says of arguments that it cannot take
        raise UserError(f"--loss {names['loss']}: {type(error).__name__}: {error}") from error
    return loss, made[0], made[1]


def _found(option: str, place: str) -> Any:
    module, _, path = place.partition(":")
    if not module or not path:
        raise UserError(f"--{option} {place}: expected module:name, such as my_module:{option}")
    sys.path.insert(0, "")
    try:
        value = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise UserError(f"--{option} {place}: importing {module} failed: {error}") from error
        raise UserError(
            f"--{option} {place}: no module {module} in this folder, and none is installed; run it from the folder of "
            f"{module.partition('.')[0]}.py"
        ) from error
    except Exception as error:
        raise UserError(f"--{option} {place}: importing {module} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")
    for name in path.split("."):
        if not hasattr(value, name):
            names = (
                ", ".join(name for name in vars(value) if not name.startswith("_"))
                if hasattr(value, "__dict__")
                else ""
            )
            raise UserError(f"--{option} {place}: {module} has no {path}; it has {names or 'nothing'}")
        value = getattr(value, name)
    return value
