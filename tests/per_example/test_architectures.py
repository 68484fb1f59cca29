import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp

from jaxnet import losses, nn

KEY = jax.random.key(0)


@hypothesis.settings(
    deadline=None, max_examples=4, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    st.lists(st.sampled_from(["dense", "tanh", "relu", "layer_norm", "residual", "attention"]), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(2, 5),
)
def test_random_architectures(check_per_example, names, length, n):
    """Layers over sequences (N, T, 4), in any order."""
    layers = {
        "dense": nn.dense(4),
        "tanh": nn.activation(jnp.tanh),
        "relu": nn.activation(jax.nn.relu),
        "layer_norm": nn.layer_norm(),
        "residual": nn.residual(nn.dense(4)),
        "attention": nn.self_attention(2),
    }
    model = nn.serial(*(layers[name] for name in names), nn.flatten(), nn.dense(3))
    with jax.enable_x64(True):
        params = model.init(KEY, (length, 4))
        batch = (jax.random.normal(jax.random.key(1), (n, length, 4)), jnp.arange(n) % 3)
        check_per_example(losses.mean_loss(model.apply, losses.softmax_cross_entropy), params, batch)
