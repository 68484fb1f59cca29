"""An Equinox model in its own loop: its curvature, its learning rates, and an optimizer that follows λ_max.

Run it: python examples/equinox_model.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from jaxnet import curvature, data, learning_rate, per_example

key = jax.random.key(0)
train, test = data.digits("train"), data.digits("test")

# Nothing here knows of jaxnet.
model = eqx.nn.MLP(64, 10, width_size=64, depth=2, activation=jnp.tanh, key=key)


def loss_of(model, batch):
    """Equinox models take one example; the batch is their own `jax.vmap`."""
    inputs, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(inputs), labels).mean()


# The one contract, loss(params, batch) -> scalar: the arrays are the params, and the rest is put back in use.
params, rest = eqx.partition(model, eqx.is_inexact_array)
loss = lambda params, batch: loss_of(eqx.combine(params, rest), batch)

sharp = curvature.sharpness(loss, params, train, key=key)
print(f"λ_max = {float(sharp.value):.6g}, so 1/λ_max = {float(learning_rate.optimal(sharp.value)):.6g}")
print(learning_rate.analyse(loss, params, train, key=key))
norms = per_example.gradients(loss, params, train).norms()
print(f"norms of {len(norms)} examples' gradients: {norms.min():.3g} to {norms.max():.3g}, mean {norms.mean():.3g}")

# In the loop the rate is no number to choose: the optimizer keeps it in proportion to 1/λ_max as that moves.
optimizer = learning_rate.sharpness_sgd(key=key)
opt_state = optimizer.init(params)


@eqx.filter_jit
def step(model, opt_state, batch):
    value, grads = eqx.filter_value_and_grad(loss_of)(model, batch)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = optimizer.update(grads, opt_state, params, value_fn=lambda params: loss(params, batch))
    return eqx.apply_updates(model, updates), opt_state, value


for _ in range(100):
    model, opt_state, value = step(model, opt_state, train)
followed = opt_state[0]
print(f"in the end λ_max is {float(followed.sharpness):.3g} and the rate {float(followed.rate):.3g}")
accuracy = (jax.vmap(model)(test[0]).argmax(axis=1) == test[1]).mean()
print(f"loss {loss(params, train):.4g} to {value:.4g} in 100 steps; right on the test digits: {accuracy:.1%}")
