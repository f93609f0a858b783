"""Folders that a training wrote: what is in them, and which base an adapter belongs to."""

import json
from pathlib import Path

import peft
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file


TEXT_FILES = ["*.json", "*.jinja", "*.py", "*.model", "*.txt", "*LICENSE*"]
NOT_FOUND_IS_NONE = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


def local_folder(name: str, revision: str | None = None) -> Path:
    """A folder as it is, or the downloaded snapshot of a hub name: its safetensors or, without any, its .bin files.

    Raises ValueError where there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*TEXT_FILES, "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*TEXT_FILES, "*.bin"]))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors, those of a malformed name ValueErrors
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} is neither a folder nor found on the hub or in its cache ({reason})") from error
    return folder


def adapter_config(folder: Path) -> peft.PeftConfig | None:
    """The configuration of the adapter in a folder; None if the folder holds none."""
    return peft.PeftConfig.from_pretrained(str(folder)) if (folder / "adapter_config.json").is_file() else None


def adapter_folder(name: str) -> Path | None:
    """The folder of the adapter with a path or hub name; None if there is a model by that name, or nothing."""
    if Path(name).is_dir():
        return Path(name) if (Path(name) / "adapter_config.json").is_file() else None
    found = cached_file(name, "adapter_config.json", **NOT_FOUND_IS_NONE)
    return local_folder(name) if found else None


def base_of(adapter: Path, override: str | None) -> tuple[str, str]:
    """Name and revision of the model that an adapter changes: `override`, or what was noted when it was trained.

    Raises ValueError where nothing was noted, or a folder that is no longer there.
    """
    if override:
        return override, "main"
    config = adapter_config(adapter)
    name = config.base_model_name_or_path
    if not name:
        raise ValueError(f"{adapter}/adapter_config.json names no base model: pass --base_model.")
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ValueError(f"The base model of {adapter} is not at {name} any more: pass its place with --base_model.")
    record = adapter / "provenance.json"  # of run_chatglm_lora.py
    noted = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    return name, config.revision or noted.get("commit") or noted.get("revision") or "main"


def stop_ids(tokenizer: PreTrainedTokenizerBase, end: int | list[int] | None) -> list[int]:
    """Ids that end an answer: the model's own, `end`, and the tokenizer's."""
    ids = [*(end if isinstance(end, list) else [end]), tokenizer.eos_token_id]
    return sorted({*ids, *getattr(tokenizer, "stop_token_ids", [])} - {None})
