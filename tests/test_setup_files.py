"""The requirements, the lock files made from them, and what else has to name the same versions."""

import re

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from tiny import ROOT

import finetuning
from finetuning.versions import NEWEST, OLDEST
from scripts.newer_than_lock import locked_versions, newer


LOCKS = {"requirements.lock": "requirements.txt", "tests/requirements.lock": "tests/requirements.txt"}
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def lines(name) -> list[str]:
    return [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def ranges(name) -> dict[str, Requirement]:
    wishes = [Requirement(line) for line in lines(name)]
    return {wish.name: wish for wish in wishes}


def minor(version) -> tuple[int, ...]:
    return Version(version).release[:2]


def bound(requirement, operator) -> str:
    (version,) = [clause.version for clause in requirement.specifier if clause.operator == operator]
    return version


def newest_locked(name) -> Version:
    pins = [Requirement(line) for line in lines("requirements.lock")]
    return max(Version(bound(pin, "==")) for pin in pins if pin.name == name)


BOUNDED = [name for name, wish in ranges("requirements.txt").items() if "<" in str(wish.specifier)]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_version_in_the_lock_is_in_the_range_asked_for(lock):
    wanted = ranges(LOCKS[lock])
    pins = [Requirement(line) for line in lines(lock)]
    assert wanted.keys() - {"torch"} <= {pin.name for pin in pins}
    assert not [str(pin) for pin in pins if pin.name in wanted and bound(pin, "==") not in wanted[pin.name].specifier]


@pytest.mark.parametrize("lock", [*LOCKS, "tests/oldest.lock"])
def test_lock_is_exact_versions_without_host_or_cuda(lock):
    pin = re.compile(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; [^;]+)?")
    assert not [line for line in lines(lock) if not pin.fullmatch(line)]
    left_to_the_machine = re.compile("torch==|triton|nvidia-|cuda-")
    assert not [line for line in lines(lock) if left_to_the_machine.match(line)]
    assert not re.search("https?:|index-url|find-links", (ROOT / lock).read_text())


@pytest.mark.parametrize(
    "name", [name for name, wish in ranges("requirements.txt").items() if "<" in str(wish.specifier)]
)
def test_upper_bound_is_the_minor_release_after_the_locked_one(name):
    major, minor_locked = newest_locked(name).release[:2]
    assert minor(bound(ranges("requirements.txt")[name], "<")) == (major, minor_locked + 1)


def test_tested_range_of_transformers_is_that_of_the_requirements():
    wish = ranges("requirements.txt")["transformers"]
    assert bound(wish, ">=") == OLDEST
    assert minor(NEWEST) == newest_locked("transformers").release[:2]
    assert lines("tests/oldest.txt") == [f"transformers=={OLDEST}.0"]
    assert lines("tests/oldest.txt")[0] in lines("tests/oldest.lock")


def test_report_names_what_is_newer_than_the_lock_for_this_python():
    locked = locked_versions(
        ["# head", "peft==0.21.2", "numpy==9 ; python_version < '3'", "numpy==2.4.6 ; python_version >= '3'", "six==1"]
    )
    installed = {"peft": Version("0.22.0rc1"), "numpy": Version("2.4.6"), "ours": Version("1")}
    assert newer(installed, locked) == ["peft 0.22.0rc1 (locked: 0.21.2)"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_calls_the_scripts_and_nothing_else(workflow):
    steps = re.findall(r"^ *(?:- )?(?:run|uses): *(.*)$", workflow.read_text(), re.M)
    script = re.compile(r"actions/(checkout|setup-python)@v\d+|bash scripts/test\.sh( --newest .*)?")
    assert steps and not [step for step in steps if not script.fullmatch(step)]


def test_style_is_checked_by_one_ruff_before_a_commit_and_in_the_tests():
    (revision,) = re.findall(r"rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert f"ruff=={revision}" in lines("tests/requirements.lock")


def test_extra_for_tests_is_what_the_tests_require():
    extra = re.search(r"^test = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S).group(1)
    wanted = [re.sub("[\"']", "", line) for line in lines("tests/requirements.txt")]
    assert sorted(re.sub("'", "", wish) for wish in re.findall('"(.+?)"', extra)) == sorted(wanted)


def test_changelog_begins_with_the_version_of_the_package():
    released = re.findall(r"^## \[(\d.+?)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == finetuning.__version__
