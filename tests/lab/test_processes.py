"""The main job by two real processes: the record of one, and an end to all when one is killed."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
# A checkpoint every 0.6 seconds.
PROGRAM = "from jaxnet.lab import train; train.MINUTES = 0.01; from jaxnet.__main__ import main; main()"
TASK = ["--data", "two-gaussians", "--model", "linear", "--dtype", "float64"]
JOB = ["analyse", *TASK, "--num-epochs", "1"]
TRAINING = ["train", *TASK, "--learning-rate", "0.1", "--num-epochs", "1000"]
# A loaded machine is slow to bring the threads of a collective together.
FLAGS = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300 --xla_cpu_collective_call_terminate_timeout_seconds=600"
)

pytestmark = pytest.mark.slow


def start(folder, *arguments, job=JOB):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, "-c", PROGRAM, *job, "--out", str(folder), "--no-keep-programs", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def two(*folders, job=JOB):
    """Two processes of the same job that find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = "--coordinator", f"localhost:{port}", "--num-processes", "2"
    return [start(folder, *together, "--process-id", str(i), job=job) for i, folder in enumerate(folders)]


def wait_for(path, processes):
    for _ in range(3000):
        if path.exists():
            return
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    raise AssertionError(f"no {path}")


def measured(folder):
    return numbers(json.loads((folder / "record.json").read_text())["measurements"])


def same(one, other):
    assert one.keys() == other.keys()
    for name, expected in other.items():
        np.testing.assert_allclose(one[name], expected, rtol=1e-6, atol=1e-8, err_msg=name)


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
    # A folder of its own for each, so that who writes is seen.
    for process in two(tmp_path / "0", tmp_path / "1"):
        out, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    assert not (tmp_path / "1").exists()
    alone = start(tmp_path / "alone")
    _, errors = alone.communicate(timeout=600)
    assert alone.returncode == 0, errors
    same(measured(tmp_path / "0"), measured(tmp_path / "alone"))


@pytest.mark.parametrize(("killed", "number"), [(0, signal.SIGKILL), (1, signal.SIGTERM)])
def test_when_one_is_killed_the_other_ends_within_a_minute_and_says_so(tmp_path, killed, number):
    processes = two(tmp_path / "0", tmp_path / "1")
    # The first stage is done, and the next begun.
    wait_for(tmp_path / "0" / "record.json", processes)
    processes[killed].send_signal(number)
    processes[killed].communicate(timeout=10)
    out, errors = processes[1 - killed].communicate(timeout=60)
    assert processes[1 - killed].returncode != 0
    assert "another process ended" in errors or "distributed service" in errors, errors


def test_a_signal_to_one_of_two_ends_both_at_the_same_epoch_and_one_goes_on(tmp_path):
    """Ctrl-C to the second, SIGTERM to the first, then one process alone to the end: the run of one process."""
    run = tmp_path / "run"
    for whom, number, status in ((1, signal.SIGINT, 130), (0, signal.SIGTERM, 143)):
        before = epochs(run)
        going_on = ["--resume"] if before else []
        processes = two(run, run, job=[*TRAINING, *going_on])
        for _ in range(3000):
            if max(epochs(run), default=0) > max(before, default=0):
                break
            assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
            time.sleep(0.05)
        processes[whom].send_signal(number)
        for process in processes:
            out, errors = process.communicate(timeout=60)
            assert process.returncode == status, errors
        assert max(epochs(run)) == read(run)[-1]["epoch"] > max(before, default=0)
    last, alone = start(run, "--resume", job=TRAINING), start(tmp_path / "alone", job=TRAINING)
    for process in (last, alone):
        out, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    same(measured(run), measured(tmp_path / "alone"))
    assert [row["epoch"] for row in read(run)] == list(range(1, 1001))


def epochs(folder):
    """Those whose checkpoints are there."""
    return [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()]


def read(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
