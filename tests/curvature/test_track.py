import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import curvature, training

KEY = jax.random.key(4)


def test_checks_along_a_run_are_right_and_cheap(mlp_problem):
    loss, params, batch = mlp_problem
    tracker = curvature.track(loss, batch, key=KEY, every=5)

    def step(carry, _):
        params, state = carry
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(loss)(params, batch))
        state = tracker.update(state, params)
        return (params, state), (params, state)

    first = tracker.init(params)
    _, (path, states) = jax.jit(lambda p, s: jax.lax.scan(step, (p, s), None, length=60))(params, first)
    values = np.asarray(states.sharpness.value)
    dense = jax.jit(lambda p: jnp.linalg.eigvalsh(curvature.materialize(curvature.hessian(loss, p, batch)))[-1])
    for i in range(60):
        if i % 5 == 4:
            np.testing.assert_allclose(values[i], dense(jax.tree.map(lambda x, i=i: x[i], path)), rtol=1e-3)
        else:
            assert values[i] == (values[i - 1] if i else first.sharpness.value)
    spent = np.diff(np.append(first.num_matvecs, states.num_matvecs))
    assert np.median(spent[4::5]) <= 6
    assert spent[4::5].min() > 0
    assert not np.delete(spent, np.arange(4, 60, 5)).any()
    assert int(states.num_checks[-1]) == 13


def test_an_observer_of_fit(mlp_problem):
    loss, params, batch = mlp_problem
    observer = curvature.track(loss, batch, key=KEY, every=2).observer(params)
    options = {"learning_rate": 0.3, "batch_size": None, "key": KEY}
    training.fit(loss, params, batch, optax.sgd, num_epochs=5, observers=[observer], **options)
    assert observer.epochs == [0, 2, 4]
    for epochs, check in zip(observer.epochs[1:], observer.checks[1:], strict=True):
        moved = training.fit(loss, params, batch, optax.sgd, num_epochs=epochs, **options).state.params
        expected = curvature.sharpness(loss, moved, batch, key=KEY, tol=1e-8).value
        np.testing.assert_allclose(check.value, expected, rtol=1e-3)


def test_bad_arguments(mlp_problem):
    loss, _, batch = mlp_problem
    with pytest.raises(ValueError, match="every: expected 1 or more, got 0"):
        curvature.track(loss, batch, key=KEY, every=0)
