"""The table of docs/optimizers.md, walked: each of optax's own makers gives what it says."""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import training
from jaxnet.learning_rate import analyse, measure_stability, stability

KEY = jax.random.key(0)
PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
TABLE = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE))
OTHERWISE = {
    "noisy_sgd": lambda rate: optax.noisy_sgd(rate, key=0),
    "lbfgs": lambda rate: optax.lbfgs(rate, linesearch=None),
}
PARAMS = {"w": jnp.full((2, 2), 0.3), "v": jnp.full(2, 0.1)}
BATCH = jax.random.normal(KEY, (40, 6))
CURVATURES = jnp.array([5.0, 2.0, 1.0, 0.5, 1.0, 1.0])


def loss(params, batch):
    """½ Σ_i h_i (ω_i − x_i)², the mean over examples: curvature h, noise h²Var(x)."""
    flat = jnp.append(params["w"].ravel(), params["v"])
    return 0.5 * jnp.mean(jnp.square(flat - batch) @ CURVATURES)


def makers():
    alias = inspect.getmodule(optax.adam)
    return [
        n for n, f in vars(alias).items() if inspect.isfunction(f) and f.__module__ == alias.__name__ and n[0] != "_"
    ]


def test_it_names_every_optimizer():
    assert sorted(TABLE) == sorted(makers())


@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated")
@pytest.mark.parametrize("name", TABLE)
def test_stability(name):
    said = TABLE[name].split(" | ")[0]
    optimizer = OTHERWISE.get(name, getattr(optax, name))(1e-3)
    update, state = jax.jit(training.make_update(loss, optimizer)), training.init_state(PARAMS, optimizer)
    if said.startswith("refused"):
        with pytest.raises((TypeError, ValueError), match="optimizer: "):
            stability(loss, PARAMS, BATCH, optimizer, state.opt_state, key=KEY)
        return
    for _ in range(30):
        state, _ = update(state, BATCH)
    found = stability(loss, state.params, BATCH, optimizer, state.opt_state, key=KEY)
    assert np.isnan(found.limit) == said.startswith("NaN")


@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated")
@pytest.mark.parametrize("name", TABLE)
def test_analyse(name):
    said = TABLE[name].split(" | ")[1]
    make = OTHERWISE.get(name, getattr(optax, name))
    if said.startswith("refused"):
        with pytest.raises(TypeError, match="optimizer: "):
            analyse(loss, PARAMS, BATCH, key=KEY, make_optimizer=make, batch_sizes=[8])
        return
    found = analyse(loss, PARAMS, BATCH, key=KEY, make_optimizer=make, batch_sizes=[8])
    assert found.optimizer == name
    if said.startswith("rate only"):
        assert found.rate(8) > 0
        assert np.isnan(found.limit(8))
        return
    assert 0 < found.rate(8) < found.limit(8)
    low, high = found.bracket(8)
    # Of Hessians there is no lower end, and so no permit.
    assert np.isnan(low)
    assert found.limit(8) <= high
    assert found.is_stable(0.01 * float(found.rate(8)), 8) == "not resolved"


def test_an_empty_leaf_and_two_precisions(x64):
    """The limit is that of the dense Hessian of what is there, 2/5, by each of the three roads."""
    params = {"w": PARAMS["w"].astype(jnp.float64), "v": PARAMS["v"].astype(jnp.float32), "none": jnp.zeros((0, 3))}
    batch = BATCH.astype(jnp.float64)
    state = optax.sgd(0.1).init(params)
    np.testing.assert_allclose(stability(loss, params, batch, optax.sgd(0.1), state, key=KEY).limit, 2 / 5, rtol=1e-3)
    found = analyse(loss, params, batch, key=KEY, batch_sizes=[8, len(batch)], second_moments=False)
    np.testing.assert_allclose(found.limit(None), 2 / 5, rtol=1e-3)
    assert 0 < found.rate(8) < found.limit(8)
    ladder = 2 / 5 * np.geomspace(0.5, 2, 9)
    measured = measure_stability(loss, params, batch, optax.sgd, rates=ladder, key=KEY, num_steps=2)
    np.testing.assert_allclose(measured.limits, 2 / 5, rtol=5e-3)


def test_some_leaves_in_half_precision_are_refused():
    params = {"w": PARAMS["w"], "v": PARAMS["v"].astype(jnp.bfloat16)}
    for refused in (
        lambda: stability(loss, params, BATCH, optax.sgd(0.1), optax.sgd(0.1).init(params), key=KEY),
        lambda: measure_stability(loss, params, BATCH, optax.sgd, rates=[0.1, 0.4, 0.9], key=KEY),
    ):
        with pytest.raises(TypeError, match="params.*float32 or float64"):
            refused()


def test_each_group_of_another_precision_has_its_own_rate(x64):
    """Two leaves, one of single precision, stepped at a rate and at four times it: 2 over λ_max(R^½HR^½)."""
    curvatures = np.array([1.0, 2.0])
    loss = lambda p, batch: (p["a"] ** 2 * curvatures[0] / 2 + p["b"] ** 2 * curvatures[1] / 2).sum() + 0 * batch.mean()
    params = {"a": jnp.ones(1, jnp.float32), "b": jnp.ones(1, jnp.float64)}
    make = lambda rate: optax.partition({"a": optax.sgd(4 * rate), "b": optax.sgd(rate)}, {"a": "a", "b": "b"})
    batch = jnp.arange(8.0)
    found = analyse(loss, params, batch, key=jax.random.key(0), make_optimizer=make, batch_sizes=[8])
    np.testing.assert_allclose(found.limit(8), 2 / (curvatures * [4, 1]).max(), rtol=1e-3)
