"""The command line: its values, its help, and flags that contradict each other."""

import argparse
import json
import math
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import peft
from transformers import HfArgumentParser, TrainingArguments

from .flag_names import check_both_ways, check_known, without_usage
from .mistakes import named


NOT_GIVEN = object()
USAGE = "run_chatglm_lora.py --flag value ...    or    run_chatglm_lora.py ARGUMENTS.yaml"

# Our flags that become a field of PEFT's configuration: what it is called there.
PEFT_FIELDS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_exclude_modules": "exclude_modules",
    "lora_layers_to_transform": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "lora_bias": "bias",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "init_lora_weights": "init_lora_weights",
    "num_virtual_tokens": "num_virtual_tokens",
}

# What numbers must be, where Trainer, PEFT and datasets fail far from the flag, or go on as if nothing had been said.
COUNTS = """
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps
    torch_empty_cache_steps dataloader_prefetch_factor save_total_limit max_train_samples max_eval_samples
    max_predict_samples max_source_length max_target_length pack_to_length block_size num_beams eval_generate_every
    preview early_stopping_patience lora_r lora_alpha num_virtual_tokens pre_seq_len train_last_layers"""
NOT_NEGATIVE = """
    learning_rate weight_decay max_grad_norm warmup_steps num_train_epochs neftune_noise_alpha eval_delay data_seed
    dataloader_num_workers preprocessing_num_workers"""
RANGES = [
    ("at least 1", lambda n: n >= 1, COUNTS),
    ("at least 1, or -1 to go by --num_train_epochs", lambda n: n >= 1 or n == -1, "max_steps"),
    ("at least 0", lambda n: n >= 0, NOT_NEGATIVE),
    ("at least 0 and less than 1", lambda n: 0 <= n < 1, "lora_dropout label_smoothing_factor adam_beta1 adam_beta2"),
    ("above 0", lambda n: n > 0, "adam_epsilon logging_steps temperature loraplus_lr_ratio"),
    ("above 0 (for none, write --save_strategy no)", lambda n: n > 0, "save_steps"),
    ("above 0 (for none, write --eval_strategy no)", lambda n: n > 0, "eval_steps"),
    ("above 0 and at most 1", lambda n: 0 < n <= 1, "top_p"),
    ("at least 0 and less than 2**32", lambda n: 0 <= n < 2**32, "seed"),
]

# Flags that say nothing without another.
NEEDED = {
    "fsdp_config": "fsdp",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "activation_checkpointing",
    "liger_kernel_config": "use_liger_kernel",
    "hub_model_id": "push_to_hub",
}
MAY_BE_EMPTY = {"system_prompt", "debug", "fsdp"}  # where nothing is a value

# What TrainingArguments says of a mistake, by a part of it, and what is said in place of it or, as {}, around it.
LIBRARY_SENTENCES = {
    "doesn't support bf16": "--bf16 needs a GPU that knows the type: on CPUs add --use_cpu, or leave --bf16 out.",
    "requires the save and eval strategy to match": "--load_best_model_at_end compares what is saved: --eval_strategy "
    "and --save_strategy must be the same (steps or epoch), or --save_strategy best.",
    "MASTER_ADDR": "WORLD_SIZE or LOCAL_RANK is set in the environment, and no launcher has set MASTER_ADDR: unset "
    "both, or start with torchrun.",
    "saving steps to be a": "--load_best_model_at_end compares what is saved: --save_steps must be a multiple of "
    "--eval_steps.",
    "AcceleratorConfig": "--accelerator_config: {}",
}


class FlagParser(HfArgumentParser):
    """HfArgumentParser that takes no abbreviations, raises a ValueError for a mistake, and prints a help to read."""

    def __init__(self, classes, first=(), **options):
        super().__init__(classes, allow_abbrev=False, usage=USAGE, formatter_class=Help, **options)
        self.first = first  # the classes that the help begins with
        for action in self._actions:
            if getattr(action.type, "__name__", "") == "dict":  # whose constructor takes no text
                action.type = json_object

    def format_help(self):
        return help_text(self, self.first)

    def error(self, message):
        """A ValueError in place of argparse's usage, which lists every flag."""
        raise ValueError(without_usage(message))

    def given(self, words) -> dict:
        """The values of the flags on a command line, by name, without the defaults of all others.

        argparse sets a default only where the namespace has no value yet.
        """
        unset = {f.name: NOT_GIVEN for cls in self.dataclass_types for f in fields(cls)}
        namespace, rest = self.parse_known_args(words, argparse.Namespace(**unset))
        check_known([word.split("=")[0] for word in rest], self._option_string_actions)
        check_both_ways(words)
        return {name: value for name, value in vars(namespace).items() if value is not NOT_GIVEN}

    def parse_dict(self, args, **options):
        names = {f.name for cls in self.dataclass_types for f in fields(cls)}
        check_known([f"--{name}" for name in args if name not in names], self._option_string_actions)
        check_ranges(args)
        check_texts(args)
        return self.checked(args, lambda: super(FlagParser, self).parse_dict(args, **options))

    def checked(self, given, parse):
        """What `parse` returns. Raises a ValueError if flags contradict each other or a library refuses one."""
        try:
            parsed = parse()
        except (ValueError, TypeError) as error:  # TrainingArguments' own; ours say already what they have to
            sentence = " ".join(str(error).split())
            known = next((ours for theirs, ours in LIBRARY_SENTENCES.items() if theirs in sentence), "{}")
            raise ValueError(known.format(sentence)) from error
        check_contradictions(set(given), SimpleNamespace(**{k: v for part in parsed for k, v in vars(part).items()}))
        return parsed


def check_ranges(values):
    """Raise a ValueError for the first of some flags, {name: value}, whose number is outside of its range."""
    for words, fits, names in RANGES:
        for name in names.split():
            value = values.get(name)
            if isinstance(value, (int, float)) and not (math.isfinite(value) and fits(value)):
                raise ValueError(f"--{name} must be {words}, not {value:g}.")


def check_texts(values):
    """Raise a ValueError for a text that is empty, or that is no dictionary where one is expected.

    An unset variable of a shell is an empty text, and most flags would go on as if they had not been given.
    """
    types = TrainingArguments.__annotations__
    for name, value in values.items():
        if value == "" and name not in MAY_BE_EMPTY:
            raise ValueError(f"--{name} is empty: give it a value, or leave it out (is a variable not set?).")
        if isinstance(value, str) and "dict" in str(types.get(name)):
            is_file = not name.endswith("_kwargs") and not value.startswith("{")
            with named(f"--{name} {value}", OSError, ValueError):
                found = json_object(Path(value).read_text("utf-8") if is_file else value)
            if not isinstance(found, dict):
                raise ValueError(f'--{name} {value}: a JSON object is expected, such as {{"name": 1}}.')


def json_object(text) -> dict:
    return json.loads(text)


def check_contradictions(given, args):
    """Raise a ValueError if, of the flags that were given, one makes another ineffective."""
    check_both_ways([f"--{name}" for name in given])
    for name, needed in NEEDED.items():
        if name in given and not getattr(args, needed):
            raise ValueError(f"--{name} says nothing without --{needed}: add it, or drop --{name}.")
    if not hasattr(args, "peft_type"):
        return
    adapter = [
        name
        for name in (*PEFT_FIELDS, "peft_config", "prefix_projection", "loraplus_lr_ratio", "adapter_name_or_path")
        if name in given
    ]
    if not args.use_lora and not args.pre_seq_len and adapter:
        whole = "--no_use_lora trains all weights"
        if args.train_last_layers:
            whole = "--train_last_layers trains whole layers"
        raise ValueError(f"{whole} and no adapter: drop it, or --{adapter[0]}.")
    shape = [name for name in (*PEFT_FIELDS, "peft_config", "peft_type") if name in given]
    if args.pre_seq_len and shape:
        raise ValueError(f"--pre_seq_len is ChatGLM's own prefix, without PEFT: drop it, or --{shape[0]}.")
    if args.adapter_name_or_path and shape:
        raise ValueError(
            f"--adapter_name_or_path goes on with an adapter, whose settings stand in its folder: drop --{shape[0]}, "
            "or train a new adapter."
        )
    known = {f.name for f in fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[args.peft_type])}
    for name, field in PEFT_FIELDS.items():
        if name in given and field not in known:
            raise ValueError(f"--{name} says nothing to --peft_type {args.peft_type}: drop one of them.")


# --------------------------------------------------------------------------------------------------------- the help


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Each flag once, in the spelling with underscores; what turns a flag off has a text of its own."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=119)

    def _format_action_invocation(self, action):
        name = next(option for option in action.option_strings if re.fullmatch(r"--\w+", option))
        if action.choices and len(action.choices) < 6:
            return f"{name} {{{','.join(map(str, action.choices))}}}"
        kind = getattr(action.type, "__name__", "")
        value = {"int": "N", "float": "X", "string_to_bool": ""}.get(kind, "TEXT") if action.nargs != 0 else ""
        return f"{name} {value}".rstrip()

    def _get_help_string(self, action):
        if action.option_strings[0].startswith("--no_") and action.nargs == 0:
            return f"Turns --{action.dest} off."
        text = " ".join((action.help or "").split())
        if action.choices and len(action.choices) >= 6:
            text += f" One of {', '.join(map(str, action.choices))}."
        shown = (
            action.default not in (None, False, argparse.SUPPRESS) and "efault" not in text and action.dest != "help"
        )
        return f"{text} (default: {str(action.default).replace('%', '%%')})" if shown else text


def trainer_groups() -> dict[str, str]:
    """{flag of Trainer: heading}, from the headings ("> Optimizer") in TrainingArguments' docstring."""
    groups, heading = {}, "output"
    for line in TrainingArguments.__doc__.splitlines():
        if found := re.match(r" {8}> (\w.*)", line):
            heading = found[1]
        elif found := re.match(r"\s+(\w+) \(`", line):
            groups.setdefault(found[1], heading)
    return groups


def help_text(parser, first) -> str:
    """The help: the groups of the classes `first`, then the other named ones, then Trainer's by subject."""
    formatter, groups = parser._get_formatter(), {}
    titles = [cls._argument_group_name for cls in first]
    named = sorted(
        (group for group in parser._action_groups if group.title not in ("options", "positional arguments")),
        key=lambda group: titles.index(group.title) if group.title in titles else len(titles),
    )
    groups = {group.title: group._group_actions for group in named}
    subjects = trainer_groups()
    for action in parser._optionals._group_actions:
        heading = "help" if action.dest == "help" else f"Trainer: {subjects.get(action.dest, 'other')}"
        groups.setdefault(heading, []).append(action)
    formatter.add_usage(parser.usage, [], [])
    formatter.add_text(parser.description)
    for title, actions in groups.items():
        formatter.start_section(title)
        formatter.add_arguments(actions)
        formatter.end_section()
    formatter.add_text(parser.epilog)
    return formatter.format_help()
