import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

from jaxnet.lab.experiments import local_minima


@pytest.fixture
def problem(x64):
    batch = local_minima.examples(jax.random.key(3), 60)
    return batch, local_minima.landscape(batch)


def slopes(w, batch):
    x, t = map(np.asarray, batch)
    y = np.tanh(np.multiply.outer(w, x))
    return (y - t) * (1 - y**2) * x


def test_every_claim_holds():
    found = local_minima.run(seed=1, num_steps=1500, num_timed=500, num_timed_steps=6000)
    assert [claim.name for claim in found.claims if not claim.passed] == []
    assert [panel.name for panel in found.panels] == ["landscape", "share_against_rate", "time_against_rate"]
    assert 0 < found.measurements["counts"]["left"][1] < 100


def test_minima_and_barrier(problem):
    batch, land = problem
    e = lambda w: float(local_minima.error(jnp.asarray(w), batch))
    bounded = lambda f, low, high: minimize_scalar(f, bounds=(low, high), method="bounded", options={"xatol": 1e-9}).x
    np.testing.assert_allclose(land.poor, bounded(e, -0.3, 0.1), atol=1e-6)
    np.testing.assert_allclose(land.barrier, bounded(lambda w: -e(w), 0.05, 0.6), atol=1e-6)
    np.testing.assert_allclose(land.good, bounded(e, 1.0, 3.0), atol=1e-4)
    assert e(land.good) < e(land.poor) < e(land.barrier)


def test_the_chain_tells_the_share_that_leaves(problem):
    """Against 20 000 runs in NumPy with their own draws."""
    batch, land = problem
    rng, n, w = np.random.default_rng(0), 20_000, np.full(20_000, land.poor)
    x, t = map(np.asarray, batch)
    for _ in range(300):
        i = rng.integers(0, 60, n)
        y = np.tanh(w * x[i])
        w = w - 0.014 * (y - t[i]) * (1 - y**2) * x[i]
    share = (w > land.barrier).mean()
    predicted = local_minima.chance(batch, jnp.array([land.poor]), 0.014, land.barrier, 300)
    assert 0.1 < share < 0.9
    np.testing.assert_allclose(predicted, share, atol=4 * (share * (1 - share) / n) ** 0.5 + 0.005)


def test_kramers_exponent(problem):
    batch, land = problem
    integrand = lambda w: 2 * slopes(w, batch).mean() / slopes(w, batch).var()
    np.testing.assert_allclose(
        local_minima.kramers(batch, land), quad(integrand, land.poor, land.barrier)[0], rtol=1e-4
    )


def test_wilsons_interval_is_scipys():
    from scipy.stats import binomtest, norm

    left = np.array([0, 13, 50, 97, 99, 100])
    counts = local_minima.Counts(100, left, left / 100, np.full(7, 100), 600)
    shown = [series.y for series in counts.panel(10).series if series.style == "dashed"]
    level = 1 - 2 * norm.sf(local_minima.QUANTILE)
    expected = [binomtest(int(k), 100).proportion_ci(level, method="wilson") for k in left]
    np.testing.assert_allclose(np.transpose(shown), expected, atol=1e-12)


def test_a_run_of_the_full_batch_that_leaves_is_a_miss():
    left = np.array([0, 13, 50, 97, 99, 100])
    counts = local_minima.Counts(100, left, left / 100, np.array([100] * 6 + [99]), 600)
    assert [claim.passed for claim in counts.claims(0.17, 10)].count(False) == 1


def test_data_without_two_minima_are_refused(x64):
    inputs = jnp.linspace(0.5, 1.5, 20)
    with pytest.raises(ValueError, match="two minima"):
        local_minima.landscape((inputs, jnp.tanh(2 * inputs)))
