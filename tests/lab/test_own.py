"""A loss, params and a batch of one's own on the command line."""

import json
import sys

import jax
import numpy as np
import pytest

from jaxnet import curvature
from jaxnet.lab import cli

MODULE = """
import jax, jax.numpy as jnp
batch = {"x": jax.random.normal(jax.random.key(0), (40, 3)), "y": jnp.arange(40.0) / 40}
def params():
    return {"w": jnp.ones(3) / 2, "none": None}
class Net:
    @staticmethod
    def loss(p, b):
        return jnp.mean((b["x"] @ p["w"] - b["y"]) ** 2)
def coupled(p, b):
    return jnp.mean((b["x"] @ p["w"] - b["y"]).sum() ** 2)
ragged = {"x": jnp.ones((4, 3)), "y": jnp.ones(5)}
def broken():
    raise RuntimeError("no data here")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "ones_own.py").write_text(MODULE)
    (tmp_path / "fails.py").write_text("import not_there\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("ones_own", None)


@pytest.mark.slow
def test_it_is_analysed_like_any_other(folder):
    arguments = "--loss ones_own:Net.loss --params ones_own:params --batch ones_own:batch --num-epochs 2 --batch-size 8"
    arguments += " --devices 1"
    assert cli.run(["analyse", *arguments.split(), "--out", "out"]) == 0
    found = json.loads((folder / "out" / "record.json").read_text())
    module = sys.modules["ones_own"]
    expected = curvature.sharpness(module.Net.loss, module.params(), module.batch, key=jax.random.key(1)).value
    np.testing.assert_allclose(found["measurements"]["sharpness"]["value"], expected, rtol=2e-3)
    assert found["measurements"]["num_examples"] == 40
    assert found["rows"][0][:2] == ["devices", 1]
    assert "" not in sys.path


@pytest.mark.parametrize(
    ("loss", "params", "batch", "words"),
    [
        ("ones_own:Net.loss", None, "ones_own:batch", "go together; give --params too"),
        (
            "ones_own",
            "ones_own:params",
            "ones_own:batch",
            "--loss ones_own: expected module:name, such as my_module:loss",
        ),
        ("ones_owm:a", "ones_own:params", "ones_own:batch", "no module ones_owm in this folder"),
        ("fails:a", "ones_own:params", "ones_own:batch", "importing fails failed: No module named 'not_there'"),
        ("ones_own:Net.los", "ones_own:params", "ones_own:batch", "has no Net.los; it has loss"),
        ("ones_own:batch", "ones_own:params", "ones_own:batch", "expected a function loss(params, batch), got dict"),
        ("ones_own:Net.loss", "ones_own:broken", "ones_own:batch", "--params ones_own:broken: RuntimeError: no data"),
        ("ones_own:Net.loss", "ones_own:params", "ones_own:ragged", "--loss ones_own:Net.loss: ValueError"),
        ("ones_own:coupled", "ones_own:params", "ones_own:batch", "are its examples coupled"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, capsys, loss, params, batch, words):
    given = {"--loss": loss, "--params": params, "--batch": batch}
    arguments = [word for option, place in given.items() if place for word in (option, place)]
    assert cli.run(["analyse", *arguments, "--out", "out", "--batch-size", "4"]) == cli.BAD_INPUT
    printed = capsys.readouterr().err.strip()
    assert words in printed
    assert len(printed.splitlines()) == 1
