import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxnet import losses, nn
from jaxnet.lab.experiments import edge_of_stability

pytestmark = pytest.mark.slow

SMALL = {"num_examples": 200, "width": 24}


@pytest.fixture(scope="module")
def found():
    return edge_of_stability.run(seed=1, **SMALL)


def test_every_claim_holds(found):
    assert [claim.name for claim in found.claims if not claim.passed] == []
    assert len(found.claims) == 14
    assert len(found.rows) == len(edge_of_stability.METHODS)


def test_a_row_outside_its_gate_says_so(found):
    gates = edge_of_stability.GATES | {edge_of_stability.FAST: 0.1}
    missed = {name.split(":")[0] for name, _, remark in found.rows if "a miss" in remark}
    settled = {name: ratio[-len(ratio) // 3 :].mean() for name, ratio in found.measurements["ratio"].items()}
    assert missed == {name for name, gate in gates.items() if abs(settled[name] - 1) > gate}
    assert missed == {edge_of_stability.FAST}


def test_curvature_holds_while_the_loss_falls(found):
    for name in edge_of_stability.GATES:
        ratio, loss = found.measurements["ratio"][name], found.measurements["loss"][name]
        assert ratio.min() < 0.7 < ratio[-len(ratio) // 3 :].min()
        assert np.isfinite(loss).all()
        assert loss[-1] < 0.6 * loss[len(loss) // 3]


def test_a_rate_that_is_too_small_does_not_come_to_the_edge():
    """The ratio is measured, not made: below the edge it is below 1, and would miss its gate."""
    method = edge_of_stability.METHODS["gradient descent"]._replace(rate=0.05)
    batch = (jnp.eye(8), jnp.eye(8))
    loss = losses.mean_loss(nn.mlp([6, 8], activation=jnp.tanh).apply, losses.squared_error)
    params = nn.mlp([6, 8], activation=jnp.tanh).init(jax.random.key(0), (8,))
    run = edge_of_stability._follow(loss, params, batch, method, 210, jax.random.key(1))
    assert run.ratio.shape == (10,)
    assert run.settled.shape == (3,)
    flat, unravel = ravel_pytree(run.state.params)
    largest = np.linalg.eigvalsh(jax.hessian(lambda w: loss(unravel(w), batch))(flat))[-1]
    np.testing.assert_allclose(run.ratio[-1], 0.05 * largest / 2, rtol=0.01)
    assert run.settled.max() < 0.9


def test_too_few_steps_for_a_last_third():
    with pytest.raises(ValueError, match="num_steps: expected 63 or more"):
        edge_of_stability.run(num_steps=62)


def test_a_threshold_is_found_wherever_it_is():
    """Bisection knows of no prediction: another quadratic, another threshold, 2/λ of its dense Hessian."""
    with jax.enable_x64(True):
        rows = np.random.default_rng(0).normal(size=(4, 3)) * 3
        largest = np.linalg.eigvalsh(rows.T @ rows / 4)[-1]
        start = np.full(3, 1e-9)
        make = edge_of_stability.METHODS["gradient descent"].make
        measured = edge_of_stability._begins_to_grow(make, lambda state: state, start, rows)
        np.testing.assert_allclose(measured, 2 / largest, rtol=1e-6)
