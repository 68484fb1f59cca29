"""Training from words, by the record, the history and the checkpoints that it leaves."""

import json

import jax
import numpy as np
import pytest

from jaxnet.lab import _task, cli, report, train
from jaxnet.lab.record import Record

SMALL = {"data": "two-gaussians", "model": "linear", "batch_size": 10, "schedule": "constant"}
WORDS = ["train", "--data", "two-gaussians", "--model", "linear", "--batch-size", "10"]


def job(arguments, out):
    return cli.run([*WORDS, *arguments.split(), "--out", str(out)])


def run(out, on_stage=lambda stage, share: None, **given):
    """As the command runs it, without the figures; what lies there is gone on with."""
    config = train.TrainConfig(**{**SMALL, "num_epochs": 4, **given})
    for found in train.stages(config, on_stage, report.read_record(out), folder=out):
        report.write_record(found, out)


def test_full_batch_steps_are_those_of_gradient_descent_by_hand(tmp_path, x64):
    """A linear neuron with the rate falling from η to 0: w ← w − η(1 − t/T) (Hw − c)."""
    given = {"data": "two-gaussians", "model": "linear", "dtype": "float64"}
    config = train.TrainConfig(**given, batch_size=100, learning_rate=1.0, num_epochs=5)
    *_, found = train.stages(config, folder=tmp_path)
    task = _task.make_task(config, key=_task.keys_of(config, 3)[0])
    x, y = (np.asarray(part) for part in task.train)
    x = np.append(x, np.ones((100, 1)), axis=1)
    layer = jax.tree.map(np.asarray, task.params)
    (kernel,) = (leaf for leaf in jax.tree.leaves(layer) if leaf.size == 2)
    w = np.append(np.ravel(kernel), 0.0)  # biases begin at 0
    for t in range(5):
        w -= (1 - t / 5) * x.T @ (x @ w - y) / 100
    np.testing.assert_allclose(found.measurements["run"]["loss"], np.mean((x @ w - y) ** 2) / 2, rtol=1e-9)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(lines[-1]["metrics/loss"], found.measurements["run"]["loss"], rtol=1e-12)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("train")
    run(out)
    return out


def kept(out):
    return {name: (out / name).read_text() for name in ("record.json", "history.jsonl")}


def test_it_trains_at_the_derived_rate_and_says_so(whole):
    found = Record.from_json((whole / "record.json").read_text())
    measured = found.measurements
    assert measured["rate"] == measured["recommended"][measured["batch_sizes"].index(10)]
    assert f"sgd at η = {measured['rate']:.3g}" in found.answer[0]
    assert measured["why"].startswith(f"sgd on batches of 10: η = {measured['rate']:.3g}")
    assert measured["run"]["num_steps"] == 40
    assert [path.name for path in (whole / "checkpoints").iterdir()] == ["4"]


def test_a_run_that_is_broken_off_goes_on_to_the_same_end_and_beyond(whole, tmp_path):
    def interrupted(stage, share):
        if stage == "training" and share > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted)
    assert "run" not in report.read_record(tmp_path).measurements
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    for epochs in (3, 0):  # the second time there is nothing left to do
        seen = []
        run(tmp_path, lambda stage, share: seen.append(share) if stage == "training" and share > 0.3 else None)
        assert len(seen) == epochs
        assert kept(tmp_path) == kept(whole)
    run(tmp_path, num_epochs=6)
    (tmp_path / "anew").mkdir()
    run(tmp_path / "anew", num_epochs=6)
    assert kept(tmp_path) == kept(tmp_path / "anew")


def test_what_cannot_be_gone_on_with_is_refused(whole, capsys):
    before = kept(whole)
    for arguments, words in {
        "--num-epochs 3 --schedule constant": "begun with --num-epochs 4, now 3",
        "--num-epochs 4 --schedule constant --seed 1": "begun with --seed 0, now 1",
        "--num-epochs 4 --schedule nope": "'--schedule'. Expected one of ('linear', 'constant')",
        "--num-epochs 4 --learning-rate -1": "learning_rate: expected positive and finite",
    }.items():
        assert job(f"{arguments} --resume", whole) == 2
        assert words in capsys.readouterr().err
    assert kept(whole) == before


def test_a_run_that_diverges_is_told_by_the_exit_status_and_can_be_overwritten(tmp_path, capsys):
    assert job("--num-epochs 30 --learning-rate 1e9 --schedule constant", tmp_path) == 1
    assert "MISS train: training loss at the end" in (printed := capsys.readouterr().out)
    assert "diverged" in printed.splitlines()[0]
    assert job("--num-epochs 1 --learning-rate 0.1 --overwrite", tmp_path) == 0
    assert {"report.html", "loss_against_epoch.png"} < {path.name for path in tmp_path.iterdir()}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 1


def test_without_orbax_it_trains_without_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "orbax_is_here", lambda: False)
    run(tmp_path, num_epochs=1, learning_rate=0.1)
    rows = {name: remark for name, _, remark in report.read_record(tmp_path).rows}
    assert "pip install 'jaxnet[checkpoint]'" in rows["checkpoints"]
    assert not (tmp_path / "checkpoints").exists()
