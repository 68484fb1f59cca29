import numpy as np
import pytest

from jaxnet.lab.experiments import catapult

SMALL = {"num_examples": 20, "width": 256, "num_steps": 200}


@pytest.mark.parametrize("seed", [0, 1])
def test_every_claim_holds(seed):
    found = catapult.run(seed=seed, **SMALL)
    assert [claim.name for claim in found.claims if not claim.passed] == []
    assert {panel.name for panel in found.panels} == {"loss_against_step", "sharpness_against_step", "landing"}


def test_claims_are_of_wide_networks_and_fail_for_narrow_ones():
    narrow = [catapult.run(seed=seed, num_examples=20, width=4, num_steps=100) for seed in range(4)]
    assert not all(found.claim("lazy_keeps_curvature").passed for found in narrow)
    # The recursion alone is exact at any width.
    assert all(found.claim("one_example_recursion").passed for found in narrow)


def test_the_kernel_and_the_hessian_agree_at_the_start_up_to_the_width():
    found = catapult.run(**SMALL)
    panel = next(panel for panel in found.panels if panel.name == "sharpness_against_step")
    for ratio, series in zip(catapult.DRAWN, panel.series, strict=True):
        np.testing.assert_allclose(series.y[0], ratio, rtol=1 / SMALL["width"] ** 0.5)


def test_too_few_steps_to_draw():
    with pytest.raises(ValueError, match="num_steps: expected 30 or more"):
        catapult.run(num_steps=10)
