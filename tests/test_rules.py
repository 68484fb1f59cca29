"""Every public function of the library, against four rules; a name without an entry fails.

a: no running sum in less than float32.
b: no two trees paired but by their structure and keys.
c: a mask, a list or a callable is what its type says, or refused.
d: a loss that couples its examples is refused where they are taken apart.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import curvature, dataset, learning_rate, losses, per_example, training

ROOMS = ["nn", "losses", "data", "dataset", "training", "per_example", "curvature", "learning_rate"]
KEY = jax.random.key(0)
N = 4096


def names():
    return [f"{room}.{name}" for room in ROOMS for name in dir(importlib.import_module(f"jaxnet.{room}"))]


def linear(params, batch):
    return jnp.mean(batch["x"] @ params["w"] + params["b"])


PARAMS = {"b": jnp.ones(()), "w": jnp.ones(2)}
BATCH = {"x": jnp.arange(24.0).reshape(12, 2) / 24}
# Leaves of the same shapes, in another structure or under other keys; and shapes that the keys belong to exchanged.
OTHERS = {
    "a tuple": (jnp.ones(()), jnp.ones(2)),
    "other keys": {"a": jnp.ones(()), "c": jnp.ones(2)},
    "exchanged": {"w": jnp.ones(()), "b": jnp.ones(2)},
}
GRADS = lambda: per_example.gradients(linear, PARAMS, BATCH)
OP = lambda: curvature.gradient_covariance(linear, PARAMS, BATCH)

# a: from half precision and the same numbers in float32 to what must agree to 1 %, over N terms of about one.
ONES = jnp.ones(N)
ROWS = {"x": jnp.ones((N, 2))}
HALF = lambda dtype: (jax.tree.map(lambda x: x.astype(dtype), PARAMS), {"x": ROWS["x"].astype(dtype)})
half_sum = lambda batch: batch["x"].astype(jnp.bfloat16).sum()
SUMS = {
    "dataset.total": lambda p, b: dataset.total(half_sum, b, size=4),
    "dataset.mean": lambda p, b: dataset.mean(lambda c: c["x"].mean(), b, size=4),
    "dataset.rows_and_total": lambda p, b: dataset.rows_and_total(lambda c: ((), half_sum(c)), b, size=4)[1],
    "losses.squared_error": lambda p, b: losses.squared_error(b["x"].reshape(1, -1), 0 * b["x"].reshape(1, -1)),
    "losses.sigmoid_cross_entropy": lambda p, b: losses.sigmoid_cross_entropy(
        b["x"].reshape(1, -1), b["x"].reshape(1, -1)
    ),
    "losses.softmax_cross_entropy": lambda p, b: losses.softmax_cross_entropy(
        b["x"][None], jnp.zeros((1, N), jnp.int32)
    ),
    "losses.chunked": lambda p, b: losses.chunked(linear, 4)(p, b),
    "losses.mean_loss": lambda p, b: losses.mean_loss(lambda p, x: x @ p["w"], losses.squared_error)(
        p, (b["x"], 0 * b["x"][:, 0])
    ),
    "losses.accuracy": lambda p, b: losses.accuracy(lambda p, x: x, p, (b["x"], jnp.zeros(N, jnp.int32))),
    "per_example.gradients": lambda p, b: [
        f(per_example.gradients(linear, p, b))
        for f in (lambda g: g.norms(), lambda g: g.mean(), lambda g: g.second_moment(), lambda g: g.weighted_sum(ONES))
    ],
    "per_example.clipped_grad": lambda p, b: per_example.clipped_grad(linear, 1.0, microbatch_size=8)(p, b),
    "per_example.noise_scale": lambda p, b: per_example.noise_scale(linear, p, b).mean_squared,
    "per_example.layer_noise_scale": lambda p, b: [
        x.mean_squared for x in per_example.layer_noise_scale(linear, p, b).values()
    ],
    "curvature.empirical_fisher": lambda p, b: curvature.empirical_fisher(linear, p, b) @ p,
}

# b: what takes a tree that has to be like params.
PAIRED = {
    "per_example.gradients": [
        lambda t: GRADS().vdot(t), lambda t: GRADS().cosine(t), lambda t: GRADS().distances(t),
        lambda t: GRADS().sum_of_deviations(t),
    ],
    "curvature.LinearOperator": [lambda t: OP() @ t],
    "curvature.precondition": [lambda t: curvature.precondition(OP(), t)],
    "curvature.solve": [lambda t: curvature.solve(OP(), t, damping=1.0)],
    "curvature.eigsh": [lambda t: curvature.eigsh(OP(), key=KEY, v0=t)],
    "curvature.sharpness": [lambda t: curvature.sharpness(linear, PARAMS, BATCH, key=KEY, v0=t)],
    "curvature.overlap": [lambda t: curvature.overlap(curvature.eigsh(OP(), key=KEY), t)],
    "curvature.quadratic_form": [lambda t: curvature.quadratic_form(OP(), t)],
    "curvature.quadratic_forms": [lambda t: curvature.quadratic_forms(OP(), t)],
    "curvature.landscape": [lambda t: curvature.landscape(linear, PARAMS, BATCH, t)],
    "learning_rate.critical_sharpness": [lambda t: learning_rate.critical_sharpness(linear, PARAMS, BATCH, t)],
}  # fmt: skip

# c: calls that have to be refused.
MISTAKEN = {
    "per_example.clipped_grad": [
        lambda: per_example.clipped_grad(linear, 1.0)(PARAMS, BATCH, is_padding_example=jnp.zeros(12)),
        lambda: per_example.clipped_grad(linear, 1.0)(PARAMS, BATCH, is_padding_example=[0] * 12),
    ],
    "curvature.restrict": [lambda: curvature.restrict(OP(), {"b": 1, "w": 0}), lambda: curvature.restrict(OP(), "z*")],
}


def fitted(**options):
    return training.fit(
        linear, PARAMS, BATCH, optax.sgd,
        **{"learning_rate": 0.1, "batch_size": 4, "num_epochs": 1, "key": KEY, **options},
    )  # fmt: skip


# c: what is of another type, and the argument that the error names.
OTHER_TYPES = {
    "loss": [
        lambda: curvature.sharpness("linear", PARAMS, BATCH, key=KEY),
        lambda: per_example.gradients(None, PARAMS, BATCH),
        lambda: losses.chunked(3, 2),
        lambda: losses.mixed_precision([linear]),
    ],
    "apply": [lambda: losses.mean_loss(3, losses.squared_error)],
    "criterion": [lambda: losses.mean_loss(linear, "mse")],
    "size": [lambda: losses.chunked(linear, 2.5), lambda: losses.chunked(linear, "4")],
    "product": [lambda: curvature.hessian(linear, PARAMS, BATCH, product="forward")],
    "op": [lambda: curvature.eigsh(PARAMS, key=KEY), lambda: curvature.spectral_density(PARAMS, key=KEY)],
    "k": [lambda: curvature.eigsh(OP(), 2.0, key=KEY), lambda: curvature.eigsh(OP(), True, key=KEY)],
    "ncv": [lambda: curvature.eigsh(OP(), ncv=4.0, key=KEY)],
    "tol": [lambda: curvature.eigsh(OP(), tol="1e-3", key=KEY)],
    "num_steps": [lambda: curvature.spectral_density(OP(), key=KEY, num_steps=2.5)],
    "num_points": [lambda: curvature.landscape(linear, PARAMS, BATCH, PARAMS, num_points=2.5)],
    "groups": [lambda: curvature.layer_sharpness(linear, PARAMS, BATCH, key=KEY, groups=["w"])],
    "every": [
        lambda: curvature.track(linear, BATCH, key=KEY, every=2.5),
        lambda: learning_rate.scale_by_sharpness(key=KEY, fraction=1.0, every=2.5),
    ],
    "max_matvecs": [lambda: curvature.solve(OP(), PARAMS, damping=1.0, max_matvecs=2.5)],
    "microbatch_size": [lambda: per_example.clipped_grad(linear, 1.0, microbatch_size=2.5)],
    "weights": [lambda: GRADS().weighted_sum([1.0] * 12)],
    "batch_sizes": [
        lambda: learning_rate.analyse(linear, PARAMS, BATCH, key=KEY, batch_sizes=4),
        lambda: learning_rate.analyse(linear, PARAMS, BATCH, key=KEY, batch_sizes="4"),
    ],
    "observers": [lambda: fitted(observers=print), lambda: fitted(observers="x"), lambda: fitted(observers=[3])],
    "metrics": [lambda: fitted(metrics=[linear]), lambda: fitted(metrics={"loss": 3})],
    "augment": [lambda: fitted(augment=3)],
    "stop": [lambda: fitted(stop=3)],
    "learning_rate": [lambda: fitted(learning_rate="0.1")],
}  # fmt: skip


# d: entry points that take examples apart.
def coupled(params, batch):
    x = batch["x"] - batch["x"].mean(axis=0)
    return jnp.mean((x @ params["w"] + params["b"]) ** 2)


REFUSE = {
    "per_example.check_independent": per_example.check_independent,
    "per_example.noise_scale": per_example.noise_scale,
    "per_example.layer_noise_scale": per_example.layer_noise_scale,
    "curvature.empirical_fisher": curvature.empirical_fisher,
    "curvature.gradient_covariance": curvature.gradient_covariance,
    "losses.chunked": lambda f, p, b: losses.chunked(f, 5)(p, b),
    "losses.check_mean": losses.check_mean,
    "learning_rate.analyse": lambda f, p, b: learning_rate.analyse(f, p, b, key=KEY),
    "learning_rate.sgd_stability": lambda f, p, b: learning_rate.sgd_stability(f, p, b, 2, replace=True),
    "learning_rate.stationary_excess": lambda f, p, b: learning_rate.stationary_excess(f, p, b, 2, 0.1, replace=True),
}

# Why no rule is tried on the others.
BEYOND = {
    "a type or a constant: what makes it is listed": """
        curvature.Differences curvature.HessianProduct curvature.Landscape learning_rate.CriticalSharpness
        losses.Apply losses.Criterion training.Checkpoints training.JsonLines training.TensorBoard
        curvature.Eigenpairs curvature.Eigensolver curvature.Estimate curvature.LEADING curvature.Leading
        curvature.OnlineSharpness curvature.Sharpness curvature.Solution curvature.Space curvature.SpectralDensity
        curvature.Track curvature.TrackObserver curvature.Tracker data.Contents data.Order dataset.Stream
        learning_rate.Analysis learning_rate.MeasuredSgdStability learning_rate.MeasuredStability
        learning_rate.NoisyCurvature learning_rate.RangeTest learning_rate.ScaleBySharpnessState
        learning_rate.Stability losses.ChunkedLoss losses.MeanLoss nn.Layer per_example.ClippedGrad
        per_example.Clipping per_example.NoiseAverage per_example.NoiseScale per_example.PerExampleGradients
        per_example.WithNoiseScaleState training.Best training.FitProgress training.FitResult training.History
        training.StopRule training.Stopped training.TrainState training.ValueFn""",
    "a layer or a network: sums over features, by XLA's own products": """
        nn.activation nn.avg_pool nn.conv nn.dense nn.dropout nn.embed nn.flatten nn.group_norm nn.layer_norm nn.lenet
        nn.linear_neuron nn.max_pool nn.mlp nn.remat nn.residual nn.self_attention nn.serial nn.transformer""",
    "data and orders: nothing is summed, no tree is paired": """
        data.check_num_shards data.in_shards data.rows_in_shards losses.check_labels
        data.batches data.cyclic data.digits data.independent data.load data.mnist1d data.mnist5k data.read
        data.repeated data.reshuffled data.two_gaussians data.two_gaussians_exact data.with_keys""",
    "JAX's own, or a question about where data are": """
        dataset.afresh dataset.check_in_memory dataset.cond dataset.first dataset.jit dataset.map dataset.num_examples
        dataset.of dataset.on_automatic_axes dataset.on_explicit_axes dataset.on_host dataset.rows
        dataset.while_loop
        dataset.with_rows""",
    "of numbers alone": """
        learning_rate.for_batch_size learning_rate.linear_to_zero learning_rate.maximal learning_rate.optimal
        per_example.noise_average""",
    "the loss is taken whole, so that it may couple its examples; trees are made within": """
        curvature.by_derivatives curvature.forward_over_reverse curvature.reverse_over_reverse curvature.pushforward
        curvature.unflattened curvature.filter_normalised
        curvature.flattened curvature.hessian curvature.layer_sharpness curvature.online_sharpness curvature.shift
        curvature.track curvature.diagonal curvature.trace curvature.spectral_density curvature.materialize
        curvature.gauss_newton learning_rate.greedy learning_rate.measure_stability learning_rate.range_test
        learning_rate.scale_by_sharpness learning_rate.sharpness_sgd learning_rate.stability training.fit
        training.init_state training.make_update training.sweep training.trajectory training.with_extra_args
        training.is_masked training.with_rate losses.parts_of""",
    "by way of one that is listed, or by tests of their own: of what `restore` compares, of a grid's points": """
        training.save training.restore losses.mixed_precision
        curvature.fisher curvature.follow learning_rate.in_mean_square learning_rate.measure_sgd_stability
        learning_rate.noisy_curvature learning_rate.one_by_one losses.check_parts""",
    "a wrapped optimizer: its sums are held to float32 by per_example/test_running_noise.py": """
        per_example.running_noise_scale per_example.with_noise_scale""",
}


def test_every_public_name_has_an_entry():
    tried = [*SUMS, *PAIRED, *MISTAKEN, *REFUSE]
    beyond = [name for listed in BEYOND.values() for name in listed.split()]
    assert not set(names()) - {*tried, *beyond}, "a new name: say which rules hold for it"
    assert not {*tried, *beyond} - set(names()), "a name that is gone"
    assert not set(tried) & set(beyond)


@pytest.mark.parametrize("name", SUMS)
def test_no_running_sum_in_half_precision(name):
    for dtype in (jnp.bfloat16, jnp.float16):
        found, expected = SUMS[name](*HALF(dtype)), SUMS[name](PARAMS, ROWS)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(np.asarray(x, np.float32), y, rtol=0.01)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("kind", OTHERS)
def test_no_tree_is_paired_by_its_leaves_alone(name, kind):
    for call in PAIRED[name]:
        with pytest.raises((TypeError, ValueError)):
            call(OTHERS[kind])


@pytest.mark.parametrize("name", MISTAKEN)
def test_a_mask_is_a_mask(name):
    for call in MISTAKEN[name]:
        with pytest.raises((TypeError, ValueError)):
            call()


@pytest.mark.parametrize("name", OTHER_TYPES)
def test_what_is_of_another_type_is_told_by_its_name(name):
    for call in OTHER_TYPES[name]:
        with pytest.raises(TypeError, match=rf"^{name}[:,]"):
            call()


@pytest.mark.parametrize("name", REFUSE)
def test_a_loss_that_couples_its_examples_is_refused(name):
    with pytest.raises(ValueError, match="are its examples coupled"):
        REFUSE[name](coupled, PARAMS, BATCH)
