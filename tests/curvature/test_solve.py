import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxnet import curvature
from jaxnet.curvature import LinearOperator, Space

KEY = jax.random.key(0)


def test_a_damped_newton_step_is_that_of_the_dense_matrix(mlp_problem):
    loss, params, batch = mlp_problem
    gradient = jax.grad(loss)(params, batch)
    for make in (curvature.gauss_newton, curvature.empirical_fisher):
        op = make(loss, params, batch)
        dense = np.asarray(curvature.materialize(op)) + 0.1 * np.eye(op.space.size)
        found = curvature.solve(op, gradient, damping=0.1, tol=1e-10)
        assert found.converged
        flat = np.asarray(ravel_pytree(gradient)[0])
        np.testing.assert_allclose(ravel_pytree(found.x)[0], np.linalg.solve(dense, flat), rtol=1e-7, atol=1e-9)
        residual = np.linalg.norm(flat - dense @ np.asarray(ravel_pytree(found.x)[0]))
        np.testing.assert_allclose(found.residual_norm, residual, rtol=1e-3, atol=1e-14)


def test_what_is_not_solved_is_said():
    product = lambda d, v: d * v
    d = jnp.geomspace(1e-4, 1.0, 50)
    op = LinearOperator(product, Space.of(d), d)
    b = jnp.ones(50)
    assert not curvature.solve(op, b, max_matvecs=3).converged
    few = curvature.solve(op, b, max_matvecs=3)
    np.testing.assert_allclose(few.residual_norm, jnp.linalg.norm(b - d * few.x), rtol=1e-4)
    singular = LinearOperator(product, Space.of(d), d.at[0].set(0.0))
    assert not curvature.solve(singular, b).converged
    with pytest.raises(ValueError, match="b: expected a pytree like params"):
        curvature.solve(op, jnp.ones(3))
    with pytest.raises(ValueError, match="max_matvecs: expected 1 or more, got 0"):
        curvature.solve(op, b, max_matvecs=0)


def test_it_has_a_derivative(x64):
    """x(c) = b/(d + c), so dx/dc = −b/(d + c)²."""
    d = jnp.array([1.0, 2.0, 5.0])
    op = LinearOperator(lambda d, v: d * v, Space.of(d), d)
    slope = jax.jacfwd(lambda c: curvature.solve(op, jnp.ones(3), damping=c, tol=1e-12).x)(0.5)
    np.testing.assert_allclose(slope, -1 / (d + 0.5) ** 2, rtol=1e-9)


def test_blocks_by_the_names_of_leaves_and_layer_by_layer(mlp_problem):
    loss, params, batch = mlp_problem
    op = curvature.hessian(loss, params, batch)
    kernels = jax.tree.map(lambda x: x.ndim == 2, params)
    np.testing.assert_array_equal(
        curvature.materialize(curvature.restrict(op, "*/kernel")),
        curvature.materialize(curvature.restrict(op, kernels)),
    )
    with pytest.raises(ValueError, match="no leaf's name is like 'kernel'; they are 0/bias, 0/kernel"):
        curvature.restrict(op, "kernel")
    found = curvature.layer_sharpness(loss, params, batch, key=KEY, tol=1e-8)
    dense = np.asarray(curvature.materialize(op))
    names = [jax.tree_util.keystr(path[:-1], simple=True) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    rows = np.concatenate([np.full(x.size, name) for name, x in zip(names, jax.tree.leaves(params), strict=True)])
    assert list(found) == list(dict.fromkeys(names))
    for name, pairs in found.items():
        block = dense[np.ix_(rows == name, rows == name)]
        np.testing.assert_allclose(pairs.values[0], np.linalg.eigvalsh(block)[-1], rtol=1e-7)
    named = curvature.layer_sharpness(loss, params, batch, key=KEY, groups={"all": "*"}, tol=1e-8)
    np.testing.assert_allclose(named["all"].values[0], np.linalg.eigvalsh(dense)[-1], rtol=1e-7)
    flat = curvature.layer_sharpness(
        lambda p, b: loss(params, b) + (p["w"] ** 2).sum(), {"w": jnp.ones(3)}, batch, key=KEY
    )
    np.testing.assert_allclose(flat["params"].values, [2.0], rtol=1e-3)
    # A layer that is called as the top is: leaves of both are one group, and none is lost.
    both = {"params": {"w": jnp.ones(2)}, "scale": jnp.ones(1)}
    curved = lambda p, b: loss(params, b) + 2 * (p["params"]["w"] ** 2).sum() + (p["scale"] ** 2).sum()
    found = curvature.layer_sharpness(curved, both, batch, key=KEY)
    np.testing.assert_allclose(found["params"].values, [4.0], rtol=1e-3)
