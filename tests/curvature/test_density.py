import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import curvature
from jaxnet.curvature import LinearOperator, Space

KEY = jax.random.key(6)


def product(a, v):
    return {"a": a[:3] @ jnp.append(v["a"], v["b"]), "b": a[3:] @ jnp.append(v["a"], v["b"])}


def operator(a):
    return LinearOperator(
        product, Space.of({"a": jnp.zeros(3, a.dtype), "b": jnp.zeros(len(a) - 3, a.dtype)}), jnp.asarray(a)
    )


def symmetric(n):
    a = np.random.default_rng(0).normal(size=(n, n))
    return (a + a.T) / n**0.5


def test_quadrature_is_exact_for_polynomials(x64):
    """Σ w θ^p = vᵀAᵖv for p < 2·steps, with the very probe vector v."""
    a, steps = symmetric(20), 4
    found = curvature.spectral_density(operator(a), key=KEY, num_probes=3, num_steps=steps)
    assert found.num_matvecs == 12
    for key, nodes, weights in zip(jax.random.split(KEY, 3), found.nodes, found.weights, strict=True):
        v = Space.of({"a": jnp.zeros(3), "b": jnp.zeros(17)}).random(key)
        v = np.append(v["a"], v["b"])
        v /= np.linalg.norm(v)
        for p in range(2 * steps):
            np.testing.assert_allclose(weights @ nodes**p, v @ np.linalg.matrix_power(a, p) @ v, rtol=1e-9, atol=1e-11)


def test_the_band_covers_the_smoothed_spectrum(x64):
    a = symmetric(60)
    values = np.linalg.eigvalsh(a)
    points, width = np.linspace(-3, 3, 25), 0.3
    found = curvature.spectral_density(operator(a), key=KEY, num_probes=200, num_steps=60)
    density, error = found.density(points, width)
    z = (points[:, None] - values) / width
    expected = np.exp(-(z**2) / 2).mean(axis=1) / (width * (2 * np.pi) ** 0.5)
    assert (np.abs(density - expected) <= 4 * error + 1e-12).all()
    assert (np.abs(density - expected) <= 1.96 * error + 1e-12).mean() >= 0.8  # points are not independent
    np.testing.assert_allclose(np.trapezoid(*(np.asarray(x) for x in (density, points))), 1.0, atol=0.01)
    share, error = found.cumulative(points, width)
    assert (np.diff(share) >= 0).all()
    assert abs(float(share[12]) - (values < 0).mean()) < 0.1
    mean, error = found.mean(found.nodes)
    assert abs(float(mean) - values.mean()) <= 4 * float(error)


def test_an_invariant_subspace_ends_the_measure(x64):
    """Two distinct eigenvalues carry all weight, however many steps are asked for; equal nodes may share it."""
    found = curvature.spectral_density(operator(np.diag([1.0, 1, 1, 3, 3])), key=KEY, num_probes=2, num_steps=9)
    assert found.nodes.shape == (2, 5)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1.0, rtol=1e-12)
    at = lambda value: np.where(abs(found.nodes - value) < 1e-12, found.weights, 0).sum(axis=1)
    np.testing.assert_allclose(at(1) + at(3), 1.0, rtol=1e-12)
    assert (at(1) > 1e-3).all()
    assert (at(3) > 1e-3).all()


def test_bad_arguments():
    for wrong in ({"num_probes": 1}, {"num_steps": 0}):
        with pytest.raises(ValueError, match="num_probes: expected 2 or more|num_steps: expected 1 or more"):
            curvature.spectral_density(operator(np.eye(5, dtype=np.float32)), key=KEY, **wrong)
