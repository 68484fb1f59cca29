import json
import pathlib
import re

import numpy as np
import pytest

from jaxnet.lab import experiments

NAMES = ["inference", "backprop", "one_dimension", "two_gaussians", "one_epoch", "overfitting"]


def test_every_experiment_has_a_question_and_a_test():
    names = experiments.names()
    assert set(NAMES) < set(names)
    assert all(experiments.question(name).endswith("?") for name in names)
    here = pathlib.Path(__file__).parent
    assert all((here / f"test_{name}.py").exists() for name in set(names) - set(NAMES))


@pytest.mark.parametrize("name", [*NAMES[:-1], pytest.param(NAMES[-1], marks=pytest.mark.slow)])
def test_every_claim_holds_and_the_record_is_whole(name):
    found = experiments.run(name, seed=1)
    assert found.name == name
    assert len(found.claims) >= 4
    assert [claim.name for claim in found.claims if not claim.passed] == []
    assert [claim.key for claim in found.claims if not re.fullmatch("[a-z][a-z0-9]*(_[a-z0-9]+)*", claim.key)] == []
    assert found.panels
    plain = json.loads(found.to_json())
    assert plain["versions"]["jaxnet"]
    assert plain["dtype"] in ("float32", "float64")


def test_the_lectures_inference_unrounded():
    found = experiments.run("inference").measurements
    np.testing.assert_allclose(found["hidden"], [0.1301, 0.9569, 0.4013], atol=5e-5)
    np.testing.assert_allclose(found["output"], [0.3458, 0.8531], atol=5e-5)


def test_the_block_of_random_draws_has_the_known_spread():
    found = experiments.run("two_gaussians", num_steps=2, num_draws=400).measurements
    np.testing.assert_allclose(found["block_sharpness_mean"], 0.841, atol=0.008)
    np.testing.assert_allclose(found["block_sharpness_std"], 0.037, atol=0.005)


def test_a_miss_is_a_miss():
    """Too narrow for a theory of wide networks: claims fail, and say by how much."""
    found = experiments.run("catapult", num_examples=10, width=16, num_steps=100)
    assert not found.passed
    missed = next(claim for claim in found.claims if not claim.passed)
    assert missed.name.startswith("below 2: λ at the end differs")
    assert missed.measured > missed.predicted


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"unknown experiment 'nope': known are inference, backprop"):
        experiments.run("nope")
    with pytest.raises(
        ValueError, match=r"unknown option of experiment one_dimension 'steps': known are curvature_of_loss"
    ):
        experiments.run("one_dimension", steps=3)
    with pytest.raises(ValueError, match="curvature_of_loss: expected a positive number"):
        experiments.run("one_dimension", curvature_of_loss=-1.0)


def test_the_parts_of_all_are_known_before():
    parts = experiments.parts(NAMES)
    assert (parts[0], len(parts)) == (0, len(NAMES) + 1)
    assert parts == sorted(parts)
    np.testing.assert_allclose(parts[-1], 1)
