import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet.learning_rate._response import check_proportional, settled

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
        (optax.lion, "ScaleByLionState"),
        (optax.sign_sgd, "does it take a sign"),
        (lambda rate: optax.sgd(-rate), "does not step down"),
        (lambda rate: optax.set_to_zero(), "is its rate 0"),
        (optax.adamax, "root of a second moment"),
        (optax.adafactor, "FactoredState"),
        (lambda rate: optax.chain(optax.trace(0.9), optax.sgd(rate, momentum=0.9)), "at most one momentum"),
    ],
)
def test_other_makers_are_refused(make, words):
    with pytest.raises(TypeError, match=words):
        check_proportional(make, PARAMS)
