# %% [markdown]
# # From one neuron to the largest learning rate
#
# This is `examples/lecture.py`. Open it as a notebook (VS Code and Jupytext read its `# %%` cells), or run it:
#
#     python examples/lecture.py             # prints
#     python examples/lecture.py figures     # and writes its figures into a folder
#
# It needs jaxnet with its extra `app`. Each cell is short; change a number and run it again.

# %%
import builtins
import functools
import io
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnet import curvature, data, learning_rate, losses, nn, per_example, plot, training
from jaxnet.lab import plots
from jaxnet.lab.record import Contours, Line, Panel, Series

in_notebook = hasattr(builtins, "__IPYTHON__")
folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 and not in_notebook else None
key = jax.random.key(0)


def show(drawn, name=None):
    """Draw a panel, or a result of the library: in the notebook, or into the folder that was named."""
    if not in_notebook and folder is None:
        return
    figure = plots.draw([drawn])[drawn.name] if isinstance(drawn, Panel) else plot(drawn)
    if in_notebook:
        from IPython.display import Image, display

        figure.savefig(picture := io.BytesIO())
        display(Image(picture.getvalue()))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name or drawn.name}.png")


# %% [markdown]
# ## A neuron
#
# A neuron weighs its inputs, adds them up, and squashes the sum: O = S(w·I) with S(z) = 1/(1 + e⁻ᶻ).

# %%
inputs = jnp.array([0.5, 0.9, -0.3])
first = jnp.array([1.0, -2.0, 2.0])
total = first @ inputs
print(f"H1 = S({total:.1f}) = {jax.nn.sigmoid(total):.2f}")

# %% [markdown]
# ## A network is matrices
#
# Put the weights of three neurons into the rows of a matrix, and one product gives all three sums. The outputs of one
# layer are the inputs of the next.

# %%
hidden_weights = jnp.array([[1.0, -2.0, 2.0], [2.0, 1.0, -4.0], [1.0, -1.0, 0.0]])
output_weights = jnp.array([[-3.0, 1.0, -3.0], [0.0, 1.0, 2.0]])
hidden = jax.nn.sigmoid(hidden_weights @ inputs)
output = jax.nn.sigmoid(output_weights @ hidden)
print("hidden:", *(f"{h:.2f}" for h in hidden), " output:", *(f"{o:.2f}" for o in output))

# %% [markdown]
# In jaxnet a network is two pure functions: `init(key, shape)` draws its weights, and `apply(params, x)` computes its
# outputs, for many examples at once. Here we put our own weights in.

# %%
sigmoid = nn.activation(jax.nn.sigmoid)
network = nn.serial(nn.dense(3, use_bias=False), sigmoid, nn.dense(2, use_bias=False), sigmoid)
params = ({"kernel": hidden_weights.T}, (), {"kernel": output_weights.T}, ())
print("from jaxnet:", *(f"{o:.2f}" for o in network.apply(params, inputs[None])[0]))

# %% [markdown]
# ## A loss says how wrong it is
#
# For a quantity, half the squared error, E = ½(O − T)². For a class, cross-entropy: the surprise,
# −log p, at what turned out to be true. With log₂ it is counted in bits: a fair coin surprises by one.

# %%
print(f"squared error: {losses.squared_error(output[:1], jnp.array([0.9]))[0]:.4f}")
for p in (1.0, 0.5, 0.25, 0.125):
    print(f"probability {p:5}: surprise {np.log2(1 / p):.0f} bits")

# %% [markdown]
# Computed from a probability that has been rounded to 0, the surprise is infinite. Computed from the sum before the
# squashing (the *logit*), it stays finite, and so does its gradient.

# %%
print("from p:    ", -jnp.log(jax.nn.sigmoid(jnp.float32(-200.0))))
print("from logit:", losses.sigmoid_cross_entropy(jnp.array([-200.0]), jnp.array([1.0]))[0])

# %% [markdown]
# ## Whose fault is it?
#
# How much does the error change if one weight changes a little? For the weight from hidden neuron 1 to output 1, the
# chain rule multiplies three slopes: ∂E/∂w = I (O − T) O (1 − O).

# %%
I, O, T = hidden[0], output[0], 0.9
print("by the rule: ", I * (O - T) * O * (1 - O))


def error(params):
    """E of the first output for the target T."""
    return 0.5 * (network.apply(params, inputs[None])[0, 0] - T) ** 2


print("by jax.grad: ", jax.grad(error)(params)[2]["kernel"][0, 0])

# %% [markdown]
# `jax.grad` is backpropagation. Every module of a network knows how to do two things: compute its outputs from its
# inputs, and turn the gradient at its outputs into gradients at its inputs. For a linear module O = WI these are
# δI = W′δO and δW = δO I′.

# %%
delta_output = jnp.array([1.0, -2.0])
_, backward = jax.vjp(lambda w, i: w @ i, output_weights, hidden)
delta_weights, delta_hidden = backward(delta_output)
print("δI agrees:", jnp.allclose(delta_hidden, output_weights.T @ delta_output))
print("δW agrees:", jnp.allclose(delta_weights, jnp.outer(delta_output, hidden)))

# %% [markdown]
# ## Down the slope: one dimension
#
# Gradient descent takes a step against the gradient, ω ← ω − η ∂E/∂ω.
# How long a step? On a parabola the slope falls to zero after a step of just
# η_opt = (∂²E/∂ω²)⁻¹. In general a step multiplies the distance from the minimum by
# 1 − η/η_opt, so there are four regimes: creep, jump there, swing, fly apart. The border is
# η_max = 2η_opt.

# %%
parabola = lambda w: 1.6 * w**2
second_derivative = jax.grad(jax.grad(parabola))(1.0)
best = 1 / second_derivative
print(f"∂²E/∂ω² = {second_derivative:.2f}, η_opt = {best:.4f}, η_max = {2 * best:.4f}")


def descend(rate, w=1.0, num_steps=8):
    """The distances from the minimum, step after step."""
    return [w := w - rate * jax.grad(parabola)(w) for _ in range(num_steps)]


ratios = (0.5, 1.0, 1.5, 2.0, 2.1)
paths = {ratio: np.array([1.0, *descend(ratio * best)]) for ratio in ratios}
for ratio, path in paths.items():
    print(f"η = {ratio} η_opt:", np.round(path[:6], 3))

# %%
series = [Series(f"η = {ratio} η_opt", np.arange(9), path, "line-points") for ratio, path in paths.items()]
show(Panel("one_dimension", "Distance from the minimum at five rates", "step", "ω − ω*", series))

# %% [markdown]
# ## Many dimensions: the steepest direction sets the limit
#
# With many weights the second derivatives form a matrix, the Hessian H. Along each of its eigenvectors gradient
# descent is one-dimensional, with the eigenvalue λ as second derivative. All directions share one rate, so the
# largest eigenvalue decides: η_max = 2/λ_max.
#
# Our data: two classes of 50 points around ±(.4, .8), targets ±1, and one linear neuron, y = w·x.

# %%
points = data.two_gaussians_exact()


def weights_only(w, batch):
    """E = ½ mean (d − w·x)²."""
    x, d = batch
    return jnp.mean(losses.squared_error(x @ w, d))


start = jnp.array([-0.25, 2.2])
H = jax.hessian(weights_only)(start, points)
print("eigenvalues of H:", np.round(jnp.linalg.eigvalsh(H), 4))
print(f"η_max = 2/.84 = {learning_rate.maximal(0.84):.2f}")

# %% [markdown]
# A network has too many weights to write H down. Products Hv are cheap, about two gradients each, and a dozen of
# them are enough to find λ_max by Lanczos' method. That is what `sharpness` does.

# %%
sharp = curvature.sharpness(weights_only, start, points, key=key)
print(f"λ_max = {sharp.value:.4f}, after {sharp.num_matvecs} products, at most {sharp.upper_bound:.4f}")

# %% [markdown]
# Does training agree? Just below 2.38 the error falls, just above it grows.

# %%
sweep = functools.partial(training.sweep, data=points, make_optimizer=optax.sgd, batch_size=None, key=key)
for rate in (2.3, 2.45):
    (run,) = sweep(weights_only, start, learning_rates=[rate], num_epochs=40)
    print(f"η = {rate}: E from {run.history.loss[0]:.3g} to {run.history.loss[-1]:.3g}")

# %% [markdown]
# Give the neuron a bias, y = w·x + b, and there is a third direction, of curvature 1, the mean of 1². Now
# that one is the steepest, and the limit is 2. The rate 2.2 tells the two apart.

# %%
neuron = nn.linear_neuron()
with_bias = losses.mean_loss(neuron.apply, losses.squared_error)
biased_start = {"kernel": start[:, None], "bias": jnp.array([0.5])}
sharp = curvature.sharpness(with_bias, biased_start, points, key=key)
print(f"λ_max with the bias: {sharp.value:.4f}, so η_max = {learning_rate.maximal(sharp.value):.2f}")
for name, loss, begin in (("weights only", weights_only, start), ("with the bias", with_bias, biased_start)):
    (run,) = sweep(loss, begin, learning_rates=[2.2], num_epochs=40)
    print(f"{name}, η = 2.2: E from {run.history.loss[0]:.3g} to {run.history.loss[-1]:.3g}")

# %% [markdown]
# ## All examples, some, or one
#
# The gradient of the mean over all examples is the mean of their gradients. Why wait for all of them? *Stochastic*
# descent takes a step after every example, *mini-batch* descent after a few, *batch* descent after all. One step is an
# *iteration*, one pass over the data an *epoch*. For `fit` the three differ in `batch_size` and nothing else.

# %%
fit = functools.partial(
    training.fit, weights_only, start, points, optax.sgd, num_epochs=20, key=key, metrics={"E": weights_only}
)
runs = {
    "batch, η = 1.19": fit(learning_rate=1.19, batch_size=None),
    "10 at a time, η = 0.6": fit(learning_rate=0.6, batch_size=10),
    "stochastic, η = 0.2": fit(learning_rate=0.2, batch_size=1),
}
for name, run in runs.items():
    error_after = run.history.metrics["E"][[0, 4, 19]]
    print(f"{name}: {run.state.step} iterations; E after 1, 5 and 20 epochs:", np.round(error_after, 4))

# %% [markdown]
# Count what each has paid in gradients of single examples: the same. The small batches are ahead at once, and then
# keep bouncing, since each example pulls its own way. A smaller rate bounces less, and is slower.

# %%
at_start = weights_only(start, points)
series = [
    Series(name, np.arange(21), [at_start, *run.history.metrics["E"]], "line-points") for name, run in runs.items()
]
show(Panel("batch_sizes", "Three batch sizes, two Gaussians", "epoch", "E on all examples", series, yscale="log"))

# %% [markdown]
# The paths on a map of the error show why: the valley is long and narrow, .84 across and .04 along.

# %%
update = jax.jit(training.make_update(weights_only, optax.sgd(0.2)))
state = training.init_state(start, optax.sgd(0.2))
path = [start]
for one in data.batches(points, 1, key=key):
    state, _ = update(state, one)
    path.append(state.params)
batch_path = [w := start] + [w := w - 2.2 * jax.grad(weights_only)(w, points) for _ in range(20)]
across, up = jnp.linspace(-1.2, 1.4, 40), jnp.linspace(0.4, 2.4, 40)
heights = jax.vmap(lambda y: jax.vmap(lambda x: weights_only(jnp.stack([x, y]), points))(across))(up)
series = [
    Series(name, *np.array(steps).T, "line-points")
    for name, steps in (("batch, η = 2.2, 20 steps", batch_path), ("stochastic, η = 0.2, one epoch", path))
]
contours = Contours(across, up, heights, "E")
show(Panel("paths", "Batch descent swings across the valley", "weight w₁", "weight w₂", series, contours=contours))

# %% [markdown]
# ## A real network
#
# Handwritten digits, 8 × 8 pixels, and a network of 26 122 weights. The recipe is the same: a loss, λ_max of
# its Hessian, the rates that follow. `analyse` does it in one call, and looks at the gradient's noise too.

# %%
digits = jax.tree.map(lambda x: x[:400], data.digits())
model = nn.mlp([128, 128, 10], activation=jnp.tanh)
params = model.init(key, (64,))
loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
found = learning_rate.analyse(loss, params, digits, key=key)
print(found)

# %% [markdown]
# Hold it against training. Start beside the initial weights, with the loss tilted so that they are a fixed point:
# at which rate does an oscillation begin to grow? Only gradients are used, so the answer owes nothing to the Hessian.

# %%
ladder = float(found.maximal) * np.array([0.5, 0.7, 0.9, 1.1, 1.5, 2.0, 3.0, 4.0, 6.0])
measured = learning_rate.measure_stability(loss, params, digits, optax.sgd, rates=ladder, key=key)
print(f"limit of stability: predicted {found.maximal:.3f}, measured {measured.limit:.3f} ± {measured.limit_error:.3f}")

# %% [markdown]
# And plain training? It may survive beyond the limit: thrown out of a narrow valley, it often lands in a wider one. The
# limit says where that begins. It does not say that the run is lost.

# %%
after = np.minimum(np.nan_to_num(np.array(measured.plain_loss[:, -1]), nan=1e3), 1e3)
lines = [Line("1/λ_max", float(found.optimal)), Line("2/λ_max", float(found.maximal))]
series = [Series("full batch, 60 steps", ladder, after, "line-points")]
title = "Loss after 60 steps: training goes on beyond 2/λ_max, for a while"
show(Panel("plain_training", title, "learning rate η", "loss", series, lines, xscale="log", yscale="log"))

# %% [markdown]
# ## Small batches need smaller rates
#
# The gradient of a small batch is the whole gradient and noise. How much noise, the gradients of the single examples
# tell. Curvature sees the noise as well as the signal, so the rate must fall: η(B) = ε/(1 + B_noise/B).

# %%
norms = per_example.gradients(loss, params, digits).norms()
print(f"norms of the {len(norms)} gradients: {norms.min():.2f} to {norms.max():.2f}")
for batch_size in (1, 8, 32, 128, None):
    print(f"B = {batch_size}: η = {found.rate(batch_size):.3f}")

# %% [markdown]
# The rate of the full batch, taken for single examples, ruins the network in one epoch. The derived one trains it.

# %%
train = functools.partial(training.fit, loss, params, digits, optax.sgd, batch_size=1, num_epochs=1, key=key)
for rate in (found.optimal, found.rate(1)):
    trained = train(learning_rate=float(rate)).state.params
    print(f"B = 1, η = {rate:.3f}: loss {loss(params, digits):.2f} to {loss(trained, digits):.2f}")

# %% [markdown]
# ## Beside the common recipe
#
# Many people find a rate by a *range test*: train while the rate rises, look where the loss falls and where it blows
# up. It works, and it needs an eye: the rates that rules of thumb read off one curve differ by a factor of ten or more.

# %%
rates = np.geomspace(1e-4, 30, 100)
swept = learning_rate.range_test(
    loss, params, digits, optax.sgd, learning_rates=rates, batch_size=32, key=key, analysis=found
)
print(swept)
show(swept, "range_test")

# %% [markdown]
# ## What to take home
#
# - The loss has a curvature, and it bounds the rate: η_max = 2/λ_max. In one dimension half is best.
# - Everything counts that learns: a bias moved the limit from 2.38 to 2.
# - Small batches pay with noise; η(B) says how much.
# - All of it is computed at one point. Training moves on, and λ_max with it: see `curvature.track`, and
#   `learning_rate.sharpness_sgd`, an optimizer that follows it.
#
# Try it: centre the digits or not (`data.digits(centre=False)`), make the network deeper, exchange `jnp.tanh`. Guess
# first what it does to λ_max.
