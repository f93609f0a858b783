"""A grafted run_clm.py: what is changed in it, and that it gives what run_chatglm_lora.py gives."""

import difflib
import importlib.util
import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from stand_in import NEWEST, RUNS_TODAY, SHAPES, stand_in
from tiny import CHAT_FLAGS, CHATS, COMMON, ROOT, flat, losses, results, write_jsonl


sys.path.append(str(ROOT / "scripts"))
import upstream


def graft(*words):
    """Exit status of `upstream.py graft`."""
    return upstream.main(["graft", *map(str, words)])


@pytest.fixture(scope="session")
def grafted(tmp_path_factory):
    """The grafted stand-in of a date, as a file."""

    def grafted_file(date=NEWEST):
        folder = tmp_path_factory.mktemp("graft")
        (folder / "run_clm.py").write_text(stand_in(date))
        assert graft(folder / "run_clm.py", "-o", folder / f"grafted_{date}.py") == 0
        return folder / f"grafted_{date}.py"

    return grafted_file


@pytest.fixture
def run_grafted(tmp_path, monkeypatch, grafted):
    """Runs a grafted script's main() on a command line, like the fixture `run`."""

    def run_script(*flags, date=NEWEST):
        folder = tmp_path / f"grafted_{date}"
        spec = importlib.util.spec_from_file_location(f"grafted_{date}", grafted(date))
        script = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, script)
        monkeypatch.setattr(sys, "path", sys.path[:])
        spec.loader.exec_module(script)
        monkeypatch.setattr(sys, "argv", [spec.name, *COMMON.split(), "--output_dir", str(folder), *flat(flags)])
        script.main()
        return folder

    return run_script


def outcome(folder):
    """All that two runs must have in common: losses, metrics without timings, weights, answers, record."""
    weights = next(folder / name for name in WEIGHTS if (folder / name).exists())
    files = ("generated_predictions.jsonl", "generated_evaluations.jsonl", "provenance.json")
    timed = ("runtime", "per_second", "total_flos")
    return {
        "losses": losses(folder),
        "metrics": {
            name: {key: value for key, value in results(folder, name).items() if not key.endswith(timed)}
            for name in ("train", "eval", "predict", "all")
            if (folder / f"{name}_results.json").exists()
        },
        "weights": {name: tensor.tolist() for name, tensor in load_file(weights).items()},
        **{name: (folder / name).read_text() for name in files if (folder / name).exists()},
    }


WEIGHTS = ("adapter_model.safetensors", "model.safetensors")


@pytest.mark.parametrize("date", SHAPES)
def test_graft_changes_at_most_40_lines_of_every_shape_and_compiles(date, tmp_path, capsys):
    source, out = tmp_path / "run_clm.py", tmp_path / "out.py"
    source.write_text(stand_in(date))
    assert graft(source, "-o", out) == 0
    before, after = source.read_text().splitlines(), out.read_text().splitlines()
    changed = [line for line in difflib.ndiff(before, after) if line[:2] in ("- ", "+ ")]
    assert len(changed) == 35
    assert f"35 lines changed of {len(before)}, at 13 places" in capsys.readouterr().out
    compile(out.read_text(), "out.py", "exec")


@pytest.fixture
def text_flags(llama, text_files):
    files = ["--train_file", text_files / "train.txt", "--validation_file", text_files / "valid.txt"]
    return ["--model_name_or_path", llama, *files, "--block_size", 16, "--do_train", "--do_eval", "--max_steps", 3]


@pytest.fixture
def chat_flags(llama, chats):
    files = ["--train_file", chats, "--validation_file", chats, "--test_file", chats, "--max_predict_samples", 2]
    lengths = ["--max_source_length", 64, "--max_target_length", 16]
    stages = ["--do_train", "--do_eval", "--do_predict", "--max_steps", 3]
    return ["--model_name_or_path", llama, *files, *CHAT_FLAGS, *lengths, *stages]


@pytest.mark.parametrize("lora", [[], ["--no_use_lora"]])
def test_grafted_script_equals_ours_on_text(lora, run, run_grafted, text_flags):
    ours = outcome(run(text_flags, lora))
    assert len(ours["losses"]) == 3 and ours["metrics"]["eval"]["perplexity"] > 1
    assert outcome(run_grafted(text_flags, lora)) == ours


@pytest.mark.parametrize("date", [RUNS_TODAY, NEWEST])
def test_grafted_script_equals_ours_on_conversations(date, run, run_grafted, chat_flags):
    ours = outcome(run(chat_flags, "--predict_with_generate", "--max_eval_samples", 2))
    assert ours["metrics"]["eval"]["eval_samples"] == 2 and ours["generated_predictions.jsonl"].count("\n") == 2
    assert outcome(run_grafted(chat_flags, "--predict_with_generate", "--max_eval_samples", 2, date=date)) == ours


@pytest.mark.parametrize("flags", [[], ["--max_train_samples", 3]])
def test_grafted_script_equals_ours_on_streamed_conversations(flags, run, run_grafted, chat_flags):
    flags = [*chat_flags, "--streaming", *flags]
    assert outcome(run_grafted(flags)) == outcome(run(flags))
