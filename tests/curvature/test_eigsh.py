import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

from jaxnet import curvature
from jaxnet.curvature import LinearOperator, Space

KEY = jax.random.key(11)


def dense_product(a, v):
    return a @ v


def operator(a):
    a = jnp.asarray(a)
    return LinearOperator(dense_product, Space.of(jnp.zeros(len(a), a.dtype)), a)


def laplacian(n):
    return 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)


def ring(n):
    a = laplacian(n)
    a[0, -1] = a[-1, 0] = -1
    return a


def clement(n):
    b = np.sqrt(np.arange(1, n) * (n - np.arange(1, n)))
    return np.diag(b, 1) + np.diag(b, -1)


def wilkinson():
    return np.diag(np.abs(np.arange(-10, 11.0))) + np.eye(21, k=1) + np.eye(21, k=-1)


def strakos(n, low=0.1, high=100.0, rho=0.9):
    i = np.arange(1, n + 1)
    return np.diag(low + (i - 1) / (n - 1) * (high - low) * rho ** (n - i))


CASES = {
    "laplacian 1": (laplacian(1), 2.0),
    "laplacian 2": (laplacian(2), 3.0),
    "laplacian 1000": (laplacian(1000), 2 - 2 * np.cos(1000 * np.pi / 1001)),
    "clement 300": (clement(300), 299.0),
    "strakos 1000": (strakos(1000), 100.0),
    "laplacian 60": (laplacian(60), 2 - 2 * np.cos(60 * np.pi / 61)),
    "ring 31, double top": (ring(31), 2 - 2 * np.cos(30 * np.pi / 31)),
    "clement 40": (clement(40), 39.0),
    "wilkinson twins": (wilkinson(), 10.746194182903322),
    "strakos 100": (strakos(100), 100.0),
    "all negative": (-np.diag(np.arange(1, 30.0)), -1.0),
    "negative dominant": (np.diag([1.0, 2.0, -5.0]), 2.0),
    "identity": (np.eye(9), 1.0),
    "zero": (np.zeros((7, 7)), 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_known_tops_in_double_precision(name, x64):
    a, top = CASES[name]
    found = curvature.eigsh(operator(a), key=KEY, tol=1e-11)
    assert bool(found.converged)
    np.testing.assert_allclose(found.values[0], top, rtol=1e-10, atol=1e-13)
    v = np.asarray(found.vectors[0])
    np.testing.assert_allclose(np.linalg.norm(v), 1, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(a @ v - top * v), 0, atol=1e-4 * max(abs(top), 1e-9))


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("1000")])
def test_known_tops_in_single_precision(name):
    a, top = CASES[name]
    found = curvature.eigsh(operator(a.astype(np.float32)), key=KEY, tol=2e-5)
    assert bool(found.converged)
    np.testing.assert_allclose(found.values[0], top, atol=1e-5 * max(np.abs(np.linalg.eigvalsh(a)).max(), 1e-30))


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_against_scipy(which, k, x64):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(80, 80))
    a = a + a.T
    if (which, k) == ("BE", 1):
        expected = [np.linalg.eigvalsh(a)[-1]]
    else:
        expected = scipy.sparse.linalg.eigsh(a, k, which=which, tol=1e-12, return_eigenvectors=False)
    found = curvature.eigsh(operator(a), k, which=which, key=KEY, tol=1e-10)
    assert bool(found.converged)
    np.testing.assert_allclose(found.values, np.sort(expected)[::-1], rtol=1e-9)
    vectors = np.asarray(found.vectors)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(k), atol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_any_scale_of_single_precision(scale):
    d = np.append(np.linspace(-1, 1, 40), 1.5).astype(np.float32)
    found = curvature.eigsh(operator(np.diag(d) * np.float32(scale)), key=KEY, tol=1e-5)
    assert bool(found.converged)
    np.testing.assert_allclose(found.values[0] / scale, 1.5, rtol=1e-5)


def test_a_hessian_against_dense_autodiff(mlp_problem):
    loss, params, batch = mlp_problem
    flat, unravel = ravel_pytree(params)
    values = np.linalg.eigvalsh(jax.jit(jax.hessian(lambda w: loss(unravel(w), batch)))(flat))
    op = curvature.hessian(loss, params, batch)
    for which, expected in (("LA", values[-3:]), ("SA", values[:3])):
        found = curvature.eigsh(op, 3, which=which, key=KEY, tol=1e-10)
        np.testing.assert_allclose(found.values, expected[::-1], rtol=1e-9)
        first = jax.tree.map(lambda x: x[0], found.vectors)
        chex.assert_trees_all_close(op(first), jax.tree.map(lambda x: found.values[0] * x, first), atol=1e-5)


def test_residuals_are_the_residuals(x64):
    a = laplacian(50)
    found = curvature.eigsh(operator(a), 2, key=KEY, tol=1e-4)
    for value, vector, residual in zip(found.values, found.vectors, found.residual_norms, strict=True):
        np.testing.assert_allclose(np.linalg.norm(a @ vector - value * vector), residual, rtol=1e-6)


def test_a_limit_on_products_is_kept_and_told():
    found = curvature.eigsh(operator(laplacian(200).astype(np.float32)), key=KEY, tol=1e-6, max_matvecs=7)
    assert int(found.num_matvecs) == 7
    assert not bool(found.converged)
    assert found.values[0] < 4


def test_a_warm_start_needs_few_products_and_a_zero_one_counts_as_none():
    op = operator(strakos(300).astype(np.float32))
    cold = curvature.eigsh(op, key=KEY, tol=1e-4)
    warm = curvature.eigsh(op, key=KEY, tol=1e-4, v0=cold.vectors[0])
    assert int(warm.num_matvecs) <= 3 < int(cold.num_matvecs)
    zero = curvature.eigsh(op, key=KEY, tol=1e-4, v0=jnp.zeros(300))
    np.testing.assert_allclose(zero.values, cold.values, rtol=1e-3)


def test_nan_is_told_and_not_converged():
    a = np.eye(30, dtype=np.float32)
    a[3, 4] = np.nan
    found = curvature.eigsh(operator(a), key=KEY)
    assert np.isnan(found.values[0])
    assert not bool(found.converged)
    assert int(found.num_matvecs) < 5


def test_one_compilation_serves_other_values_and_vmap():
    traces, counts = [], []

    def product(a, v):
        traces.append(1)
        return a @ v

    for seed in range(3):
        d = np.random.default_rng(seed).normal(size=30).astype(np.float32)
        op = LinearOperator(product, Space.of(jnp.zeros(30)), jnp.diag(d))
        found = curvature.eigsh(op, key=jax.random.key(seed), tol=1e-5)
        np.testing.assert_allclose(found.values[0], d.max(), rtol=1e-4)
        counts.append(len(traces))
    assert counts[0] == counts[-1] > 0
    stack = jnp.stack([jnp.diag(jnp.arange(25.0)), -jnp.diag(jnp.arange(25.0))])
    keys = jax.random.split(KEY, 2)
    both = jax.vmap(lambda a, k: curvature.eigsh(operator(a), key=k, tol=1e-5).values[0])(stack, keys)
    np.testing.assert_allclose(both, [24, 0], atol=3e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, "k: expected 1 or more|k: expected 1 to 4"),
        ({"k": 5}, "k: expected"),
        ({"which": "XX"}, "LA, SA, LM, BE"),
        ({"max_matvecs": 0}, "max_matvecs"),
    ],
)
def test_bad_arguments(change, words):
    with pytest.raises(ValueError, match=words):
        curvature.eigsh(operator(np.eye(4)), key=KEY, **change)
