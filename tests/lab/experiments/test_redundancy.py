import jax
import numpy as np
import pytest

from jaxnet.lab.experiments import redundancy


@pytest.fixture(scope="module")
def found():
    return redundancy.run(seed=1, copies=(1, 10, 100), num_draws=12, num_steps=6000)


def test_every_claim_holds(found):
    assert [claim.name for claim in found.claims if not claim.passed] == []
    assert len(found.claims) == 8
    assert [panel.name for panel in found.panels] == [
        "ratio_against_tolerance",
        "ratio_against_copies",
        "loss_against_gradients",
    ]


def test_from_zero_no_ratio_is_above_that_of_a_batch_step_to_a_window(found):
    """One step over 10 copies is 1000 gradients, the least that a window of 100 allows is 100."""
    loosest = found.measurements["ratios"][redundancy.ZERO][1, :, 0]
    np.testing.assert_array_equal(loosest, 10.0)


def test_a_level_is_held_from_the_last_window_that_exceeds_it_on():
    curve = np.ones(1000)
    curve[:300], curve[600] = 3.0, 150.0
    levels = np.array([[0.5, 1.5, 2.4, 3.5]])
    # The outlier adds 1.49 to the mean of 100 windows, the last of which starts with it; 2.4 is below 2.49, 3.5 above.
    brute = []
    for level in levels[0]:
        good = [curve[t - 100 : t].mean() <= level for t in range(100, 1001)]
        last_bad = max((i for i, ok in enumerate(good) if not ok), default=-1)
        brute.append(last_bad + 101 if last_bad < 900 else np.inf)
    np.testing.assert_array_equal(redundancy._held(curve[None], levels)[0], brute)
    assert brute == [np.inf, 701, 701, 100]


def test_the_full_batch_counts_steps_at_the_best_rate():
    curves = np.array([[[4.0, 2.0, 1.0, 0.5], [4.0, 3.0, 0.2, 5.0], [4.0, 8.0, 16.0, np.inf]]])
    np.testing.assert_array_equal(redundancy._first_below(curves, np.array([[2.0, 0.9, 0.1]])), [[1, 2, np.inf]])


def test_an_order_takes_each_copy_of_each_example_once_an_epoch():
    order = redundancy._order(jax.random.key(0), 7, 3, 50)
    for epoch in (order[:21], order[21:42]):
        np.testing.assert_array_equal(np.bincount(epoch), [3] * 7)
    assert (order[:21] != order[21:42]).any()


def test_copies_need_one_and_ten():
    with pytest.raises(ValueError, match="copies: expected 1 and 10"):
        redundancy.run(copies=(1, 3))
