"""What is asked for and cannot be done, found before anything is loaded."""

import copy
import importlib.util
import logging
import re
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, get_token, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, Trainer, get_scheduler
from transformers.trainer_optimizer import is_optimizer_factory

from . import methods
from .adapters import adapter_names, adapter_weights, kind_of_result
from .data_files import check_downloaded
from .flags import check_ranges
from .mistakes import did_you_mean, named


logger = logging.getLogger("run_chatglm_lora.preconditions")

HUB_TIMEOUT = 5  # seconds; the libraries' own retries take 24 to 68 until they say that there is no network

# The packages of --report_to, any of which will do, as Trainer's callbacks look for them.
REPORTERS = {
    "azure_ml": ["azureml"],
    "clearml": ["clearml"],
    "codecarbon": ["codecarbon"],
    "comet_ml": ["comet_ml"],
    "dagshub": ["dagshub"],
    "dvclive": ["dvclive"],
    "flyte": ["flytekit"],
    "mlflow": ["mlflow"],
    "neptune": ["neptune"],
    "swanlab": ["swanlab"],
    "tensorboard": ["tensorboard", "tensorboardX"],
    "trackio": ["trackio"],
    "wandb": ["wandb"],
}
# (part of an optimizer's name, its module, what pip calls it); the first that fits holds.
OPTIMIZERS = [
    ("galore", "galore_torch", "galore-torch"),
    ("apollo", "apollo_torch", "apollo-torch"),
    ("lomo", "lomo_optim", "lomo-optim"),
    ("grokadamw", "grokadamw", "grokadamw"),
    ("schedule_free", "schedulefree", "schedulefree"),
    ("stable_adamw", "optimi", "torch-optimi"),
    ("anyprecision", "torchdistx", "torchdistx"),
    ("npu", "torch_npu", "torch-npu"),
    ("adamw_torch_4bit", "torchao", "torchao"),
    ("adamw_torch_8bit", "torchao", "torchao"),
    ("8bit", "bitsandbytes", "bitsandbytes"),
    ("bnb", "bitsandbytes", "bitsandbytes"),
    ("lion", "bitsandbytes", "bitsandbytes"),
    ("ademamix", "bitsandbytes", "bitsandbytes"),
    ("paged", "bitsandbytes", "bitsandbytes"),
]


def check(model_args, data_args, lora_args, training_args):
    """Raise a ValueError or an OSError for the first thing that could not be done."""
    for arguments in (model_args, data_args, lora_args, training_args):
        check_ranges(vars(arguments))
    check_stages(data_args, training_args)
    check_strategies(data_args, training_args)
    check_packages(training_args)
    check_optimizer(training_args)
    check_schedule(training_args)
    check_publishing(training_args)
    for flag in ("lora_target_modules", "lora_exclude_modules"):
        with named(f"--{flag} {getattr(lora_args, flag)} is no regular expression", re.error):
            re.compile(getattr(lora_args, flag) or "")
    methods.check(lora_args, training_args)
    check_adapter_weights(lora_args, training_args)
    check_folders(model_args, lora_args)
    check_attention(lora_args.attn_implementation)
    for flag in ("model_name_or_path", "config_name", "tokenizer_name"):
        if name := getattr(model_args, flag):
            check_name(f"--{flag}", name, model_args)


def check_attention(name):
    """A kernel of the hub, OWNER/NAME, is looked up when the model is loaded."""
    known = ["auto", "eager", *AttentionInterface().valid_keys()]
    if name not in known and "/" not in name:
        raise ValueError(
            f"--attn_implementation {name} is none of {', '.join(known)}, and no kernel of the hub (OWNER/NAME)."
            f"{did_you_mean(name, known)}"
        )


def check_stages(data_args, args):
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("There is nothing to do: add --do_train, --do_eval or --do_predict.")
    if args.resume_from_checkpoint and not args.do_train:
        raise ValueError(
            "--resume_from_checkpoint goes on with a training: add --do_train, or pass the checkpoint as "
            "--adapter_name_or_path (of a full model: as --model_name_or_path) to evaluate it or predict with it."
        )
    if args.label_names not in (None, ["labels"]):
        raise ValueError("--label_names: what is trained is called labels here, and nothing else: drop the flag.")
    if args.dataloader_drop_last and (args.do_eval or args.eval_strategy != "no"):
        logger.warning("--dataloader_drop_last leaves the last rows of evaluations out as well; without it all count.")
    if data_args.streaming and args.do_train and args.max_steps <= 0:
        raise ValueError("--streaming needs --max_steps: nobody knows how many rows a stream has.")


def check_strategies(data_args, args):
    """Raise a ValueError for a wish about evaluations, saves or rows that Trainer would fail at or pass over."""
    if not args.do_train:
        return
    if args.load_best_model_at_end and args.eval_strategy == "no":
        raise ValueError(
            "--load_best_model_at_end compares evaluations: add --eval_strategy and --save_strategy (both steps, or "
            "both epoch)."
        )
    if args.save_strategy == "best" and (args.metric_for_best_model is None or args.eval_strategy == "no"):
        raise ValueError(
            "--save_strategy best compares evaluations: add --eval_strategy, and --metric_for_best_model loss, say."
        )
    if args.eval_on_start and not args.do_eval:
        raise ValueError("--eval_on_start evaluates before the training: add --do_eval, or drop it.")
    if data_args.streaming and args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"--train_sampling_strategy {args.train_sampling_strategy} needs all rows, and a stream comes in its own "
            "order: drop it, or --streaming."
        )
    if args.gradient_checkpointing and args.gradient_checkpointing_kwargs:
        with named(f"--gradient_checkpointing_kwargs {args.gradient_checkpointing_kwargs}", ValueError, TypeError):
            options = {"use_reentrant": True, **args.gradient_checkpointing_kwargs}  # Trainer's default
            checkpoint(torch.nn.Identity(), torch.zeros(1, requires_grad=True), **options)


def check_packages(args):
    for name in [] if args.report_to == ["none"] else args.report_to:
        if name not in (*REPORTERS, "kubeflow"):
            raise ValueError(f"--report_to {name} is none of {', '.join(REPORTERS)}.{did_you_mean(name, REPORTERS)}")
        wanted = REPORTERS.get(name, [])
        if wanted and not any(map(installed, wanted)):
            raise ValueError(f"--report_to {name} needs a package: pip install {wanted[0]}, or --report_to none.")
    if args.use_liger_kernel and not installed("liger_kernel"):
        raise ValueError("--use_liger_kernel needs a package: pip install liger-kernel, or drop the flag.")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if args.do_train and optimizer.startswith(("galore", "apollo")) and not args.optim_target_modules:
        raise ValueError(f"--optim {optimizer} needs layers: add --optim_target_modules all-linear and --no_use_lora.")
    for part, module, package in OPTIMIZERS:
        if part in optimizer:
            if args.do_train and not installed(module):
                raise ValueError(f"--optim {optimizer} needs a package: pip install {package}, or take adamw_torch.")
            return


def check_optimizer(args):
    """Raise a ValueError unless the optimizer of --optim takes all of --optim_args.

    Trainer reads those that an optimizer knows, and passes over the others: what it makes of an argument shows whether
    it reads it.
    """
    if not args.do_train or not args.optim_args:
        return
    given, optimizer = f"--optim_args {args.optim_args}", args.optim.value
    for part in args.optim_args.replace(" ", "").split(","):
        if not re.fullmatch(r"\w+=[^=]+", part):
            raise ValueError(f"{given}: '{part}' is no name=value, such as momentum=0.9.")
    without = optimizer_options(args, None)
    if isinstance(without, str):  # it wants the model, which it gets later
        return
    for name in re.findall(r"(\w+)=", args.optim_args):
        if optimizer_options(args, f"{name}=0.12345") == without:
            raise ValueError(f"{given}: --optim {optimizer} does not read {name}, and would pass over it.")
    if isinstance(refused := optimizer_options(args, args.optim_args), str):
        raise ValueError(f"{given}: --optim {optimizer} refuses that: {refused}")


def optimizer_options(args, optim_args) -> dict | str:
    """What Trainer gives to the optimizer with some --optim_args, or why it or the optimizer refuses them."""
    args = copy.copy(args)
    args.optim_args = optim_args
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        if not is_optimizer_factory(kind):
            kind([torch.nn.Parameter(torch.zeros(1))], **options)
        return options
    except (ValueError, TypeError, ImportError) as error:
        return str(error)


def check_schedule(args):
    """Raise a ValueError if the learning rate cannot follow --lr_scheduler_type with its --lr_scheduler_kwargs."""
    if args.do_train:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        options = {
            "num_warmup_steps": 0,
            "num_training_steps": 1,
            "scheduler_specific_kwargs": args.lr_scheduler_kwargs,
        }
        given = f"--lr_scheduler_type {args.lr_scheduler_type.value} --lr_scheduler_kwargs {args.lr_scheduler_kwargs}"
        with named(given, TypeError, ValueError):
            get_scheduler(args.lr_scheduler_type, optimizer, **options)


def check_publishing(args):
    """Raise an error if --push_to_hub could not begin: Trainer would find out when the model is loaded.

    Without network that is left to Trainer, which may be given a hub of its own.
    """
    if not args.push_to_hub or not args.should_save:
        return
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    with named(f"--push_to_hub --hub_model_id {name}", HFValidationError):
        validate_repo_id(name)
    if constants.is_offline_mode():
        return
    if not (args.hub_token or get_token()):
        raise ValueError("--push_to_hub needs a token: log in once with `hf auth login`, or pass --hub_token.")
    with named(f"--push_to_hub: {constants.ENDPOINT} does not let you in", HTTPError, OSError):
        HfApi(token=args.hub_token).whoami()


def installed(module) -> bool:
    return importlib.util.find_spec(module) is not None


# ---------------------------------------------------------------------------------------- folders and hub names


def check_adapter_weights(lora_args, args):
    """Raise a ValueError unless each of several adapters has a weight, and none of them is to be trained."""
    names = adapter_names(lora_args.adapter_name_or_path)
    if lora_args.adapter_weights is None and len(names) < 2:
        return
    adapter_weights(names, lora_args.adapter_weights)
    if args.do_train:
        raise ValueError("--adapter_weights adds adapters up to evaluate and predict with: drop it, or --do_train.")


def check_folders(model_args, lora_args):
    """Raise a ValueError if a base is an adapter, an adapter is none, or a folder a file or not downloaded."""
    if model_args.cache_dir and Path(model_args.cache_dir).is_file():
        raise ValueError(f"--cache_dir {model_args.cache_dir} is a file: name a folder.")
    base = model_args.model_name_or_path
    if base and Path(base, "adapter_config.json").is_file() and not Path(base, "config.json").is_file():
        raise ValueError(
            f"--model_name_or_path {base} is an adapter: pass it as --adapter_name_or_path, and the model that it was "
            "trained on as --model_name_or_path."
        )
    for folder in (base, model_args.tokenizer_name, *adapter_names(lora_args.adapter_name_or_path)):
        check_downloaded(needed_files(Path(folder)) if folder else ())
    if not lora_args.pre_seq_len:  # of a prefix, loading says what is missing
        for adapter in adapter_names(lora_args.adapter_name_or_path):
            check_adapter_folder(adapter)


def needed_files(folder) -> list[Path]:
    """Weights and tokenizer in a folder, which git-lfs keeps apart; .bin files where there are no others."""
    weights = [*folder.glob("*model*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    names = ("tokenizer*", "*.model", "*.tiktoken")
    return [path for path in (*weights, *(path for name in names for path in folder.glob(name))) if path.is_file()]


def check_adapter_folder(adapter):
    if not Path(adapter).is_dir():
        if Path(adapter).is_file():
            raise ValueError(f"--adapter_name_or_path {adapter} is a file: pass the folder of an adapter, unpacked.")
        if is_path(adapter):
            raise OSError(f"--adapter_name_or_path: there is no folder {adapter}.{holding(adapter)}")
        return
    found = kind_of_result(Path(adapter))
    if found == "full model":
        raise ValueError(
            f"--adapter_name_or_path {adapter} is a model and no adapter (it has no adapter_config.json): pass it as "
            "--model_name_or_path."
        )
    if found is None:
        within = sorted(path.parent.name for path in Path(adapter).glob("checkpoint-*/adapter_config.json"))
        inside = f" It holds {', '.join(within)}: pass one of these." if within else ""
        raise ValueError(f"--adapter_name_or_path {adapter} is no adapter: it has no adapter_config.json.{inside}")


def check_name(flag, name, model_args):
    """Raise an OSError if a name is neither a folder nor, after one question to it, a model of the hub.

    Without network a model in the hub's cache is taken from there, and the hub is not asked again.
    """
    if Path(name).exists():
        return
    if is_path(name):
        raise OSError(f"{flag}: there is no folder {name}.{holding(name)}")
    if constants.is_offline_mode():
        check_cached(f"{flag}: there is no folder {name}, and HF_HUB_OFFLINE is set", name, model_args)
        return
    try:
        HfApi(token=model_args.token).model_info(name, revision=model_args.model_revision, timeout=HUB_TIMEOUT)
    except GatedRepoError:  # it is there; loading says how to be let in
        return
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise OSError(f"{flag}: {name} is neither a folder here nor a model on {constants.ENDPOINT}.") from error
    except RevisionNotFoundError as error:
        raise OSError(f"--model_revision: {name} has no branch, tag or commit {model_args.model_revision}.") from error
    except (HTTPError, OSError):
        beginning = f"{flag}: there is no folder {name}, and {constants.ENDPOINT} cannot be reached"
        check_cached(beginning, name, model_args)
        logger.warning(f"{constants.ENDPOINT} cannot be reached: {name} is taken from the hub's cache.")
        constants.HF_HUB_OFFLINE = True


def is_path(name) -> bool:
    """Whether a name can be none of the hub's, which are OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def check_cached(beginning, name, model_args):
    """Raise an OSError, with the beginning of its sentence, if the hub's cache does not hold a model."""
    options = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision}
    files = ("config.json", "tokenizer_config.json")
    if not any(isinstance(try_to_load_from_cache(name, file, **options), str) for file in files):
        raise OSError(
            f"{beginning}. Set HF_ENDPOINT to a mirror, or pass the folder of a download, from ModelScope say: "
            f"modelscope download --model {name} --local_dir FOLDER."
        )


def holding(name) -> str:
    """What to say of the nearest folder above a missing one."""
    there = next((parent for parent in Path(name).expanduser().parents if parent.is_dir()), None)
    return f" {there} is there." if there and str(there) not in (".", "/") else ""
