"""Which flags were given: on the command line, in one .json or .yaml file, or in both, where the line overrides."""

import json
import re
from dataclasses import fields
from pathlib import Path

import yaml


ENDINGS = (".json", ".yaml", ".yml")


def given_arguments(parser, words, classes) -> dict:
    """The values of the flags that were given, by name: those of a file named first, overridden by the other words."""
    values = {}
    if words and words[0].endswith(ENDINGS):
        values, words = file_arguments(words[0], classes), words[1:]
    return values | parser.given(words)


def file_arguments(path, classes):
    """The flat mapping in a JSON or YAML file, with no_x: true for x: false as on the command line.

    YAML 1.1 reads 2e-4 as a string and no as false; where a flag is a number, a strategy or a word, what was meant is
    taken (resume_from_checkpoint: true).
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold names and values of flags, such as learning_rate: 2e-4.")
    flags = {f.name: f for cls in classes for f in fields(cls)}
    for name, value in list(values.items()):
        kind = str(flags[name].type) if name in flags else ""
        if "float" in kind and re.fullmatch(r"-?\d+[eE]-?\d+", str(value)):
            values[name] = float(value)
        elif "Strategy" in kind and value is False:
            values[name] = "no"
        elif name == "resume_from_checkpoint" and isinstance(value, bool):
            values[name] = "True" if value else None
        elif name.startswith("no_") and name[3:] in flags and flags[name[3:]].default is True:
            values[name[3:]] = not values.pop(name)
    return values
