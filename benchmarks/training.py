"""`fit` against a hand-written scan, a jitted loop over steps and eager PyTorch, on the same work.

The data are digits and an MLP 64-128-128-10; two Gaussians and a linear neuron; mnist5k and LeNet. Every contender
makes the same updates on shuffled batches; a loop of jitted steps and PyTorch are given their batches ready-made.
"""

import functools

import jax
import numpy as np
import optax

from benchmarks.timing import Row, side_by_side
from jaxnet import data, losses, nn, training

KEY = jax.random.key(0)
RATE = 0.01


def run():
    torch = _torch()
    digits, neuron_data = data.digits("all"), data.two_gaussians(key=KEY)
    images = jax.tree.map(lambda x: x[:1280], data.mnist5k())
    softmax = losses.softmax_cross_entropy
    rows = [_traces(digits)]
    mlp = nn.mlp([128, 128, 10])
    for batch_size, bound in ((1, 25), (32, 3)):
        case = Case(f"MLP, B={batch_size}", mlp, softmax, digits, batch_size, epochs=10 if batch_size == 1 else 20)
        contenders = {"fit": case.fit, "scan": case.scan, "loop": case.loop}
        if torch:
            contenders["torch"] = case.torch(torch, _torch_mlp(torch), torch.nn.CrossEntropyLoss())
        seconds = case.per_step(side_by_side(contenders))
        if batch_size == 1:
            rows.append(_row("B=1: updates/s of fit / hand-written scan", seconds, "scan", 0.95))
            rows.append(_row("B=1: updates/s of fit / jitted per-step loop", seconds, "loop", 3.5))
        if torch:
            rows.append(_row(f"B={batch_size}: updates/s of fit / eager PyTorch", seconds, "torch", bound))
    if torch:
        case = Case("neuron", nn.linear_neuron(), losses.squared_error, neuron_data, 1, epochs=500, torch_epochs=5)
        module = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Flatten(0))
        half_square = lambda o, t: 0.5 * torch.nn.functional.mse_loss(o, t)
        seconds = case.per_step(side_by_side({"fit": case.fit, "torch": case.torch(torch, module, half_square)}))
        rows.append(_row("linear neuron, B=1: updates/s of fit / eager PyTorch", seconds, "torch", 200))
    case = Case("LeNet", nn.lenet(10), softmax, images, 64, epochs=4)
    contenders = {"fit": case.fit, "loop": case.loop}
    if torch:
        contenders["torch"] = case.torch(torch, _torch_lenet(torch), torch.nn.CrossEntropyLoss(), channels_first=True)
    seconds = case.per_step(side_by_side(contenders))
    best = min((name for name in seconds if name != "fit"), key=seconds.get)
    rows.append(_row(f"LeNet, B=64: updates/s of fit / the better ({best})", seconds, best, 1.0))
    return rows


def _row(what, seconds, baseline, bound):
    return Row(what, seconds[baseline] / seconds["fit"], bound, True, seconds)


class Case:
    """One problem and the ways to train on it; each way returns something to wait for."""

    def __init__(self, name, model, criterion, batch, batch_size, epochs, torch_epochs=1):
        self.loss = losses.mean_loss(model.apply, criterion)
        self.batch, self.batch_size, self.epochs, self.torch_epochs = batch, batch_size, epochs, torch_epochs
        self.params = model.init(KEY, batch[0].shape[1:])
        self.steps = len(batch[1]) // batch_size
        # All ways see whole batches only, so that none compiles a step for the remainder.
        self.batch = jax.tree.map(lambda x: x[: self.steps * batch_size], batch)
        self.update = training.make_update(self.loss, optax.sgd(RATE))

    def per_step(self, seconds):
        epochs = {"torch": self.torch_epochs, "loop": 1}
        return {name: s / self.steps / epochs.get(name, self.epochs) for name, s in seconds.items()}

    def fit(self):
        return training.fit(
            self.loss,
            self.params,
            self.batch,
            optax.sgd,
            learning_rate=RATE,
            batch_size=self.batch_size,
            num_epochs=self.epochs,
            key=KEY,
        ).state.params

    @functools.cached_property
    def _scan(self):  # By hand, as the baseline that is raced; so is `loop`.
        def step(params, rows):
            batch = jax.tree.map(lambda x: x[rows], self.batch)
            value, grads = jax.value_and_grad(self.loss)(params, batch)
            return jax.tree.map(lambda p, g: p - RATE * g, params, grads), value

        def epoch(params, key):
            order = jax.random.permutation(key, self.steps * self.batch_size)
            return jax.lax.scan(step, params, order.reshape(self.steps, self.batch_size))

        return jax.jit(lambda params: jax.lax.scan(epoch, params, jax.random.split(KEY, self.epochs)))

    def scan(self):
        return self._scan(self.params)

    @functools.cached_property
    def _batches(self):
        return list(data.batches(self.batch, self.batch_size, key=KEY))

    @functools.cached_property
    def _step(self):
        return jax.jit(self.update)

    def loop(self):
        state = training.init_state(self.params, optax.sgd(RATE))
        for batch in self._batches:
            state, _ = self._step(state, batch)
        return state.params

    def torch(self, torch, module, criterion, channels_first=False):
        optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
        move = (lambda x: np.moveaxis(x, 3, 1).copy()) if channels_first else (lambda x: x)
        as_target = lambda y: torch.tensor(y).long() if y.dtype == np.int32 else torch.tensor(y)
        batches = [(torch.tensor(move(np.asarray(x))), as_target(np.asarray(y))) for x, y in self._batches]

        def run():
            for _ in range(self.torch_epochs):
                for inputs, targets in batches:
                    optimizer.zero_grad()
                    criterion(module(inputs), targets).backward()
                    optimizer.step()

        return run


def _traces(batch):
    model, calls = nn.mlp([128, 128, 10]), []
    inner = losses.mean_loss(model.apply, losses.softmax_cross_entropy)

    def loss(params, batch):
        calls.append(1)
        return inner(params, batch)

    params, counts = model.init(KEY, (64,)), []
    for rate, key in ((0.1, KEY), (0.2, jax.random.key(1))):
        moved = jax.tree.map(lambda x: x[::-1], batch)
        training.fit(loss, params, moved, optax.sgd, learning_rate=rate, batch_size=32, num_epochs=1, key=key)
        counts.append(len(calls))
    return Row("new traces at a second fit", counts[1] - counts[0], 0, False, {})


def _torch():
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed (extra bench): its rows are left out")
        return None
    torch.manual_seed(0)
    return torch


def _torch_mlp(torch):
    t = torch.nn
    return t.Sequential(t.Linear(64, 128), t.Tanh(), t.Linear(128, 128), t.Tanh(), t.Linear(128, 10))


def _torch_lenet(torch):
    t = torch.nn
    convolutions = (
        t.Conv2d(1, 6, 5, padding=2),
        t.Tanh(),
        t.AvgPool2d(2),
        t.Conv2d(6, 16, 5),
        t.Tanh(),
        t.AvgPool2d(2),
    )
    return t.Sequential(
        *convolutions, t.Flatten(), t.Linear(400, 120), t.Tanh(), t.Linear(120, 84), t.Tanh(), t.Linear(84, 10)
    )
