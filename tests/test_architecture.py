"""Who may import whom, and docs/architecture.md, whose picture is held against the code."""

import ast
import re
from functools import cache

import pytest
from tiny import ROOT


SCRIPT = "run_chatglm_lora"
ROOMS = sorted(path.stem for path in (ROOT / "finetuning").glob("*.py") if path.stem != "__init__")
TOOLS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
PICTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


@cache
def imported(path, top_only=False) -> set[str]:
    """Dotted names that a file imports: a from-import also with each of its names; a relative one from finetuning."""
    tree = ast.parse(path.read_bytes())
    found = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(filter(None, [path.parent.name if node.level else "", node.module]))
            found |= {package, *(f"{package}.{alias.name}" for alias in node.names)}
    return found


def roots(names) -> set[str]:
    return {name.partition(".")[0] for name in names}


def drawn() -> set[tuple[str, str]]:
    """The arrows of the picture of the rooms, as pairs of module names."""
    block = PICTURE.partition("<!-- rooms -->")[2].partition("```mermaid")[2].partition("```")[0]
    return {(a, b) for a, targets in re.findall(r"^\s*(\w+) --> (.+)$", block, re.M) for b in targets.split(" & ")}


@pytest.mark.parametrize("path", sorted((ROOT / "chatglm").glob("*.py")), ids=lambda path: path.stem)
def test_chatglm_imports_nothing_of_ours(path):
    assert not roots(imported(path)) & {"finetuning", SCRIPT, "scripts", "tests", *TOOLS}


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_neither_the_script_nor_what_lies_above_it(room):
    assert not roots(imported(ROOT / "finetuning" / f"{room}.py")) & {SCRIPT, "scripts", "tests", *TOOLS}


def test_script_imports_no_tool():
    assert not roots(imported(ROOT / f"{SCRIPT}.py")) & {"scripts", "tests", *TOOLS}


def test_picture_shows_the_imports_between_the_rooms():
    used = {(room, name) for room in ROOMS for name in ROOMS if f"finetuning.{name}" in imported(room_file(room))}
    assert {(a, b) for a, b in drawn() if a != SCRIPT} == used


def test_picture_shows_what_the_script_imports():
    used = {name for name in ROOMS if f"finetuning.{name}" in imported(ROOT / f"{SCRIPT}.py")}
    assert {b for a, b in drawn() if a == SCRIPT} == used | {"chatglm"}


def room_file(room):
    return ROOT / "finetuning" / f"{room}.py"


def test_rooms_import_each_other_without_circles():
    below = {room: {b for a, b in drawn() if a == room} for room in ROOMS}
    while free := {room for room, used in below.items() if not used & set(below)}:
        below = {room: used for room, used in below.items() if room not in free}
    assert not below, f"these import each other in a circle: {sorted(below)}"


@pytest.mark.parametrize("room", ROOMS)
def test_document_names_every_room(room):
    assert re.search(rf"^\| `{room}`", PICTURE, re.M)
