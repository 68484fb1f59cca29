"""What jaxnet runs on: versions, devices, memory, the programs that are kept, and the extras that are here."""

import importlib.util
import os
from typing import Any

import jax

from jaxnet.lab import _compiled
from jaxnet.lab._processes import all_devices
from jaxnet.lab.record import versions

EXTRAS = {
    "app": ("tyro", "rich", "matplotlib", "sklearn"),
    "table": ("pandas",),
    "data": ("mnist1d", "mlxtend"),
    "stochastic": ("matfree",),
    "checkpoint": ("orbax",),
    "tensorboard": ("tensorboardX",),
    "docs": ("mkdocs", "material", "mkdocstrings"),
}


def examine() -> dict[str, Any]:
    """All of it, as plain data; bytes are None where the system does not tell.

    Raises:
      UserError: JAX cannot start.
    """
    folder = _compiled.folder_in_use()
    programs = [path.stat().st_size for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    lacking = {extra: [name for name in modules if not _is_here(name)] for extra, modules in EXTRAS.items()}
    return {
        "versions": versions(),
        "devices": [_device(device) for device in all_devices()],
        "host": {"cpus": os.cpu_count(), "memory": _host_memory()},
        "programs": {"folder": str(folder), "files": len(programs), "bytes": sum(programs)},
        "extras": {extra: {"installed": not names, "lacks": names} for extra, names in lacking.items()},
    }


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What `examine` found, as names and words."""
    devices = [
        (f"device {device['name']}", f"{device['kind']}, {_words(device['memory'], 'memory not told by JAX')}")
        for device in found["devices"]
    ]
    programs, host = found["programs"], found["host"]
    extras = [
        (f"extra {extra}", f"lacks {', '.join(of['lacks'])}: pip install 'jaxnet[{extra}]'" if of["lacks"] else
         "installed")
        for extra, of in found["extras"].items()
    ]  # fmt: skip
    return [
        *found["versions"].items(),
        *devices,
        ("host", f"{host['cpus']} CPUs, {_words(host['memory'], 'memory not told')}"),
        ("programs", f"{programs['folder']}: {programs['files']} files, {_words(programs['bytes'])}"),
        *extras,
    ]


def _is_here(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _device(device: jax.Device) -> dict[str, Any]:
    # A CPU has no statistics; some backends raise.
    try:
        memory = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:
        memory = None
    return {"name": str(device), "kind": device.device_kind, "platform": device.platform, "memory": memory}


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _words(size: int | None, unknown: str = "") -> str:
    if size is None:
        return unknown
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.1f} {unit}"
    return f"{size} bytes"
