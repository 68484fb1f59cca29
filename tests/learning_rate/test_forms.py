import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxnet import curvature, data, dataset, losses, nn
from jaxnet.learning_rate._forms import forms

KEY = jax.random.key(0)


@pytest.fixture
def problem(x64):
    model = nn.mlp([5, 4])
    batch = (jax.random.normal(KEY, (7, 3)), jnp.arange(7) % 4)
    return losses.mean_loss(model.apply, losses.softmax_cross_entropy), model.init(KEY, (3,)), batch


def dense_forms(make, loss, params, batch, left, right):
    rows = []
    for i in range(len(batch[1])):
        example = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
        matrix = np.asarray(curvature.materialize(make(loss, params, example)))
        rows.append(np.einsum("ki,ij,kj->k", left, matrix, right))
    return np.array(rows)


@pytest.mark.parametrize("kind", ["parts known", "chunked", "any loss"])
@pytest.mark.parametrize("held", ["whole", "in chunks", "stream"])
def test_they_are_those_of_each_example_alone(problem, kind, held):
    """Against the dense matrix of each example: Gauss–Newton where the parts are known, else the Hessian."""
    loss, params, batch = problem
    flat, unravel = ravel_pytree(params)
    left, right = np.random.default_rng(0).normal(size=(2, 3, flat.size))
    given = {"parts known": loss, "chunked": losses.chunked(loss, 2), "any loss": lambda p, b: loss(p, b)}[kind]
    examples, size = {
        "whole": (batch, 7),
        "in chunks": (batch, 3),
        "stream": (dataset.of([jax.tree.map(lambda x: x[:4], batch), jax.tree.map(lambda x: x[4:], batch)]), 7),
    }[held]
    stacked = [jax.vmap(unravel)(vectors) for vectors in (left, right)]
    make = curvature.hessian if kind == "any loss" else curvature.gauss_newton
    wanted = dense_forms(make, loss, params, batch, left, right)
    np.testing.assert_allclose(forms(given, params, examples, *stacked, size=size), wanted, rtol=1e-9, atol=1e-12)


def test_regression_with_real_data(x64):
    """Linear least squares: C_n = x_n x_n′, so a form is a product of two predictions."""
    neuron = nn.linear_neuron()
    loss = losses.mean_loss(neuron.apply, losses.squared_error)
    x, t = data.two_gaussians_exact()
    params = {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}
    left = {"kernel": jnp.eye(2)[:, :, None], "bias": jnp.ones((2, 1))}
    right = {"kernel": 2 * jnp.eye(2)[:, :, None], "bias": jnp.ones((2, 1))}
    found = forms(loss, params, (x, t), left, right, size=50)
    np.testing.assert_allclose(found, (x + 1) * (2 * x + 1), rtol=1e-10)
