import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import curvature, losses, nn, training

KEY = jax.random.key(3)


@pytest.fixture(scope="session")
def all_but_certain():
    """A trained network whose logits are scaled until the label's is so far above all others, for each example.

    The Hessian is then e^-margin of the numbers that it is computed from. A function of the margin that gives the loss,
    the params, the batch, and λ_max in float64.
    """
    labels = jnp.arange(200) % 10
    batch = jax.random.normal(KEY, (200, 10)) + 6 * jax.nn.one_hot(labels, 10), labels
    model = nn.mlp([32, 10], activation=jnp.tanh)
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    trained = training.fit(
        loss, model.init(KEY, (10,)), batch, optax.adam, learning_rate=0.01, batch_size=None, num_epochs=200, key=KEY
    ).state.params
    logits = jnp.sort(model.apply(trained, batch[0]), axis=1)
    least = (logits[:, -1] - logits[:, -2]).min()

    def problem(margin):
        params = (*trained[:-1], jax.tree.map(lambda w: margin / least * w, trained[-1]))
        with jax.enable_x64(True):
            double = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype=float), tree)
            exact = curvature.hessian(loss, double(params), (double(batch[0]), labels))
            return loss, params, batch, float(curvature.eigsh(exact, tol=1e-8, key=KEY).values[0])

    return problem
