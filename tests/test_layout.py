"""The layout shows itself: an import may only point down, what is private stays in its room, no file has two jobs."""

import ast
import importlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "jaxnet"

# Rooms by floor; a room imports from lower floors and from itself.
FLOORS = [
    {"contract"},
    {"mesh"},
    {"dataset"},
    {"losses", "nn", "data"},
    {"per_example", "training"},
    {"curvature"},
    {"learning_rate"},
    {"lab"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))
LIBRARY = [path for path in FILES if path.relative_to(PACKAGE).parts[0] not in ("lab", "__main__.py")]
ROOMS = ["jaxnet", *(f"jaxnet.{room}" for floor in FLOORS[1:-1] for room in sorted(floor)), "jaxnet.lab.experiments"]
# Inside the laboratory too an arrow points down.
LAB = [
    {"record", "_compiled", "_folders", "_progress"},
    {"_devices", "_own", "_landscapes"},
    {"_task", "_panels"},
    {"plots", "_runs", "_processes", "_resumed", "_terminal"},
    {"_page"},
    {"report"},
    {"experiments", "analyse", "spectrum", "doctor"},
    {"train"},
    {"cli"},
    {"__init__"},
]
LAB_FLOOR = {module: floor for floor, modules in enumerate(LAB) for module in modules}
# What an extra brings is imported inside the one function that needs it; these are the library's.
EXTRAS_IN_FUNCTIONS = {"sklearn", "mnist1d", "mlxtend", "matfree", "pandas", "orbax", "tensorboardX"}
LOADED_AT_IMPORT = {"jax", "jaxnet", "optax", "chex", "numpy", "scipy"}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """(dotted module, whether at the top of the file) of all that a file imports."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in top
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top


def imported_rooms(path):
    return {name.split(".")[1] for name, _ in imports(path) if name.startswith("jaxnet.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    if room == "__init__":
        assert "lab" not in imported_rooms(path)
        return
    for other in imported_rooms(path):
        assert other == room or FLOOR[other] < FLOOR[room], f"{room} imports {other}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "lab").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_within_the_laboratory_point_down(path):
    own = path.relative_to(PACKAGE / "lab").parts[0].removesuffix(".py")
    for name, _ in imports(path):
        if name.startswith("jaxnet.lab.") and own != "__init__":
            other = name.split(".")[2]
            assert other == own or LAB_FLOOR[other] < LAB_FLOOR[own], f"lab/{own} imports lab/{other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_room_imports_what_is_private_to_another(path):
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] == "jaxnet" and any(part.startswith("_") and part != "__version__" for part in parts):
            assert parts[1] == room_of(path), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_library_loads_extras_inside_the_function_that_needs_them(path):
    import sys

    for name, at_top in imports(path):
        package = name.split(".")[0]
        if package not in sys.stdlib_module_names:
            assert package in (LOADED_AT_IMPORT if at_top else LOADED_AT_IMPORT | EXTRAS_IN_FUNCTIONS), name


@pytest.mark.parametrize("room", ROOMS)
def test_dir_shows_what_is_public_and_nothing_else(room):
    module = importlib.import_module(room)
    assert dir(module) == sorted(module.__all__)
    for name in module.__all__:
        assert not name.startswith("_")
        getattr(module, name)


def test_no_module_is_shadowed_by_a_function():
    for path in FILES:
        *room, name = [part for part in path.relative_to(PACKAGE.parent).with_suffix("").parts if part != "__init__"]
        if room and name != "__main__":
            module = importlib.import_module(".".join([*room, name]))
            assert getattr(importlib.import_module(".".join(room)), name) is module


def test_lanczos_knows_nothing_of_networks():
    assert imported_rooms(PACKAGE / "curvature" / "_lanczos.py") == {"contract"}


def test_the_library_does_not_print_or_plot():
    assert len(LIBRARY) > 15
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text())):
            named = getattr(node, "id", None) if isinstance(node, ast.Name) else getattr(node, "module", None)
            assert named not in ("print", "matplotlib", "rich"), path


def test_files_have_one_job():
    assert not [path for path in FILES if len(path.read_text().splitlines()) > 400]
    assert not list(PACKAGE.rglob("utils.py"))


def test_tests_mirror_the_package():
    root = pathlib.Path(__file__).parent
    for path in root.rglob("test_*.py"):
        folder = path.parent.relative_to(root)
        assert (PACKAGE / folder).is_dir(), f"tests/{folder} has no room"
