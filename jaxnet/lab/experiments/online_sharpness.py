"""λ_max from gradients of mini-batches alone, against Lanczos: how soon, how well, and in use."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from jaxnet import curvature, data, losses, nn, training
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.lab._progress import Share, unseen, watched
from jaxnet.lab.record import Claim, Line, Panel, Record, Series, above, below, close, within

QUESTION = "How good is λ_max from mini-batch gradients alone, what does it cost, and does 1/‖Ψ‖ train?"

FULL_GAMMA = 0.3
FULL_UPDATES = 150
SETTINGS = ((10, 0.1), (10, 0.03), (100, 0.1))
"""Mini-batch sizes p, each with a γ."""
SETTLED = 100, 0.03
"""Small enough a noise for the first order."""
TRAINED = 100, 0.1
WARM_UP = 100
MULTIPLES = 2.0 ** np.arange(-2, 2.1, 0.5)
NUM_PRODUCTS = 30
GRADIENTS_A_PRODUCT = 2
Batch = tuple[Array, Array]
Setting = tuple[int, float]


def run(
    *, seed: int = 0, num_examples: int = 1437, width: int = 8, num_runs: int = 16, budget: int = 100_000,
    num_steps: int = 200, share: Share = unseen,
) -> Record:  # fmt: skip
    """‖Ψ‖ of LeCun, Simard and Pearlmutter for a tanh network on digits, at its start and while it trains.

    On all N examples Ψ follows from the spectrum. On mini-batches of p, once Ψ has turned to the eigenvector v, ‖Ψ‖
    varies about λ_max with the standard deviation √(γ/(2 − γ) · Var(vᵀH_n v)/p), to first order. Costs are counted in
    gradients of single examples: an update takes 2p, and a Hessian product counts as 2N.

    Reference:
      LeCun, Simard & Pearlmutter, "Automatic Learning Rate Maximization by On-Line Estimation of the Hessian's
      Eigenvectors", NIPS 1992.
    """
    with jax.enable_x64(True):
        return _run(seed, num_examples, width, num_runs, budget, num_steps, share)


def _run(seed: int, num_examples: int, width: int, num_runs: int, budget: int, num_steps: int, share: Share) -> Record:
    batch = jax.tree.map(lambda x: x[:num_examples], data.digits())
    model = nn.mlp([width, 10], activation=jnp.tanh)
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    init_key, key, train_key = jax.random.split(jax.random.key(seed), 3)
    params = model.init(init_key, batch[0].shape[1:])
    keys = jax.random.split(key, num_runs)

    sharp = curvature.sharpness(loss, params, batch, key=key, tol=1e-8, sampling_error=True)
    largest, spread = float(sharp.value), float(sharp.sampling_error) * (num_examples - 1) ** 0.5
    exact = Estimates(
        GRADIENTS_A_PRODUCT * num_examples * np.arange(1, NUM_PRODUCTS + 1),
        np.asarray(ritz_values(loss, params, batch, keys)) / largest,
    )
    begin = jax.vmap(lambda key: curvature.online_sharpness(loss).init(params, key=key))(keys)
    online = {}
    for size, gamma in watched(SETTINGS, share, 0.1, 0.8):
        updates = budget // (2 * size)
        values = estimate(loss, params, batch, begin, keys, size, gamma, updates)
        cost = 2 * size * np.arange(1, updates + 1)
        online[size, gamma] = Estimates(cost, np.asarray(values) / largest, int(2 / gamma))
    size, gamma = SETTLED
    at_vector = jax.tree.map(lambda v: jnp.broadcast_to(largest * v, (num_runs, *v.shape)), sharp.vector)
    settled = estimate(loss, params, batch, at_vector, keys, size, gamma, int(40 / gamma))[:, int(10 / gamma) :]
    floors = {(p, g): (g / (2 - g) / p) ** 0.5 * spread / largest for p, g in (*SETTINGS, SETTLED)}
    predicted, measured = _by_spectrum(loss, params, batch, key), np.asarray(on_all(loss, params, batch, key))
    share(0.9)
    training = _train(loss, params, batch, train_key, num_steps)
    return Record(
        name="online_sharpness",
        question=QUESTION,
        config={
            "num_examples": num_examples,
            "width": width,
            "num_runs": num_runs,
            "budget": budget,
            "num_steps": num_steps,
        },
        seed=seed,
        dtype="float64",
        measurements={
            "sharpness": largest,
            "spread_of_examples": spread,
            "floors": {str(at): floor for at, floor in floors.items()},
            "settled": {"mean": float(settled.mean()) / largest, "deviation": float(settled.std()) / largest},
            "multiples": MULTIPLES,
            "final_losses": training.final(training.losses),
            "final_losses_of_mini_batches": training.final(training.noisy),
            "ratios": training.ratios,
        },
        claims=[
            *_claims_on_all(predicted / largest, measured / largest),
            *_claims_settled(np.asarray(settled) / largest, floors[SETTLED]),
            *_claims_of_cost(exact, online),
            *training.claims(),
        ],
        rows=_rows(exact, online, floors),
        panels=[_error_panel(exact, online, floors), training.tracking_panel(), training.rate_panel()],
    )


class Estimates(NamedTuple):
    """λ_max in units of the true one, along runs.

    Attributes:
      cost: (steps,) gradients of examples spent.
      values: (runs, steps).
      window: steps over which errors are averaged.
    """

    cost: np.ndarray
    values: np.ndarray
    window: int = 1

    def error(self) -> np.ndarray:
        """The root mean square error over the runs and the last ``window`` steps; shorter windows at the start."""
        squares = np.cumsum(np.append(0, np.mean((self.values - 1) ** 2, axis=0)))
        first = np.maximum(0, np.arange(1, len(squares)) - self.window)
        return np.sqrt((squares[1:] - squares[first]) / (np.arange(1, len(squares)) - first))

    def to(self, error: float) -> float:
        """Gradients from which on the error stays below; infinite if it does not."""
        too_large = np.flatnonzero(self.error() > error)
        after = int(too_large[-1]) + 1 if too_large.size else 0
        return float(self.cost[after]) if after < len(self.cost) else float("inf")


@functools.partial(jax.jit, static_argnames=("loss", "size", "gamma", "num_updates"))
def estimate(
    loss: Loss,
    params: ArrayTree,
    batch: Batch,
    starts: ArrayTree,
    keys: Array,
    size: int,
    gamma: float,
    num_updates: int,
) -> Array:
    """‖Ψ‖ after each update on a mini-batch drawn with replacement, (runs, updates), from a start for each run."""
    psi = curvature.online_sharpness(loss, gamma=gamma)

    def one(start: ArrayTree, key: Array) -> Array:
        rows = jax.random.randint(key, (num_updates, size), 0, len(batch[1]))
        step = lambda state, row: psi.update(state, params, jax.tree.map(lambda x: x[row], batch))
        return training.trajectory(step, start, rows)[1]

    return jax.vmap(one)(starts, keys)


@functools.partial(jax.jit, static_argnames="loss")
def on_all(loss: Loss, params: ArrayTree, batch: Batch, key: Array) -> Array:
    """‖Ψ‖ after each update on all of the data."""
    psi = curvature.online_sharpness(loss, gamma=FULL_GAMMA)
    step = lambda state, batch: psi.update(state, params, batch)
    return training.trajectory(step, psi.init(params, key=key), batch, num_steps=FULL_UPDATES)[1]


def _by_spectrum(loss: Loss, params: ArrayTree, batch: Batch, key: Array) -> np.ndarray:
    """The same from the eigenvalues of the Hessian: c_i ← (1 − γ)c_i + γλ_i c_i/‖c‖ along each eigenvector."""
    values, vectors = np.linalg.eigh(curvature.materialize(curvature.hessian(loss, params, batch)))
    start = curvature.online_sharpness(loss).init(params, key=key)
    c, lengths = vectors.T @ np.asarray(ravel_pytree(start)[0]), []
    for _ in range(FULL_UPDATES):  # A recurrence of coefficients: there is nothing to train.
        c = (1 - FULL_GAMMA) * c + FULL_GAMMA * values * c / np.linalg.norm(c)
        lengths.append(np.linalg.norm(c))
    return np.array(lengths)


@functools.partial(jax.jit, static_argnames="loss")
def ritz_values(loss: Loss, params: ArrayTree, batch: Batch, keys: Array) -> Array:
    """The largest Ritz value after each Lanczos step from a random start, (runs, products)."""
    op = curvature.hessian(loss, params, batch)
    solver = curvature.Eigensolver(op.space, ncv=NUM_PRODUCTS)

    def step(state: Any, _: None) -> tuple[Any, Array]:
        state = solver.step(op, state, 1e-3)
        return state, state.found.values[-1]

    def one(key: Array) -> Array:
        return training.trajectory(step, solver.init(solver.start(key)), num_steps=NUM_PRODUCTS)[1]

    return jax.lax.map(one, keys)


def _settled(values: np.ndarray, error: float) -> int:
    """Updates from which on the values are within the error of 1."""
    outside = np.flatnonzero(np.abs(values - 1) > error)
    return int(outside[-1]) + 2 if outside.size else 1


def _claims_on_all(predicted: np.ndarray, measured: np.ndarray) -> list[Claim]:
    apart = np.abs(measured / predicted - 1).max()
    name = f"on all examples, γ = {FULL_GAMMA}"
    return [
        close(
            "updates_to_tenth",
            f"{name}: updates to within 10 %, from the spectrum",
            _settled(predicted, 0.1),
            _settled(measured, 0.1),
            1,
        ),
        close("spectrum_predicts", f"{name}: largest relative difference from the spectrum's ‖Ψ‖", 0, apart, 0.01),
    ]


def _claims_settled(values: np.ndarray, deviation: float) -> list[Claim]:
    name = f"p = {SETTLED[0]}, γ = {SETTLED[1]}, from the eigenvector on: ‖Ψ‖/λ_max"
    return [
        within("settled_deviation", f"{name}, standard deviation", deviation, values.std(), 0.2),
        close("settled_mean", f"{name}, mean", 1, values.mean(), 0.01),
    ]


def _claims_of_cost(exact: Estimates, online: dict[Setting, Estimates]) -> list[Claim]:
    rough = online[SETTINGS[0]].to(0.2) / exact.to(0.2)
    fine = min(estimates.to(0.01) for estimates in online.values()) / exact.to(0.01)
    return [
        below(
            "rough_over_lanczos", "to within 20 %: gradients on-line, p = 10, γ = 0.1, over those of Lanczos", 1, rough
        ),
        above("fine_over_lanczos", "to within 1 %: least gradients on-line over those of Lanczos", 1, fine),
    ]


def _rows(
    exact: Estimates, online: dict[Setting, Estimates], floors: dict[Setting, float]
) -> list[tuple[str, float, str]]:
    rows = []
    for error in (0.2, 0.1, 0.05, 0.01):
        name = f"gradients of examples to within {100 * error:g} %: "
        rows.append((f"{name}Lanczos", exact.to(error), "of λ_max, root mean square over starts"))
        for (p, gamma), estimates in online.items():
            rows.append(
                (f"{name}p = {p}, γ = {gamma}", estimates.to(error), f"error in the end {floors[p, gamma]:.1%}, theory")
            )
    return rows


class Training(NamedTuple):
    """Descent at c/‖Ψ‖, with Ψ updated on one mini-batch a step.

    Attributes:
      losses: (multiples, steps + 1) E.
      noisy: the same where the steps, too, take that mini-batch's gradient.
      estimated: (steps,) ‖Ψ‖ at c = 1.
      checked: steps at which λ_max was found by Lanczos.
      sharpness: its values, at c = 1.
    """

    losses: np.ndarray
    noisy: np.ndarray
    estimated: np.ndarray
    checked: np.ndarray
    sharpness: np.ndarray

    @property
    def ratios(self) -> np.ndarray:
        """‖Ψ‖/λ_max at the checks."""
        return self.estimated[self.checked] / self.sharpness

    def final(self, losses: np.ndarray) -> np.ndarray:
        """E in the end, at most 100 times that at the start."""
        return np.fmin(np.where(np.isfinite(losses[:, -1]), losses[:, -1], np.inf), 100 * losses[0, 0])

    def claims(self) -> list[Claim]:
        """c = 1 trains, and the best c is near the limit 2; for noisy steps it is less."""
        whole, noisy = self.final(self.losses), self.final(self.noisy)
        at = lambda c: whole[np.argmin(np.abs(MULTIPLES - c))]
        best, best_noisy = MULTIPLES[np.argmin(whole)], MULTIPLES[np.argmin(noisy)]
        late = self.ratios[len(self.ratios) // 2 :]
        return [
            below(
                "inverse_estimate_trains",
                "full batch at 1/‖Ψ‖: E in the end over that at the start",
                0.2,
                at(1) / self.losses[0, 0],
            ),
            close("best_multiple", "full batch: log₂ of the best multiple of 1/‖Ψ‖", 0.5, np.log2(best), 0.5),
            above("four_worse_than_one", "full batch: E in the end at 4/‖Ψ‖ over that at 1/‖Ψ‖", 1, at(4) / at(1)),
            close(
                "tracks_sharpness", "full batch at 1/‖Ψ‖: mean of ‖Ψ‖/λ_max over the second half", 1, late.mean(), 0.2
            ),
            below(
                "best_multiple_of_noisy_steps",
                f"steps on {TRAINED[0]} examples: their best multiple is below the full batch's",
                best,
                best_noisy,
            ),
        ]

    def tracking_panel(self) -> Panel:
        """‖Ψ‖ and λ_max along the run at c = 1."""
        return Panel(
            name="along_training",
            title="Training at η = 1/‖Ψ‖: the estimate lags while the eigenvector turns, then holds λ_max",
            xlabel="step",
            ylabel="curvature",
            series=[
                Series(f"‖Ψ‖, p = {TRAINED[0]}, γ = {TRAINED[1]}", np.arange(len(self.estimated)), self.estimated),
                Series("λ_max by Lanczos, on all examples", self.checked, self.sharpness, "line-points"),
            ],
            yscale="log",
        )

    def rate_panel(self) -> Panel:
        """The last losses against c."""
        steps = self.losses.shape[1] - 1
        return Panel(
            name="loss_against_multiple",
            title=f"The loss after {steps} steps at c/‖Ψ‖: a full batch bears c to 2, a mini-batch less",
            xlabel="c",
            ylabel="E on all examples (at most 100 × the initial one)",
            series=[
                Series("full-batch steps", MULTIPLES, self.final(self.losses), "line-points"),
                Series(f"steps on {TRAINED[0]} examples", MULTIPLES, self.final(self.noisy), "line-points"),
            ],
            lines=[Line("2/λ_max, the full batch's limit", 2.0), Line("initial E", self.losses[0, 0], "y")],
            xscale="log",
            yscale="log",
        )


def _train(loss: Loss, params: ArrayTree, batch: Batch, key: Array, num_steps: int) -> Training:
    n, multiples = len(batch[1]), jnp.asarray(MULTIPLES)
    rows = jax.random.randint(key, (WARM_UP + num_steps, TRAINED[0]), 0, n)
    every = jnp.broadcast_to(jnp.arange(n), (num_steps, n))
    curves, lengths, points = descend(loss, params, batch, multiples, key, rows, every)
    noisy, _, _ = descend(loss, params, batch, multiples, key, rows, rows[WARM_UP:])
    one = int(np.flatnonzero(MULTIPLES == 1)[0])
    checked = np.arange(0, num_steps, max(1, num_steps // 20))
    sharpness = _sharpness(loss, jax.tree.map(lambda x: x[one][checked], points), batch, key)
    return Training(np.asarray(curves), np.asarray(noisy), np.asarray(lengths[one]), checked, np.asarray(sharpness))


@functools.partial(jax.jit, static_argnames="loss")
def descend(
    loss: Loss, params: ArrayTree, batch: Batch, multiples: Array, key: Array, rows: Array, step_rows: Array
) -> tuple[Array, Array, ArrayTree]:
    """Steps at c/‖Ψ‖: E on all examples (c, steps + 1), ‖Ψ‖ (c, steps) and the params before each step.

    Step t takes the gradient of the examples ``step_rows[t]``. Ψ is updated on those of a row of ``rows`` before each
    step, and on as many before the first as ``rows`` has more.
    """
    psi = curvature.online_sharpness(loss, gamma=TRAINED[1])
    part = lambda row: jax.tree.map(lambda x: x[row], batch)
    num_warm = len(rows) - len(step_rows)
    warm = lambda state, row: psi.update(state, params, part(row))
    begin, _ = training.trajectory(warm, psi.init(params, key=key), rows[:num_warm])

    def one(multiple: Array) -> tuple[Array, Array, ArrayTree]:
        def step(carry: tuple, at: tuple[Array, Array]) -> tuple[tuple, tuple]:
            (params, state), (row, step_row) = carry, at
            state, length = psi.update(state, params, part(row))
            moved = optax.tree.add_scale(params, -multiple / length, jax.grad(loss)(params, part(step_row)))
            return (moved, state), (loss(params, batch), length, params)

        both = rows[num_warm:], step_rows
        (end, _), (values, lengths, points) = training.trajectory(step, (params, begin), both)
        return jnp.append(values, loss(end, batch)), lengths, points

    return jax.vmap(one)(multiples)


@functools.partial(jax.jit, static_argnames="loss")
def _sharpness(loss: Loss, points: ArrayTree, batch: Batch, key: Array) -> Array:
    return jax.lax.map(lambda at: curvature.sharpness(loss, at, batch, key=key).value, points)


def _error_panel(exact: Estimates, online: dict[Setting, Estimates], floors: dict[Setting, float]) -> Panel:
    series = [Series("Lanczos", exact.cost, exact.error(), "line-points", 6)]
    lines = []
    for colour, ((p, gamma), estimates) in enumerate(online.items()):
        shown = np.unique(np.geomspace(1, len(estimates.cost), 200).astype(int)) - 1
        series.append(
            Series(f"on-line, p = {p}, γ = {gamma}", estimates.cost[shown], estimates.error()[shown], "line", colour)
        )
        lines.append(Line("" if colour else "predicted in the end, to first order", floors[p, gamma], "y", colour))
    return Panel(
        name="error_against_gradients",
        title="A rough λ_max is cheaper from mini-batches, an exact one from Lanczos",
        xlabel=f"gradients of examples (a Hessian product: {GRADIENTS_A_PRODUCT}N)",
        ylabel="relative error of λ_max, root mean square",
        series=series,
        lines=lines,
        xscale="log",
        yscale="log",
    )
