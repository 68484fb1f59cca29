import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxnet import training
from jaxnet.contract import UserError
from jaxnet.learning_rate import stability

KEY = jax.random.key(0)
BATCH = jnp.ones(2)
B2 = {"adam": 0.999, "rmsprop": 0.9}


def quadratic(params, batch):
    """½ w′Hw with H = Q diag(5, 2, 1) Q′, two leaves."""
    w = jnp.append(params["a"], params["b"])
    return jnp.mean(batch) * 0.5 * w @ _hessian() @ w


def _hessian():
    q, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    return jnp.asarray(q * [5.0, 2.0, 1.0] @ q.T)


def _params():
    return {"a": jnp.array([0.3, -0.2]), "b": jnp.array(0.5)}


MOMENTS = {"a": np.array([0.04, 1.3]), "b": np.array(0.25)}


def _is_adaptive(node):
    return hasattr(node, "nu")


def _with_moments(state, moments, count):
    """The state with second moments ν and, where it counts, t steps done."""

    def node(x):
        if not _is_adaptive(x):
            return x
        filled = {"nu": jax.tree.map(jnp.asarray, moments)}
        if "count" in x._fields:
            filled["count"] = jnp.asarray(count, jnp.int32)
        return x._replace(**filled)

    return jax.tree.map(node, state, is_leaf=_is_adaptive)


def _limit_of_iterates(make, b2, count, bracket):
    """Bisect on whether optax's own iterates grow, with ν and t put back before each step: gradients alone."""
    # So small that their squares add nothing to ν; the update takes ν to b₂ν and t to t + 1.
    small = jax.tree.map(lambda x: 1e-12 * x, _params())
    before = jax.tree.map(lambda x: x / b2, MOMENTS)

    @jax.jit
    def grows(rate):
        optimizer = make(rate)
        update = training.make_update(quadratic, optimizer)

        def step(state, _):
            held = _with_moments(state.opt_state, before, count - 1)
            state, _ = update(state._replace(opt_state=held), BATCH)
            return state, optax.tree.norm(state.params)

        _, sizes = jax.lax.scan(step, training.init_state(small, optimizer), None, length=1200)
        return jnp.any(sizes > 1e-6) | (sizes[-1] > sizes[-101])

    low, high = bracket
    for _ in range(32):
        middle = (low + high) / 2
        low, high = (low, middle) if grows(middle) else (middle, high)
    return middle


def ema(rate):
    return optax.chain(optax.ema(0.9, debias=False), optax.scale(-1.0 * rate))


def coupled(rate):
    return optax.chain(optax.add_decayed_weights(0.5), optax.sgd(rate, momentum=0.9, nesterov=True))


CASES = {
    "gradient descent": (optax.sgd, 2 / 5),
    "heavy ball": (functools.partial(optax.sgd, momentum=0.9), 3.8 / 5),
    "heavy ball, β = .5": (functools.partial(optax.sgd, momentum=0.5), 3 / 5),
    "nesterov": (functools.partial(optax.sgd, momentum=0.9, nesterov=True), 3.8 / 2.8 / 5),
    "groups with a momentum each": (
        lambda rate: optax.partition({"x": ema(rate), "y": optax.sgd(rate, momentum=0.5)}, {"a": "x", "b": "y"}),
        None,
    ),
    "ema": (ema, 38 / 5),
    "coupled decay": (coupled, 3.8 / 2.8 / 5.5),
    "adam": (optax.adam, None),
    "adam, ε = .1": (functools.partial(optax.adam, eps=0.1), None),
    "nadam": (optax.nadam, None),
    "adamw": (functools.partial(optax.adamw, weight_decay=0.05), None),
    "adamw, masked": (functools.partial(optax.adamw, weight_decay=0.2, mask={"a": True, "b": False}), None),
    "rmsprop": (optax.rmsprop, None),
    "rmsprop, ε = .1": (functools.partial(optax.rmsprop, eps=0.1), None),
    "rmsprop, nesterov": (functools.partial(optax.rmsprop, momentum=0.9, nesterov=True), None),
    "rmsprop, centered": (functools.partial(optax.rmsprop, centered=True), None),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_where_the_iterates_begin_to_grow(name, x64):
    make, closed = CASES[name]
    optimizer = make(0.01)
    state = _with_moments(optimizer.init(_params()), MOMENTS, 7)
    limit = float(stability(quadratic, _params(), BATCH, optimizer, state, key=KEY, tol=1e-12).limit)
    if closed is not None:
        np.testing.assert_allclose(limit, closed, rtol=1e-9)
    measured = _limit_of_iterates(make, 0.999 if "adam" in name else 0.9, 7, (0.5 * limit, 2 * limit))
    np.testing.assert_allclose(limit, measured, rtol=1e-6)


def test_adam_against_its_formula_on_a_network(mlp_problem):
    """λ_max(P⁻¹H) from the dense Hessian, P = (1 − β₁ᵗ) diag(√ν̂ + ε) from the state alone."""
    loss, params, batch = mlp_problem
    for optimizer, decay in (
        (optax.adam(3e-3, b1=0.8, eps=1e-3), 0),
        (optax.adamw(3e-3, b1=0.8, eps=1e-3, weight_decay=2.0), 2),
    ):
        update, state = jax.jit(training.make_update(loss, optimizer)), training.init_state(params, optimizer)
        for _ in range(9):
            state, _ = update(state, batch)
        flat, unravel = ravel_pytree(state.params)
        hessian = jax.hessian(lambda w: loss(unravel(w), batch))(flat)
        adam = state.opt_state[0]
        root = jnp.sqrt(ravel_pytree(adam.nu)[0] / (1 - 0.999**9))
        preconditioned = hessian / ((1 - 0.8**9) * (root + 1e-3))[:, None]
        largest = np.linalg.eigvals(preconditioned).real.max()
        found = stability(loss, state.params, batch, optimizer, state.opt_state, key=KEY, tol=1e-10)
        # Where λ = (1 + β)(2 − ηd)/((1 − β)η).
        np.testing.assert_allclose(found.limit, 2 / (largest * 0.2 / 1.8 + decay), rtol=1e-7)
        np.testing.assert_allclose(found.rate, 3e-3, rtol=1e-9)
        np.testing.assert_allclose(found.ratio, 3e-3 / found.limit, rtol=1e-9)


def test_groups_with_a_momentum_each_are_what_a_mask_makes(x64):
    """AdamW on one part and Adam on the other, and two masked decays, are AdamW with a mask."""
    params = _params()
    labels, mask = {"a": "decayed", "b": "free"}, {"a": True, "b": False}
    decayed = functools.partial(optax.adamw, weight_decay=0.2)
    ways = (
        decayed(0.01, mask=mask),
        optax.partition({"decayed": decayed(0.01), "free": optax.adam(0.01)}, labels),
        optax.chain(
            optax.masked(decayed(0.01), mask), optax.masked(optax.adam(0.01), jax.tree.map(lambda x: not x, mask))
        ),
    )
    limits = []
    for optimizer in ways:
        update, state = jax.jit(training.make_update(quadratic, optimizer)), training.init_state(params, optimizer)
        for _ in range(5):
            state, _ = update(state, BATCH)
        limits.append(stability(quadratic, state.params, BATCH, optimizer, state.opt_state, key=KEY, tol=1e-10).limit)
    np.testing.assert_allclose(limits, limits[0], rtol=1e-8)


def test_single_precision_and_a_warm_start():
    params = jax.tree.map(lambda x: x.astype(jnp.float32), _params())
    optimizer = optax.rmsprop(1e-3, momentum=0.9)
    state = _with_moments(optimizer.init(params), jax.tree.map(np.float32, MOMENTS), 7)
    root = np.sqrt(np.append(MOMENTS["a"], MOMENTS["b"]) + 1e-8)
    largest = np.linalg.eigvals(np.asarray(_hessian()) / root[:, None]).real.max()
    cold = stability(quadratic, params, BATCH, optimizer, state, key=KEY, tol=1e-5)
    warm = stability(quadratic, params, BATCH, optimizer, state, key=KEY, tol=1e-5, v0=cold.vector)
    np.testing.assert_allclose([cold.limit, warm.limit], 3.8 / largest, rtol=1e-5)
    np.testing.assert_allclose(cold.rate, 1e-3, rtol=1e-5)


def test_single_precision_compiles_to_the_same_rate_behind_a_clip_that_is_not_in_force():
    params = jax.tree.map(lambda x: x.astype(jnp.float32), _params())
    for clip in (optax.identity(), optax.clip_by_global_norm(1e3)):
        optimizer = optax.chain(clip, optax.adam(1e-3))
        state = _with_moments(optimizer.init(params), jax.tree.map(np.float32, MOMENTS), 7)
        found = stability(quadratic, params, BATCH, optimizer, state, key=KEY, tol=1e-5)
        np.testing.assert_allclose(found.rate, 1e-3, rtol=1e-5)


SCHEDULE = optax.piecewise_constant_schedule(0.1, {2: 0.25})


@pytest.mark.parametrize(
    ("optimizer", "rate", "limit"),
    [
        (optax.sgd(SCHEDULE, momentum=0.9), 0.025, 3.8 / 5),
        (optax.inject_hyperparams(optax.sgd)(SCHEDULE, momentum=0.9), 0.025, 3.8 / 5),
        (optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9, nesterov=True), 0.1, 3.8 / 2.8 / 5),
        # What the state names is meant: half of its rate is what arrives.
        (optax.chain(optax.inject_hyperparams(optax.sgd)(0.1), optax.scale(0.5)), 0.1, 4 / 5),
        (optax.chain(optax.sgd(0.1), optax.scale(0.5)), 0.05, 2 / 5),
        (optax.chain(optax.clip_by_global_norm(1e3), optax.sgd(0.1)), 0.1, 2 / 5),
        (optax.masked(optax.sgd(0.1, momentum=0.9), {"a": True, "b": True}), 0.1, 3.8 / 5),
        (optax.named_chain(("decay", optax.add_decayed_weights(1.0)), ("descend", optax.sgd(0.1))), 0.1, 2 / 6),
        (optax.inject_hyperparams(optax.adagrad)(0.1), 0.1, None),
        (optax.adagrad(0.1), 0.1, None),
    ],
)
def test_the_rate_and_its_limit_after_some_steps(optimizer, rate, limit, x64):
    update, state = training.make_update(quadratic, optimizer), training.init_state(_params(), optimizer)
    for _ in range(3):
        state, _ = update(state, BATCH)
    found = stability(quadratic, state.params, BATCH, optimizer, state.opt_state, key=KEY, tol=1e-10)
    np.testing.assert_allclose(found.rate, rate, rtol=1e-7)
    if limit is None:
        sums = ravel_pytree(optax.tree.get(state.opt_state, "sum_of_squares"))[0]
        limit = 2 / np.linalg.eigvals(np.asarray(_hessian()) / np.sqrt(sums + 1e-7)[:, None]).real.max()
    np.testing.assert_allclose(found.limit, limit, rtol=1e-7)


def test_frozen_params_take_no_part(x64):
    labels = {"a": "train", "b": "keep"}
    optimizer = optax.partition({"train": optax.sgd(0.1, momentum=0.9), "keep": optax.set_to_zero()}, labels)
    block = np.linalg.eigvalsh(np.asarray(_hessian())[:2, :2])[-1]
    found = stability(quadratic, _params(), BATCH, optimizer, optimizer.init(_params()), key=KEY, tol=1e-10)
    np.testing.assert_allclose([found.limit, found.rate], [3.8 / block, 0.1], rtol=1e-9)


def with_matrix(params, batch):
    return jnp.mean(batch) * jnp.sum(params["w"] ** 2 * jnp.arange(1.0, 7).reshape(2, 3))


# States that a run passes through, and why there is no limit in them.
PASSING = {
    "fresh": (optax.adam(1e-3), "seen no gradient"),
    "fresh, no count": (optax.rmsprop(1e-3), "seen no gradient"),
    "fresh average": (optax.chain(optax.ema(0.9), optax.scale(-0.1)), "a count of 0"),
    "clipped": (optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)), "is clipping in force"),
    "clipped by element": (optax.chain(optax.clip(3.0), optax.sgd(0.1)), "is clipping in force"),
    "clipped updates": (optax.chain(optax.sgd(0.1, momentum=0.9), optax.clip(0.3)), "is clipping in force"),
    "polyak": (optax.polyak_sgd(0.1), "not linear in the gradient here"),
    "before a warm-up": (optax.sgd(optax.linear_schedule(0.0, 0.1, 10)), "rate is 0 in this state"),
}
# Optimizers that have none in any state.
REFUSED = {
    "sign": (optax.sign_sgd(0.1), "does it take a sign"),
    "signum": (optax.signum(0.1), "does it take a sign"),
    "lion": (optax.lion(0.1), "does it take a sign"),
    "lars": (optax.lars(0.1), "divide by a norm"),
    "lamb": (optax.lamb(0.1), "divide by a norm"),
    "centred": (optax.chain(optax.centralize(), optax.sgd(0.1)), "not linear in the gradient"),
    "adafactor": (optax.adafactor(0.1), "FactoredState is not known"),
    "noise": (optax.noisy_sgd(0.1, key=0), "AddNoiseState is not known"),
    "accumulated": (optax.MultiSteps(optax.sgd(0.1), 3), "MultiStepsState is not known"),
    "two momenta": (optax.chain(optax.trace(0.9), optax.sgd(0.1, momentum=0.5)), "at most one momentum, got 2"),
    "uphill": (optax.sgd(-0.1), "goes up the gradient"),
    "two rates": (
        optax.partition({"x": optax.sgd(0.1), "y": optax.sgd(0.2)}, {"v": "x", "w": "y"}),
        "several rates",
    ),
}


def of_first_call(optimizer):
    params = {"v": jnp.ones(2), "w": jnp.ones((2, 3))}
    loss = lambda p, batch: with_matrix(p, batch) + jnp.sum(p["v"] ** 2)
    return stability(loss, params, BATCH, optimizer, optimizer.init(params), key=KEY)


@pytest.mark.parametrize("name", PASSING)
def test_a_run_that_is_well_goes_on(name):
    optimizer, words = PASSING[name]
    found = of_first_call(optimizer)
    assert np.isnan(found.limit)
    assert words in found.reason
    assert found.num_matvecs == 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_limit_is_refused_at_the_first_call(name):
    optimizer, words = REFUSED[name]
    with pytest.raises(ValueError if name in ("uphill", "two rates") else TypeError, match=words):
        of_first_call(optimizer)


def test_along_a_whole_schedule(x64):
    """Adam behind a clip, warmed up from 0 and decayed to 0: a number wherever there is one."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 10)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    update, state = training.make_update(quadratic, optimizer), training.init_state(_params(), optimizer)
    found = []
    for _ in range(12):
        found.append(stability(quadratic, state.params, BATCH, optimizer, state.opt_state, key=KEY))
        state, _ = update(state, BATCH)
    clipped = [s.reason.startswith("the update is not linear") for s in found]
    rates = np.array([float(s.rate) for s in found])
    np.testing.assert_allclose(rates, [float(schedule(t)) for t in range(12)], rtol=1e-5, atol=1e-12)
    known = np.array([np.isfinite(s.limit) for s in found])
    assert not known[0]
    assert not known[10:].any()
    np.testing.assert_array_equal(known[1:10], ~np.array(clipped[1:10]))
    assert known.any()


def test_a_preconditioner_that_is_no_root_needs_its_rate_named(x64):
    """Adamax divides by ν itself."""
    largest = np.linalg.eigvals(
        np.asarray(_hessian()) / ((1 - 0.9**7) * np.append(MOMENTS["a"], MOMENTS["b"]))[:, None]
    ).real.max()
    for maker in (optax.adamax, optax.inject_hyperparams(optax.adamax)):
        optimizer = maker(1e-3)
        state = _with_moments(optimizer.init(_params()), MOMENTS, 7)
        found = functools.partial(stability, quadratic, _params(), BATCH, optimizer, state, key=KEY, tol=1e-10)
        if maker is optax.adamax:
            with pytest.raises(ValueError, match="inject_hyperparams"):
                found()
        else:
            np.testing.assert_allclose(found().limit, 38 / largest, rtol=1e-7)


@pytest.mark.parametrize("half", ["params", "momentum"])
def test_half_precision_is_refused(half):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16 if half == "params" else jnp.float32), _params())
    optimizer = optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16)
    with pytest.raises(TypeError, match="float32 or float64, got bfloat16"):
        stability(quadratic, params, BATCH, optimizer, optimizer.init(params), key=KEY)


def test_where_nothing_curves_upwards():
    params, optimizer = {"w": jnp.ones((2, 3))}, optax.sgd(0.1)
    found = stability(lambda p, b: -with_matrix(p, b), params, BATCH, optimizer, optimizer.init(params), key=KEY)
    assert np.isnan(found.limit)
    assert "not positive" in found.reason


def test_bad_arguments():
    params = {"w": jnp.ones((2, 3))}
    optimizer = optax.sgd(0.1)
    state = optimizer.init(params)
    with pytest.raises(TypeError, match="one that is made"):
        stability(with_matrix, params, BATCH, optax.sgd, None, key=KEY)
    with pytest.raises(ValueError, match="opt_state: expected the state of this optimizer"):
        stability(with_matrix, params, BATCH, optimizer, optax.adam(0.1).init(params), key=KEY)
    with pytest.raises(UserError, match="not finite: .*params, leaf w"):
        stability(with_matrix, {"w": jnp.full((2, 3), jnp.nan)}, BATCH, optimizer, state, key=KEY)
