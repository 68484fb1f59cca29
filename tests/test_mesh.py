"""One device, four on a mesh of either kind of axes, and two processes of two: the same numbers, and little sent."""

import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

PROGRAM = pathlib.Path(__file__).parent / "on_a_mesh.py"
# A loaded machine is slow to bring the threads of a collective together.
FLAGS = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300 --xla_cpu_collective_call_terminate_timeout_seconds=600"
)


def start(*arguments):
    path = os.pathsep.join([str(PROGRAM.parent.parent), os.environ.get("PYTHONPATH", "")])
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, "-W", "error", str(PROGRAM), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def result(process):
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


def of_two_processes(what, devices, folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    first, second = (start(what, devices, folder, port, i) for i in range(2))
    found = result(first)
    assert result(second) is None
    return found


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "run"


@pytest.fixture(scope="module")
def on_four(broken_off):
    return result(start("few", 4, broken_off))


@pytest.fixture(scope="module")
def on_a_mesh():
    """The program as a module, for this process, which has one device."""
    assert jax.device_count() == 1
    spec = importlib.util.spec_from_file_location("on_a_mesh", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(one, other):
    assert one.keys() == other.keys()
    for name, expected in one.items():
        np.testing.assert_allclose(other[name], expected, rtol=1e-6, atol=1e-9, err_msg=name)


def test_four_devices_give_what_one_gives(on_four):
    same(on_four["one device"], on_four["layouts"]["Explicit, both"])


@pytest.mark.slow
def test_all_layouts_give_what_one_device_gives(tmp_path):
    found = result(start("all", 4, tmp_path / "run"))
    assert len(found["layouts"]) == 8
    for layout in found["layouts"].values():
        same(found["one device"], layout)


@pytest.mark.slow
def test_an_analysis_on_four_devices_is_that_of_a_process_of_one(on_a_mesh, x64):
    same(on_a_mesh.derived(*on_a_mesh.problem()), result(start("derived", 4))["Explicit, both"])


def test_two_processes_of_two_devices_give_what_one_process_gives(on_four, tmp_path):
    same(on_four["one device"], of_two_processes("numbers", 2, tmp_path))


@pytest.mark.slow
def test_processes_that_bring_unequal_data_are_told_so(tmp_path):
    error = of_two_processes("unequal", 1, tmp_path)["error"]
    for word in ("process 1", "data, leaf 0 float64[24, 8]"):
        assert word in error


def test_a_run_broken_off_on_four_devices_goes_on_on_one(on_four, broken_off, on_a_mesh, x64):
    same(on_a_mesh.finished(*on_a_mesh.problem()), on_a_mesh.go_on(broken_off, *on_a_mesh.problem()))


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_devices_and_processes(on_four, broken_off, tmp_path, on_a_mesh, x64):
    unbroken = on_a_mesh.finished(*on_a_mesh.problem())
    same(unbroken, result(start("go on", 2, broken_off)))
    same(unbroken, of_two_processes("go on", 1, broken_off))
    of_two_processes("break off", 2, tmp_path / "run")
    same(unbroken, result(start("go on", 2, tmp_path / "run")))
    same(unbroken, on_a_mesh.go_on(tmp_path / "run", *on_a_mesh.problem()))


def test_the_search_gathers_no_more_than_one_product_and_keeps_the_layout(on_four):
    for counts in on_four["gathers"].values():
        assert counts["sharpness"] <= counts["product"]
        assert counts["alike"]


def test_a_full_batch_step_sends_the_gradient_once(on_four):
    assert on_four["sent"]["params"] <= on_four["sent"]["bytes"] <= on_four["sent"]["params"] + 8 * 8


def test_arrays_on_other_devices_are_named(on_four):
    for word in ("start, leaf 0/bias", "data, leaf 0", "NamedSharding"):
        assert word in on_four["error"]
