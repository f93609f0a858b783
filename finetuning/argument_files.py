"""Which flags were given: on the command line, in one .json or .yaml file, or in both, where the line overrides."""

import json
from dataclasses import fields
from pathlib import Path

import yaml


ENDINGS = (".json", ".yaml", ".yml")


def given_arguments(parser, words) -> dict:
    """The values of the flags that were given, by name: those of a file named first, overridden by the other words."""
    values = {}
    if words and words[0].endswith(ENDINGS):
        values, words = parser.given(file_arguments(parser, words[0])), words[1:]
    return values | parser.given(words)


def file_arguments(parser, path) -> list[str]:
    """The command line that a flat mapping in a JSON or YAML file stands for: null is no flag, no_x: true is x: false.

    So its values are read as those of any command line are. YAML 1.1 reads no as false; where a strategy is expected,
    or a checkpoint, that is what was meant.
    """
    flags = {f.name: str(f.type) for cls in parser.dataclass_types for f in fields(cls)}
    words = []
    for name, value in mapping_in(path).items():
        if name not in flags and name.removeprefix("no_") in flags and isinstance(value, bool):
            name, value = name.removeprefix("no_"), not value
        kind = flags.get(name, "")
        if value is None or (name == "resume_from_checkpoint" and value is False):
            continue
        if isinstance(value, list) and "list" in kind:
            words += [f"--{name}", *map(str, value)]
            continue
        if isinstance(value, dict):
            value = json.dumps(value)
        elif isinstance(value, list):
            value = ",".join(map(str, value))
        elif "Strategy" in kind and value is False:
            value = "no"
        words.append(f"--{name}={value}")
    return words


def mapping_in(path) -> dict:
    """The mapping in a JSON or YAML file. A ValueError for any other content and for a name that is twice there."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.endswith(".json"):
            values = json.loads(text)
            names = json.loads(text, object_pairs_hook=lambda pairs: [name for name, _ in pairs])
        else:
            values = yaml.safe_load(text)
            names = [key.value for key, _ in yaml.compose(text).value] if isinstance(values, dict) else []
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} must hold names and values of flags, such as learning_rate: 2e-4.")
    if twice := next((name for name in values if names.count(name) > 1), None):
        raise ValueError(f"{path}: {twice} stands there twice: delete one.")
    return values
