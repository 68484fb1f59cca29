"""Results show themselves in a few lines: numbers by value, large arrays by shape."""

import dataclasses
import importlib
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import contract, curvature, learning_rate, losses, nn, per_example, training

ROOMS = ["curvature", "learning_rate", "per_example", "training"]
# What a person makes and hands over, in place of what a function found; and a reason in words.
NO_RESULTS = {"ClippedGrad", "Differences", "Space", "Eigensolver", "StopRule", "Stopped", "TrackObserver"}
KEY = jax.random.key(0)


def results():
    for room in ROOMS:
        module = importlib.import_module(f"jaxnet.{room}")
        for name in dir(module):
            found = getattr(module, name)
            if isinstance(found, type) and (dataclasses.is_dataclass(found) or hasattr(found, "_fields")):
                yield f"{room}.{name}", found


@pytest.mark.parametrize(("name", "kind"), list(results()), ids=lambda x: x if isinstance(x, str) else "")
def test_every_public_result_is_shown_in_short(name, kind):
    if name.split(".")[1] in NO_RESULTS:
        assert not hasattr(kind, "_repr_html_")
        return
    fields = getattr(kind, "_fields", None) or [field.name for field in dataclasses.fields(kind)]
    tree = {"a": jnp.ones((300, 5)), "b": [np.arange(1000)]}
    # As a person sees it: whatever a field holds, a large array, a pytree, a number or a function.
    for value in (np.linspace(0, 1, 10_000), tree, jnp.float32(0.125), optax.sgd, KEY, "text", None, float("nan")):
        shown = object.__new__(kind) if dataclasses.is_dataclass(kind) else kind(*[value] * len(fields))
        if dataclasses.is_dataclass(kind):
            for field in fields:
                object.__setattr__(shown, field, value)
        assert len(repr(shown).splitlines()) <= 2 + len(fields) // 2
        assert repr(shown).startswith(kind.__name__ + "(")


def test_numbers_are_shown_by_value_and_what_is_large_by_its_size():
    model = nn.mlp([8, 3], activation=jnp.tanh)
    params, batch = model.init(KEY, (5,)), (jax.random.normal(KEY, (30, 5)), jnp.arange(30) % 3)
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    found = curvature.sharpness(loss, params, batch, key=KEY)
    assert f"value={float(found.value):.6g}," in repr(found)
    assert "leading=<4 arrays, 225 numbers>" in " ".join(repr(found).split())
    table = ET.fromstring(found._repr_html_())
    cells = {row[0].text: row[1].text for row in table}
    assert cells["converged"] == "True"
    assert cells["upper_bound"] == f"{float(found.upper_bound):.6g}"
    assert len(cells) == len(dataclasses.fields(found))
    shown = []
    jax.jit(lambda p: shown.append(repr(curvature.sharpness(loss, p, batch, key=KEY))) or 0)(params)
    assert "value=float32[]" in shown[0]
    result = training.fit(
        loss, params, batch, optax.adam, learning_rate=0.1, batch_size=None, num_epochs=2, key=KEY, validation=batch
    )
    assert "stopped=Stopped(reason='num_epochs'" in repr(result)
    assert "<script>" not in contract.result(type("R", (), {"_fields": ("a",), "a": "<script>"}))()._repr_html_()


def test_an_analysis_shows_its_table_in_a_notebook():
    found = learning_rate.analyse(
        lambda p, b: jnp.mean((b[0] @ p - b[1]) ** 2), jnp.ones(3), (jnp.eye(12, 3) + 1, jnp.arange(12.0)), key=KEY,
        batch_sizes=[4],
    )  # fmt: skip
    table = ET.fromstring(found._repr_html_())
    assert [row[0].text for row in table] == [row[0] for row in found.rows()]
    assert len(repr(found).splitlines()) < 8


def test_shapes_alone_are_shown_as_such():
    average = jax.eval_shape(lambda: per_example.noise_average(0.5).add(1.0, 2.0, 4))
    assert "decay=float32[]," in repr(average)
    assert "means=float32[3]," in repr(average)
