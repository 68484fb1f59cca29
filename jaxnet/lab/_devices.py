"""A task's examples parted among devices."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxnet import contract
from jaxnet.contract import UserError


def shared(num: int | None) -> bool:
    """Whether so many devices were asked for, or there are several processes."""
    return num is not None or jax.process_count() > 1


def on_devices(num: int | None, params: Any, train: Any, test: Any) -> tuple[Any, Any, Any, tuple[str, Any, str]]:
    """Everything on a mesh, the examples to train on in as many equal parts; the last line is for the job's table."""
    devices = jax.devices()[:num]
    num, length = len(devices), contract.num_examples(train)
    if length < num:
        raise UserError(f"devices: expected no more than {length}, the number of examples to train on, got {num}")
    mesh = jax.make_mesh((num,), ("examples",), axis_types=(AxisType.Auto,), devices=devices)
    put = lambda tree, *spec: jax.device_put(jax.tree.map(np.asarray, tree), NamedSharding(mesh, PartitionSpec(*spec)))
    left = length % num
    remark = f"of kind {devices[0].platform}, each with {length // num} of the examples"
    remark += f"; {left} are left out, so that all have as many" if left else ""
    train = put(jax.tree.map(lambda x: x[: length - left], train), "examples")
    return put(params), train, None if test is None else put(test), ("devices", num, remark)
