"""The command line: upstream's flags, one file of arguments, and sentences for mistakes."""

import json
import re
import sys
from dataclasses import fields

import pytest
from processes import forked_program
from tiny import ROOT, losses

import run_chatglm_lora
from run_chatglm_lora import ChatArguments, DataTrainingArguments, LoraArguments, ModelArguments


@pytest.mark.parametrize("cls", [ModelArguments, DataTrainingArguments])
def test_flags_of_run_clm_keep_their_defaults_and_choices(cls):
    expected = json.loads((ROOT / "tests/run_clm_flags.json").read_text())[cls.__name__]
    ours = {f.name: {"default": f.default, "choices": f.metadata.get("choices")} for f in fields(cls)}
    assert ours == {name: {"default": flag["default"], "choices": flag["choices"]} for name, flag in expected.items()}
    assert all(f.metadata["help"] for f in fields(cls))


def test_help_shows_each_group_of_flags():
    text = forked_program("run_chatglm_lora.py", "--help").stdout
    for group in (ModelArguments, DataTrainingArguments, ChatArguments, LoraArguments):
        assert f"\n{group._argument_group_name}:" in text
    assert "--no_use_lora" in text


def test_losses_are_logged_fifty_times_a_run_unless_a_number_of_steps_is_given(tmp_path, monkeypatch):
    def interval(*words):
        monkeypatch.setattr(sys, "argv", ["run_chatglm_lora.py", "--output_dir", "out", "--use_cpu", *words])
        args = run_chatglm_lora.parsed_arguments()[-1]
        return args.logging_steps, args.eval_steps

    assert interval() == (0.02, 500) and interval("--logging_steps", "500") == (500, None)
    assert interval("--logging_steps", "10", "--eval_strategy", "steps") == (10, 10)
    path = tmp_path / "args.yaml"
    path.write_text("logging_steps: 500\noutput_dir: out\nuse_cpu: true\n")
    monkeypatch.setattr(sys, "argv", ["run_chatglm_lora.py", str(path)])
    assert run_chatglm_lora.parsed_arguments()[-1].logging_steps == 500


def test_run_of_nine_steps_shows_nine_losses_and_draws_them(chatglm3, chats, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    words = ["--model_name_or_path", chatglm3, "--train_file", chats, "--do_train", "--max_steps", "9", "--use_cpu"]
    words += ["--output_dir", str(tmp_path / "out"), "--report_to", "none", "--save_strategy", "no"]
    monkeypatch.setattr(sys, "argv", ["run_chatglm_lora.py", *words])
    run_chatglm_lora.main()
    assert len(losses(tmp_path / "out")) == 9 and (tmp_path / "out/training_loss.png").exists()


def test_script_header_for_uv_lists_the_requirements():
    header = re.search(r"# dependencies = \[\n(.*?)# \]", (ROOT / "run_chatglm_lora.py").read_text(), re.S).group(1)
    listed = set(re.findall(r'"(.+?)"', header))
    optional = ("deepspeed", "matplotlib", "jieba", "nltk", "rouge-chinese", "libcst")  # not imported by the script
    required = {line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith(optional)}
    assert listed == required


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (
            ["--train_file", "a.pdf"],
            "--train_file a.pdf: the file must end in one of .csv, .tsv",
        ),
        (
            ["--train_file", "a.csv", "--validation_file", "b.txt"],
            "Plain text and rows do not go together: --train_file a.csv",
        ),
        (["--do_train"], "There are no data: pass --train_file"),
        (["--config_overrides", "n=1", "--model_name_or_path", "x"], "--config_overrides changes the defaults"),
        (["--response_column", "answer"], "belong to a --prompt_column"),
        (["--max_target_length", "0"], "--max_target_length must be at least 1, not 0"),
        (["--peft_type", "LORRA"], "--peft_type LORRA is not one of .*LORA"),
        (["--load_in_4bit", "--load_in_8bit"], "exclude each other"),
    ],
)
def test_mistake_in_the_flags_is_one_sentence(run, flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(flags)


def test_quantisation_without_bitsandbytes_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(run_chatglm_lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        run("--load_in_4bit")


def test_model_that_is_nowhere_is_named(run, text_files):
    with pytest.raises(OSError, match="--model_name_or_path: there is no folder ./nothere."):
        run("--model_name_or_path", "./nothere", "--train_file", text_files / "train.txt", "--do_train")
