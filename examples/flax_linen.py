"""A Flax Linen model in its own loop: its curvature, its learning rates, and an optimizer that follows λ_max.

Run it: python examples/flax_linen.py
"""

import jax
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from jaxnet import curvature, data, learning_rate, per_example

key = jax.random.key(0)
train, test = data.digits("train"), data.digits("test")


class Net(nn.Module):
    """Nothing here knows of jaxnet."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.LayerNorm()(nn.Dense(64)(x)))
        return nn.Dense(10)(x)


model = Net()
params = model.init(key, train[0])


def loss(params, batch):
    """The one contract, loss(params, batch) -> scalar, which Linen's own functions fit as they are."""
    inputs, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, inputs), labels).mean()


sharp = curvature.sharpness(loss, params, train, key=key)
print(f"λ_max = {float(sharp.value):.6g}, so 1/λ_max = {float(learning_rate.optimal(sharp.value)):.6g}")
print(learning_rate.analyse(loss, params, train, key=key))
norms = per_example.gradients(loss, params, train).norms()
print(f"norms of {len(norms)} examples' gradients: {norms.min():.3g} to {norms.max():.3g}, mean {norms.mean():.3g}")

# In the loop the rate is no number to choose: the optimizer keeps it in proportion to 1/λ_max as that moves.
state = TrainState.create(apply_fn=model.apply, params=params, tx=learning_rate.sharpness_sgd(key=key))


@jax.jit
def step(state, batch):
    value, grads = jax.value_and_grad(loss)(state.params, batch)
    # state.apply_gradients hands nothing but gradients to the optimizer; this is its body, with value_fn.
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params, value_fn=lambda p: loss(p, batch))
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), value


for _ in range(100):
    state, value = step(state, train)
followed = state.opt_state[0]
print(f"in the end λ_max is {float(followed.sharpness):.3g} and the rate {float(followed.rate):.3g}")
accuracy = (state.apply_fn(state.params, test[0]).argmax(axis=1) == test[1]).mean()
print(f"loss {loss(params, train):.4g} to {value:.4g} in 100 steps; right on the test digits: {accuracy:.1%}")
