"""One stochastic epoch against one batch step, through the gradients of single examples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import data, losses, nn, per_example, training
from jaxnet.contract import Array
from jaxnet.lab.record import Panel, Record, Series, close, within

QUESTION = "How does an epoch of N stochastic steps at η differ from one batch step at Nη?"


def run(*, seed: int = 0, num_examples: int = 200, width: int = 32) -> Record:
    """Their difference falls as η²: to first order both add up the same N gradients."""
    with jax.enable_x64(True):
        return _run(seed, num_examples, width)


def _run(seed: int, num_examples: int, width: int) -> Record:
    batch = jax.tree.map(lambda x: x[:num_examples], data.digits())
    n = len(batch[1])
    model = nn.mlp([width, 10], activation=jnp.tanh)
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    params = model.init(jax.random.key(seed), batch[0].shape[1:])
    grads = per_example.gradients(loss, params, batch)
    mean, norms = grads.mean(), np.asarray(grads.norms())
    cosines = np.asarray(grads.cosine(mean))
    added = grads.weighted_sum(jnp.full(n, 1 / n))
    mean_squared = float(optax.tree.norm(mean, squared=True))
    spread = float(optax.tree.sum(grads.variance()))

    def displacement(rate: float, batch_size: int | None, key: Array) -> Array:
        result = training.fit(
            loss, params, batch, optax.sgd, learning_rate=rate, batch_size=batch_size, num_epochs=1, key=key,
            order=data.cyclic,
        )  # fmt: skip
        return optax.tree.sub(result.state.params, params)

    rates = np.geomspace(1e-6, 1e-3, 7)
    differences, sizes = [], []
    for rate in rates:
        key = jax.random.key(seed)
        whole = displacement(n * rate, None, key)
        differences.append(float(optax.tree.norm(optax.tree.sub(displacement(rate, 1, key), whole))))
        sizes.append(float(optax.tree.norm(whole)))
    slope = np.polyfit(np.log(rates[:4]), np.log(differences[:4]), 1)[0]
    claims = [
        within("power_of_rate", "the difference falls as this power of η", 2.0, slope, 0.02),
        close(
            "mean_of_examples",
            "Σ g_n/N is the batch gradient, largest difference",
            0.0,
            _largest(optax.tree.sub(added, mean)),
            1e-12,
        ),
        within(
            "spread_from_norms",
            "Σ|g_n − ḡ|²/(N−1) from the norms alone",
            (np.sum(norms**2) - n * mean_squared) / (n - 1),
            spread,
            1e-9,
        ),
        within("cosines", "mean of |g_n| cos(g_n, ḡ) is |ḡ|", mean_squared**0.5, np.mean(norms * cosines), 1e-9),
    ]
    return Record(
        name="one_epoch",
        question=QUESTION,
        config={"num_examples": num_examples, "width": width},
        seed=seed,
        dtype="float64",
        measurements={
            "rates": rates,
            "differences": differences,
            "norms": norms,
            "cosines": cosines,
            "spread": spread,
            "mean_squared": mean_squared,
        },
        claims=claims,
        panels=[
            Panel(
                name="difference_against_rate",
                title=f"An epoch of {n} stochastic steps at η, and one batch step at {n} η",
                xlabel="learning rate η",
                ylabel="distance in parameters",
                series=[
                    Series("length of the batch step", rates, sizes, "line-points"),
                    Series("difference of the two", rates, differences, "line-points"),
                    Series("slope 2", rates, differences[0] * (rates / rates[0]) ** 2, "dashed"),
                ],
                xscale="log",
                yscale="log",
            ),
            _histogram("norms", "Norms of the examples' gradients", "‖g_n‖", norms),
            _histogram(
                "cosines",
                "Directions of the examples' gradients against their mean's",
                "cos(g_n, ḡ)",
                cosines,
            ),
        ],
    )


def _largest(tree: Array) -> float:
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def _histogram(name: str, title: str, xlabel: str, values: np.ndarray) -> Panel:
    counts, edges = np.histogram(values, bins=25)
    centres = (edges[1:] + edges[:-1]) / 2
    return Panel(name, title, xlabel, "examples", [Series(f"{len(values)} examples", centres, counts, "bars")])
