"""Runs on disk: a checkpoint is whole or not there, and says what it is of."""

import ast
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import shutil
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.contract import ArrayTree, UserError
from jaxnet.training._history import Best, FitProgress, History
from jaxnet.training._update import TrainState

# Beside Orbax's arrays: what they are of, and the size and digest of each file.
_ABOUT, _ARRAYS, _FORMAT = "about.json", "arrays", 1
PARTIAL = ".partial"


def orbax() -> Any:
    """The package that writes the arrays.

    Raises:
      ImportError: it is not here.
    """
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("checkpoints need Orbax: pip install 'jaxnet[checkpoint]'") from error
    return orbax.checkpoint


def save(path: str | os.PathLike[str], tree: ArrayTree) -> None:
    """Write arrays to a folder of their own, which appears whole or not at all.

    Needs Orbax: ``pip install 'jaxnet[checkpoint]'``. Arrays on a mesh are written by Orbax, each process its own part;
    all processes call it.

    Args:
      path: the folder, on a disk that all processes see; it must not be there yet.
      tree: a pytree of arrays, numbers and keys: a `TrainState`, a `FitProgress`, params, any other.

    Raises:
      FileExistsError: ``path`` is there already.
      TypeError: a leaf is neither an array nor a number; the message names it.
      OSError: the disk is full, or cannot be written; nothing is left behind.
    """
    path = pathlib.Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"checkpoint {path}: is there already; name another folder, or remove it")
    named = _named(tree)
    about = {
        "format": _FORMAT,
        "tree": type(tree).__name__,
        "nodes": _nodes(tree),
        "leaves": {name: _said(name, leaf) for name, leaf in named},
        "keys": {name: str(jax.random.key_impl(leaf)) for name, leaf in named if _is_key(leaf)},
    }
    arrays = {name: _plain(leaf) for name, leaf in named}
    partial = path.with_name(path.name + PARTIAL)
    try:
        _write(partial, arrays, about)
        if jax.process_index() == 0:
            partial.rename(path)
    # TensorStore's word for a full disk is a ValueError.
    except (OSError, ValueError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = " ".join(str(error).split())
        raise OSError(f"checkpoint {path}: cannot be written ({reason}); what was saved before stays") from error
    _together(f"{path} is in its place")


def _write(partial: pathlib.Path, arrays: dict[str, Any], about: dict[str, Any]) -> None:
    ocp = orbax()
    if jax.process_index() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        needed, free = sum(x.nbytes for x in arrays.values()), shutil.disk_usage(partial).free
        # Seen beforehand, it is one line and not the complaints of Orbax's threads.
        if needed > free:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed} bytes to write, {free} free")
    _together(f"{partial} is there")
    # Orbax refuses what has no entries.
    held = {name: x for name, x in arrays.items() if x.size}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(partial / _ARRAYS, args=ocp.args.PyTreeSave(held))
    if jax.process_index() == 0:
        about["files"] = {str(file.relative_to(partial)): _digest(file) for file in _files(partial)}
        (partial / _ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")


def _together(point: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(point)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _digest(file: pathlib.Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest()[:32]


def _named(tree: ArrayTree) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path) or "value", leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _nodes(tree: ArrayTree) -> list[str]:
    """The classes that a tree is made of: leaves of two optimizers may have the same names."""
    found: list[str] = []

    def note(node: Any) -> bool:
        if hasattr(node, "_fields") or dataclasses.is_dataclass(node):
            found.append(type(node).__name__)
        return False

    jax.tree.flatten(tree, is_leaf=note)
    return found


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    """The leaf as an array that Orbax takes."""
    if _is_key(leaf):
        return np.asarray(jax.random.key_data(leaf))
    # Of several processes, each has an array of its own where it is on no mesh; Orbax takes that as NumPy's alone.
    shared = isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable)
    return leaf if shared else np.asarray(leaf)


def _said(name: str, leaf: Any) -> list[Any]:
    """A leaf's dtype and shape, as they are compared."""
    if _is_key(leaf):
        return [str(leaf.dtype), list(leaf.shape)]
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        leaf = np.asarray(leaf)
    if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
        raise TypeError(f"{name}: expected an array or a number, got {leaf.dtype}; leave it out of what is saved")
    return [str(leaf.dtype), list(leaf.shape)]


def restore(path: str | os.PathLike[str], like: ArrayTree) -> Any:
    """What `save` wrote, with the structure, and where they say so the shardings, of ``like``.

    Args:
      path: a checkpoint; or a folder of `Checkpoints`, of which the newest is taken. If that is damaged, a warning says
        so and the one before is taken.
      like: a pytree of the structure, shapes and dtypes of what was saved; of arrays, or of `jax.ShapeDtypeStruct`.
        For a `FitProgress`, the `TrainState` that its run began with, such as `init_state` makes. An array on a mesh
        comes back on ``like``'s mesh, whatever it was saved from.

    Returns:
      A tree like ``like``; or the `FitProgress`, for `fit` to go on with.

    Raises:
      FileNotFoundError: there is no checkpoint at ``path``.
      UserError: it is damaged, or of another model, optimizer, dtype or shape; the message names the first leaf that
        does not fit, what was expected and what came. Nothing has been read then.
    """
    path = pathlib.Path(path).absolute()
    candidates = [path] if (path / _ABOUT).exists() else [path / str(epoch) for epoch in reversed(epochs_in(path))]
    if not candidates and path.exists():
        raise FileNotFoundError(f"checkpoint {path}: expected a folder that save or Checkpoints wrote, got another")
    if not candidates:
        raise FileNotFoundError(f"checkpoint {path}: there is none")
    damages: list[Damaged] = []
    for candidate in candidates:
        try:
            about = intact(candidate)
        except Damaged as damage:
            damages.append(damage)
            continue
        if damages:
            told = "; ".join(map(str, damages))
            warnings.warn(f"{told}; going on from {candidate}, which is whole", RuntimeWarning, stacklevel=2)
        return _read(candidate, about, like)
    raise damages[0]


class Damaged(UserError):
    """A checkpoint lacks a part."""


def epochs_in(folder: pathlib.Path) -> list[int]:
    """Those that a folder has checkpoints of."""
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def intact(path: pathlib.Path) -> dict[str, Any]:
    """What a checkpoint says of itself, if all of it is there, byte for byte."""
    try:
        about = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
        version, files = about["format"], about["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"checkpoint {path}: {_ABOUT} cannot be read ({error})") from error
    if version != _FORMAT:
        raise UserError(f"checkpoint {path}: expected format {_FORMAT}, got {version}, of another version of jaxnet")
    for name, digest in files.items():
        if not (path / name).is_file() or _digest(path / name) != digest:
            raise Damaged(f"checkpoint {path}: is damaged, {name} is not as it was written")
    return about


def _read(path: pathlib.Path, about: dict[str, Any], like: ArrayTree) -> Any:
    ocp = orbax()
    if about["tree"] == FitProgress.__name__:
        if not isinstance(like, TrainState):
            raise UserError(f"like: expected the TrainState that the run began with, got {type(like).__name__}")
        like = _run_like(about, like)
    _check_same(path, about, like)
    named = _named(like)
    how = {name: _restore_args(leaf) for name, leaf in named if 0 not in about["leaves"][name][1]}
    held = {}
    if how:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            args = ocp.args.PyTreeRestore(item=dict.fromkeys(how, 0), restore_args=how)
            held = checkpointer.restore(path / _ARRAYS, args=args)
    return jax.tree.unflatten(
        jax.tree.structure(like), [_as(leaf, held.get(name), about["keys"].get(name)) for name, leaf in named]
    )


def _run_like(about: dict[str, Any], state: TrainState) -> FitProgress:
    """What a checkpoint of a run looks like, where only the checkpoint can know it, by its own word."""
    leaves, implementation = about["leaves"], about["keys"].get(".key")

    def own(name: str) -> Any:
        dtype, shape = leaves[name]
        return np.empty(shape, jnp.dtype(dtype))

    def named(part: str) -> dict[str, Any]:
        # What `keystr` writes of a dict's key is a list of it in Python.
        return {ast.literal_eval(name.removeprefix(part))[0]: own(name) for name in leaves if name.startswith(part)}

    rows = {field.name: f".history.{field.name}" for field in dataclasses.fields(History)}
    fields: Any = {field: own(name) if name in leaves else named(name) for field, name in rows.items()}
    best = Best(state.params, 0, 0.0) if ".best.loss" in leaves else None
    key = jax.random.key(0, impl=implementation) if implementation else own(".key")
    return FitProgress(0, 0, state, History(**fields), best, 0, key, 0 if ".batch_size" in leaves else None, 1)


def _check_same(path: pathlib.Path, about: dict[str, Any], like: ArrayTree) -> None:
    """Raise unless a checkpoint holds what ``like`` asks for, leaf by leaf."""
    expected: dict[str, Any] = {name: _said(name, leaf) for name, leaf in _named(like)}
    came = about["leaves"]
    words = lambda said: f"{said[0]} of shape {tuple(said[1])}" if said else "nothing of this name"
    for name in [*expected, *came]:
        wanted, found = expected.get(name), came.get(name)
        if wanted != found:
            raise UserError(f"checkpoint {path}: {name}: expected {words(wanted)}, got {words(found)}")
    nodes = _nodes(like)
    if nodes != about["nodes"]:
        raise UserError(
            f"checkpoint {path}: expected a tree of {', '.join(nodes)}, got one of {', '.join(about['nodes'])}; "
            "it is of another optimizer or model"
        )


def _is_bound(leaf: Any) -> bool:
    """Whether ``like`` says on which devices a leaf belongs."""
    return leaf.committed if isinstance(leaf, jax.Array) else getattr(leaf, "sharding", None) is not None


def _restore_args(leaf: Any) -> Any:
    """By Orbax onto the devices that ``like`` names; a key, and what is bound to none, over the host."""
    ocp = orbax()
    if _is_bound(leaf) and not _is_key(leaf):
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _as(leaf: Any, value: Any, implementation: str | None) -> Any:
    """What came, as an array, a number or a key, whichever ``like`` has there."""
    if implementation is not None:
        key = jax.random.wrap_key_data(jnp.asarray(value), impl=implementation)
        return jax.device_put(key, leaf.sharding) if _is_bound(leaf) else key
    if value is None:
        value = np.zeros(leaf.shape, leaf.dtype)
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        # A Python number makes an array that takes on others' dtypes.
        return jnp.asarray(value.item() if leaf.weak_type and not leaf.ndim else value)
    return value if isinstance(leaf, np.ndarray) else type(leaf)(value.item())
