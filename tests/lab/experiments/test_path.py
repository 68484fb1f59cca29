import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnet import data
from jaxnet.lab.experiments import path

SMALL = {"num_runs": 4000, "num_examples": 20}


def test_every_claim_holds():
    found = path.run(seed=1, **SMALL)
    assert [claim.name for claim in found.claims if not claim.passed] == []
    assert [panel.name for panel in found.panels] == ["full_batch", "batch_size_10", "batch_size_1"]
    shown = np.concatenate([np.ravel(series.x) for panel in found.panels for series in panel.series])
    assert np.isfinite(shown).all()


@pytest.mark.parametrize("ratio", [0.1, 1.9])
def test_the_mean_of_e_is_that_over_all_sequences_of_examples(x64, ratio):
    """Four examples and four steps: all 256 runs are enumerated."""
    batch, start = data.two_gaussians_exact(4), jnp.array(path.START)
    rows = jnp.array(list(itertools.product(range(4), repeat=path.MOMENT_STEPS)))[:, :, None]
    ends = jax.vmap(lambda one: path.walk(start, batch, ratio / 0.84, one)[-1])(rows)
    x, t = map(np.asarray, batch)
    excess = [0.5 * np.mean((x @ w - t) ** 2) for w in np.asarray(ends)]
    floor = 0.5 * np.mean((x @ np.linalg.lstsq(x, t)[0] - t) ** 2)
    np.testing.assert_allclose(path._mean_excess(batch, start, ratio / 0.84, 1), np.mean(excess) - floor, rtol=1e-10)


def test_the_walk_is_gradient_descent(x64):
    x, t = data.two_gaussians_exact(6)
    w = np.array(path.START)
    rows = np.array([[0, 1], [2, 2], [5, 3]])
    found = path.walk(jnp.asarray(w), (x, t), 0.3, jnp.asarray(rows))
    for row, point in zip(rows, found[1:], strict=True):
        w = w - 0.3 * np.mean([x[i] * (x[i] @ w - t[i]) for i in row], axis=0)
        np.testing.assert_allclose(point, w, rtol=1e-12)
