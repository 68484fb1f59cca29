"""What jaxnet runs on."""

import json
import os
import pathlib

import jax
import pytest

from jaxnet.lab import cli, doctor


class Device:
    device_kind, platform = "NVIDIA H100", "gpu"

    def __init__(self, stats):
        self._stats = stats

    def __str__(self):
        return "cuda:0"

    def memory_stats(self):
        return self._stats


def test_it_tells_devices_memory_programs_and_extras(tmp_path, monkeypatch, capsys):
    (tmp_path / "sub").mkdir()
    for name, size in (("a", 3000), ("sub/b", 72)):
        (tmp_path / name).write_bytes(bytes(size))
    monkeypatch.setattr("jaxnet.lab._compiled.folder_in_use", lambda: tmp_path)
    monkeypatch.setitem(doctor.EXTRAS, "none", ("tyro", "there_is_no_such_thing"))
    assert cli.run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["jax"] == jax.__version__
    assert [device["name"] for device in found["devices"]] == list(map(str, jax.devices()))
    assert found["programs"] == {"folder": str(tmp_path), "files": 2, "bytes": 3072}
    assert found["extras"]["app"] == {"installed": True, "lacks": []}
    assert found["extras"]["none"] == {"installed": False, "lacks": ["there_is_no_such_thing"]}
    assert found["host"]["cpus"] == os.cpu_count()
    assert cli.run(["doctor"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}: 2 files, 3.0 KiB" in "\n".join(printed)
    assert "lacks there_is_no_such_thing: pip install 'jaxnet[none]'" in "\n".join(printed)
    assert all(line == line.rstrip() for line in printed)


@pytest.mark.skipif(not pathlib.Path("/proc/meminfo").exists(), reason="Linux tells it there")
def test_the_hosts_memory_is_that_of_the_system():
    line = pathlib.Path("/proc/meminfo").read_text().splitlines()[0]
    assert doctor.examine()["host"]["memory"] == 1024 * int(line.split()[1])


def test_a_devices_memory_is_what_jax_tells(monkeypatch):
    for stats, words in (({"bytes_limit": 79 * 2**30}, "79.0 GiB"), ({}, "not told"), (None, "not told")):
        monkeypatch.setattr(doctor, "all_devices", lambda stats=stats: [Device(stats)])
        told = dict(doctor.lines(doctor.examine()))["device cuda:0"]
        assert told.startswith("NVIDIA H100, ")
        assert words in told
