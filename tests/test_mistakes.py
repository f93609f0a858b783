"""A mistake is one sentence on stderr and exit code 2; a defect keeps its traceback."""

import os
import subprocess
import sys

import pytest
from processes import forked_program
from tiny import ROOT

from finetuning.mistakes import did_you_mean, is_for_the_user, reported, way_out
from finetuning.training_checks import HopelessRun, check_finite


def end(main, capsys):
    """Exit code and stderr of a main function that is run as a program."""
    with pytest.raises(SystemExit) as ended:
        reported(main)()
    return ended.value.code, capsys.readouterr().err


def raised_by(statement):
    """A main function whose file belongs to a package of ours."""
    space = {"__name__": "finetuning.example", "HopelessRun": HopelessRun}
    path = f"finetuning_example_{abs(hash(statement))}.py"
    import linecache

    text = f"def main():\n    {statement}\n"
    linecache.cache[path] = (len(text), None, text.splitlines(True), path)
    exec(compile(text, path, "exec"), space)
    return space["main"]


@pytest.mark.parametrize("kind", ["ValueError", "OSError", "FloatingPointError", "MemoryError", "HopelessRun"])
def test_what_we_raise_for_the_user_is_one_sentence(kind, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/run_chatglm_lora.py"])
    code, text = end(raised_by(f"raise {kind}('Write --lora_r.')"), capsys)
    assert (code, text) == (2, "run_chatglm_lora.py: error: Write --lora_r.\n")


@pytest.mark.parametrize(
    "statement", ["int('x')", "raise RuntimeError('x')", "__import__('json').loads('x')", "1 / 0"]
)
def test_defect_keeps_its_traceback(statement):
    with pytest.raises((ValueError, RuntimeError, ZeroDivisionError)):
        reported(raised_by(statement))()


def test_exit_code_of_a_stopped_run_stays():
    with pytest.raises(SystemExit) as ended:
        reported(raised_by("raise SystemExit(75)"))()
    assert ended.value.code == 75


def test_debug_shows_the_traceback_and_the_sentence_last(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_chatglm_lora.py", "--log_level", "debug"])
    code, text = end(raised_by("raise ValueError('Write --lora_r.')"), capsys)
    assert code == 2 and text.startswith("Traceback (most recent call last)")
    assert text.splitlines()[-1] == "run_chatglm_lora.py: error: Write --lora_r."


def test_of_the_ranks_of_torchrun_the_first_speaks(capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        said.append(end(raised_by("raise ValueError('Write --lora_r.')"), capsys)[1].count("Write --lora_r."))
    assert said == [1, 0]


def test_error_of_a_library_that_our_code_meets_is_no_sentence():
    import torch

    with pytest.raises(RuntimeError) as met:
        check_finite(torch.nn.Linear(0, 0, device="meta"))
    assert not is_for_the_user(met.value)


def test_mistake_as_a_program_prints_one_line(chatglm3, tmp_path):
    words = ["--model_name_or_path", chatglm3, "--train_file", "nothere.jsonl", "--do_train", "--use_cpu"]
    ended = forked_program(ROOT / "run_chatglm_lora.py", *words, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == "run_chatglm_lora.py: error: There is no file nothere.jsonl.\n"
    assert len(ended.stdout.splitlines()) <= 1  # versions and device


@pytest.mark.slow
def test_under_torchrun_the_sentence_is_said_once_and_stands_in_the_report_at_the_end(chatglm3, tmp_path):
    words = [
        "--model_name_or_path",
        chatglm3,
        "--train_file",
        "x.jsonl",
        "--do_train",
        "--use_cpu",
        "--lora_rank",
        "8",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", f"{ROOT}/run_chatglm_lora.py"]
    ended = subprocess.run([*command, *words], capture_output=True, text=True, env=os.environ)
    sentence = "There is no flag --lora_rank here: write --lora_r."
    assert ended.stderr.count(f"run_chatglm_lora.py: error: {sentence}") == 1
    assert sentence in "\n".join(ended.stderr.splitlines()[-3:])


def test_did_you_mean_only_names_what_is_near():
    assert did_you_mean("promt", ["prompt", "response"]) == " Did you mean 'prompt'?"
    assert did_you_mean("prompt", ["text"]) == ""


def test_layer_of_another_model_is_answered_with_the_one_that_does_its_work():
    chatglm = ["dense", "dropout", "query_key_value"]
    sentence = "In this model q_proj, k_proj and v_proj are one layer, 'query_key_value'."
    assert way_out("q_proj", chatglm) == sentence
    assert way_out("query_key_valu", chatglm) == "Did you mean 'query_key_value'?"
    assert way_out("xyz", chatglm) == "It has dense, dropout, query_key_value."
