import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import curvature
from jaxnet.curvature import LinearOperator, Space

KEY = jax.random.key(7)


def product(a, v):
    flat = a @ jnp.concatenate([v["a"], v["b"].reshape(-1)])
    return {"a": flat[:20], "b": flat[20:].reshape(-1, 2)}


def operator(a):
    a = jnp.asarray(a)
    return LinearOperator(
        product, Space.of({"a": jnp.zeros(20, a.dtype), "b": jnp.zeros((len(a) // 2 - 10, 2), a.dtype)}), a
    )


def symmetric(n, decay):
    """Random eigenvectors, eigenvalues that fall by ``decay`` each."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))[0]
    return q @ np.diag(3.0 * decay ** np.arange(n)) @ q.T


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_traces_are_unbiased_and_know_their_error(method, x64):
    """Over 200 keys: the mean within four standard errors, and the stated error of the size of the real one."""
    a = symmetric(60, 0.9)
    one = lambda key: curvature.trace(operator(a), key=key, num_matvecs=24, method=method)
    found = jax.lax.map(one, jax.random.split(KEY, 200))
    values, stated = np.asarray(found.value), np.asarray(found.standard_error)
    error = values.std() / 200**0.5
    assert abs(values.mean() - np.trace(a)) <= 4 * error
    assert 0.5 < np.median(stated) / values.std() < 1.5
    assert one(KEY).num_matvecs == (23 if method == "xtrace" else 24)


def test_where_eigenvalues_decay_the_better_methods_are_better(x64):
    a = symmetric(100, 0.5)
    errors = {}
    for method in ("hutchinson", "hutch++", "xtrace"):
        one = lambda key, method=method: curvature.trace(operator(a), key=key, num_matvecs=30, method=method).value
        errors[method] = np.abs(np.asarray(jax.lax.map(one, jax.random.split(KEY, 20))) - np.trace(a)).mean()
    assert errors["xtrace"] < errors["hutchinson"] / 100
    assert errors["hutch++"] < errors["hutchinson"] / 50


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e6])
@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_traces_do_not_depend_on_the_unit(method, size):
    """Least squares with inputs in another unit: tr H = Σ x²/N, in single precision; and a matrix of rank 3."""
    x = np.random.default_rng(0).normal(size=(300, 200))
    a = (x.T @ x / 300).astype(np.float32)
    low = (x[:3].T @ x[:3]).astype(np.float32)
    for matrix, allowed in ((a, 0.15), (low, 1e-5 if method != "hutchinson" else 0.5)):
        scaled = operator(jnp.asarray(matrix * size**2))
        found = curvature.trace(scaled, key=KEY, num_matvecs=60, method=method)
        expected = np.trace(matrix.astype(np.float64)) * size**2
        assert abs(float(found.value) - expected) <= allowed * expected
        unit = curvature.trace(operator(jnp.asarray(matrix)), key=KEY, num_matvecs=60, method=method)
        np.testing.assert_allclose(found.value / size**2, unit.value, rtol=1e-3)
        np.testing.assert_allclose(found.standard_error / size**2, unit.standard_error, atol=1e-3 * expected / size**2)


def test_n_products_give_the_trace_itself(x64):
    a = symmetric(30, 0.9)
    found = curvature.trace(operator(a), key=KEY, num_matvecs=30)
    np.testing.assert_allclose(found.value, np.trace(a), rtol=1e-12)
    assert found.standard_error == 0
    assert found.num_matvecs == 30


def test_the_diagonal(x64):
    a = symmetric(40, 0.8)
    found = curvature.diagonal(operator(a), key=KEY, num_matvecs=400)
    value = np.concatenate([x.reshape(-1) for x in (found.value["a"], found.value["b"])])
    error = np.concatenate([x.reshape(-1) for x in (found.standard_error["a"], found.standard_error["b"])])
    # The error of an entry is that of the rest of its row.
    rest = np.sqrt((a**2).sum(axis=1) - np.diag(a) ** 2) / 400**0.5
    np.testing.assert_allclose(error, rest, rtol=0.3)
    assert (np.abs(value - np.diag(a)) <= 4.5 * rest).all()
    exact = curvature.diagonal(operator(np.diag(np.arange(40.0))), key=KEY, num_matvecs=2)
    np.testing.assert_allclose(exact.value["a"], np.arange(20.0), rtol=1e-12)


def test_bad_arguments(monkeypatch):
    op = operator(np.eye(40))
    with pytest.raises(ValueError, match=r"method: expected one of hutchinson, hutch\+\+, xtrace, got 'hutch'"):
        curvature.trace(op, key=KEY, method="hutch")
    for method, least in (("hutchinson", 2), ("hutch++", 6), ("xtrace", 5)):
        with pytest.raises(ValueError, match=f"num_matvecs: expected {least} or more"):
            curvature.trace(op, key=KEY, num_matvecs=least - 1, method=method)
    with pytest.raises(ValueError, match="num_matvecs: expected 2 or more"):
        curvature.diagonal(op, key=KEY, num_matvecs=1)
    monkeypatch.setitem(sys.modules, "matfree", None)
    with pytest.raises(ImportError, match=r"pip install \"jaxnet\[stochastic\]\""):
        curvature.diagonal(op, key=KEY, num_matvecs=3)
