"""Who may import whom, and docs/architecture.md, whose picture is held against the code."""

import ast
import re
import subprocess
import sys
from functools import cache

import pytest
from tiny import ROOT


SCRIPT = "run_chatglm_lora"
ROOMS = sorted(path.stem for path in (ROOT / "finetuning").glob("*.py") if path.stem != "__init__")
PROGRAMS = sorted((ROOT / "scripts").glob("*.py"))
PACKAGES = sorted(path.parent for path in (ROOT / "scripts").glob("*/__init__.py"))
TOOLS = {path.stem for path in (*PROGRAMS, *PACKAGES)}
MEASURING = sorted((ROOT / "scripts/benchmarks").glob("*.py"))
WITH_FLAGS = [path for path in (*PROGRAMS, *MEASURING) if "argparse.ArgumentParser(" in path.read_text("utf-8")]
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


def in_circles(below) -> set[str]:
    """Of names, each with the set of those that it uses, the ones that are left when free ones are taken away."""
    while free := {name for name, used in below.items() if not used & set(below)}:
        below = {name: used for name, used in below.items() if name not in free}
    return set(below)


def test_rooms_import_each_other_without_circles():
    assert not in_circles({room: {b for a, b in drawn() if a == room} for room in ROOMS})


@pytest.mark.parametrize("room", ROOMS)
def test_document_names_every_room(room):
    assert re.search(rf"^\| `{room}`", PICTURE, re.M)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_what_lies_at_the_top_of_scripts_is_a_program_that_none_imports(path):
    assert '\nif __name__ == "__main__":\n' in path.read_text("utf-8")
    others = {each for each in (ROOT / "scripts").rglob("*.py") if path.stem in imported(each)}
    assert not others


def test_all_other_modules_of_scripts_are_in_its_packages():
    modules = {path.relative_to(ROOT / "scripts") for path in (ROOT / "scripts").rglob("*.py") if path not in PROGRAMS}
    assert {path.parts[0] for path in modules} == {path.name for path in PACKAGES}


def test_packages_of_scripts_import_each_other_without_circles():
    names = {path.name for path in PACKAGES}
    modules = {path.name: list(path.rglob("*.py")) for path in PACKAGES}
    used = {name: roots(set().union(*map(imported, modules[name]))) & names - {name} for name in names}
    assert not in_circles(used)


def test_document_names_every_package_of_scripts():
    assert set(re.findall(r"^\| `scripts/(\w+)/`", PICTURE, re.M)) == {path.name for path in PACKAGES}


@pytest.mark.parametrize("path", WITH_FLAGS, ids=lambda path: path.stem)
def test_flags_of_a_tool_are_read_before_torch_is_imported(path):
    command = [sys.executable, "-X", "importtime", str(path), "--help"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.startswith(f"usage: {path.name} ")
    assert not re.search(r"\| +(torch|transformers|peft)$", ended.stderr, re.M)
