#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0: see the file LICENSE.
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6",
#     "transformers>=5.17,<5.25",
#     "peft>=0.19.1,<0.22",
#     "datasets>=4.0,<5.3",
#     "evaluate>=0.4.6",
#     "accelerate>=1.11,<1.16",
#     "filelock>=3.16",
#     "sentencepiece>=0.2",
#     "protobuf>=4.25",
#     "psutil>=5.9",
# ]
# ///
"""Fine-tune ChatGLM, or any causal language model of transformers, with LoRA on conversations or on plain text.

    python run_chatglm_lora.py --model_name_or_path THUDM/chatglm3-6b --dtype bfloat16 --bf16 \
        --train_file chats.jsonl --prompt_column prompt --response_column response \
        --do_train --learning_rate 2e-4 --output_dir out

This is transformers' run_clm.py, stage by stage, grown by three things: LoRA, chat data and ChatGLM. Its flags, files
and results are kept; with --no_use_lora and plain text it gives the same numbers. What differs is listed, with the
reasons, in docs/modifications.md. Start it with python, torchrun or deepspeed, with flags or with one .json or .yaml.
"""

import importlib
import importlib.util
import inspect
import json
import logging
import math
import sys
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path


if __name__ == "__main__" and importlib.util.find_spec("finetuning"):
    from finetuning import flag_names

    flag_names.check(__file__)  # a misspelt flag is told at once, and --help is: what follows takes seconds

import datasets
import peft
import tokenizers
import torch
import transformers
from datasets import IterableDataset, IterableDatasetDict, load_dataset
from datasets.fingerprint import Hasher
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput
from transformers.utils.versions import require_version


try:
    from finetuning import (
        adapters,
        argument_files,
        batches,
        chat_rows,
        data_files,
        encoding,
        estimate,
        file_rows,
        flag_names,
        flags,
        label_smoothing,
        launching,
        lora_layers,
        loss_plot,
        memory,
        methods,
        mistakes,
        model_card,
        preconditions,
        prediction,
        prefix_tuning,
        preview,
        progress,
        provenance,
        samples,
        scores,
        screen,
        self_checks,
        throughput,
    )
    from finetuning.safeguards import Safeguards
    from finetuning.training_checks import TrainingChecks
except ModuleNotFoundError as error:
    if error.name != "finetuning":
        raise
    sys.exit(f"{__file__} needs its package `finetuning`: run it where it lies, or pip install the project's folder.")

require_version("transformers>=5.17", "To fix: pip install -r requirements.txt")
require_version("datasets>=4.0", "To fix: pip install -r requirements.txt")

logger = logging.getLogger("run_chatglm_lora")

DTYPES = ["auto", "bfloat16", "float16", "float32"]
NUMBER, TEXT, MARK = map(datasets.Value, ("int64", "string", "bool"))
CUT = ("source_cut", "target_cut", "left_out")
EMPTY_EXAMPLE = {"input_ids": [], "labels": [], "length": 0, **dict.fromkeys(CUT, False)}
ENCODING_FLAGS = ("system_prompt", "skip_bad_rows", "max_source_length", "max_target_length")  # they shape the ids
LOGGED_SHARE = 0.02  # 50 log lines a run; Trainer's 500 steps would show most small runs no loss at all
LIMIT_FLAGS = {"train": "max_train_samples", "validation": "max_eval_samples"}


# ------------------------------------------------------------------------------------------------------- arguments


def argument(default, help, **metadata):
    """A dataclass field that HfArgumentParser shows in --help."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    """Which model, configuration and tokenizer to load: the flags of run_clm.py."""

    _argument_group_name = "model (as in run_clm.py)"

    model_name_or_path: str | None = argument(None, "Hub name or folder of the checkpoint. Without it: from scratch.")
    model_type: str | None = argument(None, "Architecture of a model that is built from scratch, such as gpt2.")
    config_overrides: str | None = argument(None, "Changes to the default config of --model_type: n_embd=32,n_layer=2")
    config_name: str | None = argument(None, "Config to use, where it is not the model's own.")
    tokenizer_name: str | None = argument(None, "Tokenizer to use, where it is not the model's own.")
    cache_dir: str | None = argument(None, "Where downloads and prepared data sets are kept.")
    use_fast_tokenizer: bool = argument(True, "Accepted for old scripts; transformers 5 always takes the fast one.")
    model_revision: str = argument("main", "Branch, tag or commit of the checkpoint, and of the code that it brings.")
    token: str = argument(None, "Access token of the hub; default: the one that `hf auth login` stored.")
    trust_remote_code: bool = argument(False, "Run the Python files of the checkpoint. Read them first.")
    dtype: str | None = argument(None, "Type of the loaded weights; default: as in the checkpoint.", choices=DTYPES)

    def __post_init__(self):
        if self.config_overrides is not None and (self.config_name or self.model_name_or_path):
            raise ValueError("--config_overrides changes the defaults of --model_type: name no config and no model.")


@dataclass
class DataTrainingArguments:
    """Which data to train and evaluate on: the flags of run_clm.py."""

    _argument_group_name = "data (as in run_clm.py)"

    dataset_name: str | None = argument(None, "Data set on the hub, or a folder. Wins over the files.")
    dataset_config_name: str | None = argument(None, "Configuration of --dataset_name.")
    train_file: str | None = argument(None, "Training data: csv, tsv, json, jsonl, parquet, xlsx or txt, also packed.")
    validation_file: str | None = argument(None, "Evaluation data, in the format of --train_file.")
    max_train_samples: int | None = argument(None, "Train on the first N blocks (text) or rows (chat) only.")
    max_eval_samples: int | None = argument(None, "Evaluate on the first N blocks (text) or rows (chat) only.")
    streaming: bool = argument(False, "Read the data while training. Needs --max_steps.")
    block_size: int | None = argument(None, "Tokens per block of text; default: what the model takes, 1024 at most.")
    overwrite_cache: bool = argument(False, "Prepare the data anew instead of taking them from the cache.")
    validation_split_percentage: int | None = argument(5, "Share of the training data held out if no other is given.")
    preprocessing_num_workers: int | None = argument(None, "Processes that prepare the data.")
    keep_linebreaks: bool = argument(True, "Keep the line breaks of txt files.")

    def __post_init__(self):
        data_files.check_types({"--train_file": self.train_file, "--validation_file": self.validation_file})


@dataclass
class ChatArguments:
    """How rows become conversations, batches and answers."""

    _argument_group_name = "chat data"

    data_format: str = argument(
        "auto",
        f"What a row is; auto: chat if --prompt_column is given or the columns have known names "
        f"({chat_rows.known_columns()}), text otherwise.",
        choices=["auto", "text", "prompt_response", "instruction", "messages"],
    )
    prompt_column: str | None = argument(None, "Column with the question.")
    response_column: str | None = argument(None, "Column with the answer, the part that is trained.")
    history_column: str | None = argument(None, "Column with the earlier turns: [[question, answer], ...].")
    system_prompt: str | None = argument(None, "System message of every row that has none of its own.")
    chat_template: str | None = argument(None, "Jinja file to write conversations with, instead of the tokenizer's.")
    interleave_probabilities: str | None = argument(
        None,
        "Shares of the files of --train_file, as 0.7,0.3: draw each next row from them. Rows of a small file repeat.",
    )
    skip_bad_rows: bool = argument(False, "Leave out rows that cannot be used, and list them in bad_rows_SPLIT.jsonl.")
    test_file: str | None = argument(None, "Rows to answer with --do_predict, in the format of the other files.")
    max_source_length: int = argument(1024, "Most tokens before an answer. Longer: the oldest turns are dropped.")
    max_target_length: int = argument(128, "Most tokens of an answer, when trained and when generated.")
    padding_free: bool = argument(
        False, "Lay rows end to end, or stop; without this and the next flag: where the model keeps them apart."
    )
    no_padding_free: bool = argument(False, "Turns rows end to end off: they are padded.")
    pack_to_length: int | None = argument(None, "Fill each training example with rows, up to this many tokens.")
    ignore_pad_token_for_loss: bool = argument(True, "Leave padding out of the loss.")
    pad_to_max_length: bool = argument(False, "Pad every batch to the maximum, for devices that want one shape.")
    max_predict_samples: int | None = argument(None, "Answer the first N test rows only.")
    predict_with_generate: bool = argument(False, "With --do_eval: also answer the validation rows, and score that.")
    eval_generate_every: int = argument(1, "With --predict_with_generate: answer at every N-th evaluation only.")
    num_beams: int = argument(1, "Beams of the answers' search.")
    do_sample: bool = argument(False, "Draw the answers' tokens instead of taking the likeliest.")
    temperature: float = argument(1.0, "Sharpness of --do_sample; lower is sharper.")
    top_p: float = argument(1.0, "Share of the likeliest tokens that --do_sample draws from.")
    self_check: bool = argument(True, "Try what the run relies on in the model first (docs/self_checks.md).")
    sample_prompts: str | None = argument(
        None, "File of questions, one a line, that are answered at each evaluation of a training, into samples.jsonl."
    )
    preview: int | None = argument(None, "Print the first N rows as the model sees them, and stop.")
    preview_html: str | None = argument(None, "Write the first rows, token by token, as a page, and stop.")
    dry_run: bool = argument(False, "Say what the training needs, without loading weights, and stop.")

    def __post_init__(self):
        if self.prompt_column is None and self.data_format == "auto" and (self.response_column or self.history_column):
            raise ValueError("--response_column and --history_column belong to a --prompt_column: name it too.")
        if self.data_format in ("text", "messages") and (self.prompt_column or self.response_column):
            raise ValueError(f"--data_format {self.data_format} has no --prompt_column and no --response_column.")
        flags.check_ranges(vars(self))
        if (self.temperature != 1 or self.top_p != 1) and not self.do_sample:
            raise ValueError("--temperature and --top_p are for drawn tokens: add --do_sample.")
        if self.padding_free and self.no_padding_free:
            raise ValueError("--padding_free and --no_padding_free exclude each other: drop one of the flags.")
        if self.pack_to_length is not None and self.pad_to_max_length:
            raise ValueError("--pack_to_length and --pad_to_max_length exclude each other: drop one of the flags.")
        if self.pack_to_length is not None and self.no_padding_free:
            raise ValueError("--pack_to_length needs rows end to end: drop --no_padding_free.")

    @property
    def only_looks(self) -> bool:
        """Whether the run ends before a model is loaded, and leaves nothing in --output_dir."""
        return self.preview is not None or self.preview_html is not None or self.dry_run


@dataclass
class LoraArguments:
    """Which adapter is trained, on what base, with whose code."""

    _argument_group_name = "LoRA and other methods"

    use_lora: bool = argument(True, "Train an adapter; --no_use_lora trains all weights, as run_clm.py does.")
    peft_type: str = argument("LORA", "LORA, PREFIX_TUNING (P-Tuning v2), or another method of PEFT.")
    peft_config: str | None = argument(None, "JSON file with fields of PEFT's configuration; they override the flags.")
    adapter_name_or_path: str | None = argument(
        None, "Adapter to go on training, evaluate or predict with; with --adapter_weights several, with commas."
    )
    adapter_weights: str | None = argument(None, "What the adapters of --adapter_name_or_path A,B count, as 0.7,0.3.")
    lora_r: int = argument(8, "Rank.")
    lora_alpha: int = argument(32, "Scale: updates are multiplied by alpha / r.")
    lora_dropout: float = argument(0.1, "Dropout before the adapter.")
    lora_target_modules: str | None = argument(
        None,
        "Adapted layers: names with commas, all-linear, or a regular expression. Default: PEFT's table "
        "(query_key_value for ChatGLM), all linear ones but experts for models that it does not list.",
    )
    lora_exclude_modules: str | None = argument(None, "Layers left out: names with commas, or a regular expression.")
    lora_layers_to_transform: str | None = argument(None, "Numbers of the adapted layers, with commas; default: all.")
    lora_modules_to_save: str | None = argument(None, "Layers trained and saved whole: names with commas.")
    lora_bias: str = argument("none", "Which biases are trained too.", choices=["none", "all", "lora_only"])
    use_rslora: bool = argument(False, "Scale by alpha / sqrt(r) instead.")
    use_dora: bool = argument(False, "Train magnitude and direction apart (DoRA).")
    init_lora_weights: str = argument("true", "true, false, gaussian, pissa, pissa_niter_16, olora, orthogonal, ...")
    loraplus_lr_ratio: float | None = argument(None, "LoRA+: B learns so many times as fast as A; 16 is usual.")
    num_virtual_tokens: int = argument(128, "Length of the trained prefix (PREFIX_TUNING, PROMPT_TUNING, P_TUNING).")
    prefix_projection: bool = argument(False, "Make the prefix with a two-layer network (PREFIX_TUNING).")
    pre_seq_len: int | None = argument(
        None, "Length of the prefix in ChatGLM's own form of P-Tuning v2, without PEFT."
    )
    train_last_layers: int | None = argument(None, "Train all weights of the last N layers, and no adapter.")
    load_in_4bit: bool = argument(False, "Quantise the base to 4 bits while loading (QLoRA; needs bitsandbytes).")
    load_in_8bit: bool = argument(False, "Quantise the base to 8 bits while loading (needs bitsandbytes).")
    attn_implementation: str = argument(
        "auto",
        "eager, sdpa, flex_attention, flash_attention_2, flash_attention_3 or a kernel of the hub, such as "
        "kernels-community/flash-attn2; auto: sdpa where the model has it, by one call for rows end to end on a GPU.",
    )
    use_checkpoint_code: bool = argument(False, "Use a ChatGLM checkpoint's own code; needs --trust_remote_code.")
    early_stopping_patience: int | None = argument(None, "Stop after N evaluations in a row without a better one.")
    plot_loss: bool = argument(True, "Draw the losses into training_loss.png at the end (needs matplotlib).")

    def __post_init__(self):
        self.peft_type = self.peft_type.upper()
        self.use_lora = self.use_lora and not self.train_last_layers
        if self.peft_type not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
            known = ", ".join(sorted(str(name.value) for name in peft.PEFT_TYPE_TO_CONFIG_MAPPING))
            raise ValueError(f"--peft_type {self.peft_type} is not one of {known}.")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("--load_in_4bit and --load_in_8bit exclude each other: choose one.")
        if (self.load_in_4bit or self.load_in_8bit) and not importlib.util.find_spec("bitsandbytes"):
            raise ValueError("--load_in_4bit and --load_in_8bit need bitsandbytes: pip install bitsandbytes")


ADDED_ARGUMENTS = (ChatArguments, LoraArguments)
ARGUMENT_CLASSES = (ModelArguments, DataTrainingArguments, *ADDED_ARGUMENTS, TrainingArguments)


def parsed_arguments():
    """One instance of each argument class, from the command line, and from a .json or .yaml file where it has one."""
    parser = flag_parser()
    given = argument_files.given_arguments(parser, launching.prepared_words(sys.argv[1:]))
    adapters.check_init(given)
    defaults = {**our_defaults(given), **scores.metric_defaults(given), **progress.bar_defaults(given)}
    return parser.parse_dict({**defaults, **launching.on_one_processor(given)})


def flag_parser():
    """The parser of the command line, with the help that finetuning/help.txt keeps."""
    stamp = flag_names.help_stamp(__file__)
    parser = flags.FlagParser(ARGUMENT_CLASSES, ADDED_ARGUMENTS, description=__doc__.split("\n\n")[0], epilog=stamp)
    parser.set_defaults(logging_steps=LOGGED_SHARE)  # in --help
    return parser


def our_defaults(given) -> dict:
    """What our defaults differ in from Trainer's: a share of all steps between two log lines (and its own 500 between
    evaluations); a GPU is not waited for to filter losses, since a bad one stops the run, and has batches made for it.
    """
    logs = {} if "logging_steps" in given else {"logging_steps": LOGGED_SHARE, "eval_steps": 500}
    workers = int(torch.cuda.is_available())
    return {**logs, "dataloader_num_workers": workers, "logging_nan_inf_filter": False}


def parsed_words(parser):
    """One instance of each argument class of the parser, from the command line."""
    return parser.parse_args_into_dataclasses(launching.prepared_words(sys.argv[1:]))


def parsed_file(parser, path):
    """One instance of each argument class of the parser, from a .json or .yaml file."""
    return parser.parse_args_into_dataclasses(argument_files.file_arguments(parser, path))


# ------------------------------------------------------------------------------------------------------------ data


def raw_datasets(model_args, data_args, chat_args, training_args):
    """The rows of every split and their chat format, which is None for plain text.

    Where no validation rows are given, they are split off from the training rows.
    """
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": chat_args.test_file}
    data_files.check_types({f"--{split}_file": value for split, value in files.items()})
    files = {split: data_files.listed_files(value) for split, value in files.items() if value is not None}
    options = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    if data_args.dataset_name is not None:
        source = (data_args.dataset_name, data_args.dataset_config_name)
        options["streaming"] = data_args.streaming
        files = data_files.files_in(*source) if Path(data_args.dataset_name).is_dir() else {}
    elif not files:
        raise ValueError("There are no data: pass --train_file, --validation_file, --test_file or --dataset_name.")

    raw, row_format = chat_rows.read(files, chat_args, data_args.streaming, model_args.cache_dir, training_args.seed)
    if raw is None:
        if data_args.dataset_name is None:
            builder = data_files.builder(files)
            more = data_files.builder_options(builder, files, data_args.keep_linebreaks)
            source, options = (builder,), {**options, "data_files": files, **more}
        with data_files.explained(data_args.dataset_name, files):
            raw = load_dataset(*source, **options)
        columns = {split: column_names(rows) for split, rows in raw.items()}
        row_format = chat_rows.format_of(columns, chat_args)
    logger.info(f"Data format: {row_format or 'text'} (--data_format {chat_args.data_format})")
    # Chat data are all trained on unless an evaluation is asked for; text is split as run_clm.py does, always.
    if "validation" not in raw and "train" in raw and (training_args.do_eval or not row_format):
        raw = with_validation(raw, data_args, chat_args)
    check_splits(raw, row_format, training_args)
    return raw, row_format


def read_by_run_clm(row_format, data_args) -> bool:
    """Whether run_clm.py's own lines give the same rows: plain text, not streamed, of the file types that it knows.

    `raw_datasets` reads all of them. A grafted run_clm.py asks here which rows it should leave to its own lines.
    """
    files = [Path(name) for name in (data_args.train_file, data_args.validation_file) if name]
    known = data_args.dataset_name or all(f.is_file() and f.suffix in (".csv", ".json", ".txt") for f in files)
    return bool(known and not row_format and not data_args.streaming)


def with_validation(raw, data_args, chat_args):
    """The splits, with a validation split that is taken from the training rows."""
    if chat_args.interleave_probabilities:
        raise ValueError("--interleave_probabilities repeats rows, so that none can be held out: --validation_file.")
    train, validation = train_and_validation(raw["train"], data_args)
    splits = {**raw, "train": train, "validation": validation}
    if isinstance(raw, datasets.DatasetDict) and isinstance(train, IterableDataset):  # a DatasetDict takes no streams
        return IterableDatasetDict(
            {name: d if isinstance(d, IterableDataset) else d.to_iterable_dataset() for name, d in splits.items()}
        )
    return type(raw)(splits)


def train_and_validation(train, data_args):
    """The training rows in two parts, by position: a streamed one by row number modulo 100, else a first slice."""
    percentage = data_args.validation_split_percentage
    if not 0 <= percentage <= 100:
        raise ValueError(f"--validation_split_percentage must lie between 0 and 100, not be {percentage}.")
    if not data_args.streaming:
        cut = round(len(train) * percentage / 100)
        if 0 < cut == len(train):
            raise ValueError(
                f"--validation_split_percentage {percentage} leaves no row of {cut} to train on: lower it."
            )
        return train.select(range(cut, len(train))), train.select(range(cut))
    stream = train if isinstance(train, IterableDataset) else train.to_iterable_dataset()
    return (
        stream.filter(lambda _, row: row % 100 >= percentage, with_indices=True),
        stream.filter(lambda _, row: row % 100 < percentage, with_indices=True),
    )


def check_splits(raw, row_format, training_args):
    """Raise a ValueError if a stage that was asked for has no data of its own."""
    if training_args.do_train and "train" not in raw:
        raise ValueError("--do_train needs training data: pass --train_file, or a --dataset_name with a train split.")
    if training_args.do_eval and "validation" not in raw:
        raise ValueError("--do_eval needs --validation_file, or a --train_file to split.")
    if training_args.do_eval and not isinstance(raw["validation"], IterableDataset) and not len(raw["validation"]):
        raise ValueError(
            "--do_eval: too few training rows to hold any out for the evaluation: pass --validation_file, or raise "
            "--validation_split_percentage."
        )
    if training_args.do_predict and "test" not in raw:
        raise ValueError("--do_predict needs rows to answer: pass --test_file, or a --dataset_name with a test split.")
    if training_args.do_predict and not row_format:
        raise ValueError("--do_predict answers questions: name their column with --prompt_column.")


def column_names(dataset) -> list[str]:
    """Names of the columns; a stream that does not know them yet is asked for its first row."""
    return dataset.column_names or list(next(iter(dataset), {}))


def mapped(data, function, description, data_args, training_args, **options):
    """`data.map` in batches, first on the main process, with workers and cache where the data are not streamed."""
    with training_args.main_process_first(desc=description):
        if not isinstance(data, (IterableDataset, IterableDatasetDict)):
            options["num_proc"] = data_args.preprocessing_num_workers
            options["load_from_cache_file"] = not data_args.overwrite_cache
            options["desc"] = description
        return data.map(function, batched=True, **options)


def capped(dataset, limit):
    """The first `limit` rows; all of them without a limit."""
    if limit is None:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.take(limit)
    return dataset.select(range(min(limit, len(dataset))))


# ------------------------------------------------------------------------------------------------------ plain text


def text_blocks(raw, tokenizer, config, data_args, training_args):
    """Every split as blocks of `block_size` tokens, each block its own labels: run_clm.py's encoding."""
    columns = column_names(raw.get("train" if training_args.do_train else "validation", next(iter(raw.values()))))
    text_column = "text" if "text" in columns else columns[0]
    block_size = chosen_block_size(data_args, tokenizer, config)
    for split in requested_splits(training_args):
        chat_rows.check_some_text(raw[split], text_column, split)

    def token_ids(rows):
        texts = chat_rows.texts_of(rows[text_column], text_column)
        return tokenizer(texts, verbose=False)  # whole texts may be longer than the model's maximum

    def blocks(rows):
        joined = {name: list(chain.from_iterable(values)) for name, values in rows.items()}
        end = len(joined["input_ids"]) // block_size * block_size  # the rest of a map batch is dropped
        cut = {name: [row[i : i + block_size] for i in range(0, end, block_size)] for name, row in joined.items()}
        return {**cut, "labels": [block.copy() for block in cut["input_ids"]]}

    tokens = mapped(raw, token_ids, "tokenizing", data_args, training_args, remove_columns=columns)
    data = mapped(tokens, blocks, f"cutting blocks of {block_size}", data_args, training_args)
    data = {split: capped(data[split], limit) for split, limit in sample_limits(data_args).items() if split in data}
    for split in requested_splits(training_args):
        if next(iter(data[split]), None) is None:
            raise ValueError(f"The {split} data do not fill one block of {block_size} tokens: lower --block_size.")
    return data


def check_text(config):
    """Raise a ValueError if the model cannot be trained on blocks of text."""
    if hasattr(config, "position_encoding_2d"):
        raise ValueError(
            "ChatGLM-6B needs a [gMASK] and a <sop> in every row, which text cut into blocks does not have: "
            "train it on conversations, with --prompt_column and --response_column."
        )


def block_collator(blocks):
    """A batch of blocks. ChatGLM's tokenizer counts positions from the start of each text, a block counts anew."""
    return default_data_collator([{name: block[name] for name in block if name != "position_ids"} for block in blocks])


def sample_limits(data_args):
    return {split: getattr(data_args, flag) for split, flag in LIMIT_FLAGS.items()}


def requested_splits(training_args):
    stages = {"train": training_args.do_train, "validation": training_args.do_eval}
    return [split for split, wanted in stages.items() if wanted]


def chosen_block_size(data_args, tokenizer, config) -> int:
    """--block_size within the tokenizer's maximum; by default that maximum, or 1024 where the model takes less."""
    longest = tokenizer.model_max_length
    if data_args.block_size is not None:
        if data_args.block_size > longest:
            logger.warning(f"--block_size {data_args.block_size} is cut to the tokenizer's maximum, {longest}.")
        return min(data_args.block_size, longest)
    positions = getattr(config, "max_position_embeddings", 1024)
    if longest <= positions:
        return longest
    block_size = min(1024, positions) if positions > 0 else 1024
    logger.warning(f"The tokenizer sets no limit that the model keeps: blocks of {block_size} tokens (--block_size).")
    return block_size


# ------------------------------------------------------------------------------------------------------- chat data


class EncodedChats(dict):
    """Encoded splits by name, in a place where raw ones are expected: run_clm.py's `map` calls leave them alone."""

    def map(self, *args, **kwargs):
        return self

    def __missing__(self, split):
        """No rows: run_clm.py looks up the columns of the validation split even where there are only questions."""
        return datasets.Dataset.from_dict({"input_ids": []})


def chats_as_ids(raw, row_format, tokenizer, config, chat_args, data_args, training_args):
    """Conversations as `EncodedChats`; plain text as it is, when model and flags allow blocks of it."""
    samples.check(row_format, chat_args, training_args)
    prediction.check(row_format, chat_args, training_args)
    if not row_format:
        check_text(config)
        rows = next(iter(raw.values()))
        chat_rows.check_text_columns(column_names(rows), next(iter(rows), {}), chat_args, tokenizer.chat_template)
        return raw
    launching.check_parallelism(training_args)
    chat_args = within_positions(chat_args, config)
    return encoded_chats(raw, row_format, tokenizer, chat_args, data_args, training_args)


def within_positions(chat_args, config):
    """The arguments, with --max_source_length lowered where the model has fewer positions than both limits need."""
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    room = positions - chat_args.max_target_length - encoding.ENDING_TOKENS
    if room < 1:
        raise ValueError(
            f"--max_target_length must be less than {positions - encoding.ENDING_TOKENS}: the model ends there."
        )
    if chat_args.max_source_length <= room:
        return chat_args
    logger.warning(f"The model has {positions} positions: --max_source_length is lowered to {room}.")
    return replace(chat_args, max_source_length=room)


@encoding.frozen_libraries()
def encoded_chats(raw, row_format, tokenizer, chat_args, data_args, training_args):
    """Training and validation rows as `input_ids` and `labels`; rows to answer as prompts with references.

    The rows to answer are the splits test and, with --predict_with_generate, questions (the validation rows again).
    The limits on samples, which count rows here, are used up: run_clm.py's lines would count examples with them.
    """
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise ValueError(
            "This tokenizer has no chat template or no eos token, so conversations cannot be written in the model's "
            "own format: pass the template with --chat_template FILE, or for plain text --data_format text."
        )
    options = {"tokenizer": tokenizer, "row_format": row_format, "chat_args": chat_args}
    limits, apart, data = sample_limits(data_args), encoding.answers_apart(tokenizer), EncodedChats()
    for split in requested_splits(training_args):
        rows = capped(raw[split], limits[split])
        own = {**options, "split": split, "apart": apart}
        data[split] = encoded_split(rows, encoded_rows, own, data_args, training_args)
        data[split] = chat_rows.with_trained_tokens(data[split], split, rows, chat_args, training_args)
        if isinstance(rows, IterableDataset):
            # The limit is an upper bound on the examples too, which are not counted; the columns are named, because
            # a stream that went through a map function does not know them.
            data[split] = capped(data[split], limits[split]).cast(features_of("input_ids", "labels", length=NUMBER))
            if next(iter(data[split]), None) is None:  # this also shows mistakes in the first rows
                raise ValueError(f"The streamed {split} data hold no example: see --data_format and the column flags.")
        else:
            setattr(data_args, LIMIT_FLAGS[split], None)
    asked = {"test": (raw.get("test"), chat_args.max_predict_samples)} if training_args.do_predict else {}
    if training_args.do_eval and chat_args.predict_with_generate:
        asked["questions"] = (raw["validation"], limits["validation"])
    if chat_args.sample_prompts:
        asked["samples"] = (samples.sample_rows(chat_args.sample_prompts), None)
    for split, (rows, limit) in asked.items():
        rows = capped(rows, limit)
        own = {**options, "split": split, "row_format": samples.MESSAGES if split == "samples" else row_format}
        data[split] = encoded_split(rows, encoded_prompts, own, data_args, training_args)
        data[split] = chat_rows.without_bad_rows(data[split], split, rows, chat_args, training_args)
    if chat_args.pack_to_length and "train" in data:
        options = {"fn_kwargs": {"length": chat_args.pack_to_length}, "remove_columns": list(EMPTY_EXAMPLE)[:3]}
        options["features"] = features_of("input_ids", "labels", "position_ids")
        data["train"] = mapped(data["train"], batches.packed, "packing rows", data_args, training_args, **options)
    return data


def features_of(*lists, **columns) -> datasets.Features:
    """The types of columns that hold lists of numbers, and of others."""
    return datasets.Features({name: datasets.List(NUMBER) for name in lists} | columns)


def encoded_split(rows, function, options, data_args, training_args):
    """`function` over the rows of a split, from the cache where data, tokenizer, flags and code are the same."""
    return mapped(
        rows, function, f"encoding {options['split']} rows", data_args, training_args,
        with_indices=True, remove_columns=column_names(rows), fn_kwargs=options, features=FEATURES[function],
        **({} if isinstance(rows, IterableDataset) else {"new_fingerprint": encoding_fingerprint(rows, options)}),
    )  # fmt: skip


def encoding_fingerprint(rows, options) -> str:
    """Changes with the rows, the tokenizer, its template, the flags that shape ids, and the code that makes them."""
    tokenizer, chat_args = options["tokenizer"], options["chat_args"]
    files = [
        __file__,
        chat_rows.__file__,
        encoding.__file__,
        file_rows.__file__,
        *(inspect.getsourcefile(c) for c in type(tokenizer).__mro__[:-1]),
    ]
    parts = {
        "rows": rows._fingerprint,
        "tokenizer": tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab(),
        "settings": repr(tokenizer.init_kwargs),
        "template": tokenizer.chat_template,
        "flags": [getattr(chat_args, name) for name in ENCODING_FLAGS],
        "rest": [options["row_format"], options["split"], options.get("apart")],
        "code": [Path(file).read_bytes() for file in files],
        "versions": [transformers.__version__, tokenizers.__version__],
    }
    return Hasher.hash(parts)


def encoded_rows(batch, indices, tokenizer, row_format, chat_args, split, apart):
    """Map function: examples of the rows. A row with nothing to train on gives one without ids."""
    read, rows = [], []  # read: [(row number, place, messages)]
    for number, cells in zip(indices, chat_rows.rows_of(batch), strict=True):
        place = chat_rows.place_of(cells, f"{split} row {number + 1}")
        try:
            messages = chat_rows.conversation(cells, row_format, place, chat_args.system_prompt)
            messages = chat_rows.split_where_refused(messages, tokenizer)
            pieces = encoding.up_to_answers(messages, apart) if encoding.is_complete(messages) else []
            read += [(number, place, piece) for piece in pieces]
            problem = None
        except chat_rows.BadRow as error:
            pieces, problem = [], chat_rows.skipped(error, chat_args)
        if not pieces:
            rows.append({**EMPTY_EXAMPLE, "row": number, "problem": problem})
    rows += examples_of(read, tokenizer, chat_args)
    return {name: [row[name] for row in rows] for name in (*EMPTY_EXAMPLE, "row", "problem")}


def examples_of(read, tokenizer, chat_args) -> list[dict]:
    """The example of each conversation, given as (row number, place, messages), encoded all together.

    If the template refuses one, all are encoded one by one, to find and name it.
    """
    try:
        encoded = encoding.encoded_conversations(tokenizer, [messages for _, _, messages in read], chat_args)
        rows = zip(read, encoded, strict=True)
        return [{**each, "row": row, "problem": None} for (row, *_), examples in rows for each in examples]
    except (ValueError, TemplateError) as error:
        if len(read) > 1:
            return list(chain.from_iterable(examples_of([row], tokenizer, chat_args) for row in read))
        number, place, _ = read[0]
        problem = chat_rows.skipped(chat_rows.BadRow(f"{place}: {error}"), chat_args)
        return [{**EMPTY_EXAMPLE, "row": number, "problem": problem}]


def encoded_prompts(batch, indices, tokenizer, row_format, chat_args, split):
    """Map function: the prompts of rows to answer, ending at the answer cue, with the question and the reference.

    The question is the last message before the answer, which is never in the prompt.
    """
    rows = []
    for number, cells in zip(indices, chat_rows.rows_of(batch), strict=True):
        place = chat_rows.place_of(cells, f"{split} row {number + 1}")
        row = {"input_ids": [], "prompt": None, "reference": None, "row": number, "problem": None}
        try:
            messages = chat_rows.conversation(cells, row_format, place, chat_args.system_prompt, questions_only=True)
            messages = chat_rows.split_where_refused(messages, tokenizer)
            if messages[-1]["role"] != "assistant":
                messages.append(chat_rows.message_of("assistant", None))
            if len(messages) < 2 or any(message["content"] is None for message in messages[:-1]):
                raise chat_rows.BadRow(f"{place}: there is no question, or an empty message before it.")
            short = encoding.without_oldest_turns(tokenizer, messages, chat_args.max_source_length)[:-1]
            row["input_ids"] = encoding.prompt_ids(tokenizer, short)
            row |= {"prompt": messages[-2]["content"], "reference": reference(tokenizer, messages)}
        except (ValueError, TemplateError) as error:
            named = error if isinstance(error, chat_rows.BadRow) else chat_rows.BadRow(f"{place}: {error}")
            row["problem"] = chat_rows.skipped(named, chat_args)
        rows.append(row)
    return {name: [row[name] for row in rows] for name in rows[0]}


FOUND = {"row": NUMBER, "problem": TEXT}
FEATURES = {  # thousands of rows without an example, or without a reference, may come first
    encoded_rows: features_of("input_ids", "labels", length=NUMBER, **dict.fromkeys(CUT, MARK), **FOUND),
    encoded_prompts: features_of("input_ids", prompt=TEXT, reference=TEXT, **FOUND),
}


def reference(tokenizer, messages) -> str | None:
    """The last message as text to compare an answer with: a call of tools as the model writes it."""
    if not messages[-1].get("tool_calls"):
        return messages[-1]["content"]
    ids = encoding.reply_ids(tokenizer, messages, encoding.prompt_ids(tokenizer, messages[:-1]))
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def chat_collator(model, tokenizer, chat_args, training_args):
    """The collator for the flags and for rows as long as the flags and the model allow."""
    longest = chat_args.max_source_length + chat_args.max_target_length + encoding.ENDING_TOKENS
    longest = min(longest, getattr(model.config, "max_position_embeddings", None) or longest)
    return batches.chat_collator(padding_id(tokenizer), chat_args, training_args, longest)


def padding_id(tokenizer) -> int:
    """Padding is masked, so that any id serves where the tokenizer names none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


# ----------------------------------------------------------------------------------------- model, tokenizer, adapter


def register_chatglm(lora_args):
    """Make ChatGLM known to the Auto classes, unless the checkpoint's own code is asked for."""
    if not lora_args.use_checkpoint_code:
        import chatglm  # noqa: F401 - importing registers, and what is registered comes before a checkpoint's code


def hub_options(model_args):
    """What every from_pretrained call is given."""
    return {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }


def loaded_config(model_args):
    """The configuration: of --config_name, of the checkpoint, or the default of --model_type with overrides."""
    name = model_args.config_name or model_args.model_name_or_path
    if name:
        try:
            return AutoConfig.from_pretrained(name, **hub_options(model_args))
        except OSError as error:
            missing = f"{name} is neither a folder with a config.json nor found on the hub"
            what = f"{name}/config.json" if Path(name, "config.json").is_file() else missing
            raise OSError(f"{what}: {error}") from error
        except ValueError as error:
            if model_args.trust_remote_code or "trust_remote_code" not in str(error):
                raise ValueError(f"The configuration of {name}: {error}") from error
            raise ValueError(
                f"{name} brings its own Python code. Read it; if you trust it, pass --trust_remote_code, "
                "and pin what you have read with --model_revision COMMIT."
            ) from error
    if model_args.model_type is None:
        raise ValueError("There is no model: pass --model_name_or_path, or --model_type to start from scratch.")
    if model_args.model_type not in CONFIG_MAPPING:
        near = mistakes.did_you_mean(model_args.model_type, CONFIG_MAPPING)
        raise ValueError(f"--model_type {model_args.model_type} is none of transformers' model types.{near}")
    config = CONFIG_MAPPING[model_args.model_type]()
    logger.warning(f"A new {model_args.model_type} config is made from the defaults.")
    if model_args.config_overrides is not None:
        logger.info(f"Overriding the config: {model_args.config_overrides}")
        try:
            config.update_from_string(model_args.config_overrides)
        except ValueError as error:
            raise ValueError(f"--config_overrides {model_args.config_overrides}: {error}.") from error
        logger.info(f"The new config: {config}")
    return config


def tokenizer_name(model_args, adapter=None):
    """--tokenizer_name, or the folder of an adapter that is opened, which has its own template and tokens."""
    return model_args.tokenizer_name or adapters.own_tokenizer(adapter)


def loaded_tokenizer(model_args, adapter=None):
    """The tokenizer of --tokenizer_name, of the adapter that is opened, or of the model."""
    name = tokenizer_name(model_args, adapter) or model_args.model_name_or_path
    if not name:
        raise ValueError("A model from scratch needs a tokenizer that exists: pass --tokenizer_name.")
    with mistakes.named(f"The tokenizer of {name}", OSError, ValueError):
        return AutoTokenizer.from_pretrained(name, use_fast=model_args.use_fast_tokenizer, **hub_options(model_args))


def with_chat_template(tokenizer, chat_args):
    """The tokenizer, with the template of --chat_template."""
    if chat_args.chat_template:
        encoding.take_template(tokenizer, chat_args.chat_template)
    return tokenizer


def model_class(config):
    """AutoModel for checkpoint code without a causal-LM class (as ChatGLM-6B's), AutoModelForCausalLM otherwise."""
    offered = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in offered or "AutoModel" not in offered:
        return AutoModelForCausalLM
    return AutoModel


def loaded_model(model_args, lora_args, training_args, config, tokenizer):
    """The model, from the checkpoint or from scratch, with an embedding for every token of the tokenizer."""
    if model_args.model_name_or_path:
        dtype = model_args.dtype if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype)
        options = {**hub_options(model_args), **loading_options(lora_args, training_args)}
        name = model_args.model_name_or_path
        with mistakes.named(f"The weights of {name} cannot be loaded", OSError, SafetensorError):
            model = model_class(config).from_pretrained(name, config=config, dtype=dtype, **options)
        logger.info(f"Code of the model: {provenance.code_in_words(model)}")
    else:
        options = attention_options(lora_args)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=model_args.trust_remote_code, **options)
        count = sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())  # shared tensors once
        logger.info(f"A new model with {count / 2**20:.2f}M parameters")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # under ZeRO-3 the weight itself is empty
        model.resize_token_embeddings(len(tokenizer))
    return model


def attention_options(lora_args):
    return {} if lora_args.attn_implementation == "auto" else {"attn_implementation": lora_args.attn_implementation}


def loading_options(lora_args, training_args):
    """from_pretrained options for the attention, --load_in_4bit (NF4, double quantisation, as QLoRA) and 8bit."""
    options = attention_options(lora_args)
    if not (lora_args.load_in_4bit or lora_args.load_in_8bit):
        return options
    if not lora_args.use_lora:
        raise ValueError("Quantised weights cannot be trained: drop --load_in_4bit or --load_in_8bit, or take LoRA.")
    config = BitsAndBytesConfig(
        load_in_4bit=lora_args.load_in_4bit,
        load_in_8bit=lora_args.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16 if training_args.fp16 else torch.bfloat16,
    )
    options |= {"quantization_config": config}
    if not is_deepspeed_zero3_enabled():  # which deals the model out itself
        options["device_map"] = {"": training_args.device}
    return options


def adapted_model(model, lora_args, training_args):
    """The model inside a new or loaded adapter; the bare model with --no_use_lora, or if there is nothing to train."""
    if lora_args.pre_seq_len:
        return prefix_tuning.prefix_tuned(model, lora_args)
    if lora_args.train_last_layers is not None:
        return methods.with_last_layers_trained(model, lora_args.train_last_layers)
    if not lora_args.use_lora or not (training_args.do_train or lora_args.adapter_name_or_path):
        return model
    if not model.name_or_path:
        raise ValueError("A model from scratch has no weights to adapt: train them all with --no_use_lora.")
    if lora_args.load_in_4bit or lora_args.load_in_8bit:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if training_args.gradient_checkpointing:
        if lora_args.peft_type == "PREFIX_TUNING":
            raise ValueError("A trained prefix and gradient checkpointing exclude each other: drop one of the flags.")
        model.enable_input_require_grads()  # frozen embeddings would cut checkpointed layers off from the loss
    if lora_args.adapter_name_or_path:
        model = adapters.opened_adapters(model, lora_args, training_args.do_train)
    else:
        config = lora_layers.adapter_config(model, lora_args, training_args.max_steps)
        model = lora_layers.adapted(model, config)
    model = prediction.with_cache_for_peft(model)
    if training_args.do_train and model.active_peft_config.is_prompt_learning and is_deepspeed_zero3_enabled():
        raise ValueError(
            "PEFT saves a trained prefix by running it on one process, and ZeRO-3 would wait for the others for ever: "
            "take ds_zero2.json, or ChatGLM's own prefix with --pre_seq_len."
        )
    trainable, total = model.get_nb_trainable_parameters()
    logger.info(f"Trainable parameters: {trainable:,} of {total:,} ({trainable / total:.3%})")
    return model


# ------------------------------------------------------------------------------------------------------- the stages


def check_request(model_args, data_args, lora_args, training_args, launches=True):
    """Raise an error for what cannot be done, or not in the way that it was started, before anything is loaded."""
    preconditions.check(model_args, data_args, lora_args, training_args)
    if launches:
        launching.check_launch(training_args)
    if training_args.do_train:  # no result beside one of another kind
        kind = "prefix" if lora_args.pre_seq_len else "adapter" if lora_args.use_lora else "full model"
        adapters.check_output_folder(Path(training_args.output_dir), kind)


def look_ahead(data, tokenizer, config, model_args, chat_args, lora_args, training_args, row_format):
    """--preview, --preview_html and --dry_run: what the model would see, and what its training would need."""

    def model(dtype, *arguments):
        trust = model_args.trust_remote_code
        return adapted_model(estimate.empty_model(model_class(config), config, dtype, tokenizer, trust), *arguments)

    def collator(model):
        return chat_collator(model, tokenizer, chat_args, training_args) if row_format else block_collator

    preview.show(data, tokenizer, chat_args)
    if chat_args.dry_run:
        dtype = estimate.dtype_of(config, model_args.dtype)
        estimate.show(model, collator, data, dtype, lora_args, training_args)


def safeguards(arguments, data, tokenizer):
    """What guards a training: checks, whole checkpoints, signals. None where nothing is trained."""
    *_, training_args = arguments
    return Safeguards(*arguments, data["train"], tokenizer) if training_args.do_train else None


def trainer_options(model, tokenizer, row_format, data, chat_args, lora_args, training_args, guards=None):
    """What Trainer is given beyond run_clm.py's arguments, or in place of them: collator, callbacks and scores."""
    collator = chat_collator(model, tokenizer, chat_args, training_args) if row_format else block_collator
    loss = label_smoothing.loss_options(training_args)
    if isinstance(model, peft.PeftModel) and training_args.ddp_find_unused_parameters is None:
        training_args.ddp_find_unused_parameters = False  # TrainingChecks sees to it that every tensor is used
    callbacks = guards.callbacks if guards else [TrainingChecks()]
    if chat_args.self_check:
        tried = (collator if row_format else None, data, chat_args, padding_id(tokenizer))
        callbacks = [*callbacks, self_checks.SelfChecks(*tried, is_pretrained=bool(model.name_or_path))]
    if getattr(model, "peft_type", None) == "ADALORA":
        callbacks = [*callbacks, lora_layers.RankAllocation()]
    return {
        "data_collator": guards.shielded(collator) if guards else collator,
        "callbacks": [
            screen.Plan(),
            *callbacks,
            scores.PerplexityWhileTraining(),
            *([throughput.Throughput(loss.get("compute_loss_func"))] if row_format else []),
        ],
        **loss,
        **methods.optimizer_options(lora_args, training_args),
        **scores.scoring(collator, row_format, training_args),
    }


def make_trainer(model, tokenizer, data, options, training_args):
    """A Trainer with token accuracy where evaluation is asked for, and a model card that knows the data."""
    train_dataset = data["train"] if training_args.do_train else None
    if isinstance(data, EncodedChats):
        train_dataset = batches.repeated_stream(train_dataset)
    return model_card.DocumentedTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=data["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        **options,
    )


def train(trainer, guards, tokenizer, model_args, row_format, limit):
    """Train, save the model or the adapter with a record of what it was made from, and write the metrics."""
    adapters.initialise_from_data(trainer, padding_id(tokenizer))
    self_checks.know(trainer)
    with memory.explained(trainer, "train"):
        metrics = guards.trained_and_saved(trainer)
    record_training(trainer, tokenizer, model_args, row_format)
    metrics |= sample_count("train", trainer.train_dataset, limit)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def record_training(trainer, tokenizer, model_args, row_format):
    """Look at what was saved, and write beside it what it was made from."""
    if trainer.args.should_save:
        TrainingChecks.check_saved(trainer.args.output_dir, trainer.model, trainer.state.global_step)
        origin = provenance.record(trainer.model, tokenizer, model_args, row_format)
        origin["self_checks"] = self_checks.results_of(trainer)
        record = json.dumps(origin, ensure_ascii=False, indent=2)
        Path(trainer.args.output_dir, "provenance.json").write_text(record + "\n", encoding="utf-8")


def evaluate_loss(trainer, limit):
    """Evaluate, and write loss, accuracy and perplexity."""
    with memory.explained(trainer, "eval"):
        metrics = trainer.evaluate()
    if "eval_loss" not in metrics:
        raise ValueError("--do_eval: --dataloader_drop_last left no batch: lower --per_device_eval_batch_size.")
    metrics = complete({**metrics, **sample_count("eval", trainer.eval_dataset, limit)})
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def sample_count(stage, dataset, limit):
    """{stage_samples: N}. A stream is not counted: it has the limit, or no entry."""
    count = limit if isinstance(dataset, IterableDataset) else len(dataset)
    return {} if count is None else {f"{stage}_samples": count}


def with_sample_counts(data_args, trainer):
    """The arguments with numbers of samples in place of limits, which run_clm.py's lines count with; unknown: inf."""
    counts = {}
    for stage, dataset in {"train": trainer.train_dataset, "eval": trainer.eval_dataset}.items():
        if dataset is not None:
            known = sample_count(stage, dataset, getattr(data_args, f"max_{stage}_samples"))
            counts[f"max_{stage}_samples"] = known.get(f"{stage}_samples", math.inf)
    return replace(data_args, **counts)


def complete(metrics) -> dict:
    """Metrics without unknown counts; of an evaluation, with perplexity: on chat data, over all trained tokens."""
    metrics = {name: value for name, value in metrics.items() if not name.endswith("_samples") or value != math.inf}
    if "eval_loss" in metrics:
        metrics["perplexity"] = scores.perplexity(metrics)
    return metrics


def watch_training(trainer, tokenizer, data, chat_args, lora_args):
    """A bar and a picture; at each evaluation, answers with their scores (--predict_with_generate) and samples."""
    progress.show_progress(trainer, lora_args.plot_loss)
    answering = {"questions": prediction.AnswersWhileTraining, "samples": samples.SampleAnswers}
    for split, callback in answering.items() if isinstance(data, EncodedChats) else ():
        if split in data:
            trainer.add_callback(callback(trainer, tokenizer, data[split], chat_args, padding_id(tokenizer)))
    methods.stop_early(trainer, lora_args.early_stopping_patience)


def answer(trainer, tokenizer, data, chat_args):
    """Answer the rows that were encoded for --do_predict and --predict_with_generate, if there are any."""
    for stage, split in {"eval": "questions", "predict": "test"}.items():
        if isinstance(data, EncodedChats) and split in data:
            prediction.predict(trainer, tokenizer, data[split], chat_args, padding_id(tokenizer), stage)


def draw_losses(trainer, lora_args):
    """The picture of a training's losses, unless --no_plot_loss."""
    if trainer.args.do_train and lora_args.plot_loss:
        loss_plot.draw_losses(trainer)


def publish(trainer):
    """Push to the hub with --push_to_hub, else write the model card."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()


# ------------------------------------------------------------------------------------- what a grafted run_clm.py calls


def prepare_launch(model_args, data_args, lora_args, training_args):
    """Our messages at the level of the script's, and a look at what was asked for and how it was launched."""
    logger.setLevel(training_args.get_process_log_level())
    check_request(model_args, data_args, lora_args, training_args)


def guarded_trainer(
    trainer_class, model_args, chat_args, lora_args, data, row_format,
    *, model, args, train_dataset, eval_dataset=None, processing_class=None, callbacks=(), **options,
):  # fmt: skip
    """The Trainer with run_clm.py's arguments, where ours replace those of the same names, and its safeguards.

    Callbacks of the script's own stay, before ours. A stream of conversations is made endless here, after run_clm.py's
    lines have cut it to its limit.
    """
    if chat_args.only_looks:
        raise ValueError("--preview, --preview_html and --dry_run are flags of run_chatglm_lora.py itself: run that.")
    guards = safeguards((model_args, chat_args, lora_args, args), {"train": train_dataset}, processing_class)
    splits = {**(data if row_format else {}), "train": train_dataset, "validation": eval_dataset}
    options |= trainer_options(model, processing_class, row_format, splits, chat_args, lora_args, args, guards)
    options["callbacks"] = [*(callbacks or ()), *options["callbacks"]]
    train_dataset = batches.repeated_stream(train_dataset) if row_format else train_dataset
    fixed = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "processing_class": processing_class}
    trainer = trainer_class(model=model, args=args, **fixed, **options)
    watch_training(trainer, processing_class, data, chat_args, lora_args)
    return trainer, guards


def trained(trainer, guards, resume_from_checkpoint=None):
    """What Trainer.train returns, of a training with safeguards."""
    trainer.args.resume_from_checkpoint = resume_from_checkpoint
    adapters.initialise_from_data(trainer, padding_id(trainer.processing_class))
    self_checks.know(trainer)
    with memory.explained(trainer, "train"):
        metrics = guards.trained(trainer)
    return TrainOutput(trainer.state.global_step, metrics.get("train_loss"), metrics)


def saved(trainer, guards, model_args, row_format):
    """Save the model or the adapter, with a record of what it was made from."""
    guards.save(trainer)
    record_training(trainer, trainer.processing_class, model_args, row_format)


# ------------------------------------------------------------------------------------------------------------ main


def main():
    model_args, data_args, chat_args, lora_args, training_args = parsed_arguments()
    screen.set_up_logging(training_args)
    check_request(model_args, data_args, lora_args, training_args, launches=not chat_args.only_looks)
    set_seed(training_args.seed)

    raw, row_format = raw_datasets(model_args, data_args, chat_args, training_args)
    register_chatglm(lora_args)
    config = loaded_config(model_args)
    config = prefix_tuning.with_prefix(config, lora_args)
    tokenizer = with_chat_template(loaded_tokenizer(model_args, lora_args.adapter_name_or_path), chat_args)
    # The data are encoded before the weights are loaded: a mistake in them shows within seconds.
    data = chats_as_ids(raw, row_format, tokenizer, config, chat_args, data_args, training_args)
    if not row_format:
        data = text_blocks(data, tokenizer, config, data_args, training_args)
    screen.show_data(data, raw)
    if chat_args.only_looks:
        return look_ahead(data, tokenizer, config, model_args, chat_args, lora_args, training_args, row_format)
    guards = safeguards((model_args, chat_args, lora_args, training_args), data, tokenizer)

    model = loaded_model(model_args, lora_args, training_args, config, tokenizer)
    screen.show_model(model)
    model = adapted_model(model, lora_args, training_args)
    options = trainer_options(model, tokenizer, row_format, data, chat_args, lora_args, training_args, guards)
    trainer = make_trainer(model, tokenizer, data, options, training_args)
    watch_training(trainer, tokenizer, data, chat_args, lora_args)
    model_card.name_sources(trainer, model_args, data_args, chat_args)

    if training_args.do_train:
        train(trainer, guards, tokenizer, model_args, row_format, data_args.max_train_samples)
    if training_args.do_eval:
        evaluate_loss(trainer, data_args.max_eval_samples)
    answer(trainer, tokenizer, data, chat_args)
    draw_losses(trainer, lora_args)
    publish(trainer)
    if training_args.do_train:
        screen.show_next_steps(training_args.output_dir, model_args.model_name_or_path)
    launching.end_processes()


def _mp_fn(index):
    """Entry point of the XLA launcher."""
    main()


if __name__ == "__main__":
    mistakes.reported(main)()
