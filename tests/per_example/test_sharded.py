"""A batch on a mesh of explicit axes, which JAX makes by default, gives what one device gives."""

import os
import subprocess
import sys

PROGRAM = """
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxnet import curvature, losses, nn, per_example, training

jax.config.update("jax_enable_x64", True)
key = jax.random.key(0)
model = nn.serial(nn.embed(7, 4), nn.flatten(), nn.dense(5), nn.activation(jnp.tanh), nn.dense(3))
loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
params = model.init(key, (3,))
batch = (jax.random.randint(key, (12, 3), 0, 7), jnp.arange(12) % 3)
run = lambda p, b, size: training.fit(
    loss, p, b, optax.sgd, learning_rate=0.1, batch_size=size, num_epochs=2, key=key
).state.params


@jax.jit
def everything(params, batch):
    grads = per_example.gradients(loss, params, batch)
    names = ("mean", "norms", "second_moment", "variance", "gram")
    results = {name: getattr(grads, name)() for name in names}
    results |= {"distances": grads.distances(params), "vdot": grads.vdot(params)}
    results |= {"clipped": grads.clipped_mean(0.3), "weighted": grads.weighted_sum(jnp.linspace(-1, 2, 12))}
    return results | {"covariance": curvature.gradient_covariance(loss, params, batch) @ params}


chunked = losses.chunked(loss, 5)


def more(params, batch):
    operators = [curvature.gauss_newton(x, params, batch) for x in (loss,)]
    operators += [curvature.fisher(x, params, batch, key=key) for x in (loss,)]
    clipped = per_example.clipped_grad(loss, 0.3, microbatch_size=5)(params, batch)
    layers = per_example.layer_noise_scale(loss, params, batch)
    return [op @ params for op in operators], clipped, layers


def eagerly(params, batch):
    noise = per_example.noise_scale(loss, params, batch)
    per_example.check_independent(loss, params, batch)
    return noise.value, noise.trace, per_example.gradients(loss, params, batch).norms(), run(params, batch, 5)


mesh = jax.make_mesh((4,), ("examples",), axis_types=(AxisType.Explicit,))
put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))
placed = put(params), put(batch, "examples")
same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9)
expected = jax.device_get(everything(params, batch))
jax.tree.map(same, jax.device_get(everything(*placed)), expected)
jax.tree.map(same, jax.device_get(more(*placed)), jax.device_get(more(params, batch)))
# Chunks of five would cut across the devices' shards.
in_chunks = lambda p, b: (
    jax.jit(jax.grad(chunked))(p, b),
    curvature.gauss_newton(chunked, p, b) @ p,
    curvature.hessian(chunked, p, b) @ p,
    curvature.fisher(chunked, p, b, key=key) @ p,
)
automatic = jax.make_mesh((4,), ("examples",), axis_types=(AxisType.Auto,))
for other in (mesh, automatic):
    lying = lambda tree, *spec: jax.device_put(tree, NamedSharding(other, PartitionSpec(*spec)))
    jax.tree.map(same, jax.device_get(in_chunks(lying(params), lying(batch, "examples"))), in_chunks(params, batch))
with jax.set_mesh(mesh):
    jax.tree.map(same, jax.device_get(everything(*placed)), expected)
    within = jax.device_get(eagerly(*placed))
jax.tree.map(same, within, jax.device_get(eagerly(params, batch)))
"""


def test_on_four_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
