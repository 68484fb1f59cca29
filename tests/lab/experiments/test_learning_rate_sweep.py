import pytest

from jaxnet.lab.experiments import learning_rate_sweep

pytestmark = pytest.mark.slow

SMALL = {"num_examples": 24, "widths": (8,), "problems": ("two Gaussians", "digits, MLP"), "batch_sizes": (1, 4)}


def test_every_claim_holds():
    found = learning_rate_sweep.run(seed=1, **SMALL)
    assert len(found.claims) == 12
    assert [claim.name for claim in found.claims if not claim.passed] == []
    # Momentum's limit is beyond gradient descent's, and a single example's below it.
    for rows in found.measurements.values():
        assert rows["heavy ball"]["measured"] > 1.8 * rows["gradient descent"]["measured"]
        assert rows["SGD, B = 1"]["measured"] < rows["SGD, B = 4"]["measured"]


def test_an_unknown_problem_lists_the_known():
    with pytest.raises(ValueError, match="unknown problem 'moons': known are two Gaussians, digits, MLP"):
        learning_rate_sweep.run(problems=("moons",))
