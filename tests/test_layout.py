"""The layout shows itself: an import may only point down, and no file has two jobs."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "jaxnet"

# Rooms by floor; a room imports from lower floors and from itself.
FLOORS = [
    {"contract", "record"},
    {"losses", "nn", "data"},
    {"per_example", "training"},
    {"curvature"},
    {"learning_rate"},
    {"experiments"},
    {"plots"},
    {"report"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "jaxnet":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxnet."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("jaxnet."))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    if room == "__init__":
        return
    for other in imported_rooms(path):
        assert other == room or FLOOR[other] < FLOOR[room], f"{room} imports {other}"


def test_lanczos_knows_nothing_of_networks():
    assert set(imported_rooms(PACKAGE / "curvature" / "lanczos.py")) == {"contract"}


def test_numerics_do_not_print_or_plot():
    quiet = [p for p in FILES if FLOOR.get(room_of(p), 9) <= FLOOR["learning_rate"]]
    assert len(quiet) > 15
    for path in quiet:
        for node in ast.walk(ast.parse(path.read_text())):
            named = getattr(node, "id", None) if isinstance(node, ast.Name) else getattr(node, "module", None)
            assert named not in ("print", "matplotlib", "rich"), path


def test_files_have_one_job():
    assert not [path for path in FILES if len(path.read_text().splitlines()) > 400]
    assert not list(PACKAGE.rglob("utils.py"))
