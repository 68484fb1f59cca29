import functools
import json
import math
import os
import re
import resource
import shutil
import signal
import struct

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import losses, nn, training
from jaxnet.contract import UserError

KEY = jax.random.key(5)
MODEL = nn.mlp([8, 3])
LOSS = losses.mean_loss(MODEL.apply, losses.softmax_cross_entropy)
PARAMS = MODEL.init(KEY, (4,))
DATA = jax.random.normal(KEY, (20, 4)), jax.random.randint(KEY, (20,), 0, 3)
HELD_OUT = DATA[0][:9], jnp.array([2, 1, 0] * 3)  # labels of chance: its loss turns up soon
WITH = {"validation": HELD_OUT, "metrics": {"accuracy": functools.partial(losses.accuracy, MODEL.apply)}}


def fit(start, *observers, data=DATA, make=optax.adam, learning_rate=0.05, batch_size=6, num_epochs=6, **options):
    given = {"learning_rate": learning_rate, "batch_size": batch_size, "num_epochs": num_epochs, "key": KEY, **options}
    return training.fit(LOSS, start, data, make, observers=observers, **given)


def progress_of(start, **options):
    """What an observer is shown after each epoch, and what the run returns."""
    seen = []
    result = fit(start, seen.append, **options)
    return seen, result


UNEVEN = [jax.tree.map(lambda x, rows=rows: x[rows], DATA) for rows in (slice(0, 6), slice(6, 12), slice(12, 20))]


class Growing:
    """A stream with a batch more at each pass."""

    def __init__(self, passes=0):
        self.passes = passes

    def __iter__(self):
        self.passes += 1
        return iter(UNEVEN[:1] * self.passes)


CASES = {
    "best and metrics": WITH,
    "patience": {**WITH, "stop": training.StopRule(patience=2), "num_epochs": 40, "learning_rate": 0.5},
    "small enough": {"stop": training.StopRule(loss_below=1.0), "num_epochs": 40},
    "diverged": {"make": optax.sgd, "learning_rate": 1e38},
    "injected": {"make": optax.inject_hyperparams(optax.adam)},
    "full batch": {"batch_size": None},
    "stream": {"data": UNEVEN, "batch_size": 8, **WITH},
    "a pass over a stream": {"data": UNEVEN, "batch_size": None},
}


@pytest.mark.parametrize("name", CASES)
def test_fit_goes_on_from_what_an_observer_was_shown(name):
    seen, whole = progress_of(PARAMS, **CASES[name])
    # From the middle; and from the end, where there is nothing left to do.
    for progress in {len(seen) // 2: seen[len(seen) // 2], len(seen): seen[-1]}.values():
        rest, result = progress_of(progress, **CASES[name])
        chex.assert_trees_all_equal(result._replace(stopped=None), whole._replace(stopped=None))
        assert result.stopped == whole.stopped
        assert [p.epoch for p in rest] == [p.epoch for p in seen[progress.epoch :]]
        chex.assert_trees_all_equal(rest, seen[progress.epoch :])


def test_what_is_left_is_one_program_where_nobody_looks_on():
    seen, whole = progress_of(PARAMS, **WITH)
    chex.assert_trees_all_close(fit(seen[2], **WITH)._replace(stopped=None), whole._replace(stopped=None), rtol=1e-5)


def test_a_stream_of_more_and_more_batches_keeps_its_counts():
    options = {"batch_size": 6, "num_epochs": 4}
    seen, whole = progress_of(PARAMS, data=Growing(), **options)
    _, result = progress_of(seen[1], data=Growing(2), **options)
    assert whole.history.step.tolist() == [1, 3, 6, 10]
    chex.assert_trees_all_equal(result._replace(stopped=None), whole._replace(stopped=None))


def test_progress_counts_epochs_as_the_history_does():
    _, first = progress_of(PARAMS, num_epochs=2)
    seen, result = progress_of(first.state, num_epochs=3)
    assert [(p.epoch, p.num_epochs) for p in seen] == [(3, 5), (4, 5), (5, 5)]
    assert result.history.epoch.tolist() == [3, 4, 5]
    # A run that began with a state and is broken off ends where it would have.
    again, _ = progress_of(seen[0], num_epochs=3)
    assert [(p.epoch, p.num_epochs) for p in again] == [(4, 5), (5, 5)]


def test_a_run_that_ended_goes_on_when_it_may():
    seen, _ = progress_of(PARAMS, **CASES["patience"])
    longer = {**CASES["patience"], "stop": training.StopRule(patience=4)}
    assert fit(seen[-1], **longer).stopped == fit(PARAMS, **longer).stopped
    assert fit(seen[-1], **{**longer, "stop": None, "num_epochs": 12}).stopped.epoch == 12


names = lambda folder: sorted(path.name for path in folder.iterdir())
resumed = lambda checkpoints, make=optax.adam: checkpoints.resume(training.init_state(PARAMS, make(0.05)))


def test_checkpoints_come_every_so_often_and_the_newest_are_kept(tmp_path):
    fit(PARAMS, training.Checkpoints(tmp_path / "a", every=4, keep=2), num_epochs=14)
    assert names(tmp_path / "a") == ["12", "14"]  # the last is written however the run ends
    fit(PARAMS, training.Checkpoints(tmp_path / "b", minutes=60))
    assert names(tmp_path / "b") == ["6"]
    for option in ({"every": 0}, {"keep": 0}, {"minutes": -1}, {"minutes": math.nan}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: expected"):
            training.Checkpoints(tmp_path, **option)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_leaves_the_last_epoch_that_was_finished(number, raised, tmp_path):
    checkpoints, whole = training.Checkpoints(tmp_path / "run", every=100), fit(PARAMS, lambda _: None, **WITH)
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(raised) as caught:
            fit(PARAMS, checkpoints, lambda p: p.epoch == 3 and signal.raise_signal(number), **WITH)
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert signal.getsignal(signal.SIGTERM) is before[1]
    assert raised is KeyboardInterrupt or caught.value.code == 143
    assert names(tmp_path / "run") == ["3"]
    result = fit(resumed(checkpoints), checkpoints, **WITH)
    chex.assert_trees_all_equal(result._replace(stopped=None), whole._replace(stopped=None))


def test_a_signal_waits_until_a_checkpoint_is_whole(tmp_path, monkeypatch):
    def interrupted(path, tree, save=training.save):
        os.kill(os.getpid(), signal.SIGTERM)
        save(path, tree)

    monkeypatch.setattr("jaxnet.training._observers.save", interrupted)
    with pytest.raises(SystemExit):
        fit(PARAMS, training.Checkpoints(tmp_path / "run"))
    assert names(tmp_path / "run") == ["1"]


def test_a_run_does_not_write_over_another_ones(tmp_path):
    fit(PARAMS, training.Checkpoints(tmp_path / "run"))
    with pytest.raises(UserError, match="holds a checkpoint of epoch 4 already, and this run is at 1; go on from it"):
        fit(PARAMS, training.Checkpoints(tmp_path / "run"))
    assert names(tmp_path / "run") == ["4", "5", "6"]


def test_a_damaged_checkpoint_gives_way_to_a_new_one(tmp_path):
    checkpoints = training.Checkpoints(tmp_path / "run")
    whole = fit(PARAMS, checkpoints)
    (tmp_path / "run" / "6" / "about.json").write_text("{")
    (tmp_path / "run" / "7.partial").mkdir()
    with pytest.warns(RuntimeWarning, match="going on from"):
        start = resumed(checkpoints)
    assert start.epoch == 5
    chex.assert_trees_all_equal(fit(start, checkpoints).state, whole.state)
    assert names(tmp_path / "run") == ["4", "5", "6"]
    assert resumed(checkpoints).epoch == 6


class Full:
    """A disk that is full from epoch 3 on: no file may grow beyond so many bytes."""

    def __init__(self, limit):
        self.limit = limit

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def __call__(self, progress):
        if progress.epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("required", [False, True])
def test_a_full_disk_is_told_and_what_was_saved_stays(required, tmp_path):
    checkpoints, full = training.Checkpoints(tmp_path / "run", required=required), Full(50)
    said = r"run/3: cannot be written \(.*File too large.*\); what was saved before stays"
    if required:
        with pytest.raises(OSError, match=said):
            fit(PARAMS, checkpoints, full)
    else:
        with pytest.warns(RuntimeWarning, match="training goes on") as told:
            assert fit(PARAMS, checkpoints, full).stopped.epoch == 6
        assert len(told) == 4
        assert re.search(said, str(told[0].message))
    assert names(tmp_path / "run") == ["1", "2"]
    assert resumed(checkpoints).epoch == 2


def test_what_the_writers_below_say_of_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    def full(*args, **options):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing\nlocal file: No space left on device")

    training.save(tmp_path / "a", PARAMS)
    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", full)
    with pytest.raises(OSError, match=r"b: cannot be written \(RESOURCE_EXHAUSTED: Error writing local file: No space"):
        training.save(tmp_path / "b", PARAMS)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match=r"No space left on device: 268 bytes to write, 10 free"):
        training.save(tmp_path / "b", PARAMS)
    assert names(tmp_path) == ["a"]
    chex.assert_trees_all_equal(training.restore(tmp_path / "a", PARAMS), PARAMS)


def test_the_history_is_readable_line_by_line_as_it_grows(tmp_path):
    path, read = tmp_path / "a" / "history.jsonl", []
    lines = lambda: [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    seen, whole = progress_of(PARAMS, **WITH)
    result = fit(PARAMS, training.JsonLines(path), lambda _: read.append(len(lines())), **WITH)
    assert read == [1, 2, 3, 4, 5, 6]
    for row, line in enumerate(lines()):
        assert line == {
            "epoch": row + 1,
            "step": 4 * (row + 1),
            "loss": float(result.history.loss[row]),
            "metrics/accuracy": float(result.history.metrics["accuracy"][row]),
            "validation/accuracy": float(result.history.validation["accuracy"][row]),
            "validation/loss": float(result.history.validation["loss"][row]),
        }
    # A run that goes on mends what a killed one left: lines of epochs that it repeats, and half a line.
    expected = path.read_text()
    path.write_text(expected + '{"epoch": 7, "st')
    fit(seen[2], training.JsonLines(path), **WITH)
    assert path.read_text() == expected
    fit(whole.state, training.JsonLines(path), num_epochs=1, **WITH)
    assert path.read_text().startswith(expected)
    assert [line["epoch"] for line in lines()] == [1, 2, 3, 4, 5, 6, 7]


def test_a_history_that_is_not_finite_is_json_still(tmp_path):
    path = tmp_path / "history.jsonl"
    fit(PARAMS, training.JsonLines(path), **CASES["diverged"])
    (line,) = path.read_text().splitlines()
    assert not math.isfinite(float(json.loads(line, parse_constant=pytest.fail)["loss"]))
    path.write_text("something else\n")
    with pytest.raises(UserError, match="holds something else than a history"):
        fit(PARAMS, training.JsonLines(path))
    assert path.read_text() == "something else\n"


def events(folder):
    """(step, name, value) of TensorFlow's records: a length of 8 bytes, 4 of checksum, the event, 4 of checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event, content = Event.FromString(content[12 : 12 + length]), content[16 + length :]
            yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)


def test_tensorboard_reads_what_the_history_says(tmp_path):
    history = fit(PARAMS, training.TensorBoard(tmp_path), **WITH).history
    found = list(events(tmp_path))
    for name, values in {
        "loss": history.loss,
        "metrics/accuracy": history.metrics["accuracy"],
        "validation/loss": history.validation["loss"],
        "validation/accuracy": history.validation["accuracy"],
    }.items():
        assert [step for step, tag, _ in found if tag == name] == history.step.tolist()
        np.testing.assert_array_equal([value for _, tag, value in found if tag == name], np.float32(values))
