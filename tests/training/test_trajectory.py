import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import training


def descend(params, batch):
    """ω ← ω − .1 (ω − x), whose steps have a closed form."""
    return params - 0.1 * (params - batch), {"loss": (params - batch) ** 2 / 2}


def test_one_batch_for_every_step():
    end, metrics = training.trajectory(descend, jnp.array(1.0), jnp.array(0.0), num_steps=20)
    np.testing.assert_allclose(end, 0.9**20, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], 0.81 ** np.arange(20) / 2, rtol=1e-5)


def test_what_is_observed_is_the_state_after_each_step():
    _, seen = training.trajectory(
        descend, jnp.array(1.0), jnp.zeros(5), observe=lambda state, metrics: (state, metrics["loss"])
    )
    np.testing.assert_allclose(seen[0], 0.9 ** np.arange(1, 6), rtol=1e-6)
    np.testing.assert_allclose(seen[1], 0.81 ** np.arange(5) / 2, rtol=1e-6)


@pytest.mark.parametrize("unroll", [1, 2])
def test_it_is_pure(unroll):
    """A trajectory of trajectories, jitted, vmapped over starts and differentiated."""
    inner = lambda params, batch: training.trajectory(descend, params, batch, num_steps=3, unroll=unroll)
    run = lambda start: training.trajectory(inner, start, jnp.array([0.0, 0.0]))[0]
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(jnp.array([1.0, 2.0])), [0.9**6, 2 * 0.9**6], rtol=1e-5)
    np.testing.assert_allclose(jax.grad(run)(1.0), 0.9**6, rtol=1e-5)


def test_it_is_what_fit_does(mlp_problem):
    loss, params, batch = mlp_problem
    optimizer = optax.adam(0.01)
    update, state = training.make_update(loss, optimizer), training.init_state(params, optimizer)
    state, metrics = training.trajectory(update, state, batch, num_steps=5)
    found = training.fit(
        loss, params, batch, optax.adam, learning_rate=0.01, batch_size=None, num_epochs=5, key=jax.random.key(0)
    )
    chex.assert_trees_all_close(state, found.state, rtol=1e-12)
    np.testing.assert_allclose(metrics["loss"], found.history.loss, rtol=1e-12)
