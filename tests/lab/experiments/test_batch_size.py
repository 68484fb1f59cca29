import numpy as np
import pytest

from jaxnet.lab.experiments import batch_size

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
    return batch_size.run(seed=1, batch_sizes=(8, 64, 512), num_epochs=(1,), num_runs=1, whole_sizes=(16, 128))


def test_every_claim_holds(found):
    assert [claim.name for claim in found.claims if not claim.passed] == []
    assert [panel.name for panel in found.panels] == ["best_rate", "whole_runs", "steps", "examples"]


def test_the_best_rate_for_whole_runs_grows_with_the_batch(found):
    """By about the batch's factor of 8 with SGD, by its root with Adam."""
    for name, least, most in (("SGD", 2, 8), ("heavy ball", 2, 8), ("Adam", 1, 4)):
        derived = found.measurements["whole_runs"][name]["derived"]
        assert least < derived[1] / derived[0] < most


def test_steps_fall_as_one_over_b_until_the_critical_size(found):
    steps = found.measurements["steps"]
    assert 2.5 < steps[0] / steps[1] <= 8
    assert steps[1] / steps[2] < 4


def test_ten_different_examples_bounce_less_than_ten_copies(found):
    """About a tenth: the noise is that of a mean of ten."""
    alike = found.measurements["alike"]
    np.testing.assert_allclose(alike["copies"]["mean"] / alike["distinct"]["mean"], 10, rtol=0.25)


def test_the_parabola_finds_a_minimum_between_grid_points():
    x = np.arange(9.0)
    np.testing.assert_allclose(batch_size._lowest((x - 4.3) ** 2), 4.3)
