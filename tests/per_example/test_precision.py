"""Gradients in half precision, against closed forms in float64: nothing is squared or summed in less than float32."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import curvature, per_example

HALVES = (jnp.float16, jnp.bfloat16)


def products_in_half_precision(half):
    """y ≈ x·w, of which the product is rounded: at w = 0, g_n = −y_n x_n. In float16, the squares of x overflow."""
    rng = np.random.default_rng(0)
    x, y = (10 + rng.normal(size=(16, 1024))).astype(half), 1e-3 * rng.normal(size=(16, 2)).astype(np.float32)

    def loss(params, batch):
        inputs, targets = batch
        outputs = (inputs.astype(half) @ params["kernel"].astype(half)).astype(jnp.float32)
        return jnp.mean(jnp.sum((outputs + params["bias"] - targets) ** 2, axis=1)) / 2

    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    rows = np.concatenate([-y64, -(x64[:, :, None] * y64[:, None]).reshape(16, -1)], axis=1)
    return loss, {"bias": jnp.zeros(2), "kernel": jnp.zeros((1024, 2))}, (jnp.asarray(x), jnp.asarray(y)), rows


def params_in_half_precision(half):
    """g_n = x_n: 800 numbers that differ by one unit of rounding, whose running sum in ``half`` stands still."""
    x = 300 * (1 + float(jnp.finfo(half).eps) * np.random.default_rng(0).integers(0, 2, (800, 2)))
    x = jnp.asarray(x, half)
    rows = np.concatenate([x, x], axis=1).astype(np.float64)

    def loss(params, batch):
        (inputs,) = batch
        # The second leaf is used twice, and once not by a product.
        return jnp.mean(inputs @ params["a"] + inputs @ params["b"] + 0 * params["b"].sum())

    return loss, {"a": jnp.zeros(2, half), "b": jnp.zeros(2, half)}, (x,), rows


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("held", [2**22, 0])
@pytest.mark.parametrize("problem", [products_in_half_precision, params_in_half_precision])
def test_every_method_is_the_closed_form(problem, held, half, monkeypatch, check_against_rows):
    """A product in half precision rounds δ by its unit; the sums and squares add nothing to it."""
    monkeypatch.setattr(sys.modules["jaxnet.per_example._gradients"], "_HELD", held)
    loss, params, batch, rows = problem(half)
    grads = per_example.gradients(loss, params, batch)
    check_against_rows(grads, rows, 2 * float(jnp.finfo(half).eps))


@pytest.mark.parametrize("half", HALVES)
def test_the_spread_of_a_stream_in_half_precision(half):
    loss, params, batch, rows = params_in_half_precision(half)
    stream = [tuple(x[i : i + 8] for x in batch) for i in range(0, len(rows), 8)]
    variance = rows.var(axis=0, ddof=1)
    grads = per_example.gradients(loss, params, stream)
    np.testing.assert_allclose(jnp.concatenate(jax.tree.leaves(grads.variance())), variance, rtol=1e-3)
    np.testing.assert_allclose(jnp.concatenate(jax.tree.leaves(grads.second_moment())), (rows**2).mean(0), rtol=1e-5)
    assert jax.tree.map(jnp.result_type, grads.mean()) == jax.tree.map(jnp.result_type, params)
    noise = per_example.noise_scale(loss, params, stream)
    np.testing.assert_allclose(noise.trace, variance.sum(), rtol=1e-3)
    covariance = curvature.gradient_covariance(loss, params, stream) @ jax.tree.map(jnp.ones_like, params)
    expected = np.cov(rows.T) @ np.ones(4)
    got = jnp.concatenate(jax.tree.leaves(covariance)).astype(float)
    np.testing.assert_allclose(got, expected, rtol=2 * float(jnp.finfo(half).eps))
