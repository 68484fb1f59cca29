"""The bracket of the limit for noisy batches, against the growth of second moments and of populations of runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxnet import curvature, data, losses, nn
from jaxnet.learning_rate import analyse, measure_sgd_stability, sgd_stability
from jaxnet.learning_rate._second_moments import factors as factors_of
from jaxnet.learning_rate._settled import settled

KEY = jax.random.key(0)
NETWORK = nn.mlp([4, 2], activation=jnp.tanh)
LOSS = losses.mean_loss(NETWORK.apply, losses.softmax_cross_entropy)
# So few that all of them are looked at.
N = 30


def small():
    x = jax.random.normal(jax.random.key(1), (N, 3)) * jnp.array([3.0, 1.0, 0.3])
    return NETWORK.init(KEY, (3,)), (x, (x[:, 0] + x[:, 1] > 0).astype(jnp.int32))


def blocks(params, batch):
    """The examples' Gauss–Newton matrices J′(∂²ℓ/∂o²)J, dense."""
    flat, unravel = ravel_pytree(params)

    def one(x, t):
        outputs = lambda w: NETWORK.apply(unravel(w), x[None])[0]
        curved = jax.hessian(lambda o: losses.softmax_cross_entropy(o[None], t[None])[0])(outputs(flat))
        slope = jax.jacobian(outputs)(flat)
        return slope.T @ curved @ slope

    return np.asarray(jax.vmap(one)(*batch))


def growth(examples, response, share, beta, averaged, rate):
    """How tr(CM) of (ω, m) grows from noise, over the last of 2000 steps: m ← βm + (1 or 1 − β)g, ω ← ω − ηRm."""
    n, d, _ = examples.shape

    def matrix(h):
        m = np.hstack([(1 - beta if averaged else 1.0) * h, beta * np.eye(d)])
        return np.vstack([np.hstack([np.eye(d), np.zeros((d, d))]) - rate * response[:, None] * m, m])

    mean = examples.mean(axis=0)
    step = matrix(mean)
    noise = np.concatenate([(matrix(h) - step) * (share / n) ** 0.5 for h in examples], axis=1)
    moment, factors = noise @ noise.T, []
    for _ in range(2000):
        spread = noise.reshape(2 * d, n, 2 * d) @ moment
        moment = step @ moment @ step.T + spread.reshape(2 * d, -1) @ noise.T
        factors.append(np.sum(mean * moment[:d, :d]))
        moment = moment / factors[-1]
    return np.exp(np.log(factors[-500:]).mean())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("sgd", 1), ("sgd", 4), ("momentum", 4), ("adam", 1)])
def test_where_all_examples_are_followed_it_is_exact(name, size, x64):
    """Thirty examples of rank one: nothing is left out, and the ends are the limit less and more the margin."""
    make = {"sgd": optax.sgd, "momentum": functools.partial(optax.sgd, momentum=0.9), "adam": optax.adam}[name]
    params, batch = small()
    share = (N - size) / (size * (N - 1))
    rows = jax.vmap(lambda x, t: ravel_pytree(jax.grad(LOSS)(params, (x[None], t[None])))[0])(*batch)
    unravel = ravel_pytree(params)[1]
    mean, squares = rows.mean(axis=0), jnp.square(rows.mean(axis=0)) + share * rows.var(axis=0)
    response = settled(make, params, unravel(squares), unravel(mean)).steady
    # A sum of momentum has R/(1 − β) for what stays.
    response = np.asarray(ravel_pytree(response)[0]) * (0.1 if name == "momentum" else 1)
    found = analyse(LOSS, params, batch, key=KEY, make_optimizer=make, batch_sizes=[size])
    # By the Hessian, which is not the Gauss–Newton matrix here: that of the mean alone is exchanged.
    root = np.sqrt(response)
    gauss_newton = np.linalg.eigvalsh(root[:, None] * blocks(params, batch).mean(axis=0) * root)
    alternating = {"sgd": 1, "momentum": 1 / 1.9, "adam": 0.1 / 1.9}[name]
    exchange = float(found.derived.largest[0]) / 2 - alternating * gauss_newton[-1] / 2
    low, high = (1 / (1 / float(end) - exchange) for end in found.bracket(size))
    # The share of the trace that is followed, here all, is estimated by a few random probes.
    assert high < low * 1.08**2 * 1.3
    at = functools.partial(
        growth, blocks(params, batch), response, share, 0.0 if name == "sgd" else 0.9, name == "adam"
    )
    assert at(low) < 1 < at(high)


@pytest.mark.parametrize("size", [1, 4])
def test_examples_of_a_rank_above_two(size, x64):
    """Of each example the two sharpest directions are followed, of ten here: the bracket is the wider for it."""
    x = jax.random.normal(jax.random.key(2), (N, 12))
    network = nn.dense(10)
    loss = losses.mean_loss(network.apply, losses.squared_error)
    params, batch = network.init(KEY, (12,)), (x, jnp.zeros((N, 10)))
    found = analyse(loss, params, (x, batch[1] + 1.0), key=KEY, batch_sizes=[size])
    exact = sgd_stability(loss, params, batch, size, replace=False, gauss_newton=True)
    low, high = found.bracket(size)
    assert low < exact < high


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 8])
def test_a_population_of_runs_grows_within_the_bracket(size, x64):
    """On targets that are the network's own outputs, where the examples' Hessians are their Gauss–Newton matrices."""
    network = nn.mlp([8, 4], activation=jnp.tanh)
    x = data.digits()[0][:400]
    params = network.init(KEY, (64,))
    loss = losses.mean_loss(network.apply, losses.squared_error)
    batch = x, network.apply(params, x)
    # The slope is 0 here; the limit and its bracket are asked of the point beside it.
    found = analyse(loss, params, (x, batch[1] + 1e-3), key=KEY, batch_sizes=[size])
    low, high = (float(end) for end in found.bracket(size))
    measured = measure_sgd_stability(
        loss, params, batch, size, highest=4 * high, key=KEY, replace=False, num_particles=int(256 / size**0.5),
        num_steps=200, num_halvings=8,
    )  # fmt: skip
    assert low < measured.limit < high
    assert high < 2 * low


def test_params_that_may_lie_apart_have_the_same_factors(monkeypatch, x64):
    params, batch = small()

    def squares():
        space = curvature.Space.of(params)
        roots = space.ravel(jax.tree.map(lambda x: 1 + x**2, params))
        found = factors_of(LOSS, params, batch, roots, KEY, space.starts)
        return jnp.einsum("nkp,nkq->npq", found, found)

    joined = squares()
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert curvature.Space.of(params).apart
    np.testing.assert_allclose(squares(), joined, atol=1e-12)
