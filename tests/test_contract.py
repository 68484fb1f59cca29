import dataclasses

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxnet import contract, curvature, learning_rate, losses, per_example, training

KEY = jax.random.key(0)

GOOD = {"w": jnp.ones(3)}
BATCH = (jnp.ones((4, 3)), jnp.ones(4))


def loss(params, batch):
    return jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)


def test_a_good_contract_gives_the_number_of_examples():
    assert contract.check(loss, GOOD, BATCH) == 4
    assert contract.check(lambda p, b: loss({"w": p["w"]}, b), {"w": jnp.ones(3), "frozen": None}, BATCH) == 4


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ({"w": jnp.ones(3, jnp.int32)}, TypeError, "params, leaf w: .*int32"),
        ({"w": jnp.ones(3, jnp.complex64)}, TypeError, "params, leaf w: .*complex64"),
        ({"w": "text"}, TypeError, "params, leaf w: .*str"),
        (({"kernel": jnp.ones(3, int)},), TypeError, "params, leaf 0/kernel: .*int32"),
        (jnp.ones(3, int), TypeError, "params: .*int32"),
        ({}, ValueError, "params.*without any leaf"),
    ],
)
def test_params_that_do_not_fit(params, error, words):
    with pytest.raises(error, match=words):
        contract.check_params(params)
    with pytest.raises(error, match=words):
        curvature.hessian(loss, params, BATCH)
    with pytest.raises(error, match=words):
        per_example.gradients(loss, params, BATCH)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((jnp.ones((4, 3)), jnp.ones(5)), "share one leading axis, got leaf 0 has 4, leaf 1 has 5"),
        ((jnp.ones((0, 3)), jnp.ones(0)), "at least one example"),
        ((jnp.ones((4, 3)), jnp.float32(1)), "got a scalar"),
        ((), "got no array"),
    ],
)
def test_batches_that_do_not_fit(batch, words):
    with pytest.raises(ValueError, match=words):
        contract.num_examples(batch)


@pytest.mark.parametrize("bad", [lambda p, b: b[0] @ p["w"], lambda p, b: (loss(p, b), 1.0), lambda p, b: 3])
def test_a_loss_that_is_no_real_scalar(bad):
    with pytest.raises(ValueError, match="loss: expected"):
        contract.check(bad, GOOD, BATCH)


def test_leaves_have_the_names_that_restrict_takes():
    tree = ({"kernel": jnp.ones(3), "bias": jnp.ones(2)}, (), Plain(jnp.ones(1)))
    assert contract.leaf_names(tree[:2]) == ["0/bias", "0/kernel"]
    assert contract.leaf_names({"mlp/~/linear_0": {"w": 1.0}}) == ["mlp/~/linear_0/w"]
    assert contract.leaf_names(Module(jnp.ones(1))) == ["scale"]
    assert contract.leaf_names(jnp.ones(3)) == ["params"]
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert contract.leaf_names({"out": nnx.state(layer, nnx.Param)}) == ["out/bias", "out/kernel"]
    assert contract.leaf_names({"a/b": 1.0, "a": {"b": 2.0}}) == ["['a']['b']", "['a/b']"]
    op = curvature.hessian(loss, {"w": jnp.ones(3)}, BATCH)
    assert op.space.names == list(per_example.gradients(loss, {"w": jnp.ones(3)}, BATCH).plan) == ["w"]
    with pytest.raises(
        ValueError, match=r"v: expected a pytree like params, got leaf w of shape \(2,\) and not \(3,\)"
    ):
        op @ {"w": jnp.ones(2)}
    assert contract.not_finite(params={"w": jnp.array(jnp.nan)}, loss=jnp.inf) == ["params, leaf w", "loss"]


class Module(eqx.Module):
    """A loss with an array of its own."""

    scale: jax.Array

    def __call__(self, params, batch):
        return jnp.mean(self.scale * jnp.square(batch[0] @ params - batch[1])) / 2

    def loss(self, params, batch):
        return self(params, batch)


@dataclasses.dataclass
class Plain:
    scale: jax.Array

    def __call__(self, params, batch):
        return Module.__call__(self, params, batch)


CALLS = {
    "sharpness": lambda loss, p, b: curvature.sharpness(loss, p, b, key=KEY).value,
    "hessian": lambda loss, p, b: curvature.hessian(loss, p, b) @ p,
    "empirical_fisher": lambda loss, p, b: curvature.empirical_fisher(loss, p, b) @ p,
    "gradient_covariance": lambda loss, p, b: curvature.gradient_covariance(loss, p, b) @ p,
    "track": lambda loss, p, b: curvature.track(loss, b, key=KEY).init(p).sharpness.value,
    "gradients": lambda loss, p, b: per_example.gradients(loss, p, b).norms(),
    "noise_scale": lambda loss, p, b: per_example.noise_scale(loss, p, b).value,
    "chunked": lambda loss, p, b: curvature.sharpness(losses.chunked(loss, 3), p, b, key=KEY).value,
    "greedy": lambda loss, p, b: learning_rate.greedy(loss, p, b),
    "noisy_curvature": lambda loss, p, b: learning_rate.noisy_curvature(loss, p, b, key=KEY).along_noise,
    "stability": lambda loss, p, b: learning_rate.stability(
        loss, p, b, optax.sgd(0.1), optax.sgd(0.1).init(p), key=KEY
    ).limit,
    "measure_stability": lambda loss, p, b: learning_rate.measure_stability(
        loss, p, b, optax.sgd, rates=[0.5, 1.0, 2.0, 4.0], key=KEY
    ).limits,
    "fit": lambda loss, p, b: training.fit(
        loss, p, b, optax.sgd, learning_rate=0.1, batch_size=4, num_epochs=2, key=KEY
    ).state.params,
    "sweep": lambda loss, p, b: training.sweep(
        loss, p, b, optax.sgd, learning_rates=[0.1], batch_size=None, num_epochs=2, key=KEY
    )[0].state.params,
    "range_test": lambda loss, p, b: learning_rate.range_test(
        loss, p, b, optax.sgd, learning_rates=jnp.geomspace(0.01, 1, 20), batch_size=None, key=KEY
    ).smoothed,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_losses_that_cannot_be_hashed_are_taken_and_compile_once(name):
    """A module with arrays, a plain dataclass, and a module's method, against the function."""
    scale = jnp.array(0.7)
    params, batch = jnp.array([0.5, -0.2]), (jax.random.normal(KEY, (8, 2)), jnp.linspace(-1, 1, 8))
    expected = CALLS[name](lambda p, b: Module.__call__(Plain(scale), p, b), params, batch)
    module = Module(scale)
    for loss in (module, Plain(scale), module.loss):
        chex.assert_trees_all_close(CALLS[name](loss, params, batch), expected, rtol=1e-5)


def test_a_method_of_one_object_is_compiled_once():
    traces = []

    class Counted(Plain):
        def loss(self, params, batch):
            traces.append(None)
            return self(params, batch)

    counted = Counted(jnp.array(0.7))
    batch = (jax.random.normal(KEY, (8, 2)), jnp.linspace(-1, 1, 8))
    for params in (jnp.array([0.5, -0.2]), jnp.array([0.1, 0.3])):
        before = len(traces)
        norms = per_example.gradients(counted.loss, params, batch).norms()
        assert norms.shape == (8,)
    again = len(traces) - before
    assert before > 0
    curvature.sharpness(counted.loss, params, batch, key=KEY)
    before = len(traces)
    curvature.sharpness(counted.loss, params + 1, batch, key=KEY)
    assert len(traces) == before
    assert again <= 1


@pytest.mark.parametrize(
    "of",
    [lambda loss: loss, lambda loss: losses.chunked(loss, 2), losses.mixed_precision],
    ids=["whole", "chunked", "rounded"],
)
def test_a_loss_is_traced_once_for_arguments_of_one_kind_and_is_told_as_it_was_written(of):
    traces = []

    def apply(params, x):
        traces.append(None)
        return x @ params

    params, batch = jnp.ones((3, 1)), (jnp.ones((4, 3)), jnp.ones((4, 1)))
    mean = losses.mean_loss(apply, losses.squared_error)
    for loss in (of(mean), of(lambda params, batch: losses.squared_error(apply(params, batch[0]), batch[1]).mean())):
        traces.clear()
        once = contract.traced_once(loss)
        assert type(once) is type(loss) or not dataclasses.is_dataclass(loss)
        assert contract.traced_once(once) == once == contract.traced_once(loss)
        assert contract.as_written(once) == loss
        expected = jax.grad(loss)(params, batch)
        traces.clear()
        for number in range(1, 4):
            program = jax.jit(jax.grad(lambda p, n=number, once=once: n * once(p, batch)))
            chex.assert_trees_all_close(program(params), number * expected, atol=1e-6)
        assert len(traces) == 1


def test_a_loss_that_is_called_by_itself_reads_what_it_reads_now():
    scale = [1.0]
    loss = losses.mean_loss(lambda params, x: scale[0] * (x @ params), losses.squared_error)
    params, batch = jnp.ones((3, 1)), (jnp.ones((4, 3)), jnp.zeros((4, 1)))
    before = loss(params, batch)
    curvature.hessian(loss, params, batch) @ params
    scale[0] = 2.0
    np.testing.assert_allclose(loss(params, batch), 4 * before)


def test_params_without_a_number_are_refused():
    with pytest.raises(ValueError, match="got arrays of size 0 alone"):
        contract.check_params({"w": jnp.zeros((0, 3)), "b": jnp.zeros(0)})
    contract.check_params({"w": jnp.zeros((0, 3)), "b": jnp.zeros(1)})
