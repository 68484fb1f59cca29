"""The yardstick: the derived rate against a sweep, defaults, range tests and optimizers that need no rate.

One frozen rule for all workloads, in the manner of AlgoPerf's self-tuning rules at small scale. Each workload's numbers
are kept in a file of their own beside the result, so that a run goes on where it was stopped. Distances are to the
*good interval*: the rates of the sweep whose best held-out loss is within a tenth of the least. Constant rates and a
linear fall to 0; peers at a constant rate.
"""

import json
import pathlib
import time

import jax
import numpy as np

from benchmarks import contenders
from benchmarks.timing import Row
from benchmarks.workloads import SECOND_BATCH_SIZES, WORKLOADS
from jaxnet import learning_rate
from jaxnet.lab.record import Line, Panel, Series, to_json

SEEDS = (0, 1, 2)
SCHEDULES = ("constant", "linear")
QUICK = ("wine-mlp", "cancer-logistic", "diabetes-linear")
QUICK_PEERS = ("prodigy", "schedule_free_adamw", "CDAT(adam)")
FOUND = {}
# Of a figure.
COLOURS = 7


def run(quick=False, folder=pathlib.Path("docs/derived-rate")):
    folder = folder / "quick" if quick else folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in QUICK if quick else WORKLOADS:
        path = folder / f"{name}.json"
        if not path.exists():
            start = time.process_time()
            found = measure(WORKLOADS[name], *((SEEDS[:1], QUICK_PEERS) if quick else (SEEDS, tuple(contenders.FREE))))
            path.write_text(short({"cases": found, "cpu_seconds": time.process_time() - start}))
            print(f"{name}: {time.process_time() - start:.0f} CPU-seconds", flush=True)
    return rows(read(folder))


def read(folder):
    """The workloads that are done, by name."""
    FOUND.update({path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))})
    return FOUND


def short(found):
    """JSON on one line, numbers to five digits."""
    rounded = json.loads(to_json(found), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    return json.dumps(rounded, separators=(",", ":")) + "\n"


def measure(workload, seeds, peers):
    cases = {}
    sizes = [workload.batch_size, *([SECOND_BATCH_SIZES[workload.name]] if workload.name in SECOND_BATCH_SIZES else [])]
    for size in sizes:
        names = ["momentum", "adamw"]
        if workload.name in SECOND_BATCH_SIZES and size == workload.batch_size:
            names += ["sgd", "adam"]
        for optimizer in names:
            cases[f"{optimizer}, B = {size}"] = of_optimizer(workload, optimizer, size, seeds)
        cases[f"free, B = {size}"] = of_free(workload, size, seeds, peers)
        # Linux limits the memory maps of a process, and each compiled program takes some.
        jax.clear_caches()
    return cases


def posed(workload, seed):
    """The workload from a seed; one loss for all seeds, so that they share what is compiled."""
    loss, params, train, held_out = workload.start(jax.random.key(seed))
    return LOSSES.setdefault(workload.name, loss), params, train, held_out


LOSSES = {}


def of_optimizer(workload, optimizer, size, seeds):
    """The sweep of one seed; for each seed the derived rate, its cost and its runs, and those of other rates.

    The tuned one is among these: what luck a seed has is no rate's merit.
    """
    make, grid = contenders.MAKERS[optimizer], contenders.GRIDS[optimizer]
    found = {"grid": grid, "sweep": {}, "seeds": []}
    for seed in seeds:
        loss, params, train, held_out = posed(workload, seed)
        steps = -(-len(train[1]) // size) * workload.num_epochs
        key = jax.random.key(1000 + seed)
        analysis = learning_rate.analyse(
            loss,
            params,
            train,
            key=key,
            make_optimizer=make,
            batch_sizes=[size],
            tol=0.05,
            num_probes=2,
            second_moments=False,
        )
        rates = {"derived": float(analysis.rate(size))}
        if optimizer in contenders.DEFAULTS:
            rates["default"] = contenders.DEFAULTS[optimizer]
            rates |= contenders.read_off(loss, params, train, make, grid, size, key, analysis)
        usable = {name: rate if np.isfinite(rate) and rate > 0 else grid[0] for name, rate in rates.items()}
        of_seed = {"rates": rates, "num_gradients": float(analysis.derived.num_gradients[0]), "curves": {}}
        for schedule in SCHEDULES:
            makes = make if schedule == "constant" else contenders.linear(make, steps)
            given = (loss, params, train, held_out, makes)
            if seed == seeds[0]:
                found["sweep"][schedule] = contenders.sweep(*given, grid, size, workload.num_epochs, key)
            tuned = grid[found["sweep"][schedule].min(axis=1).argmin()]
            tried = {"tuned": tuned, **(usable if schedule == "constant" else {"derived": usable["derived"]})}
            curves = contenders.sweep(*given, np.array(list(tried.values())), size, workload.num_epochs, key)
            of_seed["curves"][schedule] = dict(zip(tried, curves, strict=True))
        found["seeds"].append(of_seed)
    return found


def of_free(workload, size, seeds, peers):
    found = {}
    for name in peers:
        found[name] = []
        for seed in seeds:
            loss, params, train, held_out = posed(workload, seed)
            curve = contenders.free(
                loss, params, train, held_out, name, size, workload.num_epochs, jax.random.key(1000 + seed)
            )
            found[name].append(curve)
    return found


def good(grid, curves):
    """The best held-out loss, the ends of the interval of rates within a tenth of it, and the best run."""
    lowest = np.array(curves, float).min(axis=1)
    inside = np.array(grid)[lowest <= 1.1 * lowest.min()]
    return lowest.min(), inside.min(), inside.max(), np.array(curves, float)[lowest.argmin()]


def distance(rate, low, high):
    """How far outside of the interval, as a factor: above 1 too high, below 1 too low; inf where there is no rate."""
    if not rate > 0:
        return np.inf
    return rate / high if rate > high else rate / low if rate < low else 1.0


def epochs_to(curve, target):
    """Epochs until a held-out loss is reached; inf if it is not."""
    reached = np.array(curve, float) <= target
    return int(reached.argmax()) + 1 if reached.any() else np.inf


def judged(found):
    """A row for each run of each method: workload, case, schedule, distance, epochs over the tuned run's, diverged."""
    for name, of_workload in found.items():
        for case, of_case in of_workload["cases"].items():
            if case.startswith("free"):
                continue
            size = case.partition(", ")[2]
            for schedule in SCHEDULES:
                best, low, high, tuned = good(of_case["grid"], of_case["sweep"][schedule])
                target = 1.05 * best
                spent = epochs_to(tuned, target)
                about = {"workload": name, "case": case, "schedule": schedule, "tuned": WORKLOADS[name].tuned}
                for of_seed in of_case["seeds"]:
                    for method, curve in of_seed["curves"][schedule].items():
                        rate = of_seed["rates"].get(method, np.nan)
                        yield about | {
                            "method": method,
                            "distance": distance(float(rate), low, high),
                            "ratio": epochs_to(curve, target) / spent,
                            "least": min(map(float, curve)),
                            "diverged": not np.isfinite(float(curve[-1])),
                            "num_gradients": of_seed["num_gradients"],
                        }
                if schedule == "constant" and case.startswith("adamw"):
                    for method, curves in of_workload["cases"][f"free, {size}"].items():
                        for curve in curves:
                            yield about | {
                                "method": method,
                                "distance": np.nan,
                                "ratio": epochs_to(curve, target) / spent,
                                "diverged": not np.isfinite(float(curve[-1])),
                                "num_gradients": 0.0,
                            }


def rows(found):
    """The measures beside their bounds."""
    runs = list(judged(found))
    derived, tuned = ([run for run in runs if run["method"] == method] for method in ("derived", "tuned"))
    result = []

    def add(what, ratio, bound, at_least=False):
        result.append(Row(what, float(ratio), bound, at_least, {}))

    for words, chosen in (
        ("", derived),
        (", workloads the rule was tuned on", [run for run in derived if run["tuned"]]),
        (", the others", [run for run in derived if not run["tuned"]]),
    ):
        if chosen:
            factors = np.array([max(run["distance"], 1 / run["distance"]) for run in chosen])
            add(
                f"share of {len(chosen)} derived rates within 2 × of the good interval{words}",
                (factors <= 2).mean(),
                0.8,
                True,
            )
            add(f"share within 4 ×{words}", (factors <= 4).mean(), 1, True)
            add(f"farthest, as a factor{words}", factors.max(), 4)
    ratios, lucky = (np.array([run["ratio"] for run in chosen]) for chosen in (derived, tuned))
    reached = np.isfinite(ratios)
    add(
        "epochs to the tuned target / the tuned run's, geometric mean where reached",
        geometric_mean(ratios[reached]),
        1.25,
    )
    add("share of runs that reach the tuned target", reached.mean(), 1, True)
    add("share of the tuned rate's own runs that reach it, the same seeds", np.isfinite(lucky).mean(), 1, True)
    # On another seed than the sweep's the tuned rate itself may fail: then there is nothing to compare to.
    losses = [run["least"] / other["least"] for run, other in zip(derived, tuned, strict=True) if not other["diverged"]]
    add("least held-out loss / the tuned rate's of the same seed, geometric mean", geometric_mean(losses), 1.05)
    add("runs at the tuned rate that diverge", sum(run["diverged"] for run in tuned), 0)
    add("runs at the derived rate that diverge", sum(run["diverged"] for run in derived), 0)
    add("gradients of all examples spent on a rate, at most", max(run["num_gradients"] for run in derived), 30)
    for method, shares in profile(runs, np.array([1.5])).items():
        add(f"within 1.5 × of the tuned run's epochs, constant rate, AdamW's cases: {method}", shares[0], 0, True)
    return result


def geometric_mean(values):
    return np.exp(np.log(values).mean())


def profile(runs, factors):
    """method -> the share of AdamW's cases whose target it reaches within each factor of the tuned run's epochs."""
    chosen = [run for run in runs if run["schedule"] == "constant" and run["case"].startswith("adamw")]
    methods = dict.fromkeys(run["method"] for run in chosen)
    return {
        method: [np.mean([run["ratio"] <= factor for run in chosen if run["method"] == method]) for factor in factors]
        for method in methods
    }


def panels():
    runs = list(judged(FOUND))
    derived = [run for run in runs if run["method"] == "derived"]
    factors, away = np.geomspace(1 / 4, 8, 61), np.geomspace(1, 8, 61)

    def within(words, chosen):
        farness = np.array([max(run["distance"], 1 / run["distance"]) for run in chosen])
        return Series(words, away, [(farness <= factor).mean() for factor in away], "line")

    # More methods than colours.
    styles = [("line", i) if i < COLOURS else ("dashed", i - COLOURS) for i in range(2 * COLOURS)]
    return [
        Panel(
            name="profile",
            title="AdamW's cases, constant rate: how soon each method reaches the tuned loss",
            xlabel="epochs / the tuned run's",
            ylabel="share of runs",
            series=[
                Series(method, factors, shares, *style)
                for (method, shares), style in zip(profile(runs, factors).items(), styles, strict=False)
            ],
            xscale="log",
        ),
        Panel(
            name="distance",
            title="The derived rate's distance to the good interval",
            xlabel="factor",
            ylabel="share of the rates that are no farther away",
            series=[
                within("workloads that the rule was chosen on", [run for run in derived if run["tuned"]]),
                within("the others", [run for run in derived if not run["tuned"]]),
            ],
            lines=[Line("2 ×", 2.0), Line("4 ×", 4.0)],
            xscale="log",
        ),
    ]
