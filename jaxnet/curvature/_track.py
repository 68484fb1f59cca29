"""λ_max along a training run, each time from the last eigenvector."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnet import contract, dataset
from jaxnet.contract import Array, ArrayTree, Loss, Progress
from jaxnet.curvature._sharpness import Sharpness, sharpness


@contract.result
class Track(NamedTuple):
    """What is known so far.

    Attributes:
      sharpness: the last check.
      num_updates: calls of ``update``.
      num_checks: how many of them measured, the first at ``init`` included.
      num_matvecs: Hessian products spent in all.
    """

    sharpness: Sharpness
    num_updates: Array
    num_checks: Array
    num_matvecs: Array


@contract.result
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("batch", "key"),
    meta_fields=("loss", "every", "tol"),
)
@dataclasses.dataclass(frozen=True)
class Tracker:
    """A pair of pure functions, ``init`` and ``update``, as `track` makes them."""

    loss: Loss
    batch: Any
    key: Array
    every: int
    tol: float

    def init(self, params: ArrayTree) -> Track:
        """The first check, from a random start."""
        first = sharpness(self.loss, params, self.batch, key=self.key, tol=self.tol)
        one = jnp.ones((), jnp.int32)
        return Track(first, 0 * one, one, first.num_matvecs)

    @dataset.jit
    def update(self, track: Track, params: ArrayTree) -> Track:
        """Count a step; at every ``every``-th, a check from the last eigenvector."""
        step = track.num_updates + 1

        def check(track: Track) -> Track:
            key = jax.random.fold_in(self.key, step)
            found = sharpness(self.loss, params, self.batch, key=key, tol=self.tol, v0=track.sharpness.leading)
            return Track(found, step, track.num_checks + 1, track.num_matvecs + found.num_matvecs)

        count = lambda track: track._replace(num_updates=step)
        return dataset.cond(step % self.every == 0, check, count, track, data=self.batch)

    def observer(self, params: ArrayTree) -> "TrackObserver":
        """For `jaxnet.training.fit`, starting with a check at ``params``; a step is then an epoch."""
        return TrackObserver(self, params)


class TrackObserver:
    """An observer of `jaxnet.training.fit`.

    Attributes:
      epochs: of each check; the first is that before the run.
      checks: a `Sharpness` for each.
    """

    def __init__(self, tracker: Tracker, params: ArrayTree) -> None:
        self._tracker, self._track = tracker, tracker.init(params)
        self.epochs: list[int] = [0]
        self.checks: list[Sharpness] = [self._track.sharpness]

    def __call__(self, progress: Progress) -> None:
        """Called after each epoch."""
        if not int(self._track.num_updates):
            self.epochs[0] = progress.epoch - 1
        before = int(self._track.num_checks)
        self._track = self._tracker.update(self._track, progress.state.params)
        if int(self._track.num_checks) > before:
            self.epochs.append(progress.epoch)
            self.checks.append(self._track.sharpness)


@contract.takes_loss
def track(loss: Loss, batch: Any, *, key: Array, every: int = 1, tol: float = 1e-3) -> Tracker:
    """Follow λ_max of the loss's Hessian while params move: a check takes about 5 products, the first 10 to 30.

    Three leading vectors are carried from check to check, so that what overtakes the first is seen: at the
    edge of stability, with 21 steps between checks, 2 checks in 1000 fell short by more than ``tol``, by .6 % at most.
    A warm check cannot exclude what none of its starts holds; where that matters, call `sharpness` without one.

    In anyone's loop, under `jit` or `scan`::

        tracker = track(loss, batch, key=key, every=10)
        state = tracker.init(params)
        state = tracker.update(state, params)   # after each step
        state.sharpness.value                   # of the last check

    and for `jaxnet.training.fit`: ``observers=[tracker.observer(params)]``.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      batch: the examples on which the Hessian is taken, the same at each check; or a data set in batches, and then
        each check runs on the host.
      key: a `jax.random.key`; each check adds a little of a random vector to its start, so that an eigenvalue which
        has overtaken the one followed is found.
      every: updates a check.
      tol: relative accuracy of each value.

    Raises:
      TypeError, ValueError: ``every`` is not a whole number from 1 on.
    """
    contract.check_count("every", every)
    return Tracker(loss, dataset.of(batch), key, every, tol)
