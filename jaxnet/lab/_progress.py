"""How far a job is, told to whoever watches."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
OnStage = Callable[[str, float], None]
"""Called with a stage in words and the share of the whole job done."""
Share = Callable[[float], None]
"""Called with the share of a piece of work that is done."""


def unseen(done: float) -> None:
    """A `Share` for work that nobody watches."""


def watched(items: Iterable[Item], share: Share, begins: float = 0.0, ends: float = 1.0) -> Iterator[Item]:
    """The items; before each, ``share`` is told how much of the work from ``begins`` to ``ends`` is done."""
    items = list(items)
    for number, item in enumerate(items):
        share(begins + (ends - begins) * number / len(items))
        yield item
