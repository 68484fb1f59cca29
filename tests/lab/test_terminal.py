"""What a person sees, and what a program that reads on."""

import io

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jaxnet.lab import _terminal


def table():
    made = Table("name", "words")
    made.add_row("first", "a " * 80 + "end")
    made.add_row("second", "short")
    return made


def test_a_pipe_gets_whole_lines_without_blanks_at_their_end():
    console = Console(file=io.StringIO(), width=40)
    _terminal.show(console, table())
    _terminal.show(console, "word " * 30 + "end")
    lines = console.file.getvalue().splitlines()
    assert len([line for line in lines if "end" in line and "a a a" in line]) == 1
    assert lines[-1] == "word " * 30 + "end"
    assert all(line == line.rstrip() for line in lines)


def test_a_terminal_gets_lines_that_fit():
    console = Console(file=io.StringIO(), width=40, force_terminal=True, color_system=None)
    _terminal.show(console, table())
    assert max(map(len, console.file.getvalue().splitlines())) <= 40
    assert "end" in console.file.getvalue()


def test_the_time_left_is_the_pace_so_far(monkeypatch):
    clock = [0.0]
    with Progress(get_time=lambda: clock[0], disable=True) as bar:
        task = bar.add_task("", total=1.0, at=0.0)
        column = _terminal.TimeLeft()
        words = lambda: column.render(bar.tasks[0]).plain
        assert words() == ""
        clock[0] = 30.0
        bar.update(task, completed=0.25, at=30.0)
        assert words() == "about 90 s left"
        clock[0] = 70.0  # nothing new
        assert words() == "about 50 s left"
        clock[0] = 500.0
        assert words() == "about 0 s left"
        bar.update(task, completed=0.5, at=500.0)
        assert words() == "about 8 min left"
