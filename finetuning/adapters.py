"""Folders that a training wrote: what is in them, and which base an adapter belongs to."""

import json
import logging
import math
import re
import warnings
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import peft
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .batches import PaddedCollator
from .mistakes import named


logger = logging.getLogger("run_chatglm_lora.adapters")

KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")  # ways to begin an adapter; others change the base
SAMPLED_TENSORS = 16  # of a base, evenly spaced by name, tell it from others
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
    """The configuration of the adapter in a folder; None if the folder holds none.

    Raises ValueError if it is not what PEFT writes, or the weights beside it are missing or cut short.
    """
    if not (folder / "adapter_config.json").is_file():
        return None
    check_whole(folder / peft.utils.SAFETENSORS_WEIGHTS_NAME)
    with named(
        f"{folder}/adapter_config.json is none that PEFT {peft.__version__} reads", ValueError, KeyError, TypeError
    ):
        config = peft.PeftConfig.from_pretrained(str(folder))
    if config.peft_type is None:
        raise ValueError(f"{folder}/adapter_config.json is not what PEFT writes: it has no peft_type.")
    return config


def check_whole(path: Path):
    """Raise a ValueError if a safetensors file is shorter than its header says, or neither it nor a .bin is there.

    Its numbers are not read.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except FileNotFoundError as error:
        if not path.with_name(peft.utils.WEIGHTS_NAME).is_file():
            raise ValueError(
                f"{path.parent} has no weights beside its adapter_config.json: copy {path.name}."
            ) from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or was cut short ({error}): copy it again.") from error


def adapter_folder(name: str) -> Path | None:
    """The folder of the adapter with a path or hub name; None if there is a model by that name, or nothing."""
    if Path(name).is_dir():
        return Path(name) if (Path(name) / "adapter_config.json").is_file() else None
    found = cached_file(name, "adapter_config.json", **NOT_FOUND_IS_NONE)
    return local_folder(name) if found else None


def adapter_names(names: str | None) -> list[str]:
    """The adapters that --adapter_name_or_path names: none, one, or several with commas."""
    if not names or Path(names).is_dir():
        return [names] if names else []
    return [name.strip() for name in names.split(",") if name.strip()]


def is_folder_that_is_gone(name: str) -> bool:
    """Whether a name can only be that of a folder, and there is none."""
    return not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1)


def base_of(adapter: Path, override: str | None) -> tuple[str, str]:
    """Name and revision of the model that an adapter changes: `override`, or what was noted when it was trained.

    Raises ValueError where nothing was noted, or a folder that is no longer there.
    """
    if override:
        check_not_adapter(override)
        return override, "main"
    config = adapter_config(adapter)
    name = config.base_model_name_or_path
    if not name:
        raise ValueError(f"{adapter}/adapter_config.json names no base model: pass --base_model.")
    if is_folder_that_is_gone(name):
        raise ValueError(f"The base model of {adapter} is not at {name} any more: pass its place with --base_model.")
    check_not_adapter(name)
    noted = record_of(adapter)
    return name, config.revision or noted.get("commit") or noted.get("revision") or "main"


def check_not_adapter(base: str):
    """Raise a ValueError if what is to be the base of an adapter is an adapter itself, in a folder."""
    if (Path(base) / "adapter_config.json").is_file():
        raise ValueError(f"The base model, {base}, is an adapter itself: merge it into its base, and name the result.")


def record_of(folder: Path) -> dict:
    """What run_chatglm_lora.py noted in provenance.json; empty for an adapter that it did not write."""
    path = folder / "provenance.json"
    with named(f"{path} is damaged", ValueError):
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def own_tokenizer(adapter: str | None) -> str | None:
    """The folder of an adapter (the first of several), or of a saved prefix, that has a tokenizer; None without."""
    adapter = next(iter(adapter_names(adapter)), None)
    folder = adapter and (adapter_folder(adapter) or Path(adapter))
    if not folder or not (folder / "tokenizer_config.json").is_file():
        return None
    logger.info(f"Tokenizer and chat template: those of the adapter, {folder}")
    return str(folder)


def stop_ids(tokenizer: PreTrainedTokenizerBase, end: int | list[int] | None) -> list[int]:
    """Ids that end an answer: the model's own, `end`, and the tokenizer's."""
    ids = [*(end if isinstance(end, list) else [end]), tokenizer.eos_token_id]
    return sorted({*ids, *getattr(tokenizer, "stop_token_ids", [])} - {None})


# ------------------------------------------------------------------------------------------ results of other trainings


def kind_of_result(folder: Path) -> str | None:
    """What lies in a folder: adapter, prefix (of --pre_seq_len) or full model; None if it is none of them."""
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if not (folder / "config.json").is_file():
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return "prefix" if config.get("pre_seq_len") else "full model"


def check_output_folder(folder: Path, kind: str):
    """Raise a ValueError if a folder holds a result of another kind: adapter, prefix (--pre_seq_len) or full model.

    Old and new would lie side by side, and whoever opens the folder would take one of them.
    """
    found = kind_of_result(folder)
    if found not in (None, kind):
        raise ValueError(
            f"--output_dir {folder} holds the result of another training (kind: {found}), and this one would write "
            f"its own (kind: {kind}) beside it: choose another folder, or empty that one."
        )


# ------------------------------------------------------------------------------------------------- initialisation


def check_init(given: dict):
    """Raise a ValueError for an init_lora_weights, flag or field of --peft_config, that PEFT alone would half do."""
    missing = {
        "corda": "needs covariances of the base's inputs, which peft.tuners.lora.corda.preprocess_corda collects",
        "loftq": "needs a base that LoftQ has quantised, which PEFT's example loftq_finetuning makes",
    }
    method = str(given.get("init_lora_weights")).lower()
    if method in missing:
        raise ValueError(f"--init_lora_weights {method} {missing[method]}; this script does not: take eva or pissa.")


def initialise_from_data(trainer, pad_token_id: int):
    """With --init_lora_weights eva, A from the singular vectors of the layers' inputs in the first training batches.

    Only in a run that starts: a resumed one has its weights. Raises a ValueError where the model is dealt out.
    """
    model, args = trainer.model, trainer.args
    new = args.resume_from_checkpoint is None and isinstance(model, peft.PeftModel)
    if not new or getattr(model.active_peft_config, "init_lora_weights", None) != "eva":
        return
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError("--init_lora_weights eva needs the whole model in each process: drop --deepspeed or --fsdp.")
    padded = PaddedCollator(pad_token_id)
    data = DataLoader(
        trainer.train_dataset,
        batch_size=args.train_batch_size,
        collate_fn=lambda rows: {name: tensor.to(model.device) for name, tensor in padded(rows).items()},
    )
    logger.info("The adapter starts from the inputs of its layers in the first training batches (EVA).")
    # The processes look at the same rows, so that there is nothing to gather.
    peft.initialize_lora_eva_weights(model, data, gather_distributed_inputs=False, show_progress_bar=False)


# ------------------------------------------------------------------------------------------- which base was it


def base_content(name: str, revision: str | None = None) -> dict | None:
    """What tells a base from others wherever it lies: architecture, and a hash of names, shapes and some weights.

    The hash is None for weights that are not in safetensors; the result for a name that is no model here, or for none.
    """
    if not name or is_folder_that_is_gone(name):  # a model from scratch has no name
        return None
    path = cached_file(name, "config.json", revision=revision, **NOT_FOUND_IS_NONE)
    if path is None:
        return None
    model_type = json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")
    config = AutoConfig.from_pretrained(name, revision=revision) if model_type in CONFIG_MAPPING else None
    return {
        "architecture": getattr(config, "generation", None) or model_type,
        "weights": weights_hash(Path(path).parent),
    }


def weights_hash(folder: Path) -> str | None:
    """The same for weights that were moved, put into other files or another floating point type."""
    places, digest = {}, sha256()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    names = sorted(places)
    digest.update(" ".join(names).encode())
    for name in names[:: max(1, len(names) // SAMPLED_TENSORS)]:
        with safe_open(places[name], "pt") as file:
            weights = file.get_slice(name)
            start = weights[:1] if weights.get_shape() else file.get_tensor(name)
            digest.update(f"{weights.get_shape()}".encode() + start.bfloat16().float().numpy().tobytes())
    return digest.hexdigest() if names else None


def check_base(adapter: str, model):
    """Raise a ValueError if an adapter, or a saved prefix, was trained on another base than the model is."""
    folder = adapter_folder(adapter) or Path(adapter)
    noted = record_of(folder)
    config = adapter_config(folder)
    before = (config and config.base_model_name_or_path) or noted.get("base_model")
    if not before:
        return
    here = base_content(model.name_or_path, getattr(model.config, "_commit_hash", None)) or {}
    then = noted.get("base_content") or base_content(before, noted.get("commit")) or {}
    known = [key for key in ("architecture", "weights") if here.get(key) and then.get(key)]
    if any(here[key] != then[key] for key in known):
        raise ValueError(
            f"The adapter {adapter} was trained on {before} ({then['architecture']}), and the model here, "
            f"{model.name_or_path} ({here['architecture']}), is another one: pass that base, or train a new adapter."
        )
    if "weights" not in known and Path(before).name != Path(model.name_or_path).name:
        logger.warning(f"{adapter} was trained on {before}; whether {model.name_or_path} is the same cannot be told.")


def opened_adapter(model, adapter: str, is_trainable: bool, name: str = "default") -> peft.PeftModel:
    """The model inside the adapter with a path or hub name; ValueError if they do not belong together.

    A model on the meta device, of which only shapes are asked, gets an adapter of the same shapes.
    """
    if model.device.type == "meta":
        config = peft.PeftConfig.from_pretrained(adapter)
        config.inference_mode = not is_trainable
        return peft.get_peft_model(model, config, name)
    check_base(adapter, model)
    try:
        with loading(adapter):
            return peft.PeftModel.from_pretrained(model, adapter, name, is_trainable=is_trainable)
    except RuntimeError as error:
        sizes = re.search(r"size mismatch for (\S+): .*?Size\((.*?)\).*?Size\((.*?)\)", str(error), re.DOTALL)
        if sizes is None:
            raise
        tensor, saved, wanted = sizes.groups()
        reason = "its base is another"
        if re.search(r"embed|lm_head|output_layer", tensor):
            reason = "its tokenizer has another number of tokens: pass it with --tokenizer_name"
        raise ValueError(
            f"The adapter {adapter} does not fit {model.name_or_path}: {tensor} is {saved} in the adapter "
            f"and {wanted} here. Most likely {reason}."
        ) from error


@contextmanager
def loading(adapter: str):
    """In the block, what PEFT cannot load is a ValueError, also weights that are not there: PEFT only warns of them,
    and the model would answer as the base does, or by chance."""
    with warnings.catch_warnings(), named(f"The adapter {adapter} cannot be loaded", OSError, ValueError):
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            yield
        except UserWarning as error:
            first = re.search(r"'(.*?)'", str(error))[1]
            raise ValueError(
                f"The adapter {adapter} is not whole, or not of this model: it has no {first}."
            ) from error


# ------------------------------------------------------------------------------------------------- several adapters


def opened_adapters(model, lora_args, is_trainable: bool) -> peft.PeftModel:
    """The model inside the adapter of --adapter_name_or_path, or inside the weighted sum of several."""
    names = adapter_names(lora_args.adapter_name_or_path)
    if len(names) == 1:
        return opened_adapter(model, *names, is_trainable)
    return weighted_sum(model, names, adapter_weights(names, lora_args.adapter_weights))


def adapter_weights(names: list[str], text: str | None) -> list[float]:
    """The numbers of --adapter_weights. Raises ValueError unless there is one for each of at least two adapters."""
    try:
        weights = [float(weight) for weight in (text or "").split(",")]
    except ValueError:
        weights = []
    if len(names) < 2 or len(weights) != len(names) or not all(map(math.isfinite, weights)):
        raise ValueError(
            f"--adapter_weights is a number for each of several adapters, such as 0.7,0.3: it is {text}, and "
            f"--adapter_name_or_path names {len(names)}."
        )
    return weights


def weighted_sum(model, adapters: list[str], weights: list[float]) -> peft.PeftModel:
    """The model inside the weighted sum of LoRA adapters.

    The sum is exact: PEFT stacks the matrices ("cat"), so that its rank is that of all together. Raises ValueError for
    an adapter that has more than two matrices a layer.
    """
    for adapter in adapters:
        check_summable(adapter, peft.PeftConfig.from_pretrained(adapter))
        check_base(adapter, model)
    parts = [f"part_{number}" for number in range(len(adapters))]
    opened = opened_adapter(model, adapters[0], False, parts[0])
    for adapter, part in zip(adapters[1:], parts[1:], strict=True):
        with loading(adapter):
            opened.load_adapter(adapter, part)
    opened.add_weighted_adapter(parts, weights, "default", combination_type="cat")
    opened.set_adapter("default")
    for part in parts:
        opened.delete_adapter(part)
    terms = " + ".join(f"{weight:g} x {adapter}" for weight, adapter in zip(weights, adapters, strict=True))
    logger.info(f"Adapter: {terms}, rank {opened.active_peft_config.r}")
    return opened


def check_summable(adapter: str, config: peft.PeftConfig):
    """Raise a ValueError unless an adapter is a product of two matrices a layer, scaled by alpha / r, and no more."""
    if not isinstance(config, peft.LoraConfig):
        raise ValueError(f"--adapter_weights adds up LoRA adapters; {adapter} is {config.peft_type.value}.")
    more = ["use_dora", "use_rslora", "modules_to_save", "target_parameters", "trainable_token_indices", "lora_bias"]
    found = [name for name in more if getattr(config, name)] + (["bias"] if config.bias != "none" else [])
    found += [] if config.init_lora_weights in KEEP_THE_BASE else ["init_lora_weights"]
    if found:
        raise ValueError(f"--adapter_weights: {adapter} was trained with {found[0]}, which PEFT does not add up.")
