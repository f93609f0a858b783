"""Which words of the command line name no flag, and which flags are there?

Both are answered before the libraries are imported, which takes seconds.
"""

import argparse
import ast
import hashlib
import re
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from .mistakes import did_you_mean, reported


HELP = Path(__file__).with_name(
    "help.txt"
)  # what --help printed with the locked transformers: a test holds it to that

# Flags that transformers renamed or dropped, and those of other programs for ChatGLM and LoRA: what to write here.
# fmt: off
OTHER_NAMES = {
    # transformers and run_clm.py
    "evaluation_strategy": "write --eval_strategy",
    "torch_dtype": "write --dtype",
    "warmup_ratio": "write --warmup_steps 0.05: below 1 it is the share of all steps",
    "overwrite_output_dir": "drop it: an output folder is written into, and --resume_from_checkpoint last goes on",
    "use_auth_token": "write --token, or log in once with `hf auth login`",
    "no_cuda": "write --use_cpu",
    "use_mps_device": "drop it: an accelerator that is there is used",
    "group_by_length": "write --train_sampling_strategy group_by_length",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "drop it: everything is saved as safetensors",
    "low_cpu_mem_usage": "drop it: weights are always loaded that way",
    "per_gpu_train_batch_size": "write --per_device_train_batch_size",
    "per_gpu_eval_batch_size": "write --per_device_eval_batch_size",
    "fp16_backend": "drop it: there is one way left",
    "half_precision_backend": "drop it: there is one way left",
    "fp16_opt_level": "drop it: apex is not used",
    "push_to_hub_model_id": "write --hub_model_id",
    "push_to_hub_token": "write --hub_token",
    "use_legacy_prediction_loop": "drop it",
    "include_inputs_for_metrics": "write --include_for_metrics inputs",
    "jit_mode_eval": "drop it", "use_ipex": "drop it", "past_index": "drop it", "tpu_num_cores": "drop it",
    "ray_scope": "drop it", "debug_mode": "write --log_level debug",
    "line_by_line": "drop it: text is cut into blocks, conversations are kept row by row",
    # LLaMA-Factory, ms-swift, axolotl, alpaca-lora, qlora, ChatGLM's own ptuning/ and finetune_demo/
    "lora_rank": "write --lora_r",
    "rank": "write --lora_r",
    "freeze_trainable_layers": "write --train_last_layers",
    "early_stopping_steps": "write --early_stopping_patience",
    "lora_target": "write --lora_target_modules",
    "target_modules": "write --lora_target_modules",
    "additional_target": "write --lora_modules_to_save",
    "modules_to_save": "write --lora_modules_to_save",
    "quantization_bit": "write --load_in_4bit or --load_in_8bit",
    "bits": "write --load_in_4bit or --load_in_8bit",
    "quant_bits": "write --load_in_4bit or --load_in_8bit",
    "cutoff_len": "write --max_source_length (of the prompt) and --max_target_length (of the answer)",
    "max_length": "write --max_source_length (of the prompt) and --max_target_length (of the answer)",
    "max_len": "write --max_source_length (of the prompt) and --max_target_length (of the answer)",
    "max_seq_length": "write --max_source_length (of the prompt) and --max_target_length (of the answer)",
    "max_seq_len": "write --max_source_length (of the prompt) and --max_target_length (of the answer)",
    "model_max_length": "write --max_source_length (of the prompt) and --max_target_length (of the answer)",
    "max_input_length": "write --max_source_length",
    "max_output_length": "write --max_target_length",
    "max_new_tokens": "write --max_target_length",
    "val_max_target_length": "write --max_target_length",
    "finetuning_type": "write --no_use_lora for full, --train_last_layers 2 for freeze, --pre_seq_len 8 for P-Tuning",
    "train_type": "write --no_use_lora for full, --train_last_layers 2 for freeze, --pre_seq_len 8 for P-Tuning",
    "stage": "drop it: this is supervised fine-tuning",
    "template": "drop it: prompts are written by the tokenizer's chat template (--chat_template FILE for another)",
    "model": "write --model_name_or_path",
    "base_model": "write --model_name_or_path",
    "model_path": "write --model_name_or_path",
    "model_id": "write --model_name_or_path",
    "dataset": "write --train_file for a file, --dataset_name for the hub",
    "data_path": "write --train_file",
    "dataset_dir": "write --train_file with the path of the file",
    "train_data": "write --train_file",
    "train_path": "write --train_file",
    "val_file": "write --validation_file",
    "eval_file": "write --validation_file",
    "val_dataset": "write --validation_file",
    "val_size": "write --validation_split_percentage (5 is 5 %)",
    "val_set_size": "write --validation_split_percentage (5 is 5 %)",
    "max_samples": "write --max_train_samples",
    "checkpoint_dir": "write --adapter_name_or_path",
    "adapters": "write --adapter_name_or_path",
    "lora_path": "write --adapter_name_or_path",
    "peft_path": "write --adapter_name_or_path",
    "ptuning_checkpoint": "write --adapter_name_or_path",
    "lora_weights": "write --adapter_name_or_path",
    "batch_size": "write --per_device_train_batch_size",
    "micro_batch_size": "write --per_device_train_batch_size",
    "lr": "write --learning_rate",
    "epochs": "write --num_train_epochs",
    "num_epochs": "write --num_train_epochs",
    "system": "write --system_prompt",
    "packing": "write --pack_to_length 2048, say",
    "neat_packing": "write --pack_to_length 2048, say",
    "flash_attn": "drop it, or write --attn_implementation flash_attention_2",
    "attn_impl": "write --attn_implementation",
    "use_peft": "drop it: LoRA is the default",
    "do_test": "write --do_predict",
    "source_prefix": "write the prefix into the data, or take --system_prompt",
    "preprocessing_batch_size": "drop it",
}
# fmt: on


def check(script):
    """End the program with a sentence if a word of its command line names no flag, or a number is none.

    A call for help is answered from `HELP` where that is the script's. The flags are read from the source of the
    script's argument classes and of TrainingArguments. All else is left to `FlagParser`, which knows what they mean.
    """
    if {"-h", "--help"} & set(sys.argv[1:]) and HELP.read_text("utf-8").endswith(f"{help_stamp(script)}\n"):
        print(HELP.read_text("utf-8"), end="")
        sys.exit()
    reported(partial(check_words, sys.argv[1:], script))()


def help_stamp(script) -> str:
    """The last line of the help of a script: it changes with the flags that the help shows."""
    fields = "\n".join(text for _, text in argument_fields(script))
    digest = hashlib.sha256(fields.encode()).hexdigest()[:12]
    return f"With the flags of transformers {version('transformers')}; fingerprint of the script's own: {digest}."


def check_words(words, script):
    """Raise a ValueError as `check` does; a file of arguments and a call for help are passed over."""
    if not words or not words[0].startswith("--") or "--help" in words:
        return
    library = Path(find_spec("transformers").origin).with_name("training_args.py")
    parser = NameParser(allow_abbrev=False, add_help=False)
    for name, annotation in {**declared_flags(script), **declared_flags(library)}.items():
        several = "*" if "list" in annotation else "?"
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs=several, type=number_type(annotation))
    _, rest = parser.parse_known_args(words)
    check_known([word.split("=")[0] for word in rest], parser._option_string_actions)
    check_both_ways(words)


class NameParser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(without_usage(message))


def argument_fields(path) -> Iterator[tuple[ast.AnnAssign, str]]:
    """The fields of the argument classes in a source file, each with its text."""
    source = Path(path).read_text("utf-8")
    lines = source.splitlines()
    for declared in ast.parse(source).body:
        if isinstance(declared, ast.ClassDef) and declared.name.endswith("Arguments"):
            for field in (each for each in declared.body if isinstance(each, ast.AnnAssign)):
                yield field, "\n".join(lines[field.lineno - 1 : field.end_lineno])


def declared_flags(path) -> dict[str, str]:
    """The flags that the argument classes in a source file make, each with its type as it is written."""
    found = {}
    for field, _ in argument_fields(path):
        name, annotation = field.target.id, ast.unparse(field.annotation)
        found[name] = annotation
        if annotation in ("bool", "bool | None") and is_on(field.value):
            found[f"no_{name}"] = "bool"
    return found


def number_type(annotation) -> type:
    """What turns a word into the number that a type, as it is written, stands for; str for all other types."""
    return next((kind for kind in (int, float) if re.match(rf"{kind.__name__}\b", annotation)), str)


def is_on(call) -> bool:
    """Whether the default in a call of `field` or `argument` is True."""
    defaults = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg == "default")]
    return any(isinstance(default, ast.Constant) and default.value is True for default in defaults)


def without_usage(message) -> str:
    """A sentence of argparse's that begins with one spelling of the flag."""
    return re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message)


def check_known(words, options):
    """Raise a ValueError that says what to write instead of the first of some words that none of the options knows."""
    known = [option[2:] for option in options if option.startswith("--")]
    for word in words:
        name = word.lstrip("-").replace("-", "_")
        longer = sorted(each for each in known if each.startswith(name) and "-" not in each)
        if not word.startswith("-"):
            raise ValueError(f"'{word}' belongs to no flag: flags begin with --, and values with blanks need quotes.")
        if name in OTHER_NAMES:
            raise ValueError(f"There is no flag --{name} here: {OTHER_NAMES[name]}.")
        if longer:
            raise ValueError(
                f"--{name}: flags are not abbreviated. Write {' or '.join(f'--{n}' for n in longer[:4])}."
            )
        near = did_you_mean(f"--{name}", [f"--{each}" for each in known if "-" not in each], cutoff=0.75)
        raise ValueError(f"There is no flag --{name}.{near or ' --help lists all of them.'}")


def check_both_ways(words):
    """Raise a ValueError if a flag is turned on and off."""
    names = {word.split("=")[0].lstrip("-").replace("-", "_") for word in words if word[:2] == "--"}
    for name in sorted(names):
        if f"no_{name}" in names:
            raise ValueError(f"--{name} and --no_{name} contradict each other: drop one of them.")
