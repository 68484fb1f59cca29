"""A Flax NNX model in its own loop: its curvature, its learning rates, and an optimizer that follows λ_max.

Run it: python examples/flax_nnx.py
"""

import jax
import optax
from flax import nnx

from jaxnet import curvature, data, learning_rate, per_example

key = jax.random.key(0)
train, test = data.digits("train"), data.digits("test")


class Net(nnx.Module):
    """Nothing here knows of jaxnet."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.out = nnx.Linear(4 * 4 * 8, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.tanh(self.conv(x.reshape(-1, 8, 8, 1)))
        return self.out(x.reshape(-1, 4 * 4 * 8))


def loss_of(model, batch):
    inputs, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(inputs), labels).mean()


model = Net(nnx.Rngs(0))

# The one contract, loss(params, batch) -> scalar: split the params off, and merge them where they are used.
definition, params = nnx.split(model)
loss = lambda params, batch: loss_of(nnx.merge(definition, params), batch)

sharp = curvature.sharpness(loss, params, train, key=key)
print(f"λ_max = {float(sharp.value):.6g}, so 1/λ_max = {float(learning_rate.optimal(sharp.value)):.6g}")
print(learning_rate.analyse(loss, params, train, key=key))
norms = per_example.gradients(loss, params, train).norms()
print(f"norms of {len(norms)} examples' gradients: {norms.min():.3g} to {norms.max():.3g}, mean {norms.mean():.3g}")

# In the loop the rate is no number to choose: the optimizer keeps it in proportion to 1/λ_max as that moves.
optimizer = nnx.Optimizer(model, learning_rate.sharpness_sgd(key=key), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, batch):
    value, grads = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, grads, value_fn=lambda params: loss(params, batch))
    return value


values = [step(model, optimizer, train) for _ in range(100)]
followed = optimizer.opt_state[0]
print(f"in the end λ_max is {float(followed.sharpness):.3g} and the rate {float(followed.rate):.3g}")
accuracy = (model(test[0]).argmax(axis=1) == test[1]).mean()
print(f"loss {values[0]:.4g} to {values[-1]:.4g} in 100 steps; right on the test digits: {accuracy:.1%}")
