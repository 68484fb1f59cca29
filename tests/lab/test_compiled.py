import os
import subprocess
import sys

import jax
import jax.numpy as jnp

from jaxnet.lab import _compiled

PROGRAM = """
import jax
from jaxnet.lab import _compiled
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event.rsplit("/", 1)[-1]))
with _compiled.kept({wanted}):
    jax.jit(lambda x: x * 2 + 1)(1.0)
print(found.count("cache_hits"), found.count("cache_misses"), jax.config.jax_compilation_cache_dir)
"""


def run(folder, wanted=True, **others):
    env = os.environ | {"XDG_CACHE_HOME": str(folder), "JAX_ENABLE_COMPILATION_CACHE": "true"} | others
    code = PROGRAM.format(wanted=wanted)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


def test_a_second_process_reads_what_the_first_compiled(tmp_path):
    assert run(tmp_path) == ["0", "1", "None"]
    assert (tmp_path / "jaxnet" / "programs").is_dir()
    assert run(tmp_path) == ["1", "0", "None"]
    # Half of a file, as of a process that is writing it: compiled anew, without a word.
    for path in (tmp_path / "jaxnet" / "programs").glob("*-cache"):
        path.write_bytes(path.read_bytes()[:100])
    assert run(tmp_path)[0] == "0"


def test_it_is_left_alone_where_nobody_wants_it_or_jax_has_a_folder(tmp_path):
    assert run(tmp_path, wanted=False) == ["0", "0", "None"]
    own = str(tmp_path / "own")
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=own)[2] == own
    assert not (tmp_path / "jaxnet").exists()


def test_each_compilation_is_announced_before_and_after():
    said = []
    with _compiled.announced(said.append):
        jax.jit(lambda x: jnp.sin(x) + 3)(1.0)
    assert said == [True, False]
    jax.jit(lambda x: jnp.sin(x) + 4)(1.0)
    assert len(said) == 2
