import importlib.metadata
import os
import pathlib

# Before JAX starts: the tests compile much and run little, so let the compiler try less. Processes inherit it.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA ends the process at a flag that it no longer knows
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# No test reads what another run has compiled, nor writes into the cache of who runs it.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import curvature, losses, nn, training


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """XLA maps memory for each compiled program, and Linux ends a process at its 65,530th map: old ones go in time."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > 20_000:
        jax.clear_caches()


@pytest.fixture
def x64():
    """Double precision for one test, without flipping the process's configuration."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def mlp_problem(x64):
    """A small tanh network with softmax cross-entropy, in float64: loss, params, batch of 12."""
    model = nn.mlp([6, 4], activation=jnp.tanh)
    params = model.init(jax.random.key(0), (5,))
    keys = jax.random.split(jax.random.key(1), 2)
    batch = (jax.random.normal(keys[0], (12, 5)), jax.random.randint(keys[1], (12,), 0, 4))
    return losses.mean_loss(model.apply, losses.softmax_cross_entropy), params, batch


@pytest.fixture(scope="session")
def all_but_certain():
    """A trained network whose logits are scaled until the label's is so far above all others, for each example.

    The Hessian is then e^-margin of the numbers that it is computed from. A function of the margin that gives the loss,
    the params, the batch, and λ_max in float64.
    """
    labels, key = jnp.arange(200) % 10, jax.random.key(3)
    batch = jax.random.normal(key, (200, 10)) + 6 * jax.nn.one_hot(labels, 10), labels
    model = nn.mlp([32, 10], activation=jnp.tanh)
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    trained = training.fit(
        loss,
        model.init(key, (10,)),
        batch,
        optax.adam,
        learning_rate=0.01,
        batch_size=None,
        num_epochs=200,
        key=key,
    ).state.params
    logits = jnp.sort(model.apply(trained, batch[0]), axis=1)
    least = (logits[:, -1] - logits[:, -2]).min()

    def problem(margin):
        params = (*trained[:-1], jax.tree.map(lambda w: margin / least * w, trained[-1]))
        with jax.enable_x64(True):
            double = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype=float), tree)
            exact = curvature.hessian(loss, double(params), (double(batch[0]), labels))
            return loss, params, batch, float(curvature.eigsh(exact, tol=1e-8, key=key).values[0])

    return problem
