#!/usr/bin/env python
"""Names each library of this environment that is newer than the lock files say: python scripts/newer_than_lock.py"""

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("requirements.lock", "tests/requirements.lock")


def locked_versions(lines) -> dict[str, Version]:
    """Exact version by name, of the lines of a lock file that hold for this system and this Python."""
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {
        pin.name: Version(next(iter(pin.specifier)).version)
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


def newer(installed: dict[str, Version], locked: dict[str, Version]) -> list[str]:
    return [
        f"{name} {version} (locked: {locked[name]})"
        for name, version in sorted(installed.items())
        if name in locked and version > locked[name]
    ]


if __name__ == "__main__":
    lines = [line for lock in LOCKS for line in (ROOT / lock).read_text(encoding="utf-8").splitlines()]
    installed = {canonicalize_name(found.name): Version(found.version) for found in metadata.distributions()}
    print("newer than the lock:", ", ".join(newer(installed, locked_versions(lines))) or "nothing")
