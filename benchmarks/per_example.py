"""`jaxnet.per_example` against one plain gradient, and against other ways to the same: random data, cross-entropy.

A contender is named by what it computes, another library's by that library: "BackPACK's norms" meet "norms". Each gets
the same weights and data, and must agree with jaxnet before it is timed. JAX's are compiled, PyTorch's are eager.
"""

import collections
import functools
import statistics
import time
import warnings

import jax
import numpy as np
import optax

from benchmarks.peers import gradient_libraries
from benchmarks.timing import Row
from jaxnet import losses, nn, per_example
from jaxnet.lab.record import Panel, Series

KEY = jax.random.key(0)
METHODS = {
    "norms": lambda g: g.norms(),
    "norms + mean": lambda g: (g.norms(), g.mean()),
    "second moment": lambda g: g.second_moment(),
    "Gram matrix": lambda g: g.gram(),
    "dense": lambda g: g.dense(),
}
CLIP = 0.1
# (contender, baseline) -> the most that their times' ratio may be.
REDUCED = {
    ("norms + mean", "plain gradient"): 1.3,
    ("second moment", "plain gradient"): 1.5,
    ("Gram matrix", "its bare products"): 1.5,
    ("norms", "BackPACK's norms"): 0.6,
}
DENSE = {("dense", f"{library}'s dense"): 1 for library in ("torch.func", "Opacus", "BackPACK")}
CLIPPED = {("clipped gradient", "plain gradient"): 1.3}
IMAGES = {("norms", "vmap(grad)'s norms"): 0.5}
# The figure's: a colour for each quantity, and each library's style.
COLOURS = {"plain gradient": 6, "norms": 0, "second moment": 2, "Gram matrix": 3, "dense": 1}
STYLES = {"": "line-points", "vmap(grad)": "line", "torch.func": "line", "BackPACK": "dashed", "Opacus": "points"}
CURVES = [f"{library}'s {what}" if library else what for what in COLOURS for library in STYLES]


def run():
    narrow = narrows()[-1]
    wide = Case("MLP 784-512-512-10", nn.mlp([512, 512, 10]), (784,), 1024, REDUCED)
    images = Case("LeNet", nn.lenet(10), (28, 28, 1), 256, IMAGES)
    rows = [row for case in (narrow, wide, *narrows()[:-1], images) for row in case.rows()]
    rows += [narrow.memory("norms", 2), wide.memory("norms", 2)]
    for case in clipped():
        rows += [*case.rows(), case.memory("clipped gradient", 1.2)]
    return rows


def clipped():
    """Three networks at the batch sizes of training."""
    mlp = [Case("MLP 64-128-128-10", nn.mlp([128, 128, 10]), (64,), size, CLIPPED) for size in (256, 1024)]
    lenet = [Case("LeNet", nn.lenet(10), (28, 28, 1), size, CLIPPED) for size in (64, 256)]
    model = nn.transformer(64, features=32, num_heads=4, num_layers=2, hidden=128, max_length=32)
    return [*mlp, *lenet, *(Case("transformer, width 32", model, (32,), size, CLIPPED, text=64) for size in (64, 256))]


def panels():
    sizes, found = [case.size for case in narrows()], [case.seconds for case in narrows()]
    series = []
    for name in filter(found[0].__contains__, CURVES):
        library, what = _parts(name)
        series.append(Series(name, sizes, [seconds[name] for seconds in found], STYLES[library], COLOURS[what]))
    title = "From the gradients of N examples, MLP 64-128-128-10 (with dots and line: jaxnet)"
    return [Panel("time", title, "examples N", "time, s", series=series, xscale="log", yscale="log")]


@functools.cache
def narrows():
    bounds = {64: {}, 256: DENSE, 1024: REDUCED | DENSE}
    name, model = "MLP 64-128-128-10", nn.mlp([128, 128, 10])
    return [Case(name, model, (64,), size, bounds[size], CURVES) for size in bounds]


class Case:
    """A network and N examples, and what is measured there: what the bounds name, and others for the figure."""

    def __init__(self, name, model, shape, size, bounds, others=(), text=None):
        self.name, self.size, self.bounds, self.others = f"{name}, N={size}", size, bounds, others
        self.loss = losses.mean_loss(model.apply, losses.softmax_cross_entropy)
        init, inputs, labels = jax.random.split(KEY, 3)
        self.params = model.init(init, shape)
        if text:
            self.batch = tuple(jax.random.randint(key, (size, *shape), 0, text) for key in (inputs, labels))
        else:
            self.batch = jax.random.normal(inputs, (size, *shape)), jax.random.randint(labels, size, 0, 10)

    @functools.cached_property
    def compiled(self):
        """Name -> jitted function of (params, batch)."""

        def norms_by_vmap(params, batch):
            one = lambda x, y: optax.tree.norm(jax.grad(self.loss)(params, (x[None], y[None])))
            return jax.vmap(one)(*batch)

        method = lambda read: lambda params, batch: read(per_example.gradients(self.loss, params, batch))
        functions = {name: method(read) for name, read in METHODS.items()}
        functions |= {
            "clipped gradient": lambda params, batch: per_example.clipped_grad(self.loss, CLIP)(params, batch)
        }
        functions |= {"plain gradient": jax.grad(self.loss), "vmap(grad)'s norms": norms_by_vmap}
        return {name: jax.jit(f) for name, f in functions.items()} | {"its bare products": self.bare_products()}

    def bare_products(self):
        """The arithmetic that a Gram matrix of factored kernels consists of, Σ (AAᵀ)∘(ΔΔᵀ), and nothing else."""
        kernels = [x.shape for x in jax.tree.leaves(self.params) if x.ndim == 2]
        draw = lambda i, width: jax.random.normal(jax.random.fold_in(KEY, i), (self.size, width))
        factors = [(draw(2 * i, d), draw(2 * i + 1, p)) for i, (d, p) in enumerate(kernels)]
        summed = jax.jit(lambda factors: sum((a @ a.T) * (delta @ delta.T) for a, delta in factors))
        return lambda params, batch: summed(factors)

    @functools.cached_property
    def seconds(self):
        """Contender -> seconds, of those asked for that are installed."""
        wanted = {*self.others, *(name for pair in self.bounds for name in pair)}
        contenders = {name: functools.partial(f, self.params, self.batch) for name, f in self.compiled.items()}
        if wanted - contenders.keys():
            contenders |= gradient_libraries(self.params, self.batch)
        contenders = {name: run for name, run in contenders.items() if name in wanted}
        # Opacus's hooks warn in each backward pass that the inputs need no gradient.
        with warnings.catch_warnings(action="ignore"):
            for name, run in contenders.items():
                library, what = _parts(name)
                if library:
                    _assert_equal(name, run(), contenders[what]())
            return race(contenders)

    def rows(self):
        rows = []
        for names, bound in self.bounds.items():
            if all(name in self.seconds for name in names):
                mine, baseline = seconds = [self.seconds[name] for name in names]
                what = f"{self.name}: {' / '.join(names)}"
                rows.append(Row(what, mine / baseline, bound, False, dict(zip(names, seconds, strict=True))))
        return rows

    def memory(self, what, bound):
        """Bytes beside the arguments."""

        def needed(name):
            found = self.compiled[name].lower(self.params, self.batch).compile().memory_analysis()
            return found.temp_size_in_bytes + found.output_size_in_bytes

        ratio = needed(what) / needed("plain gradient")
        return Row(f"{self.name}: memory of {what} / plain gradient", ratio, bound, False, {})


def race(contenders, turns=5):
    """Seconds of each contender: of its turns, each the median over a fifth of a second, the one disturbed least."""
    seconds = collections.defaultdict(list)
    for _ in range(turns):
        for name, run in contenders.items():
            # A BLAS spins on for a tenth of a second after its work; then the contender's own threads must wake.
            time.sleep(0.3)
            jax.block_until_ready(run())
            spent = []
            while sum(spent) < 0.2:
                start = time.perf_counter()
                jax.block_until_ready(run())
                spent.append(time.perf_counter() - start)
            seconds[name].append(statistics.median(spent))
    return {name: min(medians) for name, medians in seconds.items()}


def _parts(name):
    """The library, empty for jaxnet, and what it computes."""
    library, _, what = name.rpartition("'s ")
    return library, what


def _assert_equal(name, theirs, mine):
    for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(mine), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max(), err_msg=name)
