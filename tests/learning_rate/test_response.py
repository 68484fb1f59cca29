import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet.learning_rate._settled import check_maker, check_proportional, settled
from jaxnet.learning_rate._signs import settled_signs, takes_sign

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
MEANS = {"a": jnp.array([0.1, -0.2]), "b": jnp.array(0.3)}
NOISES = {"a": jnp.array([0.2, 1.0]), "b": jnp.array(0.1)}
MAKERS = {
    "sgd": optax.sgd,
    "heavy ball": functools.partial(optax.sgd, momentum=0.9),
    "Nesterov": functools.partial(optax.sgd, momentum=0.9, nesterov=True),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "nadam": optax.nadam,
    "rmsprop": functools.partial(optax.rmsprop, decay=0.999),
    "rmsprop, centred, momentum": functools.partial(optax.rmsprop, decay=0.999, centered=True, momentum=0.5),
    "clipped, named": lambda rate: optax.chain(
        optax.clip_by_global_norm(1e6), optax.inject_hyperparams(optax.adamw)(learning_rate=rate)
    ),
    "groups with a momentum each": lambda rate: optax.partition(
        {"x": optax.adam(rate), "y": optax.sgd(0.1 * rate, momentum=0.5)}, {"a": "x", "b": "y"}
    ),
    "groups": lambda rate: optax.partition({"x": optax.adam(rate), "y": optax.sgd(0.1 * rate)}, {"a": "x", "b": "y"}),
}


def squares(means, noises):
    return jax.tree.map(lambda m, s: m**2 + s**2, means, noises)


def moved_on_average(optimizer, num_steps=100_000):
    """By random gradients ḡ ± σ, after averages of the last thousand have settled."""
    still = jax.tree.map(jnp.zeros_like, PARAMS)
    state = optimizer.init(still)

    def step(state, key):
        signs = optax.tree.random_like(key, MEANS, jax.random.rademacher)
        gradient = jax.tree.map(lambda m, s, sign: m + s * sign, MEANS, NOISES, signs)
        updates, state = optimizer.update(gradient, state, still)
        return state, updates

    keys = jax.random.split(jax.random.key(1), num_steps)
    state, _ = jax.lax.scan(step, state, keys[:10_000])
    _, updates = jax.lax.scan(step, state, keys)
    return jax.tree.map(lambda u: -u.mean(axis=0), updates)


@pytest.mark.parametrize("name", MAKERS)
def test_the_settled_step_is_what_the_optimizer_does_on_average(name):
    """Fed with random gradients for long, an optimizer moves on average by R times their mean."""
    make, num_steps = MAKERS[name], 100_000
    # Without the weights' own decay, which moves them too.
    optimizer = (functools.partial(make, weight_decay=0.0) if make is optax.adamw else make)(1.0)
    found = settled(make, PARAMS, squares(MEANS, NOISES), MEANS).steady
    moved = moved_on_average(optimizer, num_steps)
    for wanted, mean, noise, response in zip(*map(jax.tree.leaves, (moved, MEANS, NOISES, found)), strict=True):
        error = 4 * np.asarray(response * noise) / num_steps**0.5
        np.testing.assert_array_less(np.abs(response * mean - wanted), 0.04 * np.abs(wanted) + error)


def test_amsgrad_moves_at_most_as_far():
    """It keeps the largest average that there was, the first gradient's square among them: a stated approximation."""
    found = settled(optax.amsgrad, PARAMS, squares(MEANS, NOISES), MEANS).steady
    moved = moved_on_average(optax.amsgrad(1.0))
    for wanted, mean, response in zip(*map(jax.tree.leaves, (moved, MEANS, found)), strict=True):
        ratio = np.asarray(wanted / (response * mean))
        np.testing.assert_array_less(0.6, ratio)
        np.testing.assert_array_less(ratio, 1.05)


SIGNS = {
    "lion": functools.partial(optax.lion, weight_decay=0.0),
    "lion, β₁ = .5": functools.partial(optax.lion, b1=0.5, b2=0.9, weight_decay=0.0),
    "signum": optax.signum,
    "sign descent": optax.sign_sgd,
    "scheduled": lambda rate: optax.signum(optax.warmup_cosine_decay_schedule(0.0, rate, 50, 1000)),
}


def moved_by_normal_gradients(optimizer, num_steps, first):
    """The mean update by gradients ḡ + σz, and its answer's average, after a thousand steps."""

    def step(state, key):
        z = optax.tree.random_like(key, MEANS, jax.random.normal)
        gradient = jax.tree.map(lambda m, s, x: m + s * x, MEANS, NOISES, z)
        updates, state = optimizer.update(gradient, state, first)
        return state, updates

    state, _ = jax.lax.scan(step, optimizer.init(first), jax.random.split(jax.random.key(2), 1000))
    _, updates = jax.lax.scan(step, state, jax.random.split(jax.random.key(3), num_steps))
    return jax.tree.map(lambda u: -u.mean(axis=0), updates)


@pytest.mark.parametrize("name", SIGNS)
def test_an_expected_sign_is_what_the_optimizer_does_on_average(name):
    make, num_steps = SIGNS[name], 200_000
    assert takes_sign(make, PARAMS)
    found = settled_signs(make, PARAMS, squares(MEANS, NOISES), MEANS).steady
    optimizer = optax.signum(1.0) if name == "scheduled" else make(1.0)
    moved = moved_by_normal_gradients(optimizer, num_steps, jax.tree.map(jnp.zeros_like, PARAMS))
    for wanted, mean, response in zip(*map(jax.tree.leaves, (moved, MEANS, found)), strict=True):
        # Successive signs of one average are alike for about a hundred steps.
        np.testing.assert_allclose(response * mean, wanted, rtol=1e-3, atol=4 * (100 / num_steps) ** 0.5)


def test_the_answer_of_a_sign_to_what_alternates():
    """Beside noise much larger than the signal the mean of sign(c) is √(2/π) c/s, c as β₁m + (1 − β₁)g alternates."""
    found = settled_signs(optax.lion, PARAMS, squares(MEANS, NOISES), MEANS)
    for steady, alternating, decay in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(alternating / steady, 0.1 - 0.9 * 0.01 / 1.99, rtol=1e-5)
        np.testing.assert_allclose(decay, 1e-3, rtol=1e-6)


NO_SIGNS = {
    "clipped low": lambda rate: optax.chain(optax.clip(1e-4), optax.sgd(rate)),
    "signs averaged": lambda rate: optax.chain(
        optax.scale_by_sign(), optax.trace(0.9), optax.scale_by_learning_rate(rate)
    ),
    "decay before the sign": lambda rate: optax.chain(optax.add_decayed_weights(1e-4), optax.sign_sgd(rate)),
}


@pytest.mark.parametrize("name", MAKERS | NO_SIGNS)
def test_what_is_linear_or_more_than_a_sign_is_not_taken_for_one(name):
    assert not takes_sign((MAKERS | NO_SIGNS)[name], PARAMS)


def test_a_momentum_that_outweighs_the_gradient_has_no_negative_answer():
    found = settled_signs(functools.partial(optax.lion, b1=0.99, b2=0.9), PARAMS, squares(MEANS, NOISES), MEANS)
    assert optax.tree.min(found.alternating) == 0


def test_without_noise_the_smallest_means_are_rounding():
    means = {"a": jnp.array([1.0, 1e-9]), "b": jnp.array(0.0)}
    found = settled_signs(optax.sign_sgd, PARAMS, squares(means, jax.tree.map(jnp.zeros_like, means)), means).steady
    np.testing.assert_allclose(found["a"], [1, 1e3 * 3**0.5], rtol=1e-5)
    assert found["b"] == 0


@pytest.mark.parametrize(("name", "factor"), [("sgd", 1), ("heavy ball", 1 / 1.9), ("Nesterov", 2.8 / 1.9)])
def test_the_answer_to_what_alternates(name, factor):
    """η/(1 + β) for the heavy ball, η(1 + 2β)/(1 + β) for Nesterov: the limits (2 + 2β)/λ, (2 + 2β)/((1 + 2β)λ)."""
    found = settled(MAKERS[name], PARAMS, MEANS, MEANS)
    for leaf in jax.tree.leaves(found.alternating):
        np.testing.assert_allclose(leaf, factor, rtol=1e-5)


def test_a_schedule_counts_at_its_height():
    schedule = lambda rate: optax.adamw(optax.warmup_cosine_decay_schedule(0.0, rate, 50, 1000))
    found, wanted = (settled(make, PARAMS, squares(MEANS, NOISES), MEANS) for make in (schedule, optax.adamw))
    for tree, other in zip(found, wanted, strict=True):
        for leaf, like in zip(*map(jax.tree.leaves, (tree, other)), strict=True):
            np.testing.assert_allclose(leaf, like, rtol=1e-2)


def test_decay_is_masked_as_the_optimizer_masks_it():
    make = functools.partial(optax.adamw, weight_decay=0.1, mask={"a": True, "b": False})
    found = settled(make, PARAMS, squares(MEANS, NOISES), MEANS).decay
    np.testing.assert_allclose(found["a"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(found["b"], 0)


def test_what_no_example_moves_takes_no_part():
    dead = {"a": jnp.array([0.04, 0.0]), "b": jnp.array(0.0)}
    found = settled(optax.adam, PARAMS, dead, MEANS).steady
    assert found["a"][0] > 0
    assert found["a"][1] == found["b"] == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (optax.sgd(0.1), "expected a maker"),
        (lambda rate: optax.sgd(-rate), "does not step down"),
        (NO_SIGNS["signs averaged"], "does not step down|not linear"),
        (NO_SIGNS["decay before the sign"], "does not step down|not linear"),
        (lambda rate: optax.set_to_zero(), "is its rate 0"),
        (optax.adamax, "root of a second moment"),
        (optax.adafactor, "FactoredState"),
        (lambda rate: optax.chain(optax.trace(0.9), optax.sgd(rate, momentum=0.9)), "at most one momentum"),
    ],
)
def test_other_makers_are_refused(make, words):
    def check():
        check_maker(make, PARAMS)
        check_proportional(make, PARAMS)

    with pytest.raises(TypeError, match=words):
        check()
