import chex
import equinox as eqx
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import curvature, data, losses, nn, training
from jaxnet.learning_rate import scale_by_sharpness, sharpness_sgd

KEY = jax.random.key(0)
CURVATURES = jnp.array([5.0, 2.0, 0.5])


def quadratic(params, batch=None):
    return 0.5 * jnp.sum(CURVATURES * params["w"] ** 2) + 0.5 * params["b"] ** 2


PARAMS = {"w": jnp.ones(3), "b": jnp.array(2.0), "none": None}


def stepped(optimizer, params, loss, num_steps):
    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(num_steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize("fraction", [0.5, 1.0, 1.9])
def test_on_a_quadratic_the_rate_is_the_fraction_of_one_over_lambda(fraction):
    optimizer = scale_by_sharpness(key=KEY, fraction=fraction)
    grads = jax.grad(quadratic)(PARAMS)
    updates, state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS, value_fn=quadratic)
    np.testing.assert_allclose(state.rate, fraction / 5, rtol=0.05)
    np.testing.assert_allclose(state.sharpness, 5, rtol=0.05)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: state.rate * g, grads), rtol=1e-6)
    assert updates["none"] is None


def test_what_rounding_may_hide_of_the_sharpness_is_allowed_for(all_but_certain):
    """λ_max is seen with an error of a tenth here: the rate is below what it would be if that were nothing."""
    loss, params, batch, true = all_but_certain(16)
    grads, value_fn = jax.grad(loss)(params, batch), lambda p: loss(p, batch)
    for seed in range(5):
        optimizer = scale_by_sharpness(key=jax.random.key(seed), fraction=1.0)
        state = optimizer.update(grads, optimizer.init(params), params, value_fn=value_fn)[1]
        assert state.rate * state.sharpness < 0.97
        assert 0.4 < state.rate * true < 1.2


def test_a_check_comes_at_every_tenth_update_and_is_counted():
    params, state = stepped(
        optax.chain(scale_by_sharpness(key=KEY, fraction=1.0, every=10), optax.scale(-1.0)), PARAMS, quadratic, 21
    )
    assert int(state[0].num_checks) == 3
    assert 3 <= int(state[0].num_matvecs) <= 12
    assert float(quadratic(params)) < 1e-3 * float(quadratic(PARAMS))


def test_products_are_those_that_were_made():
    made = []

    def counted(params):
        @jax.custom_jvp
        def seen(x):
            return x

        @seen.defjvp
        def _(primals, tangents):
            jax.debug.callback(lambda: made.append(1))
            return primals[0], tangents[0]

        return quadratic({**params, "b": seen(params["b"])})

    optimizer = scale_by_sharpness(key=KEY, fraction=1.0)
    update = jax.jit(lambda s: optimizer.update(PARAMS, s, PARAMS, value_fn=counted))
    state = update(optimizer.init(PARAMS))[1]
    jax.effects_barrier()
    # The callback runs once for the gradient within each product.
    assert int(state.num_matvecs) == len(made)


def test_a_gradient_that_grows_calls_for_a_check_at_once():
    """The curve ¼w⁴ seen from farther out: twice as far, four times the curvature, eight times the gradient."""
    loss = lambda w: jnp.sum(w**4) / 4
    optimizer = scale_by_sharpness(key=KEY, fraction=1.0, every=1000)
    state = optimizer.init(jnp.ones(1))
    for w, checks, curved in ((1.0, 1, 3.0), (1.1, 1, 3.0), (2.0, 2, 12.0)):
        point = jnp.full(1, w)
        _, state = optimizer.update(jax.grad(loss)(point), state, point, value_fn=loss)
        assert int(state.num_checks) == checks
        np.testing.assert_allclose(state.rate, 1 / curved, rtol=0.05)


def test_a_check_sets_the_rate_however_far_the_curvature_has_moved():
    loss = lambda w: jnp.sum(w**4) / 4
    optimizer = scale_by_sharpness(key=KEY, fraction=1.0, every=1)
    state = optimizer.init(jnp.ones(1))
    for w in (1.0, 0.1, 3.0):
        point = jnp.full(1, w)
        _, state = optimizer.update(jax.grad(loss)(point), state, point, value_fn=loss)
        np.testing.assert_allclose(state.rate, 1 / (3 * w**2), rtol=0.05)


@pytest.mark.parametrize(
    ("curved", "rate"),
    [(lambda w: -jnp.sum(w**2), 0.5), (lambda w: jnp.sum(w), 0.0), (lambda w: jnp.nan * w.sum(), 0.0)],
)
def test_without_positive_curvature_nothing_blows_up(curved, rate):
    """−w²: |λ| = 2 decides; where there is no curvature, or none that is finite, nothing moves."""
    optimizer = scale_by_sharpness(key=KEY, fraction=1.0)
    point = jnp.ones(3)
    updates, state = optimizer.update(point, optimizer.init(point), point, value_fn=curved)
    np.testing.assert_allclose(state.rate, rate, rtol=0.05)
    assert jnp.isfinite(updates).all()


def test_a_rate_stands_where_curvature_turns_negative():
    optimizer = scale_by_sharpness(key=KEY, fraction=1.0, every=1)
    point = jnp.ones(3)
    _, state = optimizer.update(point, optimizer.init(point), point, value_fn=lambda w: jnp.sum(w**2))
    _, state = optimizer.update(point, state, point, value_fn=lambda w: -5 * jnp.sum(w**2))
    np.testing.assert_allclose(state.rate, 0.5, rtol=0.05)
    assert float(state.sharpness) < 0


def test_it_composes_in_a_chain_in_scan_and_vmap():
    optimizer = optax.chain(
        optax.add_decayed_weights(1e-3), scale_by_sharpness(key=KEY, fraction=0.5), optax.trace(0.5), optax.scale(-1.0)
    )

    def run(scale):
        loss = lambda params: scale * quadratic(params)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params, value_fn=loss)
            return (optax.apply_updates(params, updates), state), state[1].rate

        return jax.lax.scan(step, (PARAMS, optimizer.init(PARAMS)), None, length=30)

    (params, _), rates = jax.jit(jax.vmap(run))(jnp.array([1.0, 10.0]))
    np.testing.assert_allclose(rates[:, -1], [0.1, 0.01], rtol=0.05)
    assert float(jax.vmap(quadratic)(params).max()) < 0.1


def test_one_trace_serves_all_steps(x64):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        grads = jax.grad(quadratic)(params)
        updates, state = optimizer.update(grads, state, params, value_fn=quadratic)
        return optax.apply_updates(params, updates), state

    optimizer = sharpness_sgd(key=KEY)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
    state = jax.jit(optimizer.init)(params)
    for _ in range(25):
        params, state = step(params, state)
    assert params["w"].dtype == jnp.float64


def digits_problem():
    batch = jax.tree.map(lambda x: x[:200], data.digits())
    model = nn.mlp([16, 10], activation=jnp.tanh)
    return losses.mean_loss(model.apply, losses.softmax_cross_entropy), model.init(KEY, (64,)), batch


def test_mini_batches_are_refused():
    loss, params, batch = digits_problem()
    make = lambda rate: sharpness_sgd(key=KEY, fraction=rate)
    how = {"num_epochs": 1, "key": KEY}
    for held, size in ((batch, 20), ([batch, batch], 200)):
        with pytest.raises(ValueError, match="batch_size: this optimizer follows the curvature of the batch"):
            training.fit(loss, params, held, make, learning_rate=1.0, batch_size=size, **how)
    with pytest.raises(ValueError, match="batch_size: this optimizer"):
        training.sweep(loss, params, batch, make, learning_rates=[1.0], batch_size=20, **how)
    found = training.fit(loss, params, batch, make, learning_rate=1.0, batch_size=200, **how)
    assert np.isfinite(found.history.loss).all()


def test_fit_hands_it_the_loss():
    loss, params, batch = digits_problem()
    make = lambda fraction: sharpness_sgd(key=KEY, fraction=fraction)
    result = training.fit(loss, params, batch, make, learning_rate=1.9, batch_size=None, num_epochs=40, key=KEY)
    assert result.history.loss[-1] < 0.3 * result.history.loss[0]
    state = result.state.opt_state[0]
    sharp = curvature.sharpness(loss, params, batch, key=KEY)
    assert int(state.num_checks) >= 4
    assert float(state.rate) != 1.9 / float(sharp.value)


def test_in_an_nnx_loop():
    inputs, labels = digits_problem()[2]
    model = nnx.Linear(64, 10, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sharpness_sgd(key=KEY), wrt=nnx.Param)
    graph = nnx.graphdef(model)

    def mean_loss(params):
        return losses.softmax_cross_entropy(nnx.merge(graph, params)(inputs), labels).mean()

    @nnx.jit
    def step(model, optimizer):
        params = nnx.state(model, nnx.Param)
        value, grads = jax.value_and_grad(mean_loss)(params)
        optimizer.update(model, grads, value_fn=mean_loss)
        return value

    values = [float(step(model, optimizer)) for _ in range(30)]
    assert values[-1] < 0.5 * values[0]


def test_in_an_equinox_loop():
    inputs, labels = digits_problem()[2]
    params, static = eqx.partition(eqx.nn.MLP(64, 10, 16, 1, key=KEY), eqx.is_inexact_array)
    optimizer = sharpness_sgd(key=KEY)

    def mean_loss(params):
        return losses.softmax_cross_entropy(jax.vmap(eqx.combine(params, static))(inputs), labels).mean()

    @eqx.filter_jit
    def step(params, state):
        value, grads = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(grads, state, params, value_fn=mean_loss)
        return eqx.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for _ in range(30):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]


MIXING = jax.random.normal(KEY, (6, 5)) * jnp.array([1, 1, 1, 1, 3])
PARTS = {"u": jnp.array([1.0, -2.0, 0.5]), "none": None, "v": jnp.array([0.3, 1.0])}
LABELS = {"u": "x", "none": None, "v": "y"}


def coupled(params, batch):
    """½|A(u, v)|²/6 with Hessian A'A/6; it takes whole params only."""
    chex.assert_trees_all_equal_shapes_and_dtypes(params, PARTS)
    return 0.5 * jnp.mean((batch @ jnp.append(params["u"], params["v"])) ** 2)


@pytest.mark.parametrize("masked", [True, False])
def test_of_a_block_it_follows_the_blocks_curvature(masked):
    """λ_max of the rows and columns of A'A/6 that belong to what it steps."""
    follow = sharpness_sgd(key=KEY, fraction=1.0, momentum=0.0)
    if masked:
        optimizer = optax.masked(follow, {"u": True, "none": None, "v": False})
    else:
        optimizer = optax.partition({"x": follow, "y": optax.sgd(0.05)}, LABELS)
    dense = np.asarray(MIXING, np.float64).T @ np.asarray(MIXING, np.float64) / 6
    block = np.linalg.eigvalsh(dense[:3, :3])[-1]
    assert block < 0.9 * np.linalg.eigvalsh(dense)[-1]
    result = training.fit(
        coupled, PARTS, MIXING, lambda rate: optimizer, learning_rate=1.0, batch_size=None, num_epochs=1, key=KEY
    )
    state = optax.tree.get(result.state.opt_state, "sharpness")
    np.testing.assert_allclose(state, block, rtol=0.05)
    moved = -jax.grad(coupled)(PARTS, MIXING)["u"] / state
    np.testing.assert_allclose(result.state.params["u"] - PARTS["u"], moved, rtol=1e-5)
    # By hand it needs to be told of the others, and says so.
    gradient = jax.grad(coupled)(PARTS, MIXING)
    value_fn = lambda params: coupled(params, MIXING)
    with pytest.raises(ValueError, match=r"value_fn=jaxnet.training.ValueFn\(value_fn, params\)"):
        optimizer.update(gradient, optimizer.init(PARTS), PARTS, value_fn=value_fn)
    told = training.ValueFn(value_fn, PARTS)
    updates, _ = optimizer.update(gradient, optimizer.init(PARTS), PARTS, value_fn=told)
    np.testing.assert_allclose(updates["u"], moved, rtol=1e-5)


def test_two_blocks_followed_apart_are_stable_at_half_of_the_limit():
    """P^-½HP^-½ has no eigenvalue above 2 for two blocks, so below a fraction of 1 the loss falls at each step."""
    follow = lambda: sharpness_sgd(key=KEY, fraction=0.9, momentum=0.0)
    make = lambda rate: optax.partition({"x": follow(), "y": follow()}, LABELS)
    twins = jnp.ones((1, 5)) + 0.01 * MIXING
    found = training.fit(coupled, PARTS, twins, make, learning_rate=1.0, batch_size=None, num_epochs=20, key=KEY)
    assert (np.diff(found.history.loss) < 0).all()


def test_a_new_fraction_is_taken_at_once():
    make = lambda fraction: sharpness_sgd(key=KEY, fraction=fraction, momentum=0.0, every=1000)
    fit = lambda start, fraction: (
        training.fit(
            quadratic, start, jnp.ones(1), make, learning_rate=fraction, batch_size=None, num_epochs=1, key=KEY
        ).state
    )
    state = fit(PARAMS, 1.0)
    after = fit(state, 0.01)
    assert int(after.opt_state[0].num_checks) == 1
    gradient = jax.grad(quadratic)(state.params)["w"]
    np.testing.assert_allclose(after.params["w"], state.params["w"] - 0.01 / 5 * gradient, rtol=1e-3)


def test_bad_arguments():
    with pytest.raises(ValueError, match="fraction: expected positive"):
        scale_by_sharpness(key=KEY, fraction=0.0)
    with pytest.raises(ValueError, match=r"fraction: expected between 0 and 3.8"):
        sharpness_sgd(key=KEY, fraction=3.9)
    with pytest.raises(ValueError, match=r"fraction: expected between 0 and 2, the limit"):
        sharpness_sgd(key=KEY, fraction=2.0, momentum=0.0)
    with pytest.raises(ValueError, match="every: expected 1 or more"):
        scale_by_sharpness(key=KEY, fraction=1.0, every=0)
    with pytest.raises(ValueError, match="momentum: expected"):
        sharpness_sgd(key=KEY, momentum=1.0)
    optimizer = scale_by_sharpness(key=KEY, fraction=1.0)
    with pytest.raises(ValueError, match="value_fn: expected the loss as a function of params"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
