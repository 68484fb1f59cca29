import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet.lab.experiments import online_sharpness

CURVATURES = jnp.array([3.0, 1.0, 0.5, -0.2])


def quadratic(params, batch):
    """Examples scale a Hessian of known eigenvalues by factors of mean 1."""
    return 0.5 * jnp.mean(batch[0]) * jnp.vdot(CURVATURES, params**2)


def batch_of(factors):
    return factors, jnp.zeros(len(factors))


@pytest.mark.slow
def test_every_claim_holds():
    found = online_sharpness.run(seed=1, num_examples=500, width=4, num_runs=8, budget=30_000, num_steps=120)
    assert [claim.name for claim in found.claims if not claim.passed] == []
    assert [panel.name for panel in found.panels] == [
        "error_against_gradients",
        "along_training",
        "loss_against_multiple",
    ]
    assert np.isfinite(found.measurements["ratios"]).all()


def test_on_all_examples_the_spectrum_tells_every_step(x64):
    batch, params, key = batch_of(jnp.ones(5)), jnp.arange(4.0), jax.random.key(2)
    found = online_sharpness.on_all(quadratic, params, batch, key)
    np.testing.assert_allclose(found, online_sharpness._by_spectrum(quadratic, params, batch, key), rtol=1e-9)
    np.testing.assert_allclose(found[-1], 3.0, rtol=1e-9)


def test_ritz_values_grow_to_the_largest_eigenvalue(x64):
    values = jnp.append(jnp.linspace(-1, 2, 49), 3.0)
    loss = lambda params, batch: 0.5 * jnp.mean(batch[0]) * jnp.vdot(values, params**2)
    found = online_sharpness.ritz_values(
        loss, jnp.ones(50), batch_of(jnp.ones(5)), jax.random.split(jax.random.key(0), 3)
    )
    assert (np.diff(found, axis=1) > -1e-12).all()
    np.testing.assert_allclose(found[:, -1], 3.0, rtol=1e-9)


def test_errors_are_means_over_runs_and_a_window():
    values = np.array([[0.0, 1.5, 1.0, 1.2], [2.0, 0.5, 1.0, 0.8]])
    found = online_sharpness.Estimates(np.array([2, 4, 6, 8]), values, window=2)
    np.testing.assert_allclose(found.error(), np.sqrt([1, (1 + 0.25) / 2, 0.25 / 2, 0.04 / 2]), atol=1e-12)
    assert [found.to(error) for error in (1.0, 0.5, 0.2, 0.1)] == [2.0, 6.0, 8.0, float("inf")]


def test_steps_go_down_at_c_over_the_estimate(x64):
    """The quadratic has one curvature in every direction, which Ψ knows: c = 1 ends in one step, c = 3 doubles."""
    loss = lambda params, batch: jnp.mean(batch[0]) * jnp.vdot(params, params)
    batch, rows = batch_of(jnp.ones(6)), jnp.zeros((205, 3), int)
    curves, lengths, points = online_sharpness.descend(
        loss, jnp.ones(4), batch, jnp.array([1.0, 3.0]), jax.random.key(1), rows, rows[200:]
    )
    np.testing.assert_allclose(lengths, 2.0, rtol=1e-6)
    np.testing.assert_allclose(curves[0], [4.0, 0, 0, 0, 0, 0], atol=1e-9)
    np.testing.assert_allclose(curves[1], 4.0 * 4.0 ** np.arange(6), rtol=1e-5)
    np.testing.assert_allclose(points[1, 2], 4.0, rtol=1e-5)
