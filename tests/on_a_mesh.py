"""What `test_mesh` runs in processes of its own; the last line it prints is JSON."""

import contextlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.collectives import collectives
from jaxnet import contract, curvature, learning_rate, losses, nn, training
from jaxnet.mesh import automatic

KEY = jax.random.key
MODEL = nn.mlp([8, 4], activation=jnp.tanh)
FEW = ("Explicit, data", "Explicit, both")
LOSS = losses.mean_loss(MODEL.apply, losses.softmax_cross_entropy)


def problem():
    rng = np.random.default_rng(0)
    return MODEL.init(KEY(0), (8,)), (rng.normal(size=(24, 8)), np.arange(24, dtype=np.int32) % 4)


def numbers(params, batch):
    found = curvature.sharpness(LOSS, params, batch, key=KEY(1))
    run = lambda size, **how: training.fit(
        LOSS, params, batch, optax.sgd, learning_rate=0.1, batch_size=size, num_epochs=2, key=KEY(2), **how
    )
    curved = learning_rate.noisy_curvature(LOSS, params, batch, key=KEY(3), num_probes=2)
    runs = {"full batch": run(None), "mini-batch": run(8, num_shards=4)}
    weights = lambda tree: [float((x * x).sum()) for x in jax.tree.leaves(tree)]
    return {
        "sharpness": [float(x) for x in (found.value, found.upper_bound)],
        "spent": [int(found.num_matvecs), bool(found.converged)],
        "curvature": [float(x) for x in jax.tree.leaves(curved)],
        **{name: [*map(float, one.history.loss), *weights(one.state.params)] for name, one in runs.items()},
    }


def derived(params, batch):
    found = learning_rate.analyse(LOSS, params, batch, key=KEY(3), batch_sizes=[4, 24])
    rates = np.linspace(1, 3, 5) / float(found.sharpness.value)
    measured = learning_rate.measure_stability(LOSS, params, batch, optax.sgd, rates=rates, key=KEY(4))
    return {
        "rates": [float(found.rate(size)) for size in (4, 24)],
        "limits": [float(found.limit(size)) for size in (4, 24)],
        "measured": float(measured.limit),
    }


def finished(start, batch, **how):
    """A run whose state has moments, of mini-batches in two shards."""
    run = training.fit(
        LOSS, start, batch, optax.adam, learning_rate=0.01, batch_size=8, num_epochs=3, key=KEY(2), num_shards=2, **how
    )
    leaves = jax.tree.leaves(run.state)
    return {"loss": run.history.loss.tolist(), "state": [float((x * x).sum()) for x in leaves]}


class Broken(Exception):
    pass


def break_off(folder, params, batch):
    def end(progress):
        if progress.epoch == 2:
            raise Broken

    with contextlib.suppress(Broken):
        finished(params, batch, observers=[training.Checkpoints(folder), end])


def go_on(folder, params, batch):
    return finished(training.restore(folder, training.init_state(params, optax.adam(0.01))), batch)


def columns(x):
    return P(*[None] * (x.ndim - 1), "model")


def layouts(which):
    params, batch = problem()
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("examples", "model"), axis_types=(kind, kind))
        put = lambda tree, spec: jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), tree)
        whole, rows = (lambda x: P()), (lambda x: P("examples"))
        for name, of_params, of_batch in (
            ("data", whole, rows),
            ("params", columns, whole),
            ("both", columns, rows),
            ("rows of params", lambda x: P("model"), rows),
        ):
            layout = f"{kind.name}, {name}"
            if which == "all" or layout in FEW:
                yield layout, put(params, of_params), put(batch, of_batch)


def gathers(params, batch):
    product = collectives(lambda p, b, v: curvature.hessian(LOSS, p, b) @ v, params, batch, params)
    search = collectives(lambda p, b: curvature.sharpness(LOSS, p, b, key=KEY(1)), params, batch)
    leading = jax.jit(lambda p, b: curvature.sharpness(LOSS, p, b, key=KEY(1)))(params, batch).leading
    alike = lambda x, p: x[0].sharding.is_equivalent_to(p.sharding, p.ndim)
    return {
        "product": len(product["all-gather"]),
        "sharpness": len(search["all-gather"]),
        "alike": all(map(alike, jax.tree.leaves(leading), jax.tree.leaves(params))),
    }


def sent(params, batch):
    update = training.make_update(LOSS, optax.sgd(0.1))
    state = training.init_state(params, optax.sgd(0.1))
    found = collectives(update, state, batch)
    assert not found["all-gather"]
    return {"bytes": sum(found["all-reduce"]), "params": sum(x.nbytes for x in jax.tree.leaves(params))}


def refused(params, batch):
    mesh = jax.make_mesh((2,), ("examples",), axis_types=(AxisType.Auto,), devices=jax.devices()[2:])
    moved = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("examples"))), batch)
    try:
        training.fit(LOSS, params, moved, optax.sgd, learning_rate=0.1, batch_size=8, num_epochs=1, key=KEY(2))
    except contract.UserError as error:
        return str(error)


def on_devices(num):
    """The problem with its examples on so many devices, of one process or several."""
    params, batch = problem()
    mesh = jax.make_mesh((num,), ("examples",))
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("examples"))
    at, length = jax.process_index(), 24 // jax.process_count()
    own = jax.tree.map(lambda x: x[at * length : (at + 1) * length], batch)
    params = jax.tree.map(lambda x: jax.make_array_from_process_local_data(whole, np.asarray(x)), params)
    return params, jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), own)


def unequal():
    """As one of two processes that brings half as many examples as the other."""
    params, batch = problem()
    mesh = jax.make_mesh((jax.device_count(),), ("examples",))
    own = jax.tree.map(lambda x: x[: 12 - 6 * jax.process_index()], batch)
    put = lambda tree, *spec: jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(NamedSharding(mesh, P(*spec)), np.asarray(x)), tree
    )
    try:
        finished(put(params), put(own, "examples"))
    except contract.UserError as error:
        return {"error": str(error)}


def all_layouts(which, folder):
    found = {name: (params, batch) for name, params, batch in layouts(which)}
    break_off(folder, *found["Explicit, data"])
    return {
        "one device": numbers(*problem()),
        "layouts": {name: numbers(*found[name]) for name in found if which == "all" or name != "Explicit, data"},
        "gathers": {name: gathers(*found[name]) for name in found if name != "Explicit, data"},
        "sent": sent(*automatic(found["Explicit, data"])),
        "error": refused(*found["Explicit, data"]),
    }


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    what, devices, *arguments = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", int(devices))
    if len(arguments) > 1:
        jax.distributed.initialize(f"localhost:{arguments[1]}", 2, int(arguments[2]))
    if what == "numbers":
        result = numbers(*on_devices(jax.device_count()))
    elif what == "derived":
        result = {name: derived(*placed) for name, *placed in layouts("few") if name == "Explicit, both"}
    elif what == "unequal":
        result = unequal()
    elif what == "go on":
        result = go_on(arguments[0], *on_devices(jax.device_count()))
    elif what == "break off":
        result = break_off(arguments[0], *on_devices(jax.device_count()))
    else:
        result = all_layouts(what, arguments[0])
    print(json.dumps(result if jax.process_index() == 0 else None))
