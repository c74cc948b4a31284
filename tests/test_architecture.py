"""The package's rooms: imports go one way, and never into another room's private modules."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "archive_pipeline"
TRAINERS = "codec.models", "codec.compressai_model"  # for --adapt; for researchers alone
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def may_import() -> dict[str, set[str]]:
    """The rooms that each room may import, as the table of docs/architecture.md has it."""
    rows = re.findall(
        r"^\| `(\w+)(?:/|\.py)` \| .* \| (.*) \|$", PAGE.partition("Questions")[0], re.M
    )
    rooms = [room for room, _ in rows]
    allowed = {}
    for number, (room, cell) in enumerate(rows):
        below = set(rooms[number + 1 :])
        named = set(re.findall(r"`(\w+)/`", cell))
        assert named or cell in ("everything below", "nothing"), room
        assert named <= below, f"{room}: the table is in the order of imports"
        allowed[room] = below if cell == "everything below" else named
    return allowed


MAY_IMPORT = may_import()
# beside the rooms
EVERYBODYS = set(
    re.findall(r"`(\w+)\.py`", PAGE.partition("Every room may import")[2].split("\n")[0])
)


def modules() -> dict[str, Path]:
    """All modules by their dotted names below the package, rooms themselves by theirs."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


MODULES = modules()


@cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax tree, which many tests ask for."""
    return ast.parse(path.read_text())


def imported(name: str, lazy: bool) -> Iterator[str]:
    """Dotted names that a module imports of the package, those inside functions if `lazy`."""
    todo: list[ast.AST] = [parsed(MODULES[name])]
    while todo:
        node = todo.pop()
        if not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not lazy and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        else:
            continue
        for target in full:
            package, _, rest = target.partition(".")
            if package == PACKAGE.name and rest:
                # a name inside a module, or a module
                yield rest if rest in MODULES else rest.rpartition(".")[0] or rest


def test_every_room_is_here() -> None:
    rooms = {name.partition(".")[0] for name in MODULES}
    assert rooms - EVERYBODYS == MAY_IMPORT.keys()
    assert list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())  # raises on a circle


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_one_way(name: str) -> None:
    room = name.partition(".")[0]
    for target in imported(name, lazy=True):
        other, *inner = target.split(".")
        if other == room or target in EVERYBODYS:
            continue
        assert other in MAY_IMPORT.get(room, set()), f"{name} imports {target}"
        private = [part for part in inner if part.startswith("_")]
        assert not private, f"{name} imports {target}, which is private to {other}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: set(imported(name, lazy=False)) - {name} for name in MODULES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_the_codec_does_not_need_its_training() -> None:
    for name in MODULES:
        if name.startswith("pcdc.training") or name in TRAINERS:
            continue
        targets = [t for t in imported(name, lazy=False) if t.startswith("pcdc.training")]
        assert not targets, f"{name} imports {targets}"


@cache
def imports_from(path: Path) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom)]


def used_elsewhere(room: str) -> set[str]:
    """Names that other rooms and scripts import of a room's modules."""
    paths = [path for name, path in MODULES.items() if name.partition(".")[0] != room]
    paths += [
        path for folder in ("workflows", "examples") for path in (ROOT / folder).rglob("*.py")
    ]
    paths.append(PACKAGE / "__init__.pyi")
    used = set()
    for node in (node for path in paths for node in imports_from(path)):
        if node.module:
            module = node.module if node.level == 0 else f"{PACKAGE.name}.{node.module}"
            if module.startswith(f"{PACKAGE.name}.{room}"):
                used |= {alias.name for alias in node.names}
    return used


@pytest.mark.parametrize("room", sorted(MAY_IMPORT.keys() - {"api", "arguments", "commands"}))
def test_rooms_export_what_others_use(room: str) -> None:
    package = importlib.import_module(f"{PACKAGE.name}.{room}")
    stub = ast.parse((PACKAGE / room / "__init__.pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    private = [node.module for node in imports if (node.module or "_").startswith("_")]
    assert not private, f"{room} exports names of {private}, which is its own"
    assert package.__all__
    for name in package.__all__:
        # a module of the same name would hide it, or not, by who was imported first
        assert f"{room}.{name}" not in MODULES, f"{room}: {name} is a module's name, too"
        assert getattr(package, name) is not None
    unused = set(package.__all__) - used_elsewhere(room)
    assert not unused, f"{room} exports {sorted(unused)}, which nobody else uses"


def test_workflows_and_models_are_not_packages() -> None:
    for folder in ("workflows", "models", "examples"):
        assert not list((ROOT / folder).rglob("__init__.py"))
    with (ROOT / "pyproject.toml").open("rb") as file:
        wheel = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["only-include"] == [PACKAGE.name, "models"]
    assert wheel["sources"] == {"models": f"{PACKAGE.name}/_models"}


def test_workflows_find_the_modules_that_they_share() -> None:
    shared = {path.stem for path in (ROOT / "workflows" / "_shared").glob("*.py")}
    line = 'sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))'
    assert shared
    for path in (ROOT / "workflows").glob("*/*.py"):
        text = path.read_text()
        tops = {
            alias
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in [getattr(node, "module", None) or node.names[0].name]
        }
        if path.parent.name != "_shared" and tops & shared:
            assert line in text, path


def test_scripts_that_are_named_exist() -> None:
    texts = [p for folder in ("archive_pipeline", "workflows", "docs", "models", "examples")
             for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md")]  # fmt: skip
    for path in [*texts, *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]:
        for name in re.findall(r"workflows/[\w/]+\.(?:py|md)", path.read_text()):
            assert (ROOT / name).is_file(), f"{path}: {name}"
