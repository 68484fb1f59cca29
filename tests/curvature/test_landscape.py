import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxnet import curvature, losses, nn

KEY = jax.random.key(9)


def test_every_point_is_the_loss_there(mlp_problem):
    loss, params, batch = mlp_problem
    directions = curvature.filter_normalised(params, key=KEY)
    found = curvature.landscape(loss, params, batch, directions, extent=0.5, num_points=5)
    np.testing.assert_allclose(found.coordinates, np.linspace(-0.5, 0.5, 5), rtol=1e-12)
    for i, a in enumerate(found.coordinates):
        for j, b in enumerate(found.coordinates):
            moved = jax.tree.map(lambda p, d, a=a, b=b: p + a * d[0] + b * d[1], params, directions)
            np.testing.assert_allclose(found.losses[i, j], loss(moved, batch), rtol=1e-10)
    np.testing.assert_allclose(found.centre, loss(params, batch), rtol=1e-12)
    assert found.losses[2, 2] == pytest.approx(float(found.centre), rel=1e-12)


def test_slopes_and_curvatures_are_dense_autodiffs(mlp_problem):
    loss, params, batch = mlp_problem
    flat, unravel = ravel_pytree(params)
    inner = lambda w: loss(unravel(w), batch)
    gradient, dense = jax.grad(inner)(flat), jax.hessian(inner)(flat)
    directions = curvature.filter_normalised(params, key=KEY)
    found = curvature.landscape(loss, params, batch, directions, num_points=3)
    for i in range(2):
        d = ravel_pytree(jax.tree.map(lambda x, i=i: x[i], directions))[0]
        np.testing.assert_allclose(found.slopes[i], gradient @ d, rtol=1e-9)
        np.testing.assert_allclose(found.curvatures[i], d @ dense @ d, rtol=1e-9)
    # Of an eigenvector the curvature is its eigenvalue, and near the point the parabola is the loss, to third order.
    pairs = curvature.eigsh(curvature.hessian(loss, params, batch), key=KEY, tol=1e-10)
    for extent, allowed in ((1e-2, 1e-6), (1e-3, 1e-9)):
        line = curvature.landscape(loss, params, batch, pairs.vectors, extent=extent, num_points=7)
        np.testing.assert_allclose(line.curvatures, pairs.values, rtol=1e-8)
        assert line.losses.shape == (7,)
        np.testing.assert_allclose(line.losses, line.parabolas[0], rtol=0, atol=allowed)


def test_of_a_quadratic_the_parabola_is_the_loss(x64):
    loss = lambda p, b: 0.5 * jnp.vdot(b.mean(axis=0), p**2) + p.sum()
    found = curvature.landscape(loss, jnp.array([1.0, -2, 3]), jnp.array([[1.0, 4, -2]]), jnp.array([0.1, 1, 2]))
    np.testing.assert_allclose(found.losses, found.parabolas[0], rtol=1e-12)
    assert found.losses.shape == found.coordinates.shape == (41,)


def test_half_precision_a_chunked_loss_and_vmap():
    model = nn.mlp([4, 2], activation=jnp.tanh)
    params = model.init(KEY, (3,))
    batch = (jax.random.normal(KEY, (7, 3)), jnp.arange(7) % 2)
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    d = curvature.filter_normalised(params, key=KEY, count=1)
    of = lambda loss, p: curvature.landscape(loss, p, batch, d, num_points=5)
    whole = of(loss, params)
    np.testing.assert_allclose(of(losses.chunked(loss, 3), params).losses, whole.losses, rtol=1e-5)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    np.testing.assert_allclose(of(loss, half).losses, of(loss, rounded).losses, rtol=1e-6)
    several = jax.vmap(lambda s: of(loss, jax.tree.map(lambda x: s * x, params)).losses)(jnp.array([1.0, 0.5]))
    np.testing.assert_allclose(several[0], whole.losses, rtol=1e-5)


def test_filters_are_as_long_as_the_weights_own(x64):
    """By NumPy, filter by filter: columns of a dense kernel, the last axis of a convolution's."""
    params = {
        "dense": {"kernel": jax.random.normal(KEY, (5, 3)), "bias": jnp.ones(3)},
        "conv": 0.1 * jax.random.normal(KEY, (2, 2, 3, 4), jnp.float32),
        "none": None,
    }
    found = curvature.filter_normalised(params, key=KEY, count=3)
    assert not found["dense"]["bias"].any()
    assert found["conv"].dtype == jnp.float32
    for d in found["dense"]["kernel"]:
        for j in range(3):
            np.testing.assert_allclose(np.linalg.norm(d[:, j]), np.linalg.norm(params["dense"]["kernel"][:, j]))
    for j in range(4):
        own = np.linalg.norm(params["conv"][..., j].ravel())
        np.testing.assert_allclose([np.linalg.norm(d[..., j].ravel()) for d in found["conv"]], own, rtol=1e-5)
    assert abs(float(jnp.vdot(found["conv"][0], found["conv"][1]))) < 0.6 * float(
        jnp.vdot(found["conv"], found["conv"])
    )
    rows = curvature.filter_normalised(params["dense"], key=KEY, count=1, axis=0)["kernel"][0]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), np.linalg.norm(params["dense"]["kernel"], axis=1))
    with pytest.raises(ValueError, match="axis: expected one that each kernel has"):
        curvature.filter_normalised(params, key=KEY, axis=2)


def test_the_overlap_of_a_gradient_with_the_leading_eigenvectors(mlp_problem):
    loss, params, batch = mlp_problem
    flat, unravel = ravel_pytree(params)
    dense = jax.hessian(lambda w: loss(unravel(w), batch))(flat)
    pairs = curvature.eigsh(curvature.hessian(loss, params, batch), 3, key=KEY, tol=1e-10)
    gradient = jax.grad(loss)(params, batch)
    g, top = np.asarray(ravel_pytree(gradient)[0]), np.linalg.eigh(dense)[1][:, -3:]
    np.testing.assert_allclose(curvature.overlap(pairs, gradient), np.sum((top.T @ g) ** 2) / (g @ g), rtol=1e-6)
    np.testing.assert_allclose(curvature.overlap(pairs, jax.tree.map(lambda x: -2 * x[1], pairs.vectors)), 1, rtol=1e-9)
    assert jnp.isnan(curvature.overlap(pairs, jax.tree.map(jnp.zeros_like, params)))
    with pytest.raises(ValueError, match="tree: expected a pytree like params"):
        curvature.overlap(pairs, pairs.vectors)


def test_bad_arguments():
    loss, params, batch = lambda p, b: b.mean() * (p**2).sum(), jnp.ones(3), jnp.ones((2, 1))
    call = lambda d, **options: curvature.landscape(loss, params, batch, d, **options)
    with pytest.raises(ValueError, match="directions: expected one like params, or one or two"):
        call(jnp.ones((3, 3)))
    with pytest.raises(ValueError, match=r"directions: expected a pytree like params, got leaf params of shape \(4,\)"):
        call(jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="extent: expected a positive"):
        call(params, extent=0)
    with pytest.raises(ValueError, match="num_points: expected 2 or more"):
        call(params, num_points=1)
    with pytest.raises(ValueError, match="expected a kernel"):
        curvature.filter_normalised(params, key=KEY)
