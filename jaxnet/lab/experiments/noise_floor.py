"""How low stochastic descent gets at a constant rate, and at which rate it gets nowhere."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import data, training
from jaxnet.contract import Array, ArrayTree, MakeOptimizer
from jaxnet.data import Order
from jaxnet.lab._progress import Share, unseen, watched
from jaxnet.lab.experiments.two_gaussians import WITH_BIAS as LOSS
from jaxnet.lab.experiments.two_gaussians import minimum_with_bias
from jaxnet.lab.record import Claim, Line, Panel, Record, Series, above, below, within
from jaxnet.learning_rate import (
    MeasuredSgdStability,
    measure_sgd_stability,
    one_by_one,
    sgd_stability,
    stationary_excess,
)

QUESTION = "Stochastic descent keeps bouncing: how high at each rate and batch size, and up to which rate at all?"

BATCH_SIZES = (1, 2, 4, 10)
# Of each batch size's limit. The square of the excess has a mean up to .87 of it: near that, no average settles.
FRACTIONS = (0.1, 0.25, 0.5, 0.75)
CONSTANT_RATE = 0.2
# τ of the decaying rate η₀/(1 + t/τ): with η₀τλ_min = 2 the slowest direction still has the time to fall.
DECAY_TIME = 250
# The limits are bisected between 0 and this, which is beyond 2/λ_max = 2.
HIGHEST_RATE = 3.0
# Rates at which theory is asked at a time: always as many, so that it is compiled once.
POINTS = 64


def run(
    *, seed: int = 0, num_examples: int = 100, num_steps: int = 6000, num_chains: int = 128, num_particles: int = 1024,
    batch_sizes: tuple[int, ...] = BATCH_SIZES, share: Share = unseen,
) -> Record:  # fmt: skip
    """A neuron with its bias on two Gaussians: SGD's plateau and its limit in mean square, measured and by theory."""
    if any(num_examples % size for size in batch_sizes):
        raise ValueError(f"batch_sizes: expected divisors of num_examples = {num_examples}, got {batch_sizes}")
    with jax.enable_x64(True):
        return _run(seed, num_examples, num_steps, num_chains, num_particles, batch_sizes, share)


def _run(
    seed: int,
    num_examples: int,
    num_steps: int,
    num_chains: int,
    num_particles: int,
    batch_sizes: tuple[int, ...],
    share: Share,
) -> Record:
    batch = data.two_gaussians_exact(num_examples)
    minimum = minimum_with_bias(batch)
    limit_key, chain_key = jax.random.split(jax.random.key(seed))
    limits = [_limit(batch, minimum, size, num_particles, limit_key) for size in watched(batch_sizes, share, 0, 0.5)]
    chains = jax.random.split(chain_key, num_chains)
    plateaus = [_plateau(batch, minimum, limit, num_steps, chains) for limit in watched(limits, share, 0.5)]
    descents = _descents(batch, minimum, num_steps, chains)
    return Record(
        name="noise_floor",
        question=QUESTION,
        config={
            "num_examples": num_examples,
            "num_steps": num_steps,
            "num_chains": num_chains,
            "num_particles": num_particles,
            "batch_sizes": batch_sizes,
        },
        seed=seed,
        dtype="float64",
        measurements={
            "floor": float(LOSS(minimum, batch)),
            "limits": [dataclasses.asdict(limit) for limit in limits],
            "plateaus": [dataclasses.asdict(plateau) for plateau in plateaus],
            "descents": dataclasses.asdict(descents),
        },
        claims=[*_limit_claims(limits), *_plateau_claims(plateaus), *_descent_claims(descents)],
        panels=[_descent_panel(descents), _plateau_panel(plateaus), _order_panel(plateaus), _growth_panel(limits)],
        rows=_rows(limits, plateaus),
    )


def _theory(batch: ArrayTree, minimum: ArrayTree, batch_size: int, rates: np.ndarray) -> np.ndarray:
    """The stationary E − E* in units of E* for independent batches at each of the POINTS rates."""
    excess = stationary_excess(LOSS, minimum, batch, batch_size, rates, replace=True)
    return np.asarray(excess) / float(LOSS(minimum, batch))


# --- The limit: from which rate runs that see the same batches part.


@dataclasses.dataclass(frozen=True)
class Limit:
    """The rate from which SGD's distance from the minimum grows: of its mean square, and of single trajectories."""

    batch_size: int
    predicted: float
    mean_square: MeasuredSgdStability
    single: MeasuredSgdStability


def _limit(batch: ArrayTree, minimum: ArrayTree, batch_size: int, num_particles: int, key: Array) -> Limit:
    bisected = functools.partial(
        measure_sgd_stability, LOSS, minimum, batch, batch_size, highest=HIGHEST_RATE, num_particles=num_particles,
        num_steps=200, key=jax.random.fold_in(key, batch_size),
    )  # fmt: skip
    predicted = float(sgd_stability(LOSS, minimum, batch, batch_size, replace=True))
    return Limit(batch_size, predicted, *jax.tree.map(np.asarray, (bisected(), bisected(follow=one_by_one))))


def _limit_claims(limits: list[Limit]) -> list[Claim]:
    claims = []
    for limit in limits:
        measured, size = limit.mean_square.limit, limit.batch_size
        grows, fail = f"B = {size}: rate from which E|δ|² grows", f"B = {size}: single trajectories fail only beyond it"
        claims.append(within(f"mean_square_limit_b_{size}", grows, limit.predicted, measured, 0.02))
        claims.append(above(f"single_limit_b_{size}", fail, measured, limit.single.limit))
    return claims


# --- The plateau: how far above the minimum SGD stays.


@jax.jit(static_argnames=("make_optimizer", "batch_size", "order", "num_epochs"))
def _excess_along(
    batch: ArrayTree, minimum: ArrayTree, start: ArrayTree, rates: Array, keys: Array, *,
    make_optimizer: MakeOptimizer, batch_size: int, order: Order, num_epochs: int,
) -> Array:  # fmt: skip
    """E − E* along SGD, up to ten times an epoch, for each rate and key."""
    n = len(batch[1])
    looks = math.gcd(n // batch_size, 10)
    floor = LOSS(minimum, batch)

    def chain(rate: Array, key: Array) -> Array:
        optimizer = make_optimizer(rate)
        error_of = lambda params, rows: LOSS(params, jax.tree.map(lambda x: x[rows], batch))
        between_looks = functools.partial(training.trajectory, training.make_update(error_of, optimizer))
        excess = lambda state, _: LOSS(state.params, batch) - floor

        def epoch(state: training.TrainState, number: Array) -> tuple[training.TrainState, Array]:
            rows = order(key, number, n).reshape(looks, -1, batch_size)
            return training.trajectory(between_looks, state, rows, observe=excess)

        state = training.init_state(start, optimizer)
        return training.trajectory(epoch, state, jnp.arange(num_epochs))[1].reshape(-1)

    return jax.vmap(jax.vmap(chain, in_axes=(None, 0)), in_axes=(0, None))(rates, keys)


@dataclasses.dataclass(frozen=True)
class Plateau:
    """E − E* of a batch size, in units of E*, at several rates.

    Attributes:
      batch_size: B.
      limit: η*, predicted.
      rates: (R,) η.
      predicted: (R,) for independent batches.
      independent: (R,) measured.
      standard_error: (R,) of it, from chain to chain.
      reshuffled: (R,) measured over reshuffled epochs.
      curve: (2, ...) rates up to η*, and the excess predicted at each.
    """

    batch_size: int
    limit: float
    rates: np.ndarray
    predicted: np.ndarray
    independent: np.ndarray
    standard_error: np.ndarray
    reshuffled: np.ndarray
    curve: np.ndarray


def _plateau(batch: ArrayTree, minimum: ArrayTree, limit: Limit, num_steps: int, keys: Array) -> Plateau:
    size, floor = limit.batch_size, float(LOSS(minimum, batch))
    rates = limit.predicted * np.array(FRACTIONS)
    along = limit.predicted * np.linspace(0.02, 0.995, POINTS - len(rates))
    predicted, curve = np.split(_theory(batch, minimum, size, np.append(rates, along)), [len(rates)])

    def measured(order: Order) -> np.ndarray:
        excess = _excess_along(
            batch, minimum, minimum, jnp.asarray(rates), keys, make_optimizer=optax.sgd, batch_size=size, order=order,
            num_epochs=_epochs(batch, size, num_steps),
        )  # fmt: skip
        return _late(np.asarray(excess)) / floor

    independent, reshuffled = measured(data.independent), measured(data.reshuffled)
    return Plateau(
        batch_size=size,
        limit=limit.predicted,
        rates=rates,
        predicted=predicted,
        independent=independent.mean(axis=1),
        standard_error=independent.std(axis=1, ddof=1) / len(keys) ** 0.5,
        reshuffled=reshuffled.mean(axis=1),
        curve=np.stack([along, curve]),
    )


def _epochs(batch: ArrayTree, batch_size: int, num_steps: int) -> int:
    return max(3, num_steps * batch_size // len(batch[1]))


def _late(excess: np.ndarray) -> np.ndarray:
    """The mean over time of each chain, once its first third is forgotten."""
    return excess[..., excess.shape[-1] // 3 :].mean(axis=-1)


def _plateau_claims(plateaus: list[Plateau]) -> list[Claim]:
    claims = []
    for plateau in plateaus:
        ratio = plateau.independent / plateau.predicted
        worst = ratio[np.argmax(np.abs(ratio - 1))]
        name = f"B = {plateau.batch_size}: plateau over theory, the worst rate"
        claims.append(within(f"plateau_b_{plateau.batch_size}", name, 1.0, worst, 0.03))
    errors = [max(plateau.standard_error / plateau.predicted) for plateau in plateaus]
    claims.append(below("plateau_error", "largest standard error of a plateau, relative", 0.015, max(errors)))
    slowest = max(plateau.reshuffled[0] / plateau.predicted[0] for plateau in plateaus)
    claims.append(
        below(
            "reshuffled_below_theory", "reshuffled epochs at the smallest rates, over theory: the largest", 1.0, slowest
        )
    )
    return claims


# --- The descent: a constant rate against one that falls.


@dataclasses.dataclass(frozen=True)
class Descents:
    """E − E* of stochastic steps in units of E*, the mean over chains.

    Attributes:
      step: of each look.
      constant, decaying: at either rate.
      plateau: predicted for the constant rate.
      following: (2, ...) steps, and what is predicted for a rate that stood still at the decaying one's value there.
      late: the mean of ``constant`` once settled.
    """

    step: np.ndarray
    constant: np.ndarray
    decaying: np.ndarray
    plateau: float
    following: np.ndarray
    late: float


def _decaying(rate: Any) -> optax.GradientTransformation:
    return optax.sgd(lambda step: rate / (1 + step / DECAY_TIME))


def _descents(batch: ArrayTree, minimum: ArrayTree, num_steps: int, keys: Array) -> Descents:
    floor, start = float(LOSS(minimum, batch)), optax.tree.zeros_like(minimum)

    def excess(make_optimizer: MakeOptimizer) -> np.ndarray:
        along = _excess_along(
            batch, minimum, start, jnp.array([CONSTANT_RATE]), keys, make_optimizer=make_optimizer, batch_size=1,
            order=data.independent, num_epochs=_epochs(batch, 1, num_steps),
        )  # fmt: skip
        return np.asarray(along)[0] / floor

    constant, decaying = excess(optax.sgd), excess(_decaying)
    step = len(batch[1]) // 10 * np.arange(1, constant.shape[1] + 1)
    moments = np.append(0, np.geomspace(step[0], step[-1], POINTS - 1))
    predicted = _theory(batch, minimum, 1, CONSTANT_RATE / (1 + moments / DECAY_TIME))
    return Descents(
        step=step,
        constant=constant.mean(axis=0),
        decaying=decaying.mean(axis=0),
        plateau=predicted[0],
        following=np.stack([moments[1:], predicted[1:]]),
        late=float(_late(constant).mean()),
    )


def _descent_claims(found: Descents) -> list[Claim]:
    return [
        within(
            "constant_rate_bounces",
            f"η = {CONSTANT_RATE}, B = 1: keeps bouncing at this many E*",
            found.plateau,
            found.late,
            0.03,
        ),
        below("falling_rate_settles", "the rate falls: bounces at the end, in E*", 0.01, found.decaying[-10:].mean()),
    ]


def _descent_panel(found: Descents) -> Panel:
    return Panel(
        name="excess_against_step",
        title=f"Stochastic steps from η = {CONSTANT_RATE}: they bounce where theory says, unless the rate falls",
        xlabel="step (one example's gradient)",
        ylabel="(E − E*)/E*, mean over chains",
        series=[
            Series("constant η", found.step, found.constant, "line", 0),
            Series(f"η/(1 + t/{DECAY_TIME})", found.step, found.decaying, "line", 1),
            Series("predicted for the rate of the moment", found.following[0], found.following[1], "dashed", 6),
        ],
        lines=[Line("predicted plateau", found.plateau, "y", 0), Line(".01 E*", 0.01, "y")],
        xscale="log",
        yscale="log",
    )


def _plateau_panel(plateaus: list[Plateau]) -> Panel:
    series, lines = [], []
    for colour, plateau in enumerate(plateaus):
        along, curve = plateau.curve
        series.append(Series(f"B = {plateau.batch_size}, predicted", along, curve, "line", colour))
        lines.append(Line(f"limit, B = {plateau.batch_size}: {plateau.limit:.3f}", plateau.limit, "x", colour))
    rates, found = (np.concatenate([getattr(p, name) for p in plateaus]) for name in ("rates", "independent"))
    return Panel(
        name="plateau_against_rate",
        title="How high SGD bounces at each rate: without bound as the rate comes to its limit",
        xlabel="learning rate η",
        ylabel="(E − E*)/E*, stationary",
        series=[*series, Series("measured", rates, found, "points", 6)],
        lines=lines,
        yscale="log",
    )


def _order_panel(plateaus: list[Plateau]) -> Panel:
    independent = np.concatenate([plateau.independent / plateau.predicted for plateau in plateaus])
    return Panel(
        name="reshuffled_against_independent",
        title="Reshuffled epochs bounce less than independent batches, where the rate is small",
        xlabel="learning rate η, in units of the batch size's limit",
        ylabel="plateau over theory's for independent batches",
        series=[
            *(
                Series(f"B = {p.batch_size}, reshuffled", FRACTIONS, p.reshuffled / p.predicted, "line-points", colour)
                for colour, p in enumerate(plateaus)
            ),
            Series("independent, each B", np.tile(FRACTIONS, len(plateaus)), independent, "points", 6),
        ],
        lines=[Line("theory", 1.0, "y")],
    )


def _growth_panel(limits: list[Limit]) -> Panel:
    series = []
    for colour, limit in enumerate(limits):
        rates, growth = (np.asarray(x).ravel() for x in (limit.mean_square.rates, limit.mean_square.growth))
        at = rates / limit.predicted
        ascending = np.argsort(at)
        shown = ascending[np.abs(at[ascending] - 1) < 0.2]
        series.append(Series(f"B = {limit.batch_size}", at[shown], growth[shown], "line-points", colour))
    return Panel(
        name="growth_against_rate",
        title="The mean square of SGD's distance from the minimum grows from the predicted rate on",
        xlabel="learning rate η, in units of the batch size's predicted limit",
        ylabel="factor a step of E|δ|²",
        series=series,
        lines=[Line("predicted limit", 1.0), Line("neither grows nor dies", 1.0, "y")],
    )


def _rows(limits: list[Limit], plateaus: list[Plateau]) -> list[tuple[str, Any, str]]:
    rows: list[tuple[str, Any, str]] = []
    for limit in limits:
        found, single = limit.mean_square, float(limit.single.limit)
        remark = f"± {float(found.limit_error):.1g}, predicted {limit.predicted:.4f}; single trajectories: {single:.4f}"
        rows.append((f"η where E|δ|² grows, B = {limit.batch_size}", float(found.limit), remark))
    for p in plateaus:
        for rate, value, *rest in zip(p.rates, p.independent, p.standard_error, p.predicted, p.reshuffled, strict=True):
            remark = "± {:.1g}, predicted {:.4f}; reshuffled epochs: {:.4f}".format(*rest)
            rows.append((f"(E − E*)/E*, B = {p.batch_size}, η = {rate:.3g}", float(value), remark))
    return rows
