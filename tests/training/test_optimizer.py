"""What `fit` hands to optax's optimizers through their wrappers, and a rate kept in a state."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import training
from jaxnet.learning_rate import sharpness_sgd

KEY = jax.random.key(0)
BATCH = jnp.diag(jnp.sqrt(3 * jnp.array([5.0, 2.0, 1.0])))  # Hessian diag(5, 2, 1)
PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([3.0])}


def loss(params, batch):
    return 0.5 * jnp.mean((batch @ jnp.concatenate([params["a"], params["b"]])) ** 2)


fit = functools.partial(training.fit, loss, data=BATCH, batch_size=None, key=KEY)
injected = optax.inject_hyperparams(optax.sgd)
labelled = {"a": "x", "b": "y"}
first = {"a": True, "b": False}


def by_hand(optimizer, num_steps, *, with_value=False):
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(num_steps):
        value, grad = jax.value_and_grad(loss)(params, BATCH)
        updates, state = optimizer.update(grad, state, params, **({"value": value} if with_value else {}))
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: optax.MultiSteps(inner, 2),
        lambda inner: optax.MultiSteps(inner, 2).gradient_transformation(),
        lambda inner: optax.MultiSteps(inner, 2, should_skip_update_fn=optax.skip_not_finite),
        lambda inner: optax.chain(optax.identity(), inner),
        lambda inner: optax.named_chain(("it", inner)),
        lambda inner: optax.masked(inner, first),
        lambda inner: optax.partition({"x": inner, "y": optax.sgd(0.1)}, labelled),
        lambda inner: optax.apply_if_finite(inner, 3),
        lambda inner: optax.conditionally_mask(inner, lambda step: step % 2 == 0),
        optax.flatten,
    ],
)
def test_the_loss_reaches_an_optimizer_within_others(wrap):
    make = lambda rate: wrap(optax.polyak_sgd(rate))
    found = fit(PARAMS, make_optimizer=make, learning_rate=0.1, num_epochs=4).state.params
    chex.assert_trees_all_close(found, by_hand(make(0.1), 4, with_value=True), rtol=1e-5)


def test_sharpness_sgd_within_multi_steps_is_itself_at_every_second_step():
    """The mean of two gradients at one point is that gradient."""
    make = lambda rate: optax.MultiSteps(sharpness_sgd(key=KEY, fraction=rate), 2)
    plain = fit(
        PARAMS, make_optimizer=lambda rate: sharpness_sgd(key=KEY, fraction=rate), learning_rate=1.0, num_epochs=3
    )
    found = fit(PARAMS, make_optimizer=make, learning_rate=1.0, num_epochs=6)
    chex.assert_trees_all_close(found.state.params, plain.state.params, rtol=1e-5)


def test_sam_is_given_nothing_or_the_gradient_that_it_asks_for():
    """One step uphill by ρ, then the step that the gradient there says, from where it began."""
    ascend = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    gradient = jax.grad(loss)(PARAMS, BATCH)
    uphill = jax.tree.map(lambda p, g: p + 0.05 * g / optax.tree.norm(gradient), PARAMS, gradient)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, jax.grad(loss)(uphill, BATCH))
    for opaque, steps in ((False, 2), (True, 1)):
        make = lambda rate, opaque=opaque: optax.contrib.sam(optax.sgd(rate), ascend, opaque_mode=opaque)
        found = fit(PARAMS, make_optimizer=make, learning_rate=0.1, num_epochs=steps).state.params
        chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_lookahead_is_refused_in_one_sentence():
    with pytest.raises(TypeError, match=r"optimizer: optax.lookahead steps a pair of params"):
        fit(PARAMS, make_optimizer=lambda r: optax.lookahead(optax.sgd(r), 5, 0.5), learning_rate=0.1, num_epochs=1)


def test_an_update_whose_gradient_is_called_grad_gets_it_once():
    def update(grad, state, params=None, **extra):
        assert set(extra) == {"value", "value_fn"}
        return optax.tree.scale(-0.1, grad), state

    own = optax.GradientTransformation(lambda params: (), update)
    found = fit(PARAMS, make_optimizer=lambda rate: own, learning_rate=0.1, num_epochs=1).state.params
    chex.assert_trees_all_close(found, by_hand(optax.sgd(0.1), 1), rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_masked_line_search_minimises_over_its_block(momentum):
    """L-BFGS on two of three params ends at the minimum over them; the third goes by plain SGD."""
    make = lambda rate: optax.partition(
        {"x": optax.lbfgs(), "y": optax.sgd(rate, momentum)}, labelled, mask_compatible_extra_args=True
    )
    found = fit(PARAMS, make_optimizer=make, learning_rate=0.1, num_epochs=8).state.params
    np.testing.assert_allclose(found["a"], 0, atol=1e-4)
    chex.assert_trees_all_close(found["b"], by_hand(optax.sgd(0.1, momentum), 8)["b"], rtol=1e-5)


def test_a_loss_of_flattened_params_is_refused():
    value_fn = training.ValueFn(lambda p: loss(p, BATCH), PARAMS)
    with pytest.raises(ValueError, match="value_fn: expected a pytree like params"):
        value_fn(jnp.ones(3))


WITHIN = {
    "plain": injected,
    "chain": lambda rate: optax.chain(optax.clip(1e9), injected(learning_rate=rate)),
    "named_chain": lambda rate: optax.named_chain(("it", injected(learning_rate=rate))),
    "masked": lambda rate: optax.masked(injected(learning_rate=rate), {"a": True, "b": True}),
    "partition": lambda rate: optax.partition(
        {"x": injected(learning_rate=rate), "y": injected(learning_rate=rate)}, labelled
    ),
    "MultiSteps": lambda rate: optax.MultiSteps(injected(learning_rate=rate), 1),
    "apply_if_finite": lambda rate: optax.apply_if_finite(injected(learning_rate=rate), 3),
    "twice": optax.inject_hyperparams(lambda rate: injected(learning_rate=rate)),
    "by another name": optax.inject_hyperparams(lambda step_size: optax.sgd(step_size)),
    "half of it": lambda rate: optax.chain(injected(learning_rate=rate / 2), optax.scale(2.0)),
    "bounded": lambda rate: injected(learning_rate=jnp.minimum(rate, 0.05)),
}


@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("rate", [1e-6, 0.3])
def test_a_new_rate_reaches_one_kept_in_a_state(name, rate):
    make = WITHIN[name]
    state = fit(PARAMS, make_optimizer=make, learning_rate=0.02, num_epochs=1).state
    after = fit(state, make_optimizer=make, learning_rate=rate, num_epochs=1).state
    gradient = jax.grad(loss)(state.params, BATCH)
    taken = min(rate, 0.05) if name == "bounded" else rate
    moved = jax.tree.map(lambda x, g: x - taken * g, state.params, gradient)
    chex.assert_trees_all_close(after.params, moved, rtol=1e-6)
    # The same in a loop of one's own.
    update = training.make_update(loss, make(rate))
    by_loop, _ = training.trajectory(update, training.with_rate(make, state, rate), BATCH, num_steps=1)
    chex.assert_trees_all_close(by_loop, after, rtol=1e-6)


def test_adams_new_rate_and_old_moments():
    make = optax.inject_hyperparams(optax.adam)
    first, other = (
        fit(PARAMS, make_optimizer=maker, learning_rate=0.1, num_epochs=3).state for maker in (make, optax.adam)
    )
    first, other = (
        fit(state, make_optimizer=maker, learning_rate=1e-3, num_epochs=2).state
        for state, maker in ((first, make), (other, optax.adam))
    )
    chex.assert_trees_all_close(first.params, other.params, rtol=1e-5)


def test_what_the_rate_does_not_decide_stays():
    """A schedule, a number of another group, and one that a person has set in the state."""
    make = lambda rate: optax.partition(
        {"x": injected(optax.linear_schedule(0.1, 0.0, 4)), "y": optax.inject_hyperparams(optax.sgd)(rate, 0.9)},
        labelled,
    )
    state = fit(PARAMS, make_optimizer=make, learning_rate=0.1, num_epochs=2).state
    state = state._replace(opt_state=optax.tree.set(state.opt_state, momentum=0.5))
    after = fit(state, make_optimizer=make, learning_rate=1e-3, num_epochs=1).state
    gradient = jax.grad(loss)(state.params, BATCH)
    np.testing.assert_allclose(after.params["a"], state.params["a"] - 0.05 * gradient["a"], rtol=1e-6)
    trace = optax.tree.get(state.opt_state, "trace")["b"]
    np.testing.assert_allclose(after.params["b"], state.params["b"] - 1e-3 * (gradient["b"] + 0.5 * trace), rtol=1e-6)


def test_a_constant_rate_of_another_group_stays():
    make = lambda rate: optax.partition(
        {"x": injected(learning_rate=0.01), "y": injected(learning_rate=rate)}, labelled
    )
    state = fit(PARAMS, make_optimizer=make, learning_rate=0.1, num_epochs=1).state
    after = fit(state, make_optimizer=make, learning_rate=1e-3, num_epochs=1).state
    gradient = jax.grad(loss)(state.params, BATCH)
    np.testing.assert_allclose(after.params["a"], state.params["a"] - 0.01 * gradient["a"], rtol=1e-6)
    np.testing.assert_allclose(after.params["b"], state.params["b"] - 1e-3 * gradient["b"], rtol=1e-6)


def test_a_state_of_another_optimizer_takes_no_rate():
    with pytest.raises(ValueError, match="start: its opt_state belongs to another optimizer"):
        training.with_rate(injected, training.init_state(PARAMS, optax.sgd(0.1)), 0.2)
