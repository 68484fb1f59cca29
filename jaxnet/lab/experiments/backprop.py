"""The chain rule, module by module."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import losses, nn
from jaxnet.contract import Array
from jaxnet.lab.experiments import inference
from jaxnet.lab.record import Claim, Panel, Record, Series, close

QUESTION = "Is a weight's share in the error what the chain rule says, and is each module's backward rule right?"

TARGET = 0.9


def run(*, seed: int = 0) -> Record:
    """∂E/∂w of the lectures' example, and δ of each kind of module against `jax.vjp`."""
    with jax.enable_x64(True):
        return _run(seed)


def _run(seed: int) -> Record:
    model, params = inference.network()
    x = jnp.asarray([inference.INPUT])
    loss = losses.mean_loss(lambda p, x: model.apply(p, x)[:, 0], losses.squared_error)
    batch = (x, jnp.asarray([TARGET]))
    # The weight from the first hidden neuron to the first output.
    gradient = float(jax.grad(loss)(params, batch)[2]["kernel"][0, 0])
    hidden = nn.serial(nn.dense(3, use_bias=False), nn.activation(jax.nn.sigmoid)).apply(params[:2], x)[0, 0]
    output = model.apply(params, x)[0, 0]
    written = lambda i, o, t: float(i * (o - t) * o * (1 - o))
    claims = [
        close("slide", "∂E/∂w from the slide's rounded figures", -0.01626625, written(0.13, 0.35, 0.9), 5e-9),
        close(
            "unrounded",
            "∂E/∂w unrounded, I(O−T)O(1−O) against autodiff",
            written(hidden, output, TARGET),
            gradient,
            1e-12,
        ),
        *_modules(jax.random.key(seed)),
    ]

    def error(w: Array) -> Array:
        moved = params[2]["kernel"].at[0, 0].set(w)
        return loss((params[0], (), {"kernel": moved}, ()), batch)

    weight = float(params[2]["kernel"][0, 0])
    grid = np.linspace(weight - 12, weight + 12, 121)
    curve = np.asarray(jax.vmap(error)(jnp.asarray(grid)))
    here = float(error(jnp.asarray(weight)))
    near = grid[np.abs(grid - weight) < 5]
    panel = Panel(
        name="error_against_weight",
        title="E against one weight: the gradient is the slope where the weight is",
        xlabel="weight from hidden neuron 1 to output 1",
        ylabel="E = ½(O − T)²",
        series=[
            Series("E", grid, curve),
            Series(f"slope ∂E/∂w = {gradient:.5f}", near, here + gradient * (near - weight), "dashed"),
            Series("the network's weight", [weight], [here], "points"),
        ],
    )
    return Record(
        name="backprop",
        question=QUESTION,
        config={},
        seed=seed,
        dtype="float64",
        measurements={"gradient": gradient, "hidden": hidden, "output": output},
        claims=claims,
        panels=[panel],
    )


def _modules(key: Array) -> list[Claim]:
    """Each module's backward rule as written, against the vector-Jacobian product of its forward rule."""
    keys = jax.random.split(key, 6)
    w, other = jax.random.normal(keys[0], (3, 4)), jax.random.normal(keys[1], (3,))
    i, delta = jax.random.normal(keys[2], (4,)), jax.random.normal(keys[3], (3,))
    signal, bias = jax.random.normal(keys[4], (3,)), jax.random.normal(keys[5], (3,))
    s = jax.nn.sigmoid(signal + bias)
    slope = s * (1 - s)

    def claim(
        key: str, name: str, forward: Callable[..., Array], arguments: tuple[Array, ...], rules: tuple[Array, ...]
    ) -> Claim:
        found = jax.vjp(forward, *arguments)[1](delta)
        worst = max(float(jnp.abs(f - r).max()) for f, r in zip(found, rules, strict=True))
        return close(key, name, 0.0, worst, 1e-12)

    return [
        claim(
            "linear", "linear: δI = W′δO, δW = δO·I′",
            lambda i, w: w @ i, (i, w), (w.T @ delta, jnp.outer(delta, i)),
        ),
        claim(
            "sigmoid_with_bias", "sigmoid with bias: δI = f′(I+B)δO, δB = δI",
            lambda i, b: jax.nn.sigmoid(i + b), (signal, bias), (slope * delta, slope * delta),
        ),
        claim(
            "product_of_inputs", "product of two inputs: δI₁ = I₂δO, δI₂ = I₁δO",
            jnp.multiply, (signal, other), (other * delta, signal * delta),
        ),
        claim(
            "residual_sum", "residual sum: δI₁ = δO, δI₂ = f′(I₂)δO",
            lambda a, b: a + jax.nn.sigmoid(b), (other, signal + bias), (delta, slope * delta),
        ),
    ]  # fmt: skip
