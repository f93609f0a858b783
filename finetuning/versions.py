"""Did the tests pass with the transformers that is installed?"""

import transformers
from packaging.version import Version


# Minor releases, as in requirements.txt; tests/test_setup_files.py holds them to it and to the lock files.
OLDEST, NEWEST = "5.17", "5.24"


def untested_transformers(version: str = transformers.__version__) -> str | None:
    """One sentence if `version` is of a later minor release than the newest that the tests passed with."""
    if Version(version).release[:2] <= Version(NEWEST).release:
        return None
    return (
        f"transformers {version} is newer than {NEWEST}, the newest that this version was tested with "
        "(bash scripts/test.sh --newest tests it; pip install -r requirements.lock goes back)."
    )
