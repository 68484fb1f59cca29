import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxnet import per_example


def flat(tree):
    return ravel_pytree(tree)[0]


def many(trees):
    leaves = jax.tree.leaves(trees)
    return jnp.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def definition(loss, params, batch):
    """vmap of grad, one row an example."""
    one = lambda example: jax.grad(loss)(params, jax.tree.map(lambda x: x[None], example))
    return many(jax.vmap(one)(batch))


def everything(grads, v, weights, bound):
    """What every method gives, flat."""
    return {
        "dense": many(grads.dense()),
        "mean": flat(grads.mean()),
        "norms": grads.norms(),
        "leaf norms": jnp.stack(jax.tree.leaves(grads.leaf_norms())),
        "second moment": flat(grads.second_moment()),
        "variance": flat(grads.variance()),
        "gram": grads.gram(),
        "vdot": grads.vdot(v),
        "cosine": grads.cosine(v),
        "distances": grads.distances(v),
        "weighted sum": flat(grads.weighted_sum(weights)),
        "clipped mean": flat(grads.clipped_mean(bound)),
    }


def from_rows(rows, sizes, v, weights, bound):
    """The same of the gradients as a matrix, for leaves of those sizes."""
    norms = jnp.linalg.norm(rows, axis=1)
    leaves = jnp.split(rows, np.cumsum(sizes)[:-1], axis=1)
    factors = jnp.where(norms > bound, bound / norms, 1)
    return {
        "dense": rows,
        "mean": rows.mean(axis=0),
        "norms": norms,
        "leaf norms": jnp.stack([jnp.linalg.norm(x, axis=1) for x in leaves]),
        "second moment": (rows**2).mean(axis=0),
        "variance": rows.var(axis=0, ddof=1),
        "gram": rows @ rows.T,
        "vdot": rows @ v,
        "cosine": rows @ v / norms / jnp.linalg.norm(v),
        "distances": jnp.linalg.norm(rows - v, axis=1),
        "weighted sum": weights @ rows,
        "clipped mean": (factors[:, None] * rows).mean(axis=0),
    }


@pytest.fixture(scope="session")
def check_per_example():
    """Every method against the definition, to 1e-12 of the largest entry."""
    return check


def check(loss, params, batch, bound=0.3):
    v = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    weights = jnp.linspace(-1, 2, len(jax.tree.leaves(batch)[0]))
    sizes = [x.size for x in jax.tree.leaves(params)]
    ours = jax.jit(lambda p, b: everything(per_example.gradients(loss, p, b), v, weights, bound))(params, batch)
    rows = jax.jit(functools.partial(definition, loss))(params, batch)
    compare(ours, from_rows(rows, sizes, flat(v), weights, bound), 1e-12)


def compare(ours, expected, tolerance):
    """To that part of the largest entry."""
    for name in expected:
        scale = float(jnp.nan_to_num(jnp.abs(expected[name])).max())
        np.testing.assert_allclose(ours[name], expected[name], rtol=tolerance, atol=tolerance * scale, err_msg=name)


@pytest.fixture(scope="session")
def check_against_rows():
    """Every method against rows (N, P) found in another way, in float64."""

    def check_rows(grads, rows, tolerance):
        leaves, n = jax.tree.leaves(grads.params), len(rows)
        v = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype), grads.params)
        weights, bound = jnp.linspace(-1, 2, n) / n, float(np.median(np.linalg.norm(rows, axis=1)))
        ours = everything(grads, v, weights, bound)
        with jax.enable_x64(True):
            given = (np.asarray(x, np.float64) for x in (flat(v), weights))
            compare(ours, from_rows(jnp.asarray(rows), [x.size for x in leaves], *given, bound), tolerance)

    return check_rows
