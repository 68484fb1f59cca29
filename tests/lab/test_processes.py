"""The main job by two real processes: the record of one, and an end to all when one is killed."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
JOB = ["analyse", "--data", "two-gaussians", "--model", "linear", "--num-epochs", "1", "--dtype", "float64"]
# A loaded machine is slow to bring the threads of a collective together.
FLAGS = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300 --xla_cpu_collective_call_terminate_timeout_seconds=600"
)

pytestmark = pytest.mark.slow


def start(folder, *arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, "-m", "jaxnet", *JOB, "--out", str(folder), "--no-keep-programs", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def two(folder):
    """A folder of its own for each process, so that who writes is seen."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = "--coordinator", f"localhost:{port}", "--num-processes", "2"
    return [start(folder / str(i), *together, "--process-id", str(i)) for i in range(2)]


def numbers(tree):
    """Name -> number, of all that a record measured; digests and words aside."""
    found = {}

    def walk(name, x):
        if isinstance(x, dict):
            for key, value in x.items():
                walk(f"{name}.{key}", value)
        elif isinstance(x, list):
            for i, value in enumerate(x):
                walk(f"{name}.{i}", value)
        elif isinstance(x, (int, float)):
            found[name] = x

    walk("", tree)
    return found


def test_two_processes_leave_the_record_of_one_and_the_first_writes_it(tmp_path):
    processes = two(tmp_path)
    for process in processes:
        out, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    assert not (tmp_path / "1").exists()
    alone = start(tmp_path / "alone")
    _, errors = alone.communicate(timeout=600)
    assert alone.returncode == 0, errors
    together, by_one = (
        numbers(json.loads((tmp_path / name / "record.json").read_text())["measurements"]) for name in ("0", "alone")
    )
    assert together.keys() == by_one.keys()
    for name, expected in by_one.items():
        np.testing.assert_allclose(together[name], expected, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_other_ends_within_a_minute_and_says_so(tmp_path, killed):
    processes = two(tmp_path)
    # The first stage is done, and the next begun.
    for _ in range(3000):
        if (tmp_path / "0" / "record.json").exists():
            break
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[killed].kill()
    processes[killed].communicate()
    out, errors = processes[1 - killed].communicate(timeout=60)
    assert processes[1 - killed].returncode != 0
    assert "another process ended" in errors or "distributed service" in errors, errors
