"""The main job: what should the learning rate be, and does training agree?"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import contract, curvature, learning_rate
from jaxnet.contract import Array, check_batch_size
from jaxnet.lab import _panels, _runs, record
from jaxnet.lab._progress import OnStage, Share
from jaxnet.lab._resumed import as_read, check_same_job
from jaxnet.lab._task import Task, TaskConfig, check_count, check_own_rate, checked_rate, keys_of, known, make_task
from jaxnet.lab.record import Claim, Record
from jaxnet.learning_rate import Analysis, MeasuredStability

MOMENTUM = 0.9
Optimizer = Literal["sgd", "momentum", "nesterov", "adam", "adamw", "nadam", "amsgrad", "rmsprop", "lion"]
OPTIMIZERS: dict[Optimizer, Callable[[Any], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=MOMENTUM),
    "nesterov": functools.partial(optax.sgd, momentum=MOMENTUM, nesterov=True),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "nadam": optax.nadam,
    "amsgrad": optax.amsgrad,
    "rmsprop": optax.rmsprop,
    "lion": optax.lion,
}
# Targets of this size are out of reach for a few epochs.
LARGE_TARGETS = 100.0
# Rates of the ladder, in units of the predicted limit: from .35 to 8, closer together around 1.
STEPS_OF_LADDER = 2.0 ** np.unique(np.concatenate([np.arange(-1.5, 3.01, 0.25), np.arange(-0.5, 0.51, 0.125)]))


@dataclasses.dataclass(frozen=True)
class AnalyseConfig(TaskConfig):
    """Derive the learning rate of a task from its curvature and noise, and hold it against training."""

    batch_size: int = 32
    """B of the mini-batch run."""
    optimizer: Optimizer = "sgd"
    """What trains; momentum and nesterov with β = 0.9."""
    learning_rate: float | None = None
    """A rate of your own for the full-batch run, in place of the derived one."""
    num_epochs: int = 30
    """Epochs of each of the three runs: equal numbers of example gradients."""


def stages(
    config: AnalyseConfig, on_stage: OnStage = lambda stage, share: None, begun: Record | None = None
) -> Iterator[Record]:
    """The job's record, growing: one yield after each stage, so that an interrupted job keeps what it has.

    Each stage is a function of the task and of the record so far, as JSON has it; so a job that goes on from ``begun``,
    the record of one that was broken off, leaves the same record as one that was not.

    Raises:
      UserError: before the first yield, if the configuration does not hold together, or ``begun`` is of another job.
    """
    known("optimizer", config.optimizer, OPTIMIZERS)
    keys = keys_of(config, 5)
    on_stage("loading data", 0.0)
    task = make_task(config, key=keys[0])
    check_batch_size(config.batch_size, task.num_examples)
    check_count("num_epochs", config.num_epochs)
    own = config.learning_rate
    check_own_rate(own, config.dtype)
    if begun is None:
        on_stage("λ_max and the gradient's noise", 0.03)
        begun = _analysed(config, task, keys[1])
    else:
        check_same_job(begun, "analyse", config, task)
    yield (found := as_read(begun))

    names = {
        "full batch": None,
        f"mini-batch, B = {config.batch_size}": config.batch_size,
        "stochastic, B = 1": 1,
    }
    for number, (name, batch_size) in enumerate(names.items()):
        if number < len(found.measurements["runs"]):
            continue
        derived = checked_rate(_at(found, "recommended", batch_size), batch_size)
        rate = own if own is not None and batch_size is None else derived
        # Of the default job, the analysis takes half; of a run, its sweep more than the training before it.
        words, begins = f"training, {name}", 0.5 + 0.12 * number
        share: Share = lambda done: on_stage(words, begins + 0.05 * done)
        run = _runs.train(
            task, name, OPTIMIZERS[config.optimizer], batch_size,
            derived=derived, rate=rate, num_epochs=config.num_epochs, key=keys[2], share=share,
        )  # fmt: skip
        yield (
            found := as_read(_runs.with_run(found, run, contract.num_examples(task.sample), _limit_by_sharpness(found)))
        )

    # With second moments there is no limit before they have seen gradients, and gradient descent's is another's.
    if config.optimizer in _runs.PLAIN and "ladder" not in found.measurements:
        on_stage("ladder of rates", 0.86)
        yield _with_ladder(found, task, keys[3:])
    on_stage("done", 1.0)


def _analysed(config: AnalyseConfig, task: Task, key: Array) -> Record:
    n = task.num_examples
    analysis = learning_rate.analyse(
        task.loss,
        task.params,
        task.train,
        key=key,
        make_optimizer=OPTIMIZERS[config.optimizer],
        batch_sizes=sorted({1, config.batch_size, n}),
    )
    return Record(
        name="analyse",
        question=f"What should the learning rate be? {task.title}, {task.num_params} parameters, N = {n}",
        config=dataclasses.asdict(config),
        seed=config.seed,
        dtype=str(jnp.result_type(*jax.tree.leaves(task.params))),
        measurements={**analysis.to_dict(), "runs": [], "data": task.digest},
        rows=[*task.rows, *_of_targets(task), *analysis.rows(), *_of_own_rate(config, analysis)],
        panels=_panels.of_analysis(analysis),
        answer=answer(config.optimizer, config.batch_size, analysis),
    )


def _at(found: Record, name: str, batch_size: int | None) -> float:
    """What was derived for batches of B; None is the full batch, the largest."""
    sizes = found.measurements["batch_sizes"]
    return float(found.measurements[name][sizes.index(batch_size) if batch_size else -1])


def _limit_by_sharpness(found: Record) -> float:
    """Without second moments the limit is c/λ_max; this is c."""
    return _at(found, "limits", None) * float(found.measurements["sharpness"]["value"])


def answer(name: str, size: int, analysis: Analysis) -> list[str]:
    """What to do with an optimizer and batches of a size, and what not to."""
    rate, error = float(analysis.rate(size)), float(analysis.rate_error(size))
    if not rate > 0:
        return [analysis.reason(size)]
    words = [f"Train {name} at η = {rate:.3g} with batches of {size} (± {error:.1g})."]
    low, high = (float(end) for end in analysis.bracket(size))
    if analysis.derived.signs:
        words.append(f"{name} takes signs: its steps do not shrink, so no rate is a limit; let the rate fall to 0.")
    elif np.isfinite(high):
        between = f"between {low:.3g} and {high:.3g}" if np.isfinite(low) else f"at most {high:.3g}"
        limit = float(analysis.limit(size))
        words.append(f"At these parameters a constant rate is unstable from about {limit:.3g} on ({between}).")
        if rate > limit:
            words.append("The rate is for a run, which moves to flatter places: warm it up over the first steps.")
    return words


def _of_targets(task: Task) -> list[tuple[str, Any, str]]:
    """A warning where a network's outputs, which begin near 1, have far to go."""
    if task.labelled or task.apply is None:
        return []
    largest = float(jnp.abs(task.train[1]).max())
    if largest < LARGE_TARGETS:
        return []
    return [("largest target", largest, "far from outputs that begin near 1: pass --standardise-target, or rescale")]


def _of_own_rate(config: AnalyseConfig, analysis: Analysis) -> list[tuple[str, Any, str]]:
    rate = config.learning_rate
    if rate is None:
        return []
    return [("your η, full batch", rate, f"stable here? {analysis.is_stable(rate)}")]


def _with_ladder(found: Record, task: Task, keys: Array) -> Record:
    batch, value = task.sample, found.measurements["sharpness"]["value"]
    n = contract.num_examples(batch)
    if n < task.num_examples:
        value = curvature.sharpness(task.loss, task.params, batch, key=keys[0], tol=1e-4).value
    make = OPTIMIZERS[found.config["optimizer"]]
    predicted = _limit_by_sharpness(found) / float(value)
    rates = predicted * STEPS_OF_LADDER
    ladder = learning_rate.measure_stability(task.loss, task.params, batch, make, rates=rates, key=keys[1])
    sampling = f"{'gradient descent' if make is optax.sgd else found.config['optimizer']} on {n} examples"
    if np.isnan(float(ladder.limit)) and found.dtype == "float32":
        # Kinks (relu) lie closer to ω₀ than single precision can start beside it.
        with jax.enable_x64(True):
            double = lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
            params, batch = jax.tree.map(double, (task.params, batch))
            ladder = learning_rate.measure_stability(task.loss, params, batch, make, rates=rates, key=keys[1])
        sampling += ", in float64"
    # In NumPy, which keeps the double precision that JAX has only inside of the block above.
    ladder = jax.tree.map(np.asarray, ladder)
    limit, error = float(ladder.limit), float(ladder.limit_error)
    high = float(ladder.plain_bracket[1])
    rows = [
        *found.rows,
        (
            "η where ω₀ loses stability",
            limit,
            f"± {error:.1g}, measured: {sampling}; predicted {predicted:.5g}",
        ),
        ("η where plain training fails", high, _of_plain_training(ladder)),
    ]
    claims = [_stability_claim(predicted, limit), *found.claims]
    measurements = {
        **found.measurements,
        "ladder": {
            **dataclasses.asdict(ladder),
            "predicted": predicted,
            "limit": limit,
            "limit_error": error,
        },
    }
    panels = [*found.panels, *_panels.of_measured(ladder, predicted)]
    return dataclasses.replace(found, measurements=measurements, rows=rows, claims=claims, panels=panels)


def _of_plain_training(ladder: MeasuredStability) -> str:
    low, high = (float(x) for x in ladder.plain_bracket)
    if np.isnan(high):
        return f"measured: no rate of the ladder fails, up to {low:.3g}"
    return f"measured: the first on the ladder; {low:.3g} still trains"


def _stability_claim(predicted: float, limit: float) -> Claim:
    return record.within("limit", "loss of stability at ω₀, predicted and measured", predicted, limit, 0.05)
