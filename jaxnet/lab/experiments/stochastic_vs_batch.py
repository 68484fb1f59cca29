"""The lectures' table of stochastic against batch updates: measured where a measurement can speak, else its source."""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

from jaxnet.lab._progress import Share, unseen, watched
from jaxnet.lab.experiments import batch_size, local_minima, noise_floor, one_dimension, redundancy, second_order
from jaxnet.lab.record import Claim, Record, slug

QUESTION = "Which of the advantages and disadvantages of stochastic updates can be measured, and do they hold?"

# Each experiment, at a size that keeps all of them together within a minute.
MEASURED: Mapping[ModuleType, Mapping[str, Any]] = {
    redundancy: {"copies": (1, 10, 100), "num_draws": 12, "num_steps": 6000},
    local_minima: {"num_steps": 1500, "num_timed": 500, "num_timed_steps": 6000},
    noise_floor: {"num_steps": 4800, "num_chains": 48, "num_particles": 256, "batch_sizes": (1, 4)},
    second_order: {"num_examples": 120, "num_steps": 800, "num_epochs": 130},
    batch_size: {"batch_sizes": (8, 64, 512), "num_epochs": (1,)},
    one_dimension: {},
}


class Measured(NamedTuple):
    """A line of the table that an experiment's claims with these keys speak of."""

    side: str
    words: str
    experiment: ModuleType
    keys: tuple[str, ...]


class Proven(NamedTuple):
    """A line of which only a proof can speak, and where it is."""

    side: str
    words: str
    source: str


STOCHASTIC, BATCH = "stochastic", "batch"
TABLE: tuple[Measured | Proven, ...] = (
    Measured(
        f"{STOCHASTIC} +",
        "fast on large redundant data",
        redundancy,
        ("ten_copies_to_1_25", "ten_copies_to_1_05", "ten_copies_from_zero_to_1_05"),
    ),
    Measured(
        f"{STOCHASTIC} +",
        "leaves poor local minima",
        local_minima,
        tuple(slug("leaves_at", rate) for rate in local_minima.CLAIMED),
    ),
    Measured(f"{STOCHASTIC} −", "keeps bouncing unless the rate falls", noise_floor, ("constant_rate_bounces",)),
    Measured(f"{STOCHASTIC} −", "and settles where it does", noise_floor, ("falling_rate_settles",)),
    Measured(f"{STOCHASTIC} −", "no accelerated or second-order method", second_order, ("single_floor",)),
    Measured(f"{STOCHASTIC} −", "harder to run in parallel: only up to B_crit", batch_size, ("critical_batch_size",)),
    Proven(
        f"{STOCHASTIC} −",
        "conditions of convergence are less clear",
        "Σ η = ∞, Σ η² < ∞: Robbins & Monro 1951, section 2",
    ),
    Proven(f"{STOCHASTIC} −", "proofs hold with probability only", "Bottou, Curtis & Nocedal 2018, theorem 4.9"),
    Measured(
        f"{BATCH} +",
        "converges below 2/λ, and only there",
        one_dimension,
        ("optimal_rate", "maximal_rate", *(slug("factor_at", ratio) for ratio in one_dimension.RATIOS), "returns_at_2"),
    ),
    Measured(
        f"{BATCH} +",
        "stays in its minimum",
        local_minima,
        (*(slug("stays_at", rate) for rate in local_minima.RATES), "stays_at_inverse_curvature"),
    ),
    Proven(
        f"{BATCH} +", "converges to a local minimum", "almost surely: Lee, Simchowitz, Jordan & Recht 2016, theorem 4"
    ),
    Measured(f"{BATCH} +", "second-order methods accelerate it", second_order, ("power_of_lbfgs",)),
    Measured(
        f"{BATCH} +",
        "quadratically, near the minimum",
        second_order,
        tuple(slug("newton_order", decay) for decay in second_order.DECAYS),
    ),
    Proven(f"{BATCH} +", "simple proofs", "E falls by η(1 − ηλ/2)|g|² or more a step: Nesterov 2004, section 1.2.3"),
    Measured(
        f"{BATCH} −",
        "slow on large data: its cost grows with the copies",
        redundancy,
        ("power_of_copies_to_1_25", "power_of_copies_to_1_05"),
    ),
)


def run(*, seed: int = 0, share: Share = unseen) -> Record:
    """The table's lines, each with the claims that were measured for it or the source of its proof."""
    found = {which: which.run(seed=seed, **options) for which, options in watched(MEASURED.items(), share)}
    rows: list[tuple[str, Any, str]] = []
    claims: list[Claim] = []
    for line in TABLE:
        name = f"{line.side} {line.words}"
        if isinstance(line, Proven):
            rows.append((name, "proven", line.source))
            continue
        record = found[line.experiment]
        spoken = [record.claim(key) for key in line.keys]
        named = [dataclasses.replace(claim, key=f"{record.name}_{claim.key}") for claim in spoken]
        claims += [claim for claim in named if claim not in claims]
        first, held = spoken[0], sum(claim.passed for claim in spoken)
        together = f"; {held} of {len(spoken)} such claims hold" if len(spoken) > 1 else ""
        rows.append((name, first.measured, f"{first.name}: predicted {first.predicted:.3g}{together}"))
    return Record(
        name="stochastic_vs_batch",
        question=QUESTION,
        config={},
        seed=seed,
        dtype="float64",
        measurements={record.name: record.measurements for record in found.values()},
        claims=claims,
        rows=rows,
        panels=[record.panels[0] for record in found.values()],
    )
