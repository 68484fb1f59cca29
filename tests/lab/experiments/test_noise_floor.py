import dataclasses

import numpy as np
import pytest

from jaxnet.lab.experiments import noise_floor


@pytest.fixture(scope="module")
def found():
    done = []
    made = noise_floor.run(
        seed=1, num_steps=4800, num_chains=48, num_particles=256, batch_sizes=(1, 4), share=done.append
    )
    assert done == [0, 0.25, 0.5, 0.75]
    return made


def test_every_claim_holds(found):
    assert [claim.name for claim in found.claims if not claim.passed] == []
    assert len(found.claims) == 10
    assert {panel.name for panel in found.panels} == {
        "excess_against_step",
        "plateau_against_rate",
        "reshuffled_against_independent",
        "growth_against_rate",
    }
    assert len(found.rows) == 2 + 2 * len(noise_floor.FRACTIONS)


def test_the_limits_are_those_of_the_gaussian_population(found):
    """Of 100 points drawn from it; single trajectories hold on to about 1.066 and 1.978."""
    one, four = found.measurements["limits"]
    np.testing.assert_allclose([one["predicted"], four["predicted"]], [1.026, 1.696], rtol=0.01)
    singles = [float(np.mean(limit["single"]["limits"])) for limit in (one, four)]
    np.testing.assert_allclose(singles, [1.066, 1.978], rtol=0.02)


def test_a_claim_can_fail(found):
    plateau = noise_floor.Plateau(**found.measurements["plateaus"][0])
    off = dataclasses.replace(plateau, independent=1.04 * plateau.independent)
    assert [claim.passed for claim in noise_floor._plateau_claims([off])] == [False, True, True]


def test_batch_sizes_divide_the_examples():
    with pytest.raises(ValueError, match="divisors of num_examples = 100, got"):
        noise_floor.run(batch_sizes=(3,))
