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
import pytest

from jaxnet import losses, nn


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
