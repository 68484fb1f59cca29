import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxnet import curvature, data, losses, nn


def dense_hessian(loss, params, batch):
    flat, unravel = ravel_pytree(params)
    return jax.jit(jax.hessian(lambda w: loss(unravel(w), batch)))(flat)


def test_hessian_of_an_mlp_is_dense_autodiffs(mlp_problem):
    op = curvature.hessian(*mlp_problem)
    np.testing.assert_allclose(curvature.materialize(op), dense_hessian(*mlp_problem), rtol=1e-10, atol=1e-12)


def test_hessian_of_a_conv_net_is_dense_autodiffs(x64):
    model = nn.serial(nn.conv(2, 3), nn.activation(jnp.tanh), nn.max_pool(2), nn.avg_pool(2), nn.flatten(), nn.dense(3))
    params = model.init(jax.random.key(0), (8, 8, 1))
    batch = (jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.array([0, 1, 2, 0]))
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    op = curvature.hessian(loss, params, batch)
    np.testing.assert_allclose(curvature.materialize(op), dense_hessian(loss, params, batch), rtol=1e-9, atol=1e-11)


def test_softmax_regression_at_zero_has_the_known_top(x64):
    inputs, labels = data.digits(centre=False)
    model = nn.dense(10, use_bias=False)
    params = {"kernel": jnp.zeros((64, 10))}
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    top = np.linalg.eigvalsh(inputs.T @ inputs / len(inputs))[-1]
    found = curvature.sharpness(loss, params, (inputs, labels), key=jax.random.key(0), tol=1e-10)
    np.testing.assert_allclose(found.value, top / 10, rtol=1e-9)


def test_a_product_crosses_jit_and_vmap(mlp_problem):
    loss, params, batch = mlp_problem
    op = curvature.hessian(loss, params, batch)
    v = jax.tree.map(jnp.ones_like, params)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), v)
    twice = jax.jit(jax.vmap(lambda op, v: op(v), in_axes=(None, 0)))(op, stacked)
    for index, factor in enumerate((1, 2)):
        expected = ravel_pytree(op(v))[0] * factor
        np.testing.assert_allclose(ravel_pytree(jax.tree.map(lambda x, i=index: x[i], twice))[0], expected, rtol=1e-9)


def test_a_vector_of_another_shape_is_refused(mlp_problem):
    with pytest.raises(ValueError, match="expected a pytree like params"):
        curvature.hessian(*mlp_problem)(jnp.ones(3))
