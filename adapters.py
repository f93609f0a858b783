"""Folders that a training wrote: which base an adapter belongs to, and the model and tokenizer of both together."""

import importlib.util
import json
from pathlib import Path

import peft
import torch
from huggingface_hub import snapshot_download
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

import chatglm  # noqa: F401  makes ChatGLM known
from run_chatglm_lora import ModelArguments, hub_options, loaded_config, loaded_tokenizer, model_class


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


def tokenizer_of(folder: Path, base: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer that an adapter was trained with: saved beside it, or else the base's."""
    own = (folder / "tokenizer_config.json").is_file()
    return loaded_tokenizer(ModelArguments(str(folder)) if own else base)


def stop_ids(tokenizer: PreTrainedTokenizerBase, end: int | list[int] | None) -> list[int]:
    """Ids that end an answer: the model's own, `end`, and the tokenizer's."""
    ids = [*(end if isinstance(end, list) else [end]), tokenizer.eos_token_id]
    return sorted({*ids, *getattr(tokenizer, "stop_token_ids", [])} - {None})


def opened_base(
    arguments: ModelArguments, dtype: str | None = None, device: str = "cpu", bits: int | None = None
) -> torch.nn.Module:
    """A model without adapter; `dtype` is a name of torch's (None: as stored), `bits` 4 or 8 quantises it."""
    config = loaded_config(arguments)
    options = {"dtype": getattr(torch, dtype) if dtype else "auto", "device_map": {"": device}}
    if bits:
        if not importlib.util.find_spec("bitsandbytes"):
            raise ValueError(f"--load_in_{bits}bit needs bitsandbytes: pip install bitsandbytes")
        quantization = {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8, "bnb_4bit_quant_type": "nf4"}
        options["quantization_config"] = BitsAndBytesConfig(**quantization, bnb_4bit_compute_dtype=torch.bfloat16)
    name = arguments.model_name_or_path
    return model_class(config).from_pretrained(name, config=config, **options, **hub_options(arguments)).eval()


def opened(
    name: str, base_model: str | None = None, trust_remote_code: bool = False, **loading
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Model, ready for inference, and tokenizer of a model folder, an adapter folder or a hub name of either.

    The base of an adapter is `base_model`, or the one that it was trained on; `loading` goes to `opened_base`. Raises
    ValueError or OSError where something is missing or does not fit.
    """
    folder = adapter_folder(name)
    if folder is None and base_model:
        raise ValueError(f"{name} is no adapter (it has no adapter_config.json): --base_model is for adapters.")
    base, revision = base_of(folder, base_model) if folder else (name, "main")
    arguments = ModelArguments(base, model_revision=revision, trust_remote_code=trust_remote_code)
    model = opened_base(arguments, **loading)
    tokenizer = tokenizer_of(folder, arguments) if folder else loaded_tokenizer(arguments)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))  # as in training
    if folder:
        try:
            model = peft.PeftModel.from_pretrained(model, str(folder))
        except RuntimeError as error:  # load_state_dict's: sizes
            line = next((line for line in str(error).splitlines() if "size mismatch" in line), str(error))
            raise ValueError(f"The adapter {name} was trained on another model than {base}: {line.strip()}") from error
    return model.eval(), tokenizer
