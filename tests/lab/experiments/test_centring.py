import numpy as np
import pytest
from sklearn.datasets import load_digits

from jaxnet.lab.experiments import centring

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
    return centring.run(seed=1, num_steps=1000)


def test_every_claim_holds(found):
    assert len(found.claims) == 11
    assert [claim.name for claim in found.claims if not claim.passed] == []
    assert {panel.name for panel in found.panels} == {"eigenvalues", "softmax_regression", "tanh_network"}


def test_the_weights_block_is_the_second_moment_of_scikit_learns_pixels(found):
    pixels = load_digits().data[np.random.default_rng(0).permutation(1797)][:1437] / 16
    n = len(pixels)
    singular = [np.linalg.norm(x, ord=2) ** 2 / (10 * n) for x in (pixels, pixels - pixels.mean(axis=0))]
    np.testing.assert_allclose(found.measurements["weights_sharpness"], singular, rtol=1e-6)
    np.testing.assert_allclose(singular, [1.05, 0.07], atol=0.005)


def test_the_centred_bias_is_alone_and_has_the_curvature_1_over_c(found):
    np.testing.assert_allclose(found.measurements["sharpness"][1], 0.1, rtol=1e-9)


def test_steps_to_a_level_between_two_steps():
    curve = np.exp(-0.25 * np.arange(9))
    np.testing.assert_allclose(centring._steps_to(np.exp(-0.6), curve), 2.4, rtol=1e-12)
    assert np.isnan(centring._steps_to(0.1, curve))


def test_the_ratio_of_steps_is_held_against_the_ratio_of_curvatures():
    slow, fast = (np.exp(-rate * np.arange(40)) for rate in (0.1, 0.3))
    assert all(claim.passed for claim in centring.Pair("model", 3.0, (slow, fast)).claims())
    assert not any(claim.passed for claim in centring.Pair("model", 4.0, (slow, fast)).claims())
    # A level that is never reached is a miss, not a match.
    assert not any(claim.passed for claim in centring.Pair("model", 3.0, (slow[:5], fast)).claims())
