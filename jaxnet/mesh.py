"""Arrays on a mesh of devices: those of explicit axes are worked on as on automatic ones.

On explicit axes, which JAX makes by default, a sharding is a part of an array's type, and many an operation has to be
told the sharding of its result. What is computed here does not depend on how arrays lie, so the compiler lays them
out: `on_automatic_axes` is the one place that knows the difference.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, reshard, use_abstract_mesh

from jaxnet import contract

try:
    from jax.experimental.shard_alike import shard_alike
except ImportError:  # JAX 0.12 has none
    shard_alike = None  # type: ignore[assignment]

__all__ = ["automatic", "check_together", "keep_pace", "laid_out_like", "on_automatic_axes", "on_explicit_axes"]


def __dir__() -> list[str]:
    return sorted(__all__)


def on_explicit_axes(*trees: Any) -> bool:
    """Whether an array's sharding is a part of its type."""
    return bool(_explicit_meshes(jax.tree.leaves(trees)))


def automatic(tree: Any) -> Any:
    """The same arrays on automatic axes, which share their memory; for values at hand, not for tracers."""
    return jax.tree.map(lambda x: _moved(x, _automatic(x.sharding.mesh)) if _is_explicit(x) else x, tree)


def on_automatic_axes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, within which arrays on a mesh of explicit axes are as on automatic ones.

    Its results are on explicit axes again. Within a `jit` their shardings have to be known beforehand: what has the
    shape of an argument, or several rows of it, lies as that argument does; all else is whole on every device.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        if not _explicit_meshes(leaves):
            return function(*args, **kwargs)
        if _tracing(leaves):
            return _traced(function, args, kwargs)
        mesh = next(x.sharding.mesh for x in leaves if _is_explicit(x))
        args, kwargs = automatic((args, kwargs))
        with contextlib.nullcontext() if jax.sharding.get_mesh().empty else jax.set_mesh(_automatic(mesh)):
            result = function(*args, **kwargs)
        back = lambda x: _moved(x, mesh) if _mesh_of(x) == _automatic(mesh) else x
        return jax.tree.map(back, result)

    return call


def laid_out_like(like: Any, tree: Any) -> Any:
    """The same tree, in a compiled program whose leaves the compiler is to lay out as those of ``like``."""
    if jax.device_count() == 1 or shard_alike is None:
        return tree
    tracers = lambda *xs: all(isinstance(x, jax.core.Tracer) for x in xs)
    return jax.tree.map(lambda p, x: shard_alike(p, x)[1] if tracers(p, x) else x, like, tree)


def keep_pace(results: Any) -> Any:
    """The same results, for which a loop on the host waits where it could run too far ahead of several devices.

    With dozens of programs under way that send to one another, XLA on CPUs (jaxlib 0.10) has no thread left for the one
    that the others wait for, and stands still.
    """
    ahead = jax.device_count() > 1 and jax.default_backend() == "cpu"
    return jax.block_until_ready(results) if ahead else results


def check_together(**trees: Any) -> None:
    """Raise unless all arrays that were put on devices were put on the same ones, a mesh's or one.

    And unless those that several processes share have the same shapes in each of them.

    Raises:
      UserError: they were not, or have not.
    """
    found: dict[Any, str] = {}
    shared: dict[str, str] = {}
    for name, x in [leaf for argument, tree in trees.items() for leaf in contract.called(argument, tree)]:
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.committed:
            found.setdefault(frozenset(map(str, x.sharding.device_set)), name)
            if not x.is_fully_addressable:
                shared[name] = f"{x.dtype}{list(x.shape)}"
    if len(found) > 1:
        lists = "; ".join(f"{name} on {', '.join(sorted(devices))}" for devices, name in found.items())
        raise contract.UserError(
            f"devices: expected all arrays on the devices of one mesh, got {lists}; put each there by jax.device_put, "
            "with NamedSharding(mesh, PartitionSpec()) for what every device holds"
        )
    if shared and not _tracing([]):
        _check_in_each_process(shared)


def _check_in_each_process(shared: dict[str, str]) -> None:
    """JAX takes each process's word for the shape of a whole array: programs of several shapes would meet unnoticed."""
    from jax.experimental.multihost_utils import process_allgather

    digest = hashlib.blake2b(repr(shared).encode(), digest_size=8).digest()
    of_all = process_allgather(np.frombuffer(digest, np.uint32))
    others = np.flatnonzero((of_all != of_all[jax.process_index()]).any(axis=1))
    if others.size:
        own = ", ".join(f"{name} {shape}" for name, shape in shared.items())
        raise contract.UserError(
            f"devices: expected arrays of the same shapes in every process, got others in process {others[0]} than in "
            f"process {jax.process_index()}, which has {own}; give each process as many of the examples"
        )


def _automatic(mesh: Any) -> Any:
    kinds = [AxisType.Auto if kind is AxisType.Explicit else kind for kind in mesh.axis_types]
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices, mesh.axis_names, axis_types=tuple(kinds))
    return mesh.update_axis_types(dict(zip(mesh.axis_names, kinds, strict=True)))


def _tracing(leaves: list[Any]) -> bool:
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        return True
    try:
        jax.sharding.get_mesh()
    except ValueError:  # within a `jit`, though of arrays that it closes over
        return True
    return False


def _mesh_of(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return None
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def _is_explicit(x: Any) -> bool:
    mesh = _mesh_of(x)
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def _explicit_meshes(leaves: list[Any]) -> list[Any]:
    return [_mesh_of(x) for x in leaves if _is_explicit(x)]


def _moved(x: Any, mesh: Mesh) -> Any:
    """The same array on a mesh of the same devices whose axes are of another kind; nothing is copied."""
    sharding = NamedSharding(mesh, x.sharding.spec, memory_kind=x.sharding.memory_kind)
    parts = [part.data for part in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts, dtype=x.dtype)


def _traced(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    leaves, structure = jax.tree.flatten((args, kwargs))
    types = {i: jax.typeof(x) for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
    mesh = next(t.sharding.mesh for t in types.values() if AxisType.Explicit in t.sharding.mesh.axis_types)
    with use_abstract_mesh(_automatic(mesh)):
        inside = [reshard(x, PartitionSpec()) if i in types else x for i, x in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(structure, inside)
        result = function(*args, **kwargs)
    known = [(t.shape, t.sharding.spec) for t in types.values() if any(t.sharding.spec)]
    out = lambda x: reshard(x, NamedSharding(mesh, _spec_like(jax.numpy.shape(x), known)))
    return jax.tree.map(out, result)


def _spec_like(shape: tuple[int, ...], known: list[tuple[tuple[int, ...], PartitionSpec]]) -> PartitionSpec:
    for rows in (0, 1):
        for other, spec in known:
            if shape[rows:] == other:
                return PartitionSpec(*[None] * rows, *spec)
    return PartitionSpec()
