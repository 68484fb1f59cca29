"""One device, four on a mesh of either kind of axes, and two processes of two: the same numbers, and little sent."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

PROGRAM = pathlib.Path(__file__).parent / "on_a_mesh.py"
# A loaded machine is slow to bring the threads of a collective together.
FLAGS = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300 --xla_cpu_collective_call_terminate_timeout_seconds=600"
)


def start(*arguments):
    path = os.pathsep.join([str(PROGRAM.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, "-W", "error", str(PROGRAM), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def result(process):
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def on_four():
    return result(start("layouts", "few"))


def same(one, other):
    assert one.keys() == other.keys()
    for name, expected in one.items():
        np.testing.assert_allclose(other[name], expected, rtol=1e-6, atol=1e-9, err_msg=name)


def test_four_devices_give_what_one_gives(on_four):
    assert len(on_four["layouts"]) == 3
    for found in on_four["layouts"].values():
        same(on_four["one device"], found)


@pytest.mark.slow
def test_all_layouts_give_what_one_device_gives():
    found = result(start("layouts", "all"))
    assert len(found["layouts"]) == 8
    for layout in found["layouts"].values():
        same(found["one device"], layout)


def test_two_processes_of_two_devices_give_what_one_process_gives(on_four):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    first, second = (start("process", i, port) for i in range(2))
    found = result(first)
    assert result(second) is None
    same(on_four["one device"], found)


def test_the_search_gathers_no_more_than_one_product_and_keeps_the_layout(on_four):
    for counts in on_four["gathers"].values():
        assert counts["sharpness"] <= counts["product"]
        assert counts["alike"]


def test_a_full_batch_step_sends_the_gradient_once(on_four):
    assert on_four["sent"]["params"] <= on_four["sent"]["bytes"] <= on_four["sent"]["params"] + 8 * 8


def test_arrays_on_other_devices_are_named(on_four):
    for word in ("start", "data[0]", "NamedSharding"):
        assert word in on_four["error"]
