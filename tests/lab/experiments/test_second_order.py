import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from jaxnet import data
from jaxnet.lab.experiments import second_order

DECAY = 1e-2

pytestmark = pytest.mark.slow


@pytest.fixture
def problem(x64):
    batch = jax.tree.map(lambda x: x[:60], data.digits())
    return second_order.REGRESSION.init(jax.random.key(0), (64,)), batch


def test_every_claim_holds():
    found = second_order.run(seed=1, num_examples=120, num_steps=800, num_epochs=130)
    assert [claim.name for claim in found.claims if not claim.passed] == []
    assert len(found.panels) == 3


def test_newton_ends_where_scikit_learn_does(problem):
    start, batch = problem
    _, values, _ = second_order.newton(DECAY, start, batch, 12, 1e-12, 1000)
    x, labels = np.column_stack([batch[0], np.ones(60)]), np.asarray(batch[1])
    model = LogisticRegression(C=1 / (60 * DECAY), fit_intercept=False, tol=1e-10, max_iter=5000).fit(x, labels)
    chosen = model.predict_log_proba(x)[np.arange(60), labels]
    np.testing.assert_allclose(values[-1], -chosen.mean() + DECAY / 2 * np.sum(model.coef_**2), rtol=1e-9)


def test_lbfgs_counts_the_gradients_it_takes(problem, monkeypatch):
    """A host counter in the loss sees as many evaluations as the line searches report, and the first one."""
    start, batch = problem
    calls, real = [], second_order.CROSS_ENTROPY

    def counted(params, batch):
        jax.debug.callback(lambda: calls.append(1))
        return real(params, batch)

    monkeypatch.setattr(second_order, "CROSS_ENTROPY", counted)
    jax.clear_caches()
    _, searches = jax.block_until_ready(second_order.lbfgs(DECAY, start, batch, 17))
    jax.effects_barrier()
    jax.clear_caches()
    assert len(calls) == 1 + int(searches.sum())


def test_single_examples_are_stochastic_gradient_descent(problem):
    start, batch = problem
    key = jax.random.key(5)
    found = second_order.single_examples(DECAY, start, batch, key, 2, 3)
    x, labels = np.column_stack([batch[0], np.ones(60)]), np.asarray(batch[1])
    w, time, values = np.zeros((65, 10)), 0, []
    largest = (x**2).sum(axis=1).max() / 2 + DECAY
    softmax = lambda z: np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    for epoch in range(2):
        for row in np.asarray(data.reshuffled(key, epoch, 60)):
            error = softmax(x[row] @ w) - np.eye(10)[labels[row]]
            w = w - (np.outer(x[row], error) + DECAY * w) / (largest + DECAY * time)
            time += 1
            if time % 20 == 0:
                chosen = softmax(x @ w)[np.arange(60), labels]
                values.append(-np.log(chosen).mean() + DECAY / 2 * (w**2).sum())
    np.testing.assert_allclose(found, values, rtol=1e-10)


def test_a_level_that_is_not_reached_costs_infinitely_much():
    curve = second_order.Curve(np.array([0.0, 3.0, 5.0]), np.array([1.0, 0.5, 0.01]))
    assert [curve.to(gap) for gap in (1.0, 0.4, 1e-3)] == [0.0, 5.0, float("inf")]


def test_the_order_of_a_sequence():
    norms = jnp.array([1e-1, 1e-2, 1e-4, 1e-8, 1e-16, 1e-16])
    race = second_order.Race(1.0, [], *[second_order.Curve(norms, norms)] * 3, gradient_norms=np.asarray(norms))
    np.testing.assert_allclose(race.order(), 2)
