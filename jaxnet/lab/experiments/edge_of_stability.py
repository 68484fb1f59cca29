"""Full-batch training at the edge of stability: five optimizers, each at a limit of its own."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import curvature, data, losses, nn, training
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.lab._progress import Share, unseen, watched
from jaxnet.lab.record import Line, Panel, Record, Series, above, below, close, slug, within
from jaxnet.learning_rate import stability

QUESTION = "Does full-batch training drive curvature up to each optimizer's limit of stability, and hold it there?"

# Odd, so that checks meet both phases of an oscillation from step to step.
STEPS_A_CHECK = 21
BETA = 0.9

Make = Callable[[Any], optax.GradientTransformation]


class Method(NamedTuple):
    """An optimizer, its rate, ηλ at its limit of stability, and P of the λ = λ_max(P⁻¹H) that is meant."""

    make: Make
    rate: float
    limit: float
    preconditioner: Callable[[Any, ArrayTree], ArrayTree]


def no_preconditioner(opt_state: Any, params: ArrayTree) -> ArrayTree:
    """P = I."""
    return jax.tree.map(jnp.ones_like, params)


def of_adam(opt_state: Any, params: ArrayTree, *, b2: float = 0.999) -> ArrayTree:
    """P = (1 − β₁ᵗ) diag(√ν̂ + ε), ν̂ = ν/(1 − β₂ᵗ)."""
    nu, t = optax.tree.get(opt_state, "nu"), optax.tree.get(opt_state, "count")
    return jax.tree.map(lambda v: (1 - 0.9**t) * (jnp.sqrt(v / (1 - b2**t)) + 1e-8), nu)


def of_rmsprop(opt_state: Any, params: ArrayTree) -> ArrayTree:
    """P = diag √(ν + ε): optax has ε inside the root."""
    return jax.tree.map(lambda v: jnp.sqrt(v + 1e-8), optax.tree.get(opt_state, "nu"))


def averaging(rate: Any) -> optax.GradientTransformation:
    """m ← .9 m + .1 g, ω ← ω − ηm."""
    return optax.chain(optax.ema(BETA, debias=False), optax.scale_by_learning_rate(rate))


SLOW, FAST = "RMSprop, decay .99", "RMSprop, decay .9"
METHODS = {
    "gradient descent": Method(optax.sgd, 0.3, 2, no_preconditioner),
    "heavy ball": Method(functools.partial(optax.sgd, momentum=BETA), 0.6, 2 + 2 * BETA, no_preconditioner),
    "Nesterov": Method(
        functools.partial(optax.sgd, momentum=BETA, nesterov=True),
        0.2,
        (2 + 2 * BETA) / (1 + 2 * BETA),
        no_preconditioner,
    ),
    "Adam": Method(optax.adam, 5e-3, (2 + 2 * BETA) / (1 - BETA), of_adam),
    SLOW: Method(functools.partial(optax.rmsprop, decay=0.99), 2e-4, 2, of_rmsprop),
    FAST: Method(optax.rmsprop, 2e-4, 2, of_rmsprop),
}
# How close to 1 the ratio is claimed to stay. The limit takes P as constant, which RMSprop's is the less the lower its
# decay: at optax's default of .9 the ratio stays about 1.25, a miss that its row names. The claim on it is only that it
# is further away than at .99.
GATES = {"gradient descent": 0.05, "heavy ball": 0.05, "Nesterov": 0.05, "Adam": 0.05, SLOW: 0.1}


class Run(NamedTuple):
    """(C,) ηλ over its limit at each check, (T,) the loss before each step, and the state at the end."""

    ratio: np.ndarray
    loss: np.ndarray
    state: training.TrainState

    @property
    def settled(self) -> np.ndarray:
        """The last third of the ratios."""
        return self.ratio[-(len(self.ratio) // 3) :]


def run(
    *, seed: int = 0, num_examples: int = 500, width: int = 32, num_steps: int = 2100, share: Share = unseen
) -> Record:
    """λ_max(P⁻¹H) along training of a tanh network on digits, over the limit that linear stability gives."""
    if num_steps < 3 * STEPS_A_CHECK:
        raise ValueError(f"num_steps: expected {3 * STEPS_A_CHECK} or more, got {num_steps}")
    inputs, labels = jax.tree.map(lambda x: x[:num_examples], data.digits())
    batch = (inputs, jax.nn.one_hot(labels, 10))
    model = nn.mlp([width, width, 10], activation=jnp.tanh)
    loss = losses.mean_loss(model.apply, losses.squared_error)
    init_key, key = jax.random.split(jax.random.key(seed))
    params = model.init(init_key, inputs.shape[1:])
    runs, read = {}, {}
    for name, method in watched(METHODS.items(), share):
        runs[name] = _follow(loss, params, batch, method, num_steps, key)
        read[name] = _read(loss, batch, method, runs[name].state, key)
    mean = {name: found.settled.mean() for name, found in runs.items()}
    with jax.enable_x64(True):
        thresholds = _thresholds()
    claims = [
        *(
            within(
                slug("limit_on_quadratic", name),
                f"on a quadratic, {name}: the rate at which iterates begin to grow",
                *pair,
                1e-6,
            )
            for name, pair in thresholds.items()
        ),
        *(
            within(slug("edge", name), f"{name}: ηλ over its limit, mean over the last third", 1, mean[name], tolerance)
            for name, tolerance in GATES.items()
        ),
        below(
            "start_below_limits",
            f"all start below their limits: the largest at step {STEPS_A_CHECK}",
            1,
            max(r.ratio[0] for r in runs.values()),
        ),
        above(
            "faster_rmsprop_farther",
            "RMSprop whose P moves faster, decay .9: the same, against decay .99",
            mean[SLOW],
            mean[FAST],
        ),
        close(
            "read_from_updates",
            "the same ratio read from each optimizer's own update, largest difference",
            0,
            max(abs(read[name] / runs[name].ratio[-1] - 1) for name in METHODS),
            0.02,
        ),
    ]
    return Record(
        name="edge_of_stability",
        question=QUESTION,
        config={"num_examples": num_examples, "width": width, "num_steps": num_steps},
        seed=seed,
        dtype="float32",
        measurements={
            "ratio": {name: found.ratio for name, found in runs.items()},
            "loss": {name: found.loss for name, found in runs.items()},
            "ratio_of_update": read,
            "thresholds": {name: measured for name, (_, measured) in thresholds.items()},
        },
        claims=claims,
        panels=_panels(runs, num_examples),
        rows=[_row(name, found) for name, found in runs.items()],
    )


def _follow(loss: Loss, params: ArrayTree, batch: Any, method: Method, num_steps: int, key: Array) -> Run:
    optimizer = method.make(method.rate)
    update = training.make_update(loss, optimizer)

    def check(carry: tuple[training.TrainState, ArrayTree], key: Array) -> tuple[Any, tuple[Array, Array]]:
        state, start = carry
        state, metrics = training.trajectory(update, state, batch, num_steps=STEPS_A_CHECK)
        preconditioner = method.preconditioner(state.opt_state, state.params)
        op = curvature.precondition(curvature.hessian(loss, state.params, batch), preconditioner)
        # At the edge the largest two are close: both are followed, so that neither hides the other.
        top = curvature.eigsh(op, 2, key=key, tol=1e-2, v0=start)
        return (state, jax.tree.map(lambda x: x.sum(axis=0), top.vectors)), (metrics["loss"], top.values[0])

    begin = (training.init_state(params, optimizer), jax.tree.map(jnp.zeros_like, params))
    keys = jax.random.split(key, num_steps // STEPS_A_CHECK)
    (state, _), (values, sharpness) = jax.jit(functools.partial(training.trajectory, check))(begin, keys)
    return Run(method.rate * np.asarray(sharpness) / method.limit, np.asarray(values).ravel(), state)


def _read(loss: Loss, batch: Any, method: Method, state: training.TrainState, key: Array) -> float:
    found = stability(loss, state.params, batch, method.make(method.rate), state.opt_state, key=key)
    return float(found.ratio)


def _thresholds() -> dict[str, tuple[float, float]]:
    """On a quadratic of three parameters: the limit in closed form, and where optax's iterates begin to grow."""
    rows = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.5, 1.0], [1.0, 0.0, 1.0]])
    # Second moments that hardly move, of a run that is long past the correction of its averages.
    still, moments, steps = 1 - 1e-10, jnp.array([0.04, 1.3, 0.25]), jnp.array(2**31 - 1, jnp.int32)
    as_it_is = lambda state: state
    cases: dict[str, tuple[Make, Callable[[Any], Any], Method]] = {
        **{
            name: (METHODS[name].make, as_it_is, METHODS[name])
            for name in ("gradient descent", "heavy ball", "Nesterov")
        },
        "momentum that averages": (averaging, as_it_is, METHODS["Adam"]._replace(preconditioner=no_preconditioner)),
        "Adam": (
            functools.partial(optax.adam, b2=still),
            lambda state: optax.tree.set(state, nu=moments, count=steps),
            METHODS["Adam"]._replace(preconditioner=functools.partial(of_adam, b2=still)),
        ),
        "RMSprop": (
            functools.partial(optax.rmsprop, decay=still),
            lambda state: optax.tree.set(state, nu=moments),
            METHODS[SLOW],
        ),
    }
    found = {}
    for name, (make, prepare, method) in cases.items():
        start = jnp.array([1e-9, -2e-9, 3e-9])
        root = jnp.sqrt(method.preconditioner(prepare(make(1.0).init(start)), start))
        largest = jnp.linalg.eigvalsh(rows.T @ rows / 3 / root / root[:, None])[-1]
        found[name] = (method.limit / float(largest), _begins_to_grow(make, prepare, start, rows))
    return found


def parabola(params: Array, batch: Array) -> Array:
    """½ mean (x·ω)²."""
    return jnp.mean((batch @ params) ** 2) / 2


def _begins_to_grow(make: Make, prepare: Callable[[Any], Any], start: Array, rows: Array) -> float:
    """Bisection of the rate, on the size of the iterates alone."""

    @jax.jit
    def grows(rate: Array) -> Array:
        optimizer = make(rate)
        update, state = training.make_update(parabola, optimizer), training.init_state(start, optimizer)
        begin, size = state._replace(opt_state=prepare(state.opt_state)), lambda state, _: optax.tree.norm(state.params)
        sizes = training.trajectory(update, begin, rows, num_steps=1000, observe=size)[1]
        # By then what dies out has died out; what grows soon leaves a neighbourhood of 0.
        return (sizes[-1] > sizes[-101]) | jnp.any(sizes > 1e-6)

    low, high = 0.0, 100.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if grows(jnp.asarray(middle)) else (middle, high)
    return middle


def _row(name: str, run: Run) -> tuple[str, Any, str]:
    method = METHODS[name]
    what = "λ_max(H)" if method.preconditioner is no_preconditioner else "λ_max(P⁻¹H)"
    spread = f"± {run.settled.std():.3f} along the last third; η = {method.rate:g}, limit {what} = {method.limit:.3g}/η"
    mean, gate = float(run.settled.mean()), GATES.get(name, GATES[SLOW])
    miss = "" if abs(mean - 1) <= gate else f"; a miss: further than {gate:.0%} from 1"
    return f"{name}: ηλ over its limit", mean, spread + miss


def _panels(runs: dict[str, Run], num_examples: int) -> list[Panel]:
    steps = STEPS_A_CHECK * np.arange(1, 1 + len(next(iter(runs.values())).ratio))
    return [
        Panel(
            name="curvature_over_limit",
            title="Curvature rises to each optimizer's limit, and stays; RMSprop overshoots it",
            xlabel="step",
            ylabel="η λ_max(P⁻¹H) over its limit",
            series=[Series(name, steps, found.ratio) for name, found in runs.items()],
            lines=[Line("limit of stability", 1.0, axis="y")],
        ),
        Panel(
            name="loss",
            title=f"The loss on {num_examples} digits keeps falling at the edge, though not at every step",
            xlabel="step",
            ylabel="loss, mean of ½‖o − t‖²",
            series=[Series(name, np.arange(len(found.loss)), found.loss) for name, found in runs.items()],
            yscale="log",
        ),
    ]
