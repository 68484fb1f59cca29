"""The table of docs/streams.md, walked: what takes a data set in batches gives what the whole set gives."""

import dataclasses
import functools
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import curvature, data, learning_rate, losses, per_example, training

KEY = jax.random.key(0)
PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "streams.md").read_text()


@functools.partial(jax.tree_util.register_dataclass, data_fields=("inputs", "targets"), meta_fields=())
@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    inputs: jax.Array
    targets: jax.Array

    def __len__(self):
        return 2

    def __iter__(self):
        return iter((self.inputs, self.targets))

    def __getitem__(self, index):
        return (self.inputs, self.targets)[index]


class Loader:
    """Batches of five, the last of two, in NumPy arrays."""

    def __init__(self, batch, kind=tuple):
        self.batch, self.kind = jax.tree.map(np.asarray, batch), kind

    def __iter__(self):
        for first in range(0, 12, 5):
            yield self.kind([x[first : first + 5] for x in self.batch])


@pytest.fixture
def problem(mlp_problem):
    """A network, one batch of 12, and ways to hold the same in ragged batches."""
    loss, params, batch = mlp_problem
    return loss, params, batch, Loader(batch)


def top_three(op):
    return curvature.eigsh(op, 3, key=KEY, tol=1e-9).values


def of_operator(make):
    """A product, a search, and the algebra, of the operator that ``make(loss, params, batch)`` is."""

    def measure(loss, params, batch):
        op = make(loss, params, batch)
        kept = jax.tree.map(lambda x: x.ndim == 2, params)
        weights = jax.tree.map(lambda keep, x: jnp.sin(x) if keep else None, kept, params)
        diagonal = jax.tree.map(lambda x: 1 + x**2, params)
        combined = 2 * op - curvature.shift(op, 0.5) + -op + curvature.precondition(op, diagonal)
        return (
            op @ params,
            combined @ params,
            curvature.restrict(op, kept) @ weights,
            top_three(op),
            top_three(combined),
        )

    return measure


def tracked(loss, params, batch):
    tracker = curvature.track(loss, batch, key=KEY, every=2, tol=1e-9)
    state = tracker.init(params)
    for step in range(4):
        state = tracker.update(state, jax.tree.map(lambda x, step=step: x * (1 + 0.1 * step), params))
    return state.sharpness.value, state.num_updates, state.num_checks


def moments(loss, params, batch):
    grads = per_example.gradients(loss, params, batch)
    weights = jnp.cos(jnp.arange(12.0))
    without = [grads.mean, grads.norms, grads.leaf_norms, grads.variance, grads.second_moment]
    about = [grads.vdot, grads.cosine, grads.distances, grads.sum_of_deviations]
    sums = grads.weighted_sum(weights), grads.clipped_mean(0.5), grads.num_examples, grads.plan
    return [f() for f in without], [f(params) for f in about], sums


def trained(loss, params, batch):
    """Full-batch steps: of a stream, all of a pass in one."""
    found = training.fit(
        loss,
        params,
        batch,
        optax.adam,
        learning_rate=0.01,
        batch_size=None,
        num_epochs=4,
        key=KEY,
        metrics={"loss": loss},
        validation=batch,
    )
    return found.state, found.history, found.best


def stepped(loss, params, batch):
    """The same mini-batches as a pass of a stream and, in memory, one after the other."""
    update = training.make_update(loss, optax.sgd(0.1))
    batches = [[x[i : i + 5] for x in batch] for i in (0, 5, 10)] if isinstance(batch, tuple) else batch
    return training.trajectory(update, training.init_state(params, optax.sgd(0.1)), batches)


def of_adam(loss, params, batch):
    optimizer = optax.adam(0.01)
    state = training.init_state(params, optimizer)
    state, _ = training.make_update(loss, optimizer)(state, jax.tree.map(lambda x: x[:5], next(iter(Loader(BATCH)))))
    found = learning_rate.stability(loss, params, batch, optimizer, state.opt_state, key=KEY, tol=1e-9)
    return found.rate, found.limit


def analysed(loss, params, batch):
    """All at the point itself; the derived rates depend on the steps of a short run, which are the stream's batches."""
    found = learning_rate.analyse(loss, params, batch, key=KEY, tol=1e-9)
    return found.sharpness, found.noise, found.curvature, found.derived.largest


BATCH = (np.sin(np.arange(60.0)).reshape(12, 5), np.arange(12) % 4)

TAKES = {
    "curvature.hessian": of_operator(curvature.hessian),
    "curvature.gauss_newton": of_operator(curvature.gauss_newton),
    "curvature.fisher": of_operator(functools.partial(curvature.fisher, key=KEY)),
    "curvature.empirical_fisher": of_operator(curvature.empirical_fisher),
    "curvature.gradient_covariance": of_operator(curvature.gradient_covariance),
    "curvature.eigsh": lambda *problem: (
        curvature.eigsh(curvature.hessian(*problem), 2, which="BE", key=KEY, tol=1e-9).values
    ),
    "curvature.sharpness": lambda *problem: [
        getattr(curvature.sharpness(*problem, key=KEY, tol=1e-9, sampling_error=True), name)
        for name in ("value", "num_matvecs", "sampling_error")
    ],
    "curvature.follow": lambda loss, params, batch: (
        curvature.follow(curvature.hessian(loss, params, batch), params, 1e-9, key=KEY).value
    ),
    "curvature.layer_sharpness": lambda *problem: [
        found.values for found in curvature.layer_sharpness(*problem, key=KEY, tol=1e-9).values()
    ],
    "curvature.quadratic_form": lambda loss, params, batch: curvature.quadratic_form(
        curvature.hessian(loss, params, batch), params
    ),
    "curvature.quadratic_forms": lambda loss, params, batch: curvature.quadratic_forms(
        curvature.hessian(loss, params, batch), params
    ),
    "curvature.landscape": lambda loss, params, batch: curvature.landscape(
        loss, params, batch, jax.tree.map(lambda x: jnp.stack([x, jnp.sin(x)]), params), num_points=4
    ),
    "curvature.track": tracked,
    "per_example.gradients": moments,
    "per_example.clipped_grad": lambda loss, params, batch: per_example.clipped_grad(
        loss, 0.5, noise_multiplier=0.1, has_aux=True
    )(params, batch, key=KEY),
    "per_example.noise_scale": per_example.noise_scale,
    "per_example.layer_noise_scale": per_example.layer_noise_scale,
    "per_example.check_independent": per_example.check_independent,
    "learning_rate.critical_sharpness": learning_rate.critical_sharpness,
    "learning_rate.greedy": learning_rate.greedy,
    "learning_rate.noisy_curvature": lambda *problem: learning_rate.noisy_curvature(*problem, key=KEY, num_probes=4),
    "learning_rate.analyse": analysed,
    "learning_rate.stability": of_adam,
    "training.fit": trained,
    "training.trajectory": stepped,
}


def rates(function, **options):
    return lambda loss, params, batch: function(loss, params, batch, optax.sgd, key=KEY, **options)


REFUSES = {
    "curvature.materialize": lambda *problem: curvature.materialize(curvature.hessian(*problem)),
    "curvature.solve": lambda loss, params, batch: curvature.solve(
        curvature.hessian(loss, params, batch), params, damping=1.0
    ),
    "curvature.spectral_density": lambda *problem: curvature.spectral_density(curvature.hessian(*problem), key=KEY),
    "curvature.trace": lambda *problem: curvature.trace(curvature.hessian(*problem), key=KEY),
    "curvature.diagonal": lambda *problem: curvature.diagonal(curvature.hessian(*problem), key=KEY),
    "curvature.online_sharpness": lambda loss, params, batch: curvature.online_sharpness(loss).update(
        params, params, batch
    ),
    "per_example.gradients(...).gram": lambda *problem: per_example.gradients(*problem).gram(),
    "per_example.gradients(...).dense": lambda *problem: per_example.gradients(*problem).dense(),
    "learning_rate.sgd_stability": lambda *problem: learning_rate.sgd_stability(*problem, 2, replace=True),
    "learning_rate.stationary_excess": lambda *problem: learning_rate.stationary_excess(*problem, 2, 0.1, replace=True),
    "learning_rate.measure_stability": rates(learning_rate.measure_stability, rates=[0.1, 0.2, 0.3]),
    "learning_rate.measure_sgd_stability": lambda *problem: learning_rate.measure_sgd_stability(
        *problem, 2, highest=1.0, key=KEY
    ),
    "learning_rate.range_test": rates(learning_rate.range_test, learning_rates=[0.1, 0.2], batch_size=2),
    "training.sweep": rates(training.sweep, learning_rates=[0.1, 0.2], batch_size=2, num_epochs=1),
    "losses.chunked": lambda loss, params, batch: losses.chunked(loss, 4)(params, batch),
    "losses.accuracy": lambda loss, params, batch: losses.accuracy(loss.apply, params, batch),
    "data.batches": lambda loss, params, batch: data.batches(batch, 2, key=KEY),
    "data.repeated": lambda loss, params, batch: data.repeated(batch, 2),
}


def test_the_page_lists_what_is_tried_here():
    takes, refuses = PAGE.split("## These take a stream")[1].split("## These need one batch in memory")
    first = lambda text: set(re.findall(r"^\| `([\w.()]+)` \|", text, flags=re.MULTILINE))
    assert first(takes) == set(TAKES)
    assert first(refuses) == set(REFUSES)


@pytest.mark.parametrize("name", TAKES)
def test_it_gives_what_the_whole_set_gives(name, problem):
    loss, params, batch, loader = problem
    whole, streamed = (jax.tree.leaves(TAKES[name](loss, params, b)) for b in (batch, loader))
    assert len(whole) == len(streamed)
    for a, b in zip(whole, streamed, strict=True):
        if isinstance(a, str):
            assert re.sub(r"[\d.e+-]+", "", a) == re.sub(r"[\d.e+-]+", "", b)
        else:
            np.testing.assert_allclose(np.asarray(b), np.asarray(a), rtol=1e-6, atol=1e-10)


def test_the_derived_rates_are_much_the_same(problem):
    loss, params, batch, loader = problem
    whole, streamed = (learning_rate.analyse(loss, params, b, key=KEY).derived.rate for b in (batch, loader))
    np.testing.assert_array_less(np.abs(np.log(streamed / whole)), np.log(2.5))


@pytest.mark.parametrize("name", REFUSES)
def test_it_refuses_in_one_sentence_that_says_what_to_do_instead(name, problem):
    loss, params, batch, loader = problem
    for stream in (loader, [batch, batch]):
        with pytest.raises(TypeError, match=r"^[\w ]+: needs one batch in memory, got a data set in batches; \w.*$"):
            REFUSES[name](loss, params, stream)


@pytest.mark.parametrize("kind", [tuple, list, dict, Examples])
def test_batches_of_any_kind(kind, mlp_problem):
    loss, params, batch = mlp_problem
    make = {
        dict: lambda xy: {"inputs": xy[0], "targets": xy[1]},
        Examples: lambda xy: Examples(*xy),
    }.get(kind, kind)
    of_kind = (lambda p, b: loss(p, (b["inputs"], b["targets"]))) if kind is dict else loss
    for stream in (Loader(batch, make), list(Loader(batch, make))):
        chex.assert_trees_all_close(
            curvature.hessian(of_kind, params, stream) @ params, curvature.hessian(loss, params, batch) @ params
        )
        found = per_example.gradients(of_kind, params, stream)
        chex.assert_trees_all_close(found.variance(), per_example.gradients(loss, params, batch).variance())


def test_fit_takes_the_batches_of_a_pass_as_its_steps(mlp_problem):
    """An epoch is a pass, in the stream's order; the small last batch counts by its size."""
    loss, params, batch = mlp_problem
    how = {"learning_rate": 0.05, "batch_size": 5, "num_epochs": 3, "key": KEY, "metrics": {"loss": loss}}
    shuffled = jax.tree.map(lambda x: x[::-1], batch)
    for memory, stream in ((batch, Loader(batch)), (shuffled, list(Loader(shuffled)))):
        expected = training.fit(loss, params, memory, optax.adam, order=data.cyclic, validation=batch, **how)
        found = training.fit(loss, params, stream, optax.adam, validation=Loader(batch), **how)
        assert found.stopped == expected.stopped
        expected, found = (result._replace(stopped=None) for result in (expected, found))
        chex.assert_trees_all_close(found, expected, rtol=1e-9)
        assert found.history.step_loss.shape == (3, 3)
    resumed = training.fit(loss, expected.state, list(Loader(shuffled)), optax.adam, **how)
    assert resumed.history.epoch.tolist() == [4, 5, 6]
    assert int(resumed.state.step) == 18


def test_held_out_data_may_be_a_stream_beside_data_in_memory(mlp_problem):
    loss, params, batch = mlp_problem
    how = {"learning_rate": 0.05, "batch_size": 5, "num_epochs": 3, "key": KEY}
    expected = training.fit(loss, params, batch, optax.adam, validation=batch, **how)
    found = training.fit(loss, params, batch, optax.adam, validation=Loader(batch), **how)
    chex.assert_trees_all_close(
        (found.state, found.history, found.best), (expected.state, expected.history, expected.best)
    )


def test_fit_from_a_stream_compiles_one_step_for_every_rate(mlp_problem):
    loss, params, batch = mlp_problem
    traced = []

    def counted(params, batch):
        traced.append(batch[0].shape)
        return loss(params, batch)

    for rate in (0.1, 0.2):
        training.fit(counted, params, Loader(batch), optax.sgd, learning_rate=rate, batch_size=5, num_epochs=2, key=KEY)
    assert len(traced) == len(set(traced)) == 2


def test_fit_draws_what_is_random_for_each_batch(mlp_problem):
    loss, params, batch = mlp_problem
    seen = []

    def augment(key, batch):
        jax.debug.callback(lambda draw: seen.append(float(draw)), jax.random.uniform(key))
        return batch

    for batch_size in (5, None):
        training.fit(
            loss, params, Loader(batch), optax.sgd, learning_rate=0.1, batch_size=batch_size, num_epochs=2, key=KEY,
            augment=augment,
        )  # fmt: skip
        jax.effects_barrier()
        assert len(seen) == len(set(seen)) == 6
        seen.clear()


def test_what_fit_cannot_do_with_a_stream_is_said(mlp_problem):
    loss, params, batch = mlp_problem
    how = {"learning_rate": 0.1, "num_epochs": 1, "key": KEY}
    with pytest.raises(ValueError, match="one holds 5 examples, got 3"):
        training.fit(loss, params, Loader(batch), optax.sgd, batch_size=3, **how)
    with pytest.raises(ValueError, match="an order of its own"):
        training.fit(loss, params, Loader(batch), optax.sgd, batch_size=5, order=data.cyclic, **how)
    optimizer = lambda rate: learning_rate.sharpness_sgd(key=KEY, fraction=1.0)
    with pytest.raises(TypeError, match="a batch at hand"):
        training.fit(loss, params, Loader(batch), optimizer, batch_size=None, **how)
    with pytest.raises(TypeError, match="outside of jit, grad and vmap"):
        jax.jit(lambda p: curvature.sharpness(loss, p, Loader(batch), key=KEY).value)(params)


def test_a_pass_with_fewer_batches_than_another(mlp_problem):
    loss, params, batch = mlp_problem

    class Uneven:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(list(Loader(batch))[: 3 if self.passes != 2 else 2])

    found = training.fit(loss, params, Uneven(), optax.sgd, learning_rate=0.1, batch_size=5, num_epochs=3, key=KEY)
    assert found.history.step.tolist() == [3, 5, 8]
    assert np.isnan(found.history.step_loss[1]).tolist() == [False, False, True]
    assert found.stopped.reason == "num_epochs"
