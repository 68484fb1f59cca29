"""Ctrl-C on the command line."""

import json
import os
import signal
import subprocess
import sys
import time

from jaxnet import training
from jaxnet.lab import cli


def test_ctrl_c_leaves_what_is_finished(tmp_path):
    out = tmp_path / "out"
    arguments = ["experiment", "all", "--out", str(out)]
    # A shell's background jobs ignore the signal, and a process inherits that.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    program = [sys.executable, "-c", heed + "from jaxnet.__main__ import main; main()"]
    process = subprocess.Popen([*program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (out / "inference" / "activations.png").exists() and time.time() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert json.loads((out / "inference" / "record.json").read_text())["name"] == "inference"
    assert not list(out.rglob("*.partial"))


class Interrupts:
    """Ctrl-C falls into a destructor, where Python drops the exception."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_not_lost_in_a_destructor(monkeypatch, tmp_path, capsys):
    def fit(*args, **options):
        Interrupts()
        for _ in range(1000):
            time.sleep(0.01)
        raise AssertionError("nobody came")

    monkeypatch.setattr(training, "fit", fit)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        job = ["train", "--data", "two-gaussians", "--model", "linear", "--learning-rate", "0.1"]
        assert cli.run([*job, "--out", str(tmp_path / "out")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted" in capsys.readouterr().err
