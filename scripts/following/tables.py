"""What is known of run_clm.py: its stages and where ours are, and what differs on purpose."""

import logging
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stage of main: the names that upstream assigns, defines or calls in it, our functions, their entry."""

    name: str
    marks: str
    ours: str
    entry: str


STAGES = [
    Stage("versions", "", "", "Versions"),
    Stage(
        "arguments",
        "parser parser.parse_json_file parser.parse_args_into_dataclasses",
        "parsed_arguments flag_parser parsed_words parsed_file file_arguments check_types builder_options "
        "listed_files argument ModelArguments DataTrainingArguments ChatArguments LoraArguments",
        "Arguments",
    ),
    Stage("logging", "send_example_telemetry logging.basicConfig log_level", "set_up_logging", "Logging"),
    Stage("last checkpoint", "last_checkpoint", "", "Dropped upstream"),
    Stage("seed", "set_seed", "main", "Seed"),
    Stage(
        "data",
        "raw_datasets load_dataset data_files split_streaming_dataset",
        "raw_datasets read_by_run_clm train_and_validation check_splits",
        "Data",
    ),
    Stage(
        "configuration",
        "config_kwargs config",
        "register_chatglm hub_options loaded_config",
        "Configuration and tokenizer",
    ),
    Stage(
        "tokenizer",
        "tokenizer_kwargs tokenizer",
        "tokenizer_name loaded_tokenizer with_chat_template",
        "Configuration and tokenizer",
    ),
    Stage(
        "model",
        "torch_dtype dtype model embedding_size model.resize_token_embeddings",
        "loaded_model model_class attention_options loading_options code_revision",
        "Model",
    ),
    Stage("adapter", "", "adapted_model adapter_config target_options checked_modules", "Adapter"),
    Stage(
        "encoding",
        "tokenize_function tokenized_datasets text_column_name column_names tok_logger max_pos_embeddings block_size "
        "group_texts lm_datasets train_dataset eval_dataset",
        "chats_as_ids text_blocks check_text column_names mapped capped chosen_block_size sample_limits "
        "requested_splits within_positions EncodedChats encoded_chats encoded_split encoding_fingerprint encoded_rows "
        "encoded_prompts examples_of encoded_conversations without_oldest_turns marked_ids examples_by_turn reply_ids "
        "answers_apart templated",
        "Encoding",
    ),
    Stage(
        "metrics",
        "preprocess_logits_for_metrics metric compute_metrics",
        "TokenAccuracy best_tokens masked_accuracy scoring",
        "Metrics",
    ),
    Stage(
        "trainer",
        "trainer Trainer",
        "make_trainer trainer_options chat_collator padding_id block_collator",
        "Trainer",
    ),
    Stage(
        "training",
        "checkpoint train_result trainer.train",
        "train Safeguards record_training with_sample_counts sample_count record",
        "Training",
    ),
    Stage("evaluation", "trainer.evaluate", "evaluate_loss complete", "Evaluation"),
    Stage("prediction", "", "answer", "Prediction"),
    Stage("publishing", "kwargs trainer.push_to_hub trainer.create_model_card", "publish", "Publishing"),
]
ENTRY = {stage.name: stage.entry for stage in STAGES}
FUNCTIONS = {stage.name: stage.ours.split() for stage in STAGES}
STAGE_OF_MARK = {mark: stage.name for stage in STAGES for mark in stage.marks.split()}
STAGE_OF_FUNCTION = {function: stage.name for stage in STAGES for function in stage.ours.split()}
STAGE_OF_FUNCTION["split_streaming_dataset"] = "data"
# Where ours calls a library under another name.
ALIASES = {
    "model_class().from_pretrained": "AutoModelForCausalLM.from_pretrained",
    "flags.FlagParser": "HfArgumentParser",
    "model_card.DocumentedTrainer": "Trainer",
}

# Flags of upstream that its older versions lack: the last version of transformers whose run_clm.py may do without.
NEWER_FLAGS = {"--token": "4.31", "--trust_remote_code": "4.32.0.dev0", "--dtype": "4.56.0.dev0"}
# What upstream has and ours has not, on purpose: kind, pattern of the name, entry of docs/modifications.md.
EXPLAINED = [
    ("flag", "--use_auth_token", "Dropped upstream"),
    ("flag", "--torch_dtype", "Dropped upstream"),
    ("flag", "--low_cpu_mem_usage", "Dropped upstream"),
    ("call", "send_example_telemetry", "Dropped upstream"),
    ("call", "get_last_checkpoint", "Dropped upstream"),
    ("call", "is_torch_tpu_available", "Dropped upstream"),
    ("keyword", "* use_auth_token=", "Dropped upstream"),
    ("keyword", "* torch_dtype=", "Dropped upstream"),
    ("keyword", "* low_cpu_mem_usage=", "Dropped upstream"),
    ("keyword", "Trainer tokenizer=", "Dropped upstream"),
    ("call", "warnings.warn", "Dropped upstream"),
    ("call", "os.listdir", "Dropped upstream"),
    ("call", "transformers.utils.logging.set_verbosity_info", "Logging"),
    ("call", "os.path.isdir", "Dropped upstream"),
    ("assignment", "model_args.token", "Dropped upstream"),
    ("call", "os.path.abspath", "Arguments"),
    ("call", "MODEL_FOR_CAUSAL_LM_MAPPING.keys", "Arguments"),
    ("call", "require_version", "Versions"),
    ("call", "check_min_version", "Versions"),
    ("call", ".parse_json_file", "Arguments"),
    ("keyword", ".parse_json_file json_file=", "Arguments"),
    ("keyword", "load_dataset trust_remote_code=", "Data"),
    ("keyword", "load_dataset split=", "Data"),
    ("call", "IterableDataset*", "Data"),
    ("keyword", "IterableDataset*", "Data"),
    ("keyword", "AutoModelForCausalLM.from_pretrained from_tf=", "Model"),
    ("call", "CaptureLogger", "Encoding"),
    ("call", "transformers.utils.logging.get_logger", "Encoding"),
    ("call", "evaluate.load", "Metrics"),
    ("keyword", ".push_to_hub *", "Publishing"),
    ("keyword", ".create_model_card *", "Publishing"),
    ("keyword", "evaluate.load cache_dir=", "Metrics"),
]
# Errors of upstream by stage and by what their innermost condition looks at: our function that raises one for the same
# mistake and, where it is another one or comes at another time, the entry of docs/modifications.md.
ERRORS = {
    "arguments: config_name config_overrides model_name_or_path": ("ModelArguments", ""),
    "arguments: dataset_name train_file validation_file": ("raw_datasets", "Arguments"),
    "arguments: extension train_file": ("check_types", "Arguments"),
    "arguments: extension validation_file": ("check_types", "Arguments"),
    "arguments: token": ("", "Dropped upstream"),
    "last checkpoint: last_checkpoint output_dir": ("", "Dropped upstream"),
    "data: validation_percentage": ("train_and_validation", "Data"),
    "tokenizer: model_name_or_path": ("loaded_tokenizer", ""),
    "encoding: tokenized_datasets": ("check_splits", "Data"),
}
# The modules of finetuning/ in which functions of the table lie.
ROOMS = {
    "argument_files",
    "data_files",
    "encoding",
    "file_rows",
    "lora_layers",
    "provenance",
    "safeguards",
    "scores",
    "screen",
}
# Calls that are not compared: of modules that only compute or log, and methods of plain Python objects and loggers.
QUIET_MODULES = {"math", "itertools", "logging", "typing", "functools", "collections", "re", "pathlib"}
QUIET_METHODS = {name for kind in (str, bytes, list, dict, set, logging.Logger) for name in dir(kind)}
LOUD_BUILTINS = {"open", "delattr", "exec", "eval", "__import__"}
# Functions and classes that upstream defines; any other is a helper, which a newer version or an owner added.
DEFINED_UPSTREAM = {"ModelArguments", "DataTrainingArguments", "main", "_mp_fn", "split_streaming_dataset"}
