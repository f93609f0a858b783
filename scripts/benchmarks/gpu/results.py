"""Results of the parts of a check, kept as they come: what is killed later leaves what it had measured."""

import gc
import json
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Results:
    """Appends to `path` a line of JSON for each thing that is tried, until the time `ends`."""

    path: Path
    part: str
    ends: float

    def add(self, name, try_it, *args, **kwargs):
        """Try one thing; what it raises is its result, and the next one is tried all the same."""
        began = time.time()
        try:
            if began > self.ends:
                raise TimeoutError("no time was left for it")
            figures = try_it(*args, **kwargs)
        except Exception as error:
            traceback.print_exc()
            figures = {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"}
        self.write(name, seconds=round(time.time() - began, 1), **figures)
        release_memory()

    def write(self, name, **figures):
        line = {"part": self.part, "name": name, **figures}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def release_memory():
    """Give back what no object holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def read(path) -> list[dict]:
    """The lines of a file of results; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
