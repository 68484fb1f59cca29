import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxnet import per_example


def everything(loss, params, batch, v, weights):
    """What every method gives, flat; and the same from the definition, vmap of grad."""
    grads = per_example.gradients(loss, params, batch)
    flat = lambda tree: ravel_pytree(tree)[0]
    many = lambda tree: jnp.concatenate([x.reshape(len(weights), -1) for x in jax.tree.leaves(tree)], axis=1)
    ours = {
        "dense": many(grads.dense()),
        "mean": flat(grads.mean()),
        "norms": grads.norms(),
        "leaf norms": jnp.stack(jax.tree.leaves(grads.leaf_norms())),
        "second moment": flat(grads.second_moment()),
        "variance": flat(grads.variance()),
        "gram": grads.gram(),
        "vdot": grads.vdot(v),
        "distances": grads.distances(v),
        "weighted sum": flat(grads.weighted_sum(weights)),
    }
    one = lambda example: jax.grad(loss)(params, jax.tree.map(lambda x: x[None], example))
    definition = jax.vmap(one)(batch)
    rows = many(definition)
    leaf_norms = [jnp.linalg.norm(x.reshape(len(weights), -1), axis=1) for x in jax.tree.leaves(definition)]
    expected = {
        "dense": rows,
        "mean": rows.mean(axis=0),
        "norms": jnp.linalg.norm(rows, axis=1),
        "leaf norms": jnp.stack(leaf_norms),
        "second moment": (rows**2).mean(axis=0),
        "variance": rows.var(axis=0, ddof=1),
        "gram": rows @ rows.T,
        "vdot": rows @ flat(v),
        "distances": jnp.linalg.norm(rows - flat(v), axis=1),
        "weighted sum": weights @ rows,
    }
    return ours, expected


@pytest.fixture(scope="session")
def check_per_example():
    """Every method against the definition, to 1e-12 of the largest entry."""
    return check


def check(loss, params, batch):
    v = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    weights = jnp.linspace(-1, 2, len(jax.tree.leaves(batch)[0]))
    ours, expected = jax.jit(lambda p, b: everything(loss, p, b, v, weights))(params, batch)
    for name in expected:
        scale = float(jnp.abs(expected[name]).max())
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-12, atol=1e-12 * scale, err_msg=name)
