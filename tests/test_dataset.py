import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnet import dataset

BATCH = (np.arange(24.0).reshape(12, 2), np.arange(12))


def parts_of(batch, sizes):
    ends = np.cumsum([0, *sizes])
    return [jax.tree.map(lambda x, a=a, b=b: x[a:b], batch) for a, b in zip(ends, ends[1:], strict=False)]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("x", "y"), meta_fields=())
@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    x: jax.Array
    y: jax.Array


class Loader:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_what_is_a_stream_and_what_is_one_batch():
    x, y = BATCH
    for one in (BATCH, (BATCH, y), {"x": x}, [x, y], [jnp.ones(3)], Pair(x, y), x, None, {"x": [x, x]}):
        assert dataset.of(one) is one
    for many in ([BATCH], [[x, y], [x, y]], [{"x": x}], [Pair(x, y)], [x, BATCH], [], Loader([BATCH])):
        stream = dataset.of(many)
        assert isinstance(stream, dataset.Stream)
        assert dataset.of(stream) is stream
    with pytest.raises(TypeError, match="iterator, which ends after one pass"):
        dataset.of(iter([BATCH]))
    with pytest.raises(ValueError, match="at least one batch"):
        dataset.mean(first_moment, dataset.of([]))


def first_moment(batch, power=1):
    return {"x": (batch[0] ** power).mean(axis=0), "y": jnp.mean(batch[1] ** 1.0)}


def rows_of(batch, shift):
    return batch[0].sum(axis=1) + shift


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 7))
def test_means_sums_and_rows_are_those_of_the_whole_however_it_is_held(sizes, size):
    n = sum(sizes)
    batch = (np.arange(2.0 * n).reshape(n, 2), np.arange(n))
    stream = dataset.of(parts_of(batch, sizes))
    assert dataset.num_examples(stream) == n
    for data, options in ((batch, {}), (batch, {"size": size}), (stream, {})):
        chex.assert_trees_all_close(
            dataset.mean(first_moment, data, 2, **options),
            {"x": (batch[0] ** 2).mean(axis=0), "y": batch[1].mean()},
            rtol=1e-5,
        )
        np.testing.assert_allclose(dataset.rows(rows_of, data, 1.0, **options), batch[0].sum(axis=1) + 1, rtol=1e-6)
        of_rows = dataset.total(weighted, dataset.with_rows(data, np.arange(n) + 1.0), **options)
        np.testing.assert_allclose(of_rows, ((np.arange(n) + 1) * batch[1]).sum(), rtol=1e-6)


def weighted(data):
    batch, weights = data
    return jnp.sum(weights * batch[1])


def test_rows_that_do_not_fit_a_stream_are_refused():
    stream = dataset.of(parts_of(BATCH, (5, 7)))
    for n in (11, 13):
        with pytest.raises(ValueError, match=f"had 12 examples, and there are {n} rows"):
            dataset.total(weighted, dataset.with_rows(stream, np.ones(n)))


@pytest.mark.parametrize("streamed", [True, False])
def test_a_long_sum_does_not_stand_still_in_half_precision(streamed):
    """8000 ones: in bfloat16 a running sum stops at 256."""
    ones = jnp.ones((8000, 3), jnp.bfloat16)
    data = dataset.of(Loader([ones[:8]] * 1000)) if streamed else ones
    summed = dataset.total(column_sums, data, size=8)
    assert summed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(summed, np.float32), 8000.0)
    np.testing.assert_allclose(np.asarray(dataset.mean(column_means, data, size=8), np.float32), 1.0)


def column_sums(batch):
    return batch.sum(axis=0)


def column_means(batch):
    return batch.mean(axis=0)


def test_a_stream_compiles_once_for_each_shape_of_a_batch():
    traced = []

    def function(batch, shift):
        traced.append(batch[0].shape)
        return batch[0].mean(axis=0) + shift

    stream = dataset.of(parts_of(BATCH, (5, 5, 2)))
    for shift in (0.0, 1.0, 2.0):
        dataset.mean(function, stream, shift)
    assert traced == [(5, 2), (2, 2)]


def test_a_stream_cannot_be_traced():
    stream = dataset.of(parts_of(BATCH, (5, 7)))
    with pytest.raises(TypeError, match="outside of jit, grad and vmap"):
        jax.jit(lambda shift: dataset.rows(rows_of, stream, shift))(1.0)


@pytest.mark.parametrize("streamed", [True, False])
def test_control_flow_is_the_same_on_the_host(streamed):
    data = dataset.of(parts_of(BATCH, (5, 7))) if streamed else BATCH

    @dataset.jit
    def double_until(data, limit):
        def grow(state):
            return state + dataset.mean(first_moment, data)["y"]

        end = dataset.while_loop(lambda state: state < limit, grow, jnp.zeros(()), data=data)
        chosen = dataset.cond(end > 20, lambda x: x, lambda x: -x, end, data=data)
        return chosen, dataset.map(lambda x: x + end, jnp.arange(3.0), data=data)

    chosen, mapped = double_until(data, 21.0)
    assert chosen == 22
    np.testing.assert_array_equal(mapped, [22.0, 23.0, 24.0])
