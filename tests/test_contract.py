import jax.numpy as jnp
import pytest

from jaxnet import contract, curvature, per_example

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
        ({"w": jnp.ones(3, jnp.int32)}, TypeError, r"params\['w'\].*int32"),
        ({"w": jnp.ones(3, jnp.complex64)}, TypeError, r"params\['w'\].*complex64"),
        ({"w": "text"}, TypeError, r"params\['w'\].*str"),
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
        ((jnp.ones((4, 3)), jnp.ones(5)), "share one leading axis.*4.*5"),
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
