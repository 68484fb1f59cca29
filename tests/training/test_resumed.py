"""Runs that are killed, in a real second process, and go on."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

from jaxnet import training

# What a person would write, with all that a run may carry: momentum, noise, a best, a stop rule, metrics.
SCRIPT = """
import functools, sys
import jax, jax.numpy as jnp, optax
from jaxnet import losses, nn, training

model = nn.mlp([8, 3])
loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
keys = jax.random.split(jax.random.key(7), 2)
data = jax.random.normal(keys[0], (60, 4)), jax.random.randint(keys[1], (60,), 0, 3)
params = model.init(jax.random.key(5), (4,))
make = functools.partial(optax.sgd, momentum=0.9)

noisy = lambda key, batch: (batch[0] + jax.random.normal(key), batch[1])

def run(folder, num_epochs, **options):
    checkpoints = training.Checkpoints(f"{folder}/run", **options)
    return training.fit(
        loss, checkpoints.resume(training.init_state(params, make(0.1))), data, make, learning_rate=0.1, batch_size=7,
        num_epochs=num_epochs, key=jax.random.key(1), augment=noisy,
        validation=jax.tree.map(lambda x: x[:20], data), stop=training.StopRule(patience=50), metrics={"loss": loss},
        observers=[training.JsonLines(f"{folder}/history.jsonl"), checkpoints],
    )
"""
CHILD = (
    SCRIPT
    + """
training.save(f"{sys.argv[1]}/end", run(sys.argv[1], int(sys.argv[2]), keep=2)._replace(stopped=None))
"""
)


def whole(folder, num_epochs):
    """The run that nobody kills, in this process."""
    names = {}
    exec(SCRIPT, names)
    return names["run"](folder, num_epochs, every=num_epochs)


def started(folder, num_epochs):
    program = [sys.executable, "-W", "error", "-c", CHILD, str(folder), str(num_epochs)]
    return subprocess.Popen(program, stderr=subprocess.PIPE, text=True)


def killed_and_resumed(folder, num_epochs, delays):
    """A process a delay, killed so long after it has begun to write a checkpoint; then one that may end."""
    for delay in delays:
        process = started(folder, num_epochs)
        before = set((folder / "run").glob("*"))
        while process.poll() is None and set((folder / "run").glob("*.partial")) <= before:
            time.sleep(0.001)
        time.sleep(delay)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = started(folder, num_epochs)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors


def check_the_same_end(folder, expected):
    like = expected._replace(stopped=None)
    end = training.restore(folder / "end", like)
    chex.assert_trees_all_equal(end, like)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == expected.history.epoch.tolist()
    np.testing.assert_array_equal([line["loss"] for line in lines], expected.history.loss)
    assert len(list((folder / "run").iterdir())) == 2


@pytest.mark.parametrize(
    ("num_epochs", "delays"),
    [(12, [0.0, 0.15]), pytest.param(400, np.random.default_rng(0).uniform(0, 0.3, 20), marks=pytest.mark.slow)],
)
def test_a_run_that_is_killed_and_resumed_is_the_same_run(num_epochs, delays, tmp_path):
    expected = whole(tmp_path / "whole", num_epochs)
    killed_and_resumed(tmp_path / "killed", num_epochs, delays)
    check_the_same_end(tmp_path / "killed", expected)


def test_the_page_on_checkpoints_runs_twice(tmp_path, monkeypatch):
    page = pathlib.Path(__file__).parents[2] / "docs" / "checkpoints.md"
    (program,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    first, second = {}, {}
    exec(program, first)
    exec(program.replace("num_epochs=6", "num_epochs=8"), second)
    assert first["result"].stopped.epoch == 6
    assert second["result"].history.epoch.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(second["result"].history.loss[:6], first["result"].history.loss)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 8
