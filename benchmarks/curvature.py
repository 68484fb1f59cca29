"""λ_max by `jaxnet.curvature`: what it costs beyond its Hessian products, and against other libraries.

The data are digits and an MLP 64-128-128-10, at its init and trained. Errors are relative to ARPACK's eigenvalue in
float64, and every time and error against another library is a median over random starts.
"""

import collections
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse.linalg
from jax import lax

from benchmarks.peers import flat_product, libraries
from benchmarks.timing import Row, side_by_side
from jaxnet import curvature, data, losses, nn, training
from jaxnet.lab.record import Panel, Series

KEY = jax.random.key(0)
MODEL = nn.mlp([128, 128, 10])
LOSS = losses.mean_loss(MODEL.apply, losses.softmax_cross_entropy)
TOL = 1e-3


def run():
    rows = []
    for problem in problems():
        rows += [problem.product(), problem.solver(), problem.beyond_krylov()]
        rows += [problem.against("PyHessian", 1e-3, 0.8), problem.against("PyHessian", 1e-6, 0.5)]
        rows += [problem.against("curvlinops + ARPACK", 1e-6, 0.25), problem.warm_checks(), problem.two_levels()]
    return [row for row in rows if row] + [_first_call(), _traces(), *_memory()]


def panels():
    return [problem.panel() for problem in problems()]


@functools.cache
def problems():
    batch, start = data.digits("all"), MODEL.init(KEY, (64,))
    trained = training.fit(
        LOSS, start, batch, optax.sgd, learning_rate=0.1, batch_size=32, num_epochs=30, key=KEY
    ).state.params
    return [Problem("init", start, batch), Problem("trained", trained, batch)]


class Problem:
    """The loss at one point, and what is measured there."""

    def __init__(self, name, params, batch):
        self.name, self.params, self.batch = name, params, batch
        self.sharpness = functools.partial(curvature.sharpness, LOSS, params, batch)

    @functools.cached_property
    def exact(self):
        with jax.enable_x64(True):
            double = lambda x: jnp.asarray(x, float if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)
            product, n = flat_product(LOSS, *jax.tree.map(double, (self.params, self.batch)))
            op = scipy.sparse.linalg.LinearOperator((n, n), matvec=jax.jit(product), dtype=np.float64)
            return scipy.sparse.linalg.eigsh(op, k=1, which="LA", tol=1e-10, return_eigenvectors=False)[0]

    def product(self):
        gradient = jax.jit(jax.grad(LOSS))
        product = jax.jit(lambda params, batch, v: curvature.hessian(LOSS, params, batch)(v))
        v = curvature.Space.of(self.params).random(KEY)
        contenders = {
            "product": lambda: product(self.params, self.batch, v),
            "gradient": lambda: gradient(self.params, self.batch),
        }
        return self._row("Hessian product / gradient", side_by_side(contenders, 99), 1.8)

    def solver(self):
        @jax.jit  # The products alone are the baseline: a loop of nothing else.
        def products(params, batch, v, count):
            op = curvature.hessian(LOSS, params, batch)
            unit = lambda v: optax.tree.scale(1 / optax.tree.norm(v), v)
            return lax.fori_loop(0, count, lambda _, v: unit(op(v)), v)

        v, count = curvature.Space.of(self.params).random(KEY), self.sharpness(key=KEY).num_matvecs
        contenders = {
            "sharpness": lambda: self.sharpness(key=KEY),
            "products": lambda: products(self.params, self.batch, v, count),
        }
        return self._row(f"sharpness / its {count} products alone", side_by_side(contenders, 49), 1.15)

    def beyond_krylov(self, starts=50):
        """Products spent beyond the first Krylov space of the same start whose Ritz value is within the tolerance."""

        @jax.jit
        def spent(params, batch, exact, keys):
            op = curvature.hessian(LOSS, params, batch)
            krylov = curvature.Eigensolver(op.space, ncv=40)
            far = lambda state: (state.found.values[-1] < (1 - TOL) * exact) & ~krylov.full(state)
            step = lambda state: krylov.step(op, state, TOL)

            def one(key):
                begin = krylov.init(krylov.start(key))
                smallest = lax.while_loop(far, step, step(begin)).num_matvecs
                found = curvature.sharpness(LOSS, params, batch, key=key, tol=TOL)
                return found.num_matvecs, smallest, jnp.abs(found.value / exact - 1) <= TOL

            return lax.map(one, keys)

        products, smallest, within = spent(self.params, self.batch, self.exact, jax.random.split(KEY, starts))
        what = f"products to 1e-3 beyond the smallest Krylov space ({int(within.sum())} of {starts} starts within 1e-3)"
        medians = {"products": float(jnp.median(products)), "smallest": float(jnp.median(smallest))}
        return Row(f"{self.name}: {what}", float(jnp.median(products - smallest)), 4, False, medians)

    @functools.cached_property
    def race(self):
        """(library, setting) -> median seconds and median relative error over six starts."""
        seconds, errors = collections.defaultdict(list), collections.defaultdict(list)
        solvers = libraries(LOSS, self.params, self.batch)
        contenders = [(name, solve, setting) for name, (solve, settings) in solvers.items() for setting in settings]
        for turn in range(3):
            for name, solve, setting in contenders:
                # A BLAS spins on for a tenth of a second after its work; then the contender's own threads must wake.
                time.sleep(0.3)
                solve(setting, 0)
                for seed in (2 * turn, 2 * turn + 1):
                    start = time.perf_counter()
                    value = solve(setting, seed)
                    seconds[name, setting].append(time.perf_counter() - start)
                    errors[name, setting].append(abs(value / self.exact - 1))
        return {key: (statistics.median(seconds[key]), statistics.median(errors[key])) for key in seconds}

    def against(self, peer, tol, bound):
        if (peer, tol) not in self.race:
            return None
        (mine, my_error), (theirs, their_error) = self.race["jaxnet", tol], self.race[peer, tol]
        what = f"time to {tol:.0e} / {peer} (errors {my_error:.0e} / {their_error:.0e})"
        return self._row(what, {"jaxnet": mine, peer: theirs}, bound)

    def warm_checks(self):
        return Row(f"{self.name}: products a warm check", statistics.median(_checks(self)), 6, False, {})

    def two_levels(self, starts=20):
        """Products with all of the data from a sub-sample's eigenvector, against those from a random start."""
        spent = lambda **how: [self.sharpness(key=key, **how).num_matvecs for key in jax.random.split(KEY, starts)]
        ratio = statistics.median(map(int, spent(subsample=200))) / statistics.median(map(int, spent()))
        return Row(f"{self.name}: full-data products from a sub-sample's start / a random one", ratio, 0.75, False, {})

    def panel(self):
        series = []
        for library in dict.fromkeys(library for library, _ in self.race):
            seconds, errors = zip(*(found for (name, _), found in self.race.items() if name == library), strict=True)
            series.append(Series(library, seconds, np.maximum(errors, 1e-8).tolist(), style="line-points"))
        title = f"Largest Hessian eigenvalue of an MLP 64-128-128-10 on digits, {self.name}"
        xlabel = "time, s; along a curve the tolerance falls from 1e-1 to 1e-6, or the products double from 2"
        return Panel(self.name, title, xlabel, "relative error", series=series, xscale="log", yscale="log")

    def _row(self, what, seconds, bound):
        mine, baseline = seconds.values()
        return Row(f"{self.name}: {what}", mine / baseline, bound, False, seconds)


def _checks(problem, count=30, every=10):
    """Products of each warm check along gradient descent at 1/λ_max."""
    tracker = curvature.track(LOSS, problem.batch, key=KEY, every=every)

    @jax.jit
    def descend(carry, batch):
        params, track = carry
        params = optax.tree.add_scale(params, -1 / track.sharpness.value, jax.grad(LOSS)(params, batch))
        track = tracker.update(track, params)
        return (params, track), track.num_matvecs

    begin = tracker.init(problem.params)
    _, spent = training.trajectory(descend, (problem.params, begin), problem.batch, num_steps=count * every)
    return np.diff(spent[every - 1 :: every], prepend=begin.num_matvecs).tolist()


def first_call():
    """Seconds of the first `sharpness` in a process whose backend is up."""
    params, batch = MODEL.init(KEY, (64,)), data.digits("all")
    jax.block_until_ready(jax.jit(jnp.sin)(params[0]["kernel"]))
    start = time.perf_counter()
    jax.block_until_ready(curvature.sharpness(LOSS, params, batch, key=KEY))
    return time.perf_counter() - start


def _first_call():
    command = [sys.executable, "-c", "from benchmarks.curvature import first_call; print(first_call())"]
    root, env = pathlib.Path(__file__).parents[1], os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    fresh = lambda: float(subprocess.run(command, cwd=root, env=env, capture_output=True, check=True).stdout)
    seconds = statistics.median(fresh() for _ in range(3))
    return Row("first call, compiling included, s", seconds, 1.0, False, {"first call": seconds})


def _traces():
    calls, counts = [], []

    def loss(params, batch):
        calls.append(1)
        return LOSS(params, batch)

    for problem, n in zip(problems(), (1, -1), strict=True):
        batch = jax.tree.map(lambda x: x[::n], problem.batch)
        curvature.sharpness(loss, problem.params, batch, key=KEY)
        counts.append(len(calls))
    return Row("new traces at a second call", counts[1] - counts[0], 0, False, {})


def _memory():
    """Temporary memory of a search beyond the gradient's, in vectors like the 10⁷ params: the least, and by default."""
    model = nn.mlp([3150, 10])
    loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
    params = jax.eval_shape(lambda key: model.init(key, (3150,)), KEY)
    batch = jax.ShapeDtypeStruct((8, 3150), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    used = lambda f: jax.jit(f).lower(params, batch).compile().memory_analysis().temp_size_in_bytes / size
    of_search = lambda **given: used(functools.partial(curvature.sharpness, loss, key=KEY, **given))
    basis = curvature.Eigensolver(curvature.Space.of(jnp.zeros(99))).basis + 1
    least, usual, gradient = of_search(ncv=4), of_search(), used(jax.grad(loss))
    return [
        Row("low-memory mode: vectors of memory beyond the gradient's", least - gradient, 8, False, {}),
        Row(f"by default, of a basis of {basis}: the same", usual - gradient, basis + 3, False, {}),
    ]
