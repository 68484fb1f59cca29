"""Models of other libraries, each unchanged: their kernels are found in the trace."""

import equinox as eqx
import flax.linen
import haiku
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxnet import losses, per_example

KEY = jax.random.key(0)
BATCH = (jax.random.normal(KEY, (5, 6, 6, 2)), jnp.arange(5) % 3)


def loss_of(network):
    def loss(params, batch):
        return losses.softmax_cross_entropy(network(params, batch[0]), batch[1]).mean()

    return loss


def linen():
    class Net(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            x = flax.linen.LayerNorm()(jnp.tanh(flax.linen.Conv(4, (3, 3))(x)))
            return flax.linen.Dense(3)(flax.linen.Dense(8)(x.mean(axis=(1, 2))))

    model = Net()
    return loss_of(model.apply), model.init(KEY, BATCH[0])


def flax_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.out = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(self.norm(jnp.tanh(self.conv(x))).mean(axis=(1, 2)))

    definition, params = nnx.split(Net(nnx.Rngs(0)))
    return loss_of(lambda params, x: nnx.merge(definition, params)(x)), params


def equinox():
    keys = jax.random.split(KEY, 2)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 4, 3, key=keys[0]),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(64, 3, key=keys[1]),
        ]
    )
    params, rest = eqx.partition(model, eqx.is_array)
    return loss_of(lambda p, x: jax.vmap(eqx.combine(p, rest))(jnp.moveaxis(x, -1, 1))), params


def dm_haiku():
    def network(x):
        x = jnp.tanh(haiku.Conv2D(4, 3)(x))
        return haiku.Linear(3)(haiku.LayerNorm(-1, True, True)(x).mean(axis=(1, 2)))

    model = haiku.without_apply_rng(haiku.transform(network))
    return loss_of(model.apply), model.init(KEY, BATCH[0])


@pytest.mark.parametrize("make", [linen, flax_nnx, equinox, dm_haiku])
def test_a_model_of_another_library(make, x64, check_per_example):
    loss, params = make()
    params, batch = jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, (params, BATCH)
    )
    check_per_example(loss, params, batch)
    plan = per_example.gradients(loss, params, batch).plan
    kernels = [how for path, how in plan.items() if "kernel" in path or "weight" in path or path.endswith("/w")]
    assert len(kernels) >= 2
    assert all("factors of" in how for how in kernels), plan
