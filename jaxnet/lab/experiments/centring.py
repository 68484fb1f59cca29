"""Inputs with a mean and without: what centring does to λ_max, and what it buys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import curvature, data, learning_rate, losses, nn, training
from jaxnet.contract import Array, ArrayTree, Loss
from jaxnet.lab.record import Claim, Line, Panel, Record, Series, above, below, slug, within

QUESTION = "Why centre the inputs: how much larger a rate does it allow, and how many steps does it save?"

NUM_CLASSES = 10
REGRESSION = nn.dense(NUM_CLASSES, kernel_init=jax.nn.initializers.zeros)
NETWORK = nn.mlp([32, NUM_CLASSES], activation=jnp.tanh)
LEVELS = (0.5, 0.2, 0.1)


def run(*, seed: int = 0, num_examples: int = 1437, num_steps: int = 1500) -> Record:
    """A mean μ of the inputs is an eigenvalue of its own, of about |μ|²/C, and holds the rate down for all others.

    Softmax regression starts at W = 0, where λ_max = λ_max(XᵀX/n)/C. It is reported for the block of the weights, and
    for the whole with the bias, which is a column of ones in X; what is trained has the bias.

    Reference:
      LeCun, Bottou, Orr & Müller, "Efficient BackProp", 1998, section 4.3.
    """
    with jax.enable_x64(True):
        return _run(seed, num_examples, num_steps)


def _run(seed: int, num_examples: int, num_steps: int) -> Record:
    inputs, labels = jax.tree.map(lambda x: x[:num_examples], data.digits(centre=False))
    mean = inputs.mean(axis=0)
    batches = (inputs, labels), (inputs - mean, labels)
    keys = jax.random.split(jax.random.key(seed), 3)
    loss, params = _with_cross_entropy(REGRESSION), REGRESSION.init(keys[0], mean.shape)
    deep, start = _with_cross_entropy(NETWORK), NETWORK.init(keys[1], mean.shape)

    spectra = [_spectrum(x) for x, _ in batches]
    raw, centred = (spectrum[0] for spectrum in spectra)
    found = [_of_weights(loss, params, batch, keys[2]) for batch in batches]
    with_bias = [_spectrum(jnp.pad(x, ((0, 0), (0, 1)), constant_values=1))[0] for x, _ in batches]
    limits = [_limit(loss, params, batch, 2 / known, keys[2]) for batch, known in zip(batches, with_bias, strict=True)]
    sharp = [float(curvature.sharpness(deep, start, batch, key=keys[2], tol=1e-4).value) for batch in batches]
    runs = [
        _compare("softmax regression", loss, params, batches, with_bias, num_steps),
        _compare("tanh network", deep, start, batches, sharp, num_steps),
    ]
    of_mean = float(mean @ mean) / NUM_CLASSES
    claims = [
        within("sharpness_raw", "λ_max of the weights, raw: λ_max(XᵀX/n)/C", raw, found[0], 1e-4),
        within("sharpness_centred", "λ_max of the weights, centred", centred, found[1], 1e-4),
        within("sharpness_ratio", "raw over centred, of the weights", 15.0, found[0] / found[1], 0.02),
        above("raw_at_least_of_mean", "raw λ_max is the mean's: at least |μ|²/C", of_mean, found[0]),
        below(
            "raw_at_most_of_mean_and_centred", "and at most the centred λ_max beyond it", of_mean + centred, found[0]
        ),
        within("limit_raw", "η_max measured from gradients, raw", 2 / with_bias[0], limits[0], 0.01),
        within("limit_centred", "η_max measured from gradients, centred", 2 / with_bias[1], limits[1], 0.01),
        *(claim for pair in runs for claim in pair.claims()),
    ]
    rows = [
        ("λ_max of the weights, raw / centred", found[0] / found[1], f"{found[0]:.4g} and {found[1]:.4g}"),
        (
            "λ_max with the bias, raw / centred",
            with_bias[0] / with_bias[1],
            f"{with_bias[0]:.4g} and {with_bias[1]:.4g}: the bias's own 1/C is left",
        ),
        ("λ_max of the network, raw / centred", sharp[0] / sharp[1], f"{sharp[0]:.4g} and {sharp[1]:.4g}"),
        *(row for pair in runs for row in pair.rows()),
    ]
    return Record(
        name="centring",
        question=QUESTION,
        config={"num_examples": num_examples, "num_steps": num_steps},
        seed=seed,
        dtype="float64",
        measurements={
            "weights_sharpness": found,
            "sharpness": with_bias,
            "network_sharpness": sharp,
            "of_mean": of_mean,
            "maximal_rates": limits,
            "steps": {pair.name: pair.steps() for pair in runs},
        },
        claims=claims,
        rows=rows,
        panels=[_spectrum_panel(spectra, of_mean), *(pair.panel() for pair in runs)],
    )


def _with_cross_entropy(model: nn.Layer) -> Loss:
    return losses.mean_loss(model.apply, losses.softmax_cross_entropy)


def _spectrum(inputs: Array) -> np.ndarray:
    """Eigenvalues of XᵀX/(nC), descending; the Hessian of softmax regression at W = 0 has each of them C − 1 times."""
    return np.asarray(jnp.linalg.eigvalsh(inputs.T @ inputs / (NUM_CLASSES * len(inputs))))[::-1]


def _of_weights(loss: Loss, params: ArrayTree, batch: ArrayTree, key: Array) -> float:
    op = curvature.restrict(curvature.hessian(loss, params, batch), {"kernel": True, "bias": False})
    return float(curvature.eigsh(op, key=key, tol=1e-6).values[0])


def _limit(loss: Loss, params: ArrayTree, batch: ArrayTree, expected: float, key: Array) -> float:
    rates = expected * np.geomspace(0.7, 1.4, 9)
    return float(learning_rate.measure_stability(loss, params, batch, optax.sgd, rates=rates, key=key).limit)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One model trained from the same start on raw and on centred inputs, each at its own 1/λ_max.

    Attributes:
      name: of the model.
      ratio: λ_max raw over centred. Both need about the same time ηt to a loss, so it is the ratio of steps as well.
      curves: E before each step, raw and centred.
    """

    name: str
    ratio: float
    curves: tuple[np.ndarray, ...]

    def steps(self) -> np.ndarray:
        """Steps to each of `LEVELS`, (levels, 2)."""
        return np.array([[_steps_to(level, curve) for curve in self.curves] for level in LEVELS])

    def factors(self) -> np.ndarray:
        """Of steps, raw over centred, at each level."""
        raw, centred = self.steps().T
        return raw / centred

    def claims(self) -> list[Claim]:
        """The first level is left out: it takes but a few steps."""
        name = f"{self.name}: steps raw over centred, to E = "
        measured = zip(LEVELS[1:], self.factors()[1:], strict=True)
        return [
            within(slug("steps_ratio", self.name, level), f"{name}{level}", self.ratio, factor, 0.15)
            for level, factor in measured
        ]

    def rows(self) -> list[tuple[str, float, str]]:
        """The factors, and the steps behind them."""
        name = f"{self.name}: steps to E = "
        measured = zip(LEVELS, self.factors(), self.steps(), strict=True)
        return [(f"{name}{level}, raw / centred", factor, f"{a:.1f} and {b:.1f}") for level, factor, (a, b) in measured]

    def panel(self) -> Panel:
        """Both curves, and the centred one with its steps multiplied by the ratio."""
        raw, centred = self.curves
        step = np.arange(1, len(raw))
        stretched = self.ratio * step
        shown = stretched <= step[-1]
        factor = f"{self.factors()[-1]:.1f}"
        return Panel(
            name=self.name.replace(" ", "_"),
            title=f"{self.name.capitalize()}: to E = {LEVELS[-1]}, raw inputs take {factor} times as many steps",
            xlabel="full-batch steps, each run at its own η = 1/λ_max",
            ylabel="mean loss E",
            series=[
                Series("raw inputs", step, raw[1:]),
                Series("centred inputs", step, centred[1:]),
                Series(f"predicted: centred, steps × {self.ratio:.1f}", stretched[shown], centred[1:][shown], "dashed"),
            ],
            xscale="log",
            yscale="log",
        )


def _compare(
    name: str, loss: Loss, params: ArrayTree, batches: tuple[ArrayTree, ...], sharp: list[float], num_steps: int
) -> Pair:
    def descend(batch: ArrayTree, largest: float) -> np.ndarray:
        result = training.fit(
            loss, params, batch, optax.sgd, learning_rate=1 / largest, batch_size=None, num_epochs=num_steps,
            key=jax.random.key(0),
        )  # fmt: skip
        return np.asarray(result.history.loss)

    return Pair(name, sharp[0] / sharp[1], tuple(map(descend, batches, sharp)))


def _steps_to(level: float, curve: np.ndarray) -> float:
    """Steps until E has fallen to the level, with log E interpolated between two; NaN if it never does."""
    if not (curve <= level).any():
        return float("nan")
    k = int(np.argmax(curve <= level))
    return k - float(np.log(level / curve[k]) / np.log(curve[k - 1] / curve[k]))


def _spectrum_panel(spectra: list[np.ndarray], of_mean: float) -> Panel:
    index = np.arange(1, 31)
    names = "raw inputs", "centred inputs"
    series = [Series(name, index, s[:30], "line-points") for name, s in zip(names, spectra, strict=True)]
    return Panel(
        name="eigenvalues",
        title="Softmax regression at W = 0: the inputs' mean is one eigenvalue, far above",
        xlabel="number of the eigenvalue, largest first",
        ylabel="eigenvalue of XᵀX/(nC)",
        series=series,
        lines=[Line("|μ|²/C, of the mean alone", of_mean, "y"), Line("1/C, of the bias", 1 / NUM_CLASSES, "y")],
        xscale="log",
        yscale="log",
    )
