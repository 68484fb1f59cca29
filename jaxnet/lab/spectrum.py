"""The spectrum of a task's Hessian: its density, its top eigenvalues, and the sharpness of each layer."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import contract, curvature, learning_rate, training
from jaxnet.contract import Array, ArrayTree, UserError, check_batch_size, leaf_names
from jaxnet.curvature import Eigenpairs, LinearOperator
from jaxnet.lab import _panels, record
from jaxnet.lab._progress import OnStage, Share
from jaxnet.lab._task import Task, TaskConfig, check_count, keys_of, make_task, rate_of
from jaxnet.lab.record import Line, Panel, Record, Series


@dataclasses.dataclass(frozen=True)
class SpectrumConfig(TaskConfig):
    """Show the eigenvalues of a task's Hessian: how they are spread, the largest of them, and each layer's largest."""

    num_eigenvalues: int = 10
    """How many of the largest to find one by one."""
    num_epochs: int = 0
    """Epochs of training before, by mini-batches at the rate that theory gives."""
    batch_size: int = 32
    """Of that training."""
    num_probes: int = 8
    """Random vectors of the density."""
    num_steps: int = 64
    """Lanczos steps from each."""


def stages(config: SpectrumConfig, on_stage: OnStage = lambda stage, share: None) -> Iterator[Record]:
    """The record, growing: the top eigenvalues, then the layers', then the density.

    Raises:
      UserError: before the first yield, if the configuration does not hold together.
    """
    check_count("num_epochs", config.num_epochs, lowest=0)
    check_count("num_eigenvalues", config.num_eigenvalues)
    check_count("num_probes", config.num_probes, lowest=2)
    check_count("num_steps", config.num_steps)
    keys = keys_of(config, 5)
    on_stage("loading data", 0.0)
    task = make_task(config, key=keys[0])
    check_batch_size(config.batch_size, task.num_examples)
    check_count("num_eigenvalues, of as many parameters", config.num_eigenvalues, highest=task.num_params)
    where = "at the initial parameters"
    params = task.params
    begins = 0.35 if config.num_epochs else 0.05
    if config.num_epochs:
        on_stage("training", 0.05)
        params = _trained(config, task, keys[1], lambda done: on_stage("training", 0.25 + 0.1 * done))
        where = f"after {config.num_epochs} epochs"
    batch = task.sample
    op = curvature.hessian(task.loss, params, batch)

    on_stage("top eigenvalues", begins)
    found = _with_top(config, task, op, where, keys[2])
    yield found
    on_stage("layers", begins + 0.3 * (1 - begins))
    found = _with_layers(found, task, params, keys[3])
    yield found
    on_stage("density", begins + 0.7 * (1 - begins))
    initial = curvature.hessian(task.loss, task.params, batch) if config.num_epochs else None
    yield _with_density(config, found, op, initial, keys[4])
    on_stage("done", 1.0)


def _trained(config: SpectrumConfig, task: Task, key: Array, share: Share) -> ArrayTree:
    analysis = learning_rate.analyse(task.loss, task.params, task.train, key=key)
    result = training.fit(
        task.loss,
        task.params,
        task.train,
        optax.sgd,
        learning_rate=rate_of(analysis, config.batch_size),
        batch_size=config.batch_size,
        num_epochs=config.num_epochs,
        key=key,
        observers=[lambda progress: share(progress.epoch / progress.num_epochs)],
    )
    if result.stopped.reason == "diverged":
        raise UserError(f"num_epochs: the training before {result.stopped}")
    return result.state.params


def _with_top(config: SpectrumConfig, task: Task, op: LinearOperator, where: str, key: Array) -> Record:
    pairs = curvature.eigsh(op, config.num_eigenvalues, key=key)
    if not np.isfinite(pairs.values).all():
        raise UserError(f"the Hessian {where} is not finite; rescale the data, or use --dtype float64")
    # Relative to itself: after training it may be a thousandth of λ_max, and take hundreds of products.
    smallest = curvature.eigsh(op, which="SA", tol=1e-2, key=key)
    examples = contract.num_examples(task.sample)
    rows = [*task.rows]
    for i, (value, residual) in enumerate(zip(pairs.values, pairs.residual_norms, strict=True), start=1):
        rows.append((f"λ_{i}", float(value), f"residual {float(residual):.1g}"))
    rows.append(("λ_min", float(smallest.values[0]), f"residual {float(smallest.residual_norms[0]):.1g}"))
    rows.append(_spent("largest", pairs))
    rows.append(_spent("smallest", smallest))
    values, _ = _panels.of_eigenpairs(pairs, f"The largest eigenvalues of the Hessian, {where}")
    return Record(
        name="spectrum",
        question=(
            f"What are the Hessian's eigenvalues {where}? {task.title}, {task.num_params} parameters, N = {examples}"
        ),
        config=dataclasses.asdict(config),
        seed=config.seed,
        dtype=str(jnp.result_type(*jax.tree.leaves(task.params))),
        measurements={
            "eigenvalues": pairs.values,
            "residual_norms": pairs.residual_norms,
            "smallest": smallest.values[0],
            "num_examples": examples,
        },
        rows=rows,
        panels=[values],
        answer=_answer(pairs),
    )


def _answer(pairs: Eigenpairs) -> list[str]:
    largest = float(pairs.values[0])
    if not largest > 0:
        return [f"The Hessian's largest eigenvalue is {largest:.3g}: no curvature bounds the rate here."]
    return [
        f"The Hessian's largest eigenvalue is {largest:.4g}: here gradient descent is stable up to a rate of "
        f"{2 / largest:.3g}, and on a quadratic {1 / largest:.3g} is best."
    ]


def _spent(words: str, pairs: Eigenpairs) -> tuple[str, int, str]:
    return f"products, {words}", int(pairs.num_matvecs), "converged" if pairs.converged else "NOT converged"


def _with_layers(found: Record, task: Task, params: ArrayTree, key: Array) -> Record:
    whole = float(found.measurements["eigenvalues"][0])
    of = functools.partial(curvature.layer_sharpness, task.loss, params, task.sample, key=key)
    named = {f"layer {name}" if name.isdigit() else name: pairs for name, pairs in of().items()}
    kernels = ["kernel" in name for name in leaf_names(params)]
    if any(kernels) and not all(kernels):
        named |= of(groups={"weights without biases": "*kernel*"})
    values = {name: float(pairs.values[0]) for name, pairs in named.items()}
    # Where the outputs saturate there may be no curvature left.
    share = lambda value: f"{value / whole:.0%} of the whole" if whole > 0 else ""
    rows = [(f"λ_max, {name}", value, share(value)) for name, value in values.items()]
    # Cauchy's interlacing: a diagonal block's largest eigenvalue is at most the matrix's, each known to 1e-3.
    claims = [
        record.below("parts_below_whole", "no part is sharper than the whole", 1.002 * whole, max(values.values()))
    ]
    panel = Panel(
        name="sharpness_of_parts",
        title="Largest eigenvalue of each part's diagonal block",
        xlabel="part",
        ylabel="λ_max",
        series=[Series("", [name], [value], "bars", 0) for name, value in values.items()],
        lines=[Line("the whole Hessian", whole, "y")],
    )
    return dataclasses.replace(
        found,
        rows=[*found.rows, *rows],
        claims=claims,
        measurements={**found.measurements, "parts": values},
        panels=[*found.panels, panel],
    )


def _with_density(
    config: SpectrumConfig, found: Record, op: LinearOperator, initial: LinearOperator | None, key: Array
) -> Record:
    of = functools.partial(
        curvature.spectral_density, key=key, num_probes=config.num_probes, num_steps=config.num_steps
    )
    density = of(op)
    n = op.space.size
    mean, error = (n * float(x) for x in density.mean(density.nodes))
    flat, _ = density.cumulative(jnp.array([-1e-3, 1e-3]) * found.measurements["eigenvalues"][0], 1e-9)
    rows = [
        *found.rows,
        ("trace", mean, f"± {error:.2g}, from {density.num_matvecs} products"),
        ("flat directions", float(flat[1] - flat[0]), "share of eigenvalues within 1e-3 λ_max of 0"),
    ]
    measurements = {**found.measurements, "trace": mean, "trace_error": error, **dataclasses.asdict(density)}
    tops, smallest = found.measurements["eigenvalues"], float(found.measurements["smallest"])
    panels = [*found.panels, *_panels.of_density(density, count=n, tops=tops, smallest=smallest)]
    if initial is not None:
        before = of(initial)
        measurements["initial"] = dataclasses.asdict(before)
        labels = ["at the initial parameters", f"after {config.num_epochs} epochs"]
        panels += _panels.of_densities([before, density], labels)
    return dataclasses.replace(found, rows=rows, measurements=measurements, panels=panels)
