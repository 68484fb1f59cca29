"""Whose fault it is: a user's error is one line and status 2, a bug a traceback and status 70."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxnet import contract, data, training
from jaxnet.lab import cli, experiments, plots


def raising(error):
    def function(*args, **options):
        raise error

    return function


JOB = ["analyse", "--data", "two-gaussians", "--model", "linear", "--num-epochs", "4", "--batch-size", "10"]


@pytest.mark.parametrize("flag", [[], ["--debug"]])
@pytest.mark.parametrize(
    "error", [ValueError("boom"), TypeError("boom"), OSError("boom"), ImportError("boom"), KeyError("boom")]
)
def test_a_bug_is_a_traceback_and_not_the_users_fault(error, flag, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "fit", raising(error))
    assert cli.run([*JOB, "--out", str(tmp_path / "out"), *flag]) == 70
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert f"in train\n{' ' * 4}" in printed
    assert type(error).__name__ in printed
    last = printed.splitlines()[-1]
    assert last.startswith("jaxnet: this is a bug in jaxnet, not in your input")
    assert "issue tracker" in last
    assert "`jaxnet doctor`" in last
    # What was finished before is kept.
    assert json.loads((tmp_path / "out" / "record.json").read_text())["name"] == "analyse"


@pytest.mark.parametrize(
    "start",
    ["import runpy; runpy.run_module('jaxnet', run_name='__main__')", "from jaxnet.__main__ import main; main()"],
)
def test_the_module_and_the_script_tell_both_kinds_apart(start, tmp_path):
    plant = "from jaxnet.lab import _task; _task.check_seed = lambda seed: [][seed]; "
    for planted, status in ((plant, 70), ("", 2)):
        done = subprocess.run(
            [sys.executable, "-c", planted + start, "analyse", "--seed", "-1", "--out", tmp_path / "out"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        assert ("Traceback" in done.stderr) == ("IndexError" in done.stderr) == (status == 70)


def complaint(capsys, *arguments):
    """What is said of a user's error: one line, and with --debug the same below a traceback."""
    arguments = [str(argument) for argument in arguments]
    assert cli.run(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert cli.run([*arguments, "--debug"]) == 2
    *shown, last = capsys.readouterr().err.splitlines()
    assert last == line
    assert "Traceback (most recent call last):" in shown
    assert shown[-1].startswith("jaxnet.contract.UserError: ") or "MissingExtra: " in shown[-1]
    return line


def test_every_command_takes_debug(capsys):
    for command in ("list", "doctor"):
        assert cli.run([command, "--debug"]) == 0
    assert capsys.readouterr().err == ""


def test_a_line_that_cannot_be_read_is_the_users_error(capsys):
    assert "--nope" in complaint(capsys, "list", "--nope")
    assert "'many'" in complaint(capsys, "analyse", "--batch-size", "many")
    assert cli.run(["nope"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jaxnet: Unrecognized options: nope; Available subcommands: analyse, train, spectrum")


def test_files_that_cannot_be_read_are_the_users_error(tmp_path, capsys, monkeypatch):
    read = lambda path, *more: complaint(capsys, "analyse", "--data", path, *more, "--out", tmp_path / "out")
    assert "no such file" in read(tmp_path / "none.npz")
    (tmp_path / "folder.csv").mkdir()
    assert "folder.csv: is a folder; give the path" in read(tmp_path / "folder.csv")
    assert "File name too long" in read("a" * 300)
    (tmp_path / "a.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    assert "save it as UTF-8" in read(tmp_path / "a.csv")
    np.savez_compressed(tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=(40, 3)), y=np.arange(40) % 2)
    assert "no array named 'z'; it holds x, y" in read(tmp_path / "a.npz", "--inputs", "z")
    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[100:200] = bytes(100)
    (tmp_path / "b.npz").write_bytes(damaged)
    assert "not a readable .npz" in read(tmp_path / "b.npz")
    monkeypatch.setattr("pathlib.Path.open", raising(PermissionError(13, "Permission denied", "a.csv")))
    for name in ("a.csv", "a.npz"):
        assert read(tmp_path / name).endswith(f"{name}: Permission denied")
    assert not (tmp_path / "out").exists()


def test_data_without_a_curvature_to_follow_is_the_users_error(tmp_path, capsys):
    """Outputs so large that the softmax is certain have no curvature; larger ones no finite loss."""
    x = np.random.default_rng(0).normal(size=(40, 3))
    for scale, words in ((1e6, "no rate follows"), (1e36, "not finite")):
        np.savez(tmp_path / "a.npz", x=scale * x, y=x[:, 0] > 0)
        arguments = ["--data", tmp_path / "a.npz", "--no-standardise", "--out", tmp_path / "out"]
        assert words in complaint(capsys, "analyse", *arguments, "--model", "linear")


def test_what_is_not_installed_is_the_users_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    line = complaint(capsys, "analyse", "--data", "mnist1d", "--out", tmp_path / "out")
    assert line == "jaxnet: this data set comes with mnist1d: pip install 'jaxnet[data]'"
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    line = complaint(capsys, "experiment", "overfitting", "--out", tmp_path / "out")
    assert line == "jaxnet: this data set comes with sklearn: pip install 'jaxnet[app]'"
    with pytest.raises(ImportError, match="sklearn"):
        data.digits()
    # Before the work, not after it.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(experiments, "run", raising(AssertionError))
    line = complaint(capsys, "experiment", "backprop", "--out", tmp_path / "out")
    assert line == "jaxnet: the figures need matplotlib: pip install 'jaxnet[app]'"


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("kept")
    line = complaint(capsys, "experiment", "inference", "--out", tmp_path / "file" / "out")
    assert "file is a file; name a folder" in line
    monkeypatch.setattr("tempfile.TemporaryDirectory", raising(PermissionError(13, "Permission denied")))
    line = complaint(capsys, "experiment", "inference", "--out", tmp_path / "out")
    assert line.endswith("out: cannot be written (Permission denied); name another folder")
    monkeypatch.undo()
    # The disk fills up while figures are written; what draws them is not the user's.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", raising(OSError(28, "No space left on device")))
    line = complaint(capsys, "experiment", "inference", "--overwrite", "--out", tmp_path / "out")
    assert line.endswith("out: cannot be written (No space left on device); name another folder")
    monkeypatch.setattr(plots, "draw", raising(OSError(28, "No space left on device")))
    assert cli.run(["experiment", "inference", "--overwrite", "--out", str(tmp_path / "out")]) == 70


def test_too_little_memory_is_the_users_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "run", raising(MemoryError()))
    assert "out of memory" in complaint(capsys, "experiment", "inference", "--out", tmp_path / "out")


def test_the_library_raises_what_it_documents():
    assert issubclass(contract.UserError, ValueError)
    with pytest.raises(FileNotFoundError):
        data.load("none.csv")
    with pytest.raises(contract.UserError, match=r"\.npz or \.csv"):
        data.load(__file__)
    with pytest.raises(contract.UserError, match="unknown experiment 'nope'"):
        experiments.run("nope")
    with pytest.raises(contract.UserError, match="unknown option of experiment inference 'nope'"):
        experiments.run("inference", nope=1)


def test_without_the_extra_it_names_the_extra():
    program = "import sys; sys.modules['tyro'] = None; from jaxnet.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'jaxnet[app]'" in done.stderr
