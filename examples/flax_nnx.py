"""A Flax NNX model with batch norm and dropout in its own loop: python examples/flax_nnx.py"""

import jax
import optax
from flax import nnx

from jaxnet import curvature, data, learning_rate

key = jax.random.key(0)
train, test = data.digits("train"), data.digits("test")


class Net(nnx.Module):
    """Nothing here knows of jaxnet."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(4 * 4 * 8, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.tanh(self.norm(self.conv(x.reshape(-1, 8, 8, 1))))
        return self.out(self.dropout(x.reshape(-1, 4 * 4 * 8)))


def loss_of(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1]).mean()


model = Net(nnx.Rngs(0))

# loss(params, batch) -> scalar: batch norm by its running statistics and no dropout, so that examples are on their own.
model.eval()
definition, params, others = nnx.split(model, nnx.Param, ...)
loss = lambda params, batch: loss_of(nnx.merge(definition, params, others), batch)

sharp = curvature.sharpness(loss, params, train, key=key)
print(f"λ_max = {float(sharp.value):.6g}, so 1/λ_max = {float(learning_rate.optimal(sharp.value)):.6g}")
# AdamW on batches of 64, at the rate derived for it.
adamw = learning_rate.analyse(loss, params, train, key=key, make_optimizer=optax.adamw, batch_sizes=[64])
print(adamw)
num_steps = 10 * (len(train[1]) // 64)
optimizer = nnx.Optimizer(model, optax.adamw(adamw.schedule(64, num_steps)), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, batch):
    value, grads = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, grads)
    return value


start = loss_of(model, train)
model.train()
for epoch in range(10):
    for batch in data.batches(train, 64, key=jax.random.fold_in(key, epoch), drop_last=True):
        step(model, optimizer, batch)
model.eval()
accuracy = (model(test[0]).argmax(axis=1) == test[1]).mean()
print(f"loss {start:.4g} to {loss_of(model, train):.4g} in {num_steps} steps; right on the test digits: {accuracy:.1%}")
