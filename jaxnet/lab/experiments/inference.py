"""A prediction by hand, neuron by neuron and as matrices."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import nn
from jaxnet.contract import Array
from jaxnet.lab.record import Panel, Record, Series, close

QUESTION = "What does a small network with given weights predict, neuron by neuron and as matrices?"

INPUT = (0.5, 0.9, -0.3)
HIDDEN_WEIGHTS = ((1.0, -2.0, 2.0), (2.0, 1.0, -4.0), (1.0, -1.0, 0.0))
OUTPUT_WEIGHTS = ((-3.0, 1.0, -3.0), (0.0, 1.0, 2.0))


def network() -> tuple[nn.Layer, tuple[dict[str, Array], tuple[()], dict[str, Array], tuple[()]]]:
    """The lectures' network of three inputs, three hidden and two output sigmoids without biases, and its weights."""
    sigmoid = nn.activation(jax.nn.sigmoid)
    model = nn.serial(nn.dense(3, use_bias=False), sigmoid, nn.dense(2, use_bias=False), sigmoid)
    # A row of the lectures' matrices is a neuron; a kernel's columns are.
    kernels = [{"kernel": jnp.asarray(w, jnp.result_type(float)).T} for w in (HIDDEN_WEIGHTS, OUTPUT_WEIGHTS)]
    return model, (kernels[0], (), kernels[1], ())


def run(*, seed: int = 0) -> Record:
    """The lectures' example: hidden (.13, .96, .40), output (.35, .85)."""
    del seed  # nothing here is random
    with jax.enable_x64(True):
        model, params = network()
        x = jnp.asarray([INPUT])
        hidden = np.asarray(nn.serial(nn.dense(3, use_bias=False), nn.activation(jax.nn.sigmoid)).apply(params[:2], x))[
            0
        ]
        output = np.asarray(model.apply(params, x))[0]
    by_hand = lambda rows, inputs: [
        1 / (1 + np.exp(-sum(w * i for w, i in zip(row, inputs, strict=True)))) for row in rows
    ]
    hidden_by_hand = by_hand(HIDDEN_WEIGHTS, INPUT)
    output_by_hand = by_hand(OUTPUT_WEIGHTS, hidden_by_hand)
    units = ["H1", "H2", "H3", "O1", "O2"]
    values, summed = np.append(hidden, output), np.array([*hidden_by_hand, *output_by_hand])
    claims = [
        close(f"unit_{unit.lower()}", f"{unit} of the slides, two digits", slide, value, 0.005)
        for unit, slide, value in zip(units, (0.13, 0.96, 0.40, 0.35, 0.85), values, strict=True)
    ]
    claims.append(
        close(
            "matrices_against_sums",
            "matrices against sums, largest difference",
            0.0,
            np.abs(values - summed).max(),
            1e-12,
        )
    )
    panel = Panel(
        name="activations",
        title="Activations of the lectures' network at the input (.5, .9, −.3)",
        xlabel="neuron: 1–3 hidden, 4–5 output",
        ylabel="S(w·x)",
        series=[
            Series("as matrices, S(W·x)", np.arange(1, 6), values, "bars"),
            Series("neuron by neuron", np.arange(1, 6), summed, "points"),
        ],
    )
    return Record(
        name="inference",
        question=QUESTION,
        config={},
        seed=0,
        dtype="float64",
        measurements={"hidden": hidden, "output": output},
        claims=claims,
        panels=[panel],
    )
