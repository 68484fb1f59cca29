"""What the command line does about compilation: it keeps programs from run to run, and says when it compiles."""

import contextlib
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"
_FOLDER = "jax_compilation_cache_dir"


def folder() -> pathlib.Path:
    """Where programs are kept: jaxnet's part of the user's cache, by the XDG convention."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jaxnet" / "programs"


def folder_in_use() -> pathlib.Path:
    """`folder`, or the one that JAX has been told of, as by ``JAX_COMPILATION_CACHE_DIR``."""
    return pathlib.Path(getattr(jax.config, _FOLDER) or folder())


@contextlib.contextmanager
def kept(wanted: bool) -> Iterator[None]:
    """Within, what was compiled before is read from disk, and what is compiled now is written there.

    Nothing is changed where JAX has been told of a folder already, as by ``JAX_COMPILATION_CACHE_DIR``.
    """
    if not wanted or getattr(jax.config, _FOLDER) is not None:
        yield
        return
    # All programs: most take less than the second from which on JAX keeps them, and there are many.
    settings = {_FOLDER: str(folder()), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        _set(settings)
        with warnings.catch_warnings():
            # A folder that cannot be written, or a file that another process has begun to write: it is then compiled.
            warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
            yield
    finally:
        _set(before)


def _set(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def announced(say: Callable[[bool], None]) -> Iterator[None]:
    """``say(True)`` before each compilation within, which nothing else can be seen of, and ``say(False)`` after it."""

    def listen(event: str, *_: object, **__: object) -> None:
        if event in (_LOWERED, _COMPILED):
            say(event == _LOWERED)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
