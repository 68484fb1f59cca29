import subprocess
import sys

EXTRAS = ["jaxnet.lab", "tyro", "rich", "matplotlib", "sklearn", "mnist1d", "mlxtend", "pandas", "requests", "torch"]
PROGRAM = f"""
import logging, sys, jax
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(name) if "compile" in name else None
)
import jaxnet
loaded = [m for m in {EXTRAS!r} if m in sys.modules]
assert not loaded, loaded
assert not compiled, compiled
jax.jit(lambda x: x + 1)(1.0)
assert compiled, "the listener hears nothing"
"""


def test_import_loads_no_extra_and_compiles_nothing():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
