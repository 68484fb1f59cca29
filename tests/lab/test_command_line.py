"""The command line's options for every command, within one process."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest

import jaxnet
from jaxnet.lab import cli, experiments


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxnet {jaxnet.__version__}, JAX {jax.__version__}\n"


def test_json_is_the_record_and_nothing_else(capsys):
    assert cli.run(["experiment", "inference", "--json"]) == 0
    printed = capsys.readouterr()
    folder = pathlib.Path("jaxnet-out/experiment-1")
    assert json.loads(printed.out) == json.loads((folder / "record.json").read_text())
    assert printed.err == f"jaxnet: {folder}\n"
    assert cli.run(["list", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == experiments.names()
    assert cli.run(["experiment", "nope", "--json"]) == 2
    assert capsys.readouterr().out == ""
    assert [path.name for path in pathlib.Path("jaxnet-out").iterdir()] == ["experiment-1"]


def test_json_of_all_experiments_is_each_by_its_name(capsys, monkeypatch):
    monkeypatch.setattr(experiments, "names", lambda: ["inference"])
    assert cli.run(["experiment", "all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"inference": json.loads(pathlib.Path("jaxnet-out/experiment-1/inference/record.json").read_text())}


def test_open_shows_the_report(capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda uri: opened.append(uri) or len(opened) == 1)
    for number in (1, 2):
        assert cli.run(["experiment", "inference", "--open"]) == 0
        page = pathlib.Path(f"jaxnet-out/experiment-{number}/report.html").resolve()
        assert opened[-1] == page.as_uri()
        assert page.exists()
        assert capsys.readouterr().err == ("" if number == 1 else f"jaxnet: there is no browser to open {page}\n")


def test_a_pipe_gets_names_whole_and_the_time_that_it_took(capsys):
    assert cli.run(["experiment", "inference"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("Measured in ")
    assert all(line == line.rstrip() for line in lines)
    record = json.loads(pathlib.Path("jaxnet-out/experiment-1/record.json").read_text())
    assert record["claims"]
    for claim in record["claims"]:
        assert any(claim["name"] in line for line in lines)
    assert lines[-1].startswith("jaxnet-out/experiment-1: record.json, report.html")


def test_help_is_tyros_own_and_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(["--help"])
    assert not end.value.code
    printed = capsys.readouterr().out
    for word in (
        "analyse",
        "train",
        "spectrum",
        "experiment",
        "list",
        "doctor",
        "--version",
        "--tyro-print-completion",
    ):
        assert word in printed


@pytest.mark.parametrize(
    ("typed", "wanted"), [("tr", "train"), ("train --sched", "--schedule"), ("train --optimizer ad", "adamw")]
)
def test_bash_completes(typed, wanted):
    with pytest.raises(SystemExit) as end:
        cli.run(["--tyro-write-completion", "bash", "completion"])
    assert not end.value.code
    *before, last = typed.split()
    script = (
        f"source ./completion; COMP_WORDS=(jaxnet {typed}); COMP_CWORD={len(before) + 1}; _tyro_jaxnet jaxnet {last}; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert wanted in done.stdout.splitlines(), done.stderr


def test_nobody_reads_on(capsys, monkeypatch, tmp_path):
    def write(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "show", write)
    with (tmp_path / "pipe").open("w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.run(["list"]) == 141
        print("what is left", file=pipe)
    assert (tmp_path / "pipe").read_text() == ""
    assert capsys.readouterr().err == ""
