"""The command line: unknown, abbreviated and contradictory flags, and the help."""

import re
import subprocess
import sys
from dataclasses import fields

import pytest
import transformers
from tiny import ROOT
from transformers import training_args

import run_chatglm_lora
from finetuning import flag_names, flags
from run_chatglm_lora import ARGUMENT_CLASSES, ChatArguments, LoraArguments


@pytest.fixture(scope="module")
def help_text():
    return run_chatglm_lora.flag_parser().format_help()


def headings(text):
    return re.findall(r"^(\S.*):$", text, re.M)


def test_help_begins_with_our_flags_then_those_of_run_clm_then_trainer_by_subject(help_text):
    ours = [ChatArguments._argument_group_name, LoraArguments._argument_group_name]
    found = headings(help_text)
    assert found[:4] == [*ours, "model (as in run_clm.py)", "data (as in run_clm.py)"]
    assert all(title == "help" or title.startswith("Trainer: ") for title in found[4:])
    assert {"Trainer: Optimizer", "Trainer: Evaluation", "Trainer: Reproducibility"} <= set(found)


def test_help_shows_every_flag_once_under_one_spelling(help_text):
    shown = re.findall(r"^  (--\w+)", help_text, re.M)
    expected = [f"--{f.name}" for cls in ARGUMENT_CLASSES for f in fields(cls) if f.init]
    off = [f"--no_{f.name}" for cls in ARGUMENT_CLASSES for f in fields(cls) if f.init and f.default is True]
    assert sorted(shown) == sorted([*expected, *off, "--help"])
    assert help_text.startswith(f"usage: {flags.USAGE}\n\n") and not re.search(r"^  --\w+-", help_text, re.M)


def test_what_turns_a_flag_off_has_a_text_of_its_own(help_text):
    assert re.search(r"--no_use_lora +Turns --use_lora off\.", help_text)
    assert not re.search(r"--no_\w+ +(?!Turns)\S", help_text.replace("; --no_", ""))


def test_help_that_is_kept_in_a_file_is_the_one_of_the_parser(help_text):
    """To write it anew: python run_chatglm_lora.py --help >help.txt && mv help.txt finetuning"""
    if f"transformers=={transformers.__version__}" not in (ROOT / "requirements.lock").read_text():
        pytest.skip(f"it is for the transformers of requirements.lock, not {transformers.__version__}")
    assert flag_names.HELP.read_text("utf-8") == help_text


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_shown_before_torch_is_imported(flag):
    command = [sys.executable, "-X", "importtime", str(ROOT / "run_chatglm_lora.py"), "--output_dir", "x", flag]
    ended = subprocess.run(command, capture_output=True, text=True)
    if f"transformers {transformers.__version__};" in flag_names.HELP.read_text("utf-8"):
        assert not re.search(r"\| +(torch|transformers)$", ended.stderr, re.M)
    assert ended.returncode == 0 and ended.stdout.startswith(f"usage: {flags.USAGE}\n")


def test_help_of_a_script_with_a_flag_of_its_own_shows_that(tmp_path):
    source = (ROOT / "run_chatglm_lora.py").read_text("utf-8")
    marked = '    system_prompt: str | None = argument(None, "System'
    assert marked in source
    (tmp_path / "mine.py").write_text(source.replace(marked, marked + " (mine)"), "utf-8")
    assert flag_names.help_stamp(tmp_path / "mine.py") != flag_names.help_stamp(ROOT / "run_chatglm_lora.py")


def test_trainer_flags_are_sorted_by_the_headings_of_its_docstring():
    groups = flags.trainer_groups()
    assert groups["learning_rate"] == "Learning Rate & Scheduler" and groups["adam_beta1"] == "Optimizer"


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--lerning_rate 1", "There is no flag --lerning_rate. Did you mean '--learning_rate'?"),
        ("--lerning-rate=1", "There is no flag --lerning_rate. Did you mean '--learning_rate'?"),
        ("--frobnicate", "There is no flag --frobnicate. --help lists all of them."),
        ("--learning 1e-4", "--learning: flags are not abbreviated. Write --learning_rate."),
        ("train.jsonl", "'train.jsonl' belongs to no flag"),
        ("--evaluation_strategy steps", "--evaluation_strategy here: write --eval_strategy."),
        ("--torch_dtype bfloat16", "--torch_dtype here: write --dtype."),
        ("--overwrite_output_dir", "--overwrite_output_dir here: drop it"),
        ("--lora_rank 8", "--lora_rank here: write --lora_r."),
        ("--quantization_bit 4", "write --load_in_4bit or --load_in_8bit."),
        ("--lora_r x", "--lora_r: invalid int value: 'x'"),
        ("--eval_strategy step", "--eval_strategy: invalid choice: 'step'"),
        ("--use_lora --no_use_lora", "--use_lora and --no_use_lora contradict each other"),
        ("--pre_seq_len 8 --lora_r 16", "--pre_seq_len is ChatGLM's own prefix, without PEFT: drop it, or --lora_r."),
        ("--no_use_lora --lora_r 16", "--no_use_lora trains all weights and no adapter: drop it, or --lora_r."),
        ("--use_lora False --lora_alpha 16", "--no_use_lora trains all weights and no adapter: drop it, or --lora_al"),
        ("--no_use_lora --adapter_name_or_path x", "trains all weights and no adapter: drop it, or --adapter_name"),
        ("--adapter_name_or_path x --lora_r 4", "whose settings stand in its folder: drop --lora_r,"),
        ("--peft_type IA3 --lora_r 4", "--lora_r says nothing to --peft_type IA3: drop one of them."),
        (
            "--load_best_model_at_end --eval_strategy epoch --use_cpu",
            "--eval_strategy and --save_strategy must be the same (steps or epoch)",
        ),
        ("--optim adam", "--optim: invalid choice: 'adam'"),
        ("--adapter_name_or_path=", "--adapter_name_or_path is empty: give it a value, or leave it out"),
        ("--lr_scheduler_kwargs {", "--lr_scheduler_kwargs {: Expecting property name enclosed in double quotes"),
        ("--gradient_checkpointing_kwargs x.json", "--gradient_checkpointing_kwargs x.json: Expecting value"),
        ("--accelerator_config x.json", "--accelerator_config x.json: [Errno 2] No such file or directory"),
        (
            '--use_cpu --accelerator_config {"even":1}',
            "--accelerator_config: AcceleratorConfig.__init__() got",
        ),
        (
            "--hub_model_id me/model",
            "--hub_model_id says nothing without --push_to_hub: add it, or drop --hub_model_id.",
        ),
        ("--lr_scheduler_kwargs [1]", '--lr_scheduler_kwargs [1]: a JSON object is expected, such as {"name": 1}.'),
    ],
)
def test_mistake_in_the_words_says_what_to_write(run, words, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        run(words.split())


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--lora_r 0", "--lora_r must be at least 1, not 0."),
        ("--gradient_accumulation_steps -1", "--gradient_accumulation_steps must be at least 1, not -1."),
        ("--max_steps 0", "--max_steps must be at least 1, or -1 to go by --num_train_epochs, not 0."),
        ("--learning_rate 1e400", "--learning_rate must be at least 0, not inf."),
        ("--lora_dropout 1", "--lora_dropout must be at least 0 and less than 1, not 1."),
        ("--loraplus_lr_ratio nan", "--loraplus_lr_ratio must be above 0, not nan."),
        ("--save_steps 1e400", "--save_steps must be above 0 (for none, write --save_strategy no), not inf."),
        ("--seed -1", "--seed must be at least 0 and less than 2**32, not -1."),
    ],
)
def test_number_out_of_its_range_is_refused_with_the_range(run, words, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        run(words.split(), "--do_train")


def test_ranges_hold_numbers_of_the_parser_whose_defaults_lie_within(monkeypatch):
    names = [name for _, _, names in flags.RANGES for name in names.split()]
    actions = {action.dest: action for action in flags.FlagParser(ARGUMENT_CLASSES)._actions}
    assert len(names) == len(set(names)) and all(actions[name].type in (int, float) for name in names)
    flags.check_ranges({name: actions[name].default for name in names})


def test_flags_that_the_sources_declare_are_those_of_the_parser():
    declared = {}
    for path in (run_chatglm_lora.__file__, training_args.__file__):
        declared |= {name: flag_names.number_type(kind) for name, kind in flag_names.declared_flags(path).items()}
    actions = flags.FlagParser(ARGUMENT_CLASSES)._actions
    names = {action.option_strings[0].lstrip("-"): action for action in actions if action.dest != "help"}
    assert declared == {name: each.type if each.type in (int, float) else str for name, each in names.items()}


@pytest.mark.parametrize("words", ["--lerning_rate 1", "--lora_r x", "--use_lora --no_use_lora", "train.jsonl"])
def test_mistake_in_a_word_shows_before_torch_is_imported(words):
    command = [sys.executable, "-X", "importtime", str(ROOT / "run_chatglm_lora.py"), "--output_dir", "x"]
    ended = subprocess.run([*command, *words.split()], capture_output=True, text=True)
    assert ended.returncode == 2 and "run_chatglm_lora.py: error: " in ended.stderr
    assert not re.search(r"\| +(torch|transformers)$", ended.stderr, re.M)


def test_flag_that_a_file_of_arguments_misspells_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("lora_rank: 8\n")
    monkeypatch.setattr(sys, "argv", ["run_chatglm_lora.py", str(tmp_path / "a.yaml")])
    with pytest.raises(ValueError, match="no flag --lora_rank here: write --lora_r"):
        run_chatglm_lora.main()


def test_no_name_of_another_program_is_a_flag_here_and_each_answer_names_one():
    names = {f.name for cls in ARGUMENT_CLASSES for f in fields(cls) if f.init}
    known = names | {f"no_{name}" for name in names}
    assert not names & flag_names.OTHER_NAMES.keys()
    for answer in flag_names.OTHER_NAMES.values():
        assert set(re.findall(r"--(\w+)", answer)) <= known, answer


def test_bf16_without_a_gpu_says_use_cpu(run, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match="--bf16 needs a GPU that knows the type: on CPUs add --use_cpu, or leave"):
        run("--use_cpu", "False", "--bf16", "--do_train")
