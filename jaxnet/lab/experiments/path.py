"""Too small, optimal, too large: the paths of four rates over the level lines of E, for three batch sizes."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import curvature, data, learning_rate
from jaxnet.contract import Array
from jaxnet.lab.experiments.two_gaussians import minimum_of_weights, walk, weights_only
from jaxnet.lab.record import Claim, Contours, Panel, Record, Series, below, close, slug

QUESTION = "How do too small, optimal and too large rates move over the level lines of E, for three batch sizes?"

RATIOS = {0.1: "too small", 1.0: "the inverse curvature", 1.9: "large", 2.1: "too large"}
BATCH_SIZES = (10, 1)
FINDINGS = {
    None: "Full batch: η_opt ends the steep direction in one step, beyond 2η_opt it grows",
    10: "B = 10: the same paths in the mean, and a floor that they keep missing",
    1: "B = 1: what the full batch bears at 1.9 η_opt throws single examples out",
}
START = (-0.25, 2.2)
TOLERANCE = 1e-3
# Beyond a few steps the mean of a growing E rests on runs that are too rare to be among those drawn.
MOMENT_STEPS = 4
Batch = tuple[Array, Array]


def run(*, seed: int = 0, num_steps: int = 30, num_runs: int = 20_000, num_examples: int = 100) -> Record:
    """A linear neuron of two weights at .1, 1, 1.9 and 2.1 of η_opt = 1/λ_max, full batch, mini-batch and stochastic.

    Along an eigenvector of curvature λ a full-batch step multiplies the distance from the minimum by 1 − ηλ. Batches
    drawn independently share that path in the mean; the mean of E follows from the examples' second moments.
    """
    with jax.enable_x64(True):
        return _run(seed, num_steps, num_runs, num_examples)


def _run(seed: int, num_steps: int, num_runs: int, num_examples: int) -> Record:
    batch, start, key = data.two_gaussians_exact(num_examples), jnp.array(START), jax.random.key(seed)
    sharp = curvature.sharpness(weights_only, start, batch, key=key, tol=1e-12)
    rates = {ratio: ratio * float(learning_rate.optimal(sharp.value)) for ratio in RATIOS}
    every = jnp.broadcast_to(jnp.arange(num_examples), (1000, num_examples))
    full = {ratio: np.asarray(walk(start, batch, rate, every)) for ratio, rate in rates.items()}
    steps = {ratio: _steps_to_tolerance(batch, full[ratio], rates[ratio]) for ratio in RATIOS if ratio < 2}
    claims = [claim for ratio in RATIOS for claim in _full_batch_claims(batch, full[ratio], ratio)]
    rows = []
    for ratio, (predicted, measured) in steps.items():
        name = f"full batch, {ratio} η_opt: steps to E − E* = {TOLERANCE} (E₀ − E*)"
        claims.append(close(slug("steps_at", ratio), name, predicted, measured, 0.5))
        rows.append((name, measured, "in one dimension 1 is best; here the shallow direction decides"))
    panels = [_panel("full_batch", FINDINGS[None], batch, {r: full[r][: num_steps + 1] for r in RATIOS})]
    for size in BATCH_SIZES:
        more_claims, more_rows = _noisy(batch, full, rates, size, jax.random.split(key, num_runs))
        claims, rows = claims + more_claims, rows + more_rows
        drawn = jax.random.randint(key, (num_steps, size), 0, num_examples)
        paths = {ratio: np.asarray(walk(start, batch, rate, drawn)) for ratio, rate in rates.items()}
        panels.append(_panel(f"batch_size_{size}", FINDINGS[size], batch, paths))
    return Record(
        name="path",
        question=QUESTION,
        config={"num_steps": num_steps, "num_runs": num_runs, "num_examples": num_examples},
        seed=seed,
        dtype="float64",
        measurements={"rates": rates, "steps": {ratio: measured for ratio, (_, measured) in steps.items()}},
        claims=claims,
        rows=rows,
        panels=panels,
    )


def _minimum(batch: Batch) -> tuple[Array, Array]:
    """ω* and the Hessian H."""
    inputs, _ = batch
    return minimum_of_weights(batch), inputs.T @ inputs / len(inputs)


def _excess(path: np.ndarray, batch: Batch) -> np.ndarray:
    """E − E* = ½ dᵀHd of weights (..., 2) at d = ω − ω*."""
    minimum, hessian = map(np.asarray, _minimum(batch))
    return 0.5 * np.einsum("...i,ij,...j->...", path - minimum, hessian, path - minimum)


def _full_batch_claims(batch: Batch, path: np.ndarray, ratio: float) -> list[Claim]:
    minimum, hessian = map(np.asarray, _minimum(batch))
    values, vectors = np.linalg.eigh(hessian)
    before, after = (path[:2] - minimum) @ vectors
    return [
        close(
            slug("factor", name, "at", ratio),
            f"full batch, {ratio} η_opt: factor a step along the {name} direction",
            1 - ratio * share,
            factor,
            1e-9,
        )
        for name, share, factor in zip(("shallow", "steep"), values / values[-1], after / before, strict=True)
    ]


def _steps_to_tolerance(batch: Batch, path: np.ndarray, rate: float) -> tuple[float, float]:
    """Steps until E − E* is a thousandth of E₀ − E*: by Σ ½λc²(1 − ηλ)²ᵗ over the eigenvectors, and along the path."""
    minimum, hessian = map(np.asarray, _minimum(batch))
    values, vectors = np.linalg.eigh(hessian)
    energies = 0.5 * values * ((path[0] - minimum) @ vectors) ** 2
    expected = (1 - rate * values) ** (2 * np.arange(len(path))[:, None]) @ energies
    return _first_tolerated(expected), _first_tolerated(_excess(path, batch))


def _first_tolerated(curve: np.ndarray) -> float:
    return float(np.argmax(curve <= TOLERANCE * curve[0])) or float("nan")


def _steps(batch: Batch) -> Array:
    """The gradients of the examples as matrices G_n (N, 3, 3) on (d, 1): x_n (x_n·d + x_n·ω* − t_n)."""
    inputs, targets = batch
    errors = inputs @ _minimum(batch)[0] - targets
    upper = inputs[:, :, None] * jnp.column_stack([inputs, errors])[:, None, :]
    return jnp.pad(upper, ((0, 0), (0, 1), (0, 0)))


def _second_moment(gradients: Array, rate: float, batch_size: int) -> Array:
    """E[A ⊗ A] for A = I − η mean of B of the G_n, drawn independently: the map of E[(d, 1)(d, 1)ᵀ] over a step.

    (I − ηḠ) ⊗ (I − ηḠ) + (η²/B)(E[G_n ⊗ G_n] − Ḡ ⊗ Ḡ); its block on d alone has the spectral radius ρ(T).
    """
    mean = gradients.mean(axis=0)
    step = jnp.eye(len(mean)) - rate * mean
    spread = jax.vmap(jnp.kron)(gradients, gradients).mean(axis=0) - jnp.kron(mean, mean)
    return jnp.kron(step, step) + rate**2 / batch_size * spread


def _noisy(
    batch: Batch, full: dict[float, np.ndarray], rates: dict[float, float], size: int, keys: Array
) -> tuple[list[Claim], list[tuple[str, float, str]]]:
    """Many runs on batches drawn independently: their mean path is the full batch's, their mean of E the moments'."""
    draw = lambda key: jax.random.randint(key, (MOMENT_STEPS, size), 0, len(batch[1]))
    indices = jax.vmap(draw)(keys)
    claims, rows, deviations = [], [], []
    for ratio, rate in rates.items():
        start = jnp.asarray(full[ratio][0])
        runs = np.asarray(jax.vmap(lambda rows: walk(start, batch, rate, rows))(indices))[:, 1:]
        error = lambda values: values.std(axis=0) / len(keys) ** 0.5
        deviations.append(np.abs(runs.mean(axis=0) - full[ratio][1 : MOMENT_STEPS + 1]) / error(runs))
        excess = _excess(runs[:, -1], batch)
        name = f"B = {size}, {ratio} η_opt: mean of E − E* after {MOMENT_STEPS} steps"
        claims.append(
            close(
                slug("mean_excess_b", size, "at", ratio),
                name,
                _mean_excess(batch, start, rate, size),
                excess.mean(),
                5 * error(excess),
            )
        )
        growth = np.abs(np.linalg.eigvals(_second_moment(_steps(batch)[:, :2, :2], rate, size))).max()
        rows.append((f"B = {size}, {ratio} η_opt: factor a step of the mean of E, in the end", float(growth), "ρ(T)"))
    name = f"B = {size}: from the full batch's path to the mean of {len(keys)}, in standard errors"
    return [*claims, below(f"mean_path_b_{size}", name, 5, np.max(deviations))], rows


def _mean_excess(batch: Batch, start: Array, rate: float, batch_size: int) -> float:
    """The mean of E − E* after `MOMENT_STEPS` steps, tr(H E[ddᵀ])/2."""
    minimum, hessian = _minimum(batch)
    power = jnp.linalg.matrix_power(_second_moment(_steps(batch), rate, batch_size), MOMENT_STEPS)
    apart = jnp.append(start - minimum, 1)
    moment = (power @ jnp.kron(apart, apart)).reshape(3, 3)[:2, :2]
    return float(jnp.sum(hessian * moment)) / 2


def _panel(name: str, title: str, batch: Batch, paths: dict[float, np.ndarray]) -> Panel:
    centre, width = np.asarray(_minimum(batch)[0]), 1.9
    across, up = (np.linspace(c - width, c + width, 61) for c in centre)
    grid = np.stack(np.meshgrid(across, up), axis=-1)
    series = []
    for ratio, path in paths.items():
        outside = (np.abs(path - centre) > width).any(axis=1)
        shown = path[: np.argmax(outside) if outside.any() else len(path)]
        left = f", leaves at step {len(shown)}" if outside.any() else ""
        series.append(Series(f"{ratio} η_opt, {RATIOS[ratio]}{left}", shown[:, 0], shown[:, 1], "line-points"))
    series.append(Series("minimum", centre[:1], centre[1:], "points", 6))
    z = _excess(grid, batch)
    return Panel(name, title, "weight w₁", "weight w₂", series, contours=Contours(across, up, z, "E − E*"))
