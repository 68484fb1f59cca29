"""A Haiku model in its own loop: its curvature, its learning rates, and an optimizer that follows λ_max.

Run it: python examples/haiku_model.py
"""

import haiku as hk
import jax
import optax

from jaxnet import curvature, data, learning_rate, per_example

key = jax.random.key(0)
train, test = data.digits("train"), data.digits("test")

# Nothing here knows of jaxnet.
network = lambda x: hk.nets.MLP([64, 64, 10], activation=jax.nn.silu)(x)
model = hk.without_apply_rng(hk.transform(network))
params = model.init(key, train[0])


def loss(params, batch):
    """The one contract, loss(params, batch) -> scalar, which Haiku's own functions fit as they are."""
    inputs, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, inputs), labels).mean()


sharp = curvature.sharpness(loss, params, train, key=key)
print(f"λ_max = {float(sharp.value):.6g}, so 1/λ_max = {float(learning_rate.optimal(sharp.value)):.6g}")
print(learning_rate.analyse(loss, params, train, key=key))
norms = per_example.gradients(loss, params, train).norms()
print(f"norms of {len(norms)} examples' gradients: {norms.min():.3g} to {norms.max():.3g}, mean {norms.mean():.3g}")

# In the loop the rate is no number to choose: the optimizer keeps it in proportion to 1/λ_max as that moves.
optimizer = learning_rate.sharpness_sgd(key=key)
trained, opt_state = params, optimizer.init(params)


@jax.jit
def step(params, opt_state, batch):
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params, value_fn=lambda params: loss(params, batch))
    return optax.apply_updates(params, updates), opt_state, value


for _ in range(100):
    trained, opt_state, value = step(trained, opt_state, train)
followed = opt_state[0]
print(f"in the end λ_max is {float(followed.sharpness):.3g} and the rate {float(followed.rate):.3g}")
accuracy = (model.apply(trained, test[0]).argmax(axis=1) == test[1]).mean()
print(f"loss {loss(params, train):.4g} to {value:.4g} in 100 steps; right on the test digits: {accuracy:.1%}")
