"""The main job, by the record that it leaves."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from jaxnet.lab import cli, report, spectrum


def job(arguments, out):
    return cli.run(["analyse", *arguments.split(), "--out", str(out)])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_another_optimizer_is_held_against_a_sweep_of_its_own(tmp_path, optimizer):
    out = tmp_path / "out"
    arguments = "--data two-gaussians --model linear --num-epochs 10 --batch-size 10 --optimizer"
    assert job(f"{arguments} {optimizer}", out) == 0
    found = json.loads((out / "record.json").read_text())
    assert found["measurements"]["optimizer"] == optimizer
    # What is gradient descent's is not shown as another's.
    shown = [name for name, _, _ in found["rows"]]
    assert not any("/λ_max" in name or "/upper bound" in name or "loses stability" in name for name in shown)
    keys = [claim["key"] for claim in found["claims"]]
    assert keys == ["near_the_best_full_batch", "near_the_best_mini_batch", "near_the_best_stochastic"]
    for run, claim in zip(found["measurements"]["runs"], found["claims"], strict=True):
        assert run["rate"] == found["measurements"]["recommended"][[1, 10, 100].index(run["batch_size"] or 100)]
        np.testing.assert_allclose(claim["predicted"], 2 * min(run["sweep_losses"]), rtol=1e-6)
        # The sweep's fifth rate is the run's own.
        np.testing.assert_allclose(run["sweep_rates"][4], run["rate"], rtol=1e-6)
        np.testing.assert_allclose(run["sweep_losses"][4], claim["measured"], rtol=1e-3)


@pytest.mark.slow
def test_large_targets_are_told_and_can_be_scaled(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    np.savez(tmp_path / "a.npz", x=x, y=3e4 + 5e3 * x @ [1.0, -2.0, 0.5])
    arguments = f"--data {tmp_path / 'a.npz'} --model linear --num-epochs 2 --batch-size 8"
    assert job(arguments, tmp_path / "raw") == 0
    printed = capsys.readouterr().out
    assert "largest target" in printed
    assert "each scaled to mean 0" in " ".join(printed.split())
    assert "--standardise-target" in printed
    assert job(f"{arguments} --standardise-target", tmp_path / "scaled") == 0
    assert "largest target" not in capsys.readouterr().out
    run = json.loads((tmp_path / "scaled" / "record.json").read_text())["measurements"]["runs"][0]
    assert run["loss"][0] < 10


def test_a_job_says_what_it_took_a_table_for(tmp_path):
    size = [f"{x:.3f}".replace(".", ",") for x in np.random.default_rng(0).normal(size=40)]
    rows = [f"{i};{('[red]', 'blue')[i % 2]};{x};{'yes' if x < '0' else 'no'}" for i, x in enumerate(size)]
    (tmp_path / "a[b].CSV").write_text("\n".join([";colour[/x];size;bought", *rows, "40;;1,5;no"]))
    config = spectrum.SpectrumConfig(data=str(tmp_path / "a[b].CSV"), model="linear", batch_size=8, num_eigenvalues=2)
    printed = io.StringIO()
    for table in report.tables(next(spectrum.stages(config))):
        Console(file=printed, width=200).print(table)
    for words in ("is an index", "'colour[/x]' is 2 inputs", "[red], blue", "rows left out, 1 of 41", "decimal commas"):
        assert words in printed.getvalue()
    for words in ("a[b].CSV, linear, softmax cross entropy", "N = 32", "32 to train on, 8 to test", "classes no, yes"):
        assert words in printed.getvalue()
