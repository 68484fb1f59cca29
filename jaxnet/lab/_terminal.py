"""What a person sees while a job runs and when it ends."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from jaxnet.lab import _compiled
from jaxnet.lab._progress import OnStage

# Columns of what is no terminal: no table is wider.
_WHOLE = 10_000


def show(console: Console, content: Any, **style: Any) -> None:
    """Print wrapped to a terminal; into a pipe or a file each line whole, without blanks at its end."""
    if console.is_terminal:
        console.print(content, **style)
        return
    console.width = _WHOLE
    with console.capture() as captured:
        console.print(content, **style)
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


@contextlib.contextmanager
def progress() -> Iterator[OnStage]:
    """A bar on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal or jax.process_index() > 0:
        yield lambda stage, share: None
        return
    columns = (BarColumn(), TimeElapsedColumn(), TimeLeft(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task, stages = bar.add_task("starting", total=1.0, at=0.0), ["starting"]

        def on_stage(stage: str, share: float) -> None:
            stages.append(stage)
            bar.update(task, description=stage, completed=share, at=bar.tasks[task].elapsed or 0.0)

        compiling = lambda now: bar.update(task, description=f"{stages[-1]}: compiling …" if now else stages[-1])
        with _compiled.announced(compiling):
            yield on_stage


class TimeLeft(ProgressColumn):
    """What is left at the pace so far, counted down between one stage and the next."""

    def render(self, task: Task) -> Text:
        """About so long, or nothing while nothing is known."""
        share, at = task.completed, task.fields["at"]
        if not share:
            return Text("")
        left = max(0.0, at / share - (task.elapsed or at))
        words = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
        return Text(f"about {words} left", style="progress.remaining")
