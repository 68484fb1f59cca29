"""Predicted limits of stability against measured ones: seven ways to update, three problems."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import data, learning_rate, losses, nn, training
from jaxnet.contract import Array
from jaxnet.lab._progress import Share, unseen, watched
from jaxnet.lab._task import known
from jaxnet.lab.record import Claim, Line, Panel, Record, Series, slug, within

QUESTION = "Does training lose stability at the rate that theory predicts, whatever the update and the batch size?"

MOMENTUM = 0.9
OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "gradient descent": optax.sgd,
    "heavy ball": functools.partial(optax.sgd, momentum=MOMENTUM),
    "Nesterov": functools.partial(optax.sgd, momentum=MOMENTUM, nesterov=True),
    "Adam": optax.adam,
}
# In units of the prediction, which none of them meets: about it for the local limit, and beyond for plain training.
LADDER = np.array([0.65, 0.85, 0.94, 1.03, 1.1, 1.3, 1.8, 2.7, 4.2])
PROBLEMS = ("two Gaussians", "digits, MLP", "digits, LeNet")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss, where it starts and its examples; for SGD, the examples whose targets are the outputs there."""

    loss: losses.MeanLoss
    params: Any
    batch: tuple[Array, Array]
    num_particles: int

    @property
    def at_minimum(self) -> tuple[Array, Array]:
        """The inputs with the network's own outputs as targets: ω₀ is then a minimum for every example."""
        return self.batch[0], jax.jit(self.loss.apply)(self.params, self.batch[0])


def run(
    *,
    seed: int = 0,
    num_examples: int = 64,
    widths: tuple[int, ...] = (32, 32),
    problems: tuple[str, ...] = PROBLEMS,
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64),
    share: Share = unseen,
) -> Record:
    """η at which ω₀ loses stability for four optimizers on the full batch, and for SGD at four batch sizes."""
    for name in problems:
        known("problem", name, PROBLEMS)
    with jax.enable_x64(True):
        posed = _problems(jax.random.key(seed), num_examples, widths)
        keys = {name: jax.random.fold_in(jax.random.key(seed), number) for number, name in enumerate(PROBLEMS)}
        found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in problems}
        methods: dict[str, Callable[[Problem, Array], dict[str, float]]] = {
            **{method: functools.partial(_full_batch, make) for method, make in OPTIMIZERS.items()},
            **{f"SGD, B = {size}": functools.partial(_stochastic, size) for size in batch_sizes},
        }
        for name, (method, measure) in watched(itertools.product(problems, methods.items()), share):
            found[name][method] = measure(posed[name], keys[name])
    return Record(
        name="learning_rate_sweep",
        question=QUESTION,
        config={"num_examples": num_examples, "widths": widths, "problems": problems, "batch_sizes": batch_sizes},
        seed=seed,
        dtype="float64",
        measurements=found,
        claims=[_claim(name, method, row) for name, rows in found.items() for method, row in rows.items()],
        rows=[row for name, rows in found.items() for row in _rows(name, rows)],
        panels=[_panel(found)],
    )  # fmt: skip


def _problems(key: Array, num_examples: int, widths: tuple[int, ...]) -> dict[str, Problem]:
    double = lambda x: jnp.asarray(x, jnp.float64)
    inputs, labels = jax.tree.map(lambda x: x[:num_examples], data.digits())
    inputs = double(inputs)

    def network(model: nn.Layer, x: Array) -> Problem:
        loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
        return Problem(loss, jax.tree.map(double, model.init(key, x.shape[1:])), (x, labels), 32)

    neuron = nn.linear_neuron()
    return {
        "two Gaussians": Problem(
            losses.mean_loss(neuron.apply, losses.squared_error),
            neuron.init(key, (2,)),
            data.two_gaussians(key=key),
            256,
        ),
        "digits, MLP": network(nn.mlp([*widths, 10], activation=jnp.tanh), inputs),
        "digits, LeNet": network(nn.lenet(10, kernel_size=3, activation=jnp.tanh), inputs.reshape(-1, 8, 8, 1)),
    }


def _full_batch(make: Callable[[Any], Any], problem: Problem, key: Array) -> dict[str, float]:
    """Predicted from the update and Hessian products, measured from iterates about ω₀ on the tilted loss."""
    loss, params, batch = problem.loss, problem.params, problem.batch
    state = _warm_state(loss, params, batch, make, key)
    predicted = float(learning_rate.stability(loss, params, batch, make(1.0), state, key=key).limit)
    ladder = learning_rate.measure_stability(
        loss, params, batch, make, rates=predicted * LADDER, key=key, opt_state=state, num_starts=2, num_steps=30
    )
    return {
        "predicted": predicted,
        "measured": float(ladder.limit),
        "error": float(ladder.limit_error),
        "plain": float(ladder.plain_bracket[1]),
    }


@functools.partial(jax.jit, static_argnames=("loss", "make"))
def _warm_state(loss: Any, params: Any, batch: Any, make: Callable[[Any], Any], key: Array) -> Any:
    """The state after 1500 mini-batches at ω₀, momentum removed: an optimizer with second moments has them settled."""
    optimizer = make(1.0)

    def step(state: Any, key: Array) -> tuple[Any, None]:
        rows = jax.random.randint(key, (16,), 0, len(batch[1]))
        gradient = jax.grad(loss)(params, jax.tree.map(lambda x: x[rows], batch))
        return optimizer.update(gradient, state, params)[1], None

    at_rest = optimizer.init(params)
    moments, _ = training.trajectory(step, at_rest, jax.random.split(key, 1500))
    momenta = ("mu", "trace")
    return jax.tree_util.tree_map_with_path(
        lambda path, rest, moved: rest if any(getattr(part, "name", None) in momenta for part in path) else moved,
        at_rest, moments,
    )  # fmt: skip


def _stochastic(size: int, problem: Problem, key: Array) -> dict[str, float]:
    """Predicted from the examples' Hessians, measured from the mean square of a population of runs."""
    loss, data = losses.mean_loss(problem.loss.apply, losses.squared_error), problem.at_minimum
    predicted = float(
        learning_rate.sgd_stability(loss, problem.params, data, size, replace=True, gauss_newton=True, tol=1e-4)
    )
    # Single precision resolves the differences of gradients; the larger the batch, the fewer runs: they are more alike.
    params, data = jax.tree.map(lambda x: x.astype(jnp.float32), (problem.params, data))
    highest, num_halvings = 1.5 * predicted, 7
    num_particles = min(problem.num_particles, max(8, 256 // size))
    found = learning_rate.measure_sgd_stability(
        loss, params, data, size, highest=highest, key=key, num_particles=num_particles, num_steps=100, num_repeats=2,
        num_halvings=num_halvings,
    )  # fmt: skip
    error = max(float(found.limit_error), highest / 2 ** (num_halvings + 1))
    return {"predicted": predicted, "measured": float(found.limit), "error": error}


def _claim(problem: str, method: str, row: dict[str, float]) -> Claim:
    return within(
        slug("limit", problem, method),
        f"{problem}, {method}: η where ω₀ loses stability",
        row["predicted"],
        row["measured"],
        0.05,
    )


def _rows(problem: str, rows: dict[str, dict[str, float]]) -> list[tuple[str, float, str]]:
    """The measured limits with their errors, and where plain training fails if the ladder holds that."""

    def remark(row: dict[str, float]) -> str:
        multiple = row.get("plain", np.nan) / row["predicted"]
        plain = f"; plain training fails at {multiple:.3g} times that" if np.isfinite(multiple) else ""
        return f"± {row['error']:.1g}, predicted {row['predicted']:.5g}{plain}"

    return [
        (f"{problem}, {method}: η where ω₀ loses stability", row["measured"], remark(row))
        for method, row in rows.items()
    ]


def _panel(found: dict[str, dict[str, dict[str, float]]]) -> Panel:
    series = [
        Series(
            name,
            [method.removeprefix("SGD, ").replace("gradient descent", "GD") for method in rows],
            [row["measured"] / row["predicted"] for row in rows.values()],
            "points",
        )
        for name, rows in found.items()
    ]
    return Panel(
        name="measured_over_predicted",
        title="The rate at which ω₀ loses stability: measured from gradients, over theory's",
        xlabel="update: an optimizer on the full batch, or SGD with batches of B",
        ylabel="measured η / predicted η",
        series=series,
        lines=[Line("equal", 1.0, "y"), Line("5 % below", 0.95, "y"), Line("5 % above", 1.05, "y")],
    )
