import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import training


def quadratic(params, batch):
    return jnp.mean(0.5 * batch[0] * (params["w"] - batch[1]) ** 2)


PARAMS = {"w": jnp.array(3.0), "frozen": None}
BATCH = (jnp.array([1.0, 3.0]), jnp.array([0.0, 1.0]))


def test_an_update_of_sgd_is_the_written_rule():
    update = training.make_update(quadratic, optax.sgd(0.1))
    state, metrics = update(training.init_state(PARAMS, optax.sgd(0.1)), BATCH)
    gradient = np.mean([1.0 * (3 - 0), 3.0 * (3 - 1)])
    np.testing.assert_allclose(state.params["w"], 3 - 0.1 * gradient, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.mean([4.5, 6.0]))
    assert int(state.step) == 1
    assert state.params["frozen"] is None


def test_an_update_is_pure_and_jits():
    optimizer = optax.adam(0.1)
    update, state = training.make_update(quadratic, optimizer), training.init_state(PARAMS, optimizer)
    chex.assert_trees_all_close(update(state, BATCH), jax.jit(update)(state, BATCH), rtol=1e-6)
    np.testing.assert_array_equal(state.params["w"], 3.0)


@pytest.mark.parametrize(
    "make", [optax.lbfgs, lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15))]
)
def test_value_fn_reaches_the_optimizers_that_ask(make):
    optimizer = make()
    update, state = (
        training.make_update(quadratic, optimizer),
        training.init_state({"w": jnp.array(3.0)}, optimizer),
    )
    for _ in range(12):
        state, metrics = update(state, BATCH)
    np.testing.assert_allclose(state.params["w"], 0.75, atol=2e-2)


def test_integer_params_are_refused():
    with pytest.raises(TypeError, match="int32"):
        training.init_state({"w": jnp.arange(3)}, optax.sgd(0.1))
