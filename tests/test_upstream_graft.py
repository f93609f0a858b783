"""A grafted run_clm.py: what is changed in it, and that it gives what run_chatglm_lora.py gives."""

import difflib
import importlib.util
import json
import re
import subprocess
import sys

import pytest
import upstream
from stand_in import NEWEST, RUNS_TODAY, SHAPES, stand_in
from tiny import CHAT_FLAGS, COMMON, LINES, flat, losses, results, write_jsonl


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
    weights = [folder / name for name in ("adapter_model.safetensors", "model.safetensors")]
    files = ("generated_predictions.jsonl", "generated_evaluations.jsonl", "provenance.json")
    timed = ("runtime", "per_second", "total_flos", "peak_memory_gib")
    return {
        "losses": losses(folder) if (folder / "trainer_state.json").exists() else None,
        "metrics": {
            name: {key: value for key, value in results(folder, name).items() if not key.endswith(timed)}
            for name in ("train", "eval", "predict", "all")
            if (folder / f"{name}_results.json").exists()
        },
        "weights": [path.read_bytes() for path in weights if path.exists()],
        **{name: (folder / name).read_text() for name in files if (folder / name).exists()},
    }


@pytest.mark.parametrize("date", SHAPES)
def test_graft_changes_at_most_40_lines_of_every_shape_and_compiles(date, tmp_path, capsys):
    source, out = tmp_path / "run_clm.py", tmp_path / "out.py"
    source.write_text(stand_in(date))
    assert graft(source, "-o", out) == 0
    before, after = source.read_text().splitlines(), out.read_text().splitlines()
    changed = [line for line in difflib.ndiff(before, after) if line[:2] in ("- ", "+ ")]
    assert len(changed) == 39
    assert f"39 lines changed of {len(before)}, at 14 places" in capsys.readouterr().out
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


@pytest.mark.parametrize(
    "flags",
    [
        ["--streaming"],
        ["--streaming", "--no_use_lora", "--max_train_samples", 3, "--pack_to_length", 96],
    ],
)
def test_grafted_script_equals_ours_on_streamed_and_packed_conversations(flags, run, run_grafted, chat_flags):
    assert outcome(run_grafted(chat_flags, flags)) == outcome(run(chat_flags, flags))


def test_grafted_script_equals_ours_on_chatglm(run, run_grafted, chatglm2, chats, text_files):
    model = ["--model_name_or_path", chatglm2, "--do_train", "--max_steps", 2]
    flags = [*model, "--train_file", chats, *CHAT_FLAGS, "--max_source_length", 64, "--max_target_length", 16]
    ours = outcome(run(flags, "--max_train_samples", 6))
    assert ours["metrics"]["train"]["train_samples"] > 6  # a row makes an example for each of its answers
    assert outcome(run_grafted(flags, "--max_train_samples", 6)) == ours
    flags = [*model, "--train_file", text_files / "train.txt", "--block_size", 24, "--overwrite_cache"]
    assert outcome(run_grafted(flags)) == outcome(run(flags))  # its tokenizer counts positions


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_grafted_script_reads_text_that_upstream_does_not(streaming, run, run_grafted, llama, tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": line} for line in LINES])
    source = ["--dataset_name", tmp_path / "data"] if streaming else ["--train_file", tmp_path / "data/train.jsonl"]
    flags = ["--model_name_or_path", llama, *source, *streaming, "--block_size", 16, "--do_train", "--do_eval"]
    ours = outcome(run(flags, "--max_steps", 2))
    assert ("train_samples" in ours["metrics"]["train"]) is not bool(streaming)
    assert outcome(run_grafted(flags, "--max_steps", 2)) == ours


def test_grafted_script_only_answers(run, run_grafted, llama, chats):
    flags = [
        "--model_name_or_path",
        llama,
        "--test_file",
        chats,
        *CHAT_FLAGS,
        "--do_predict",
        "--max_target_length",
        8,
    ]
    ours = outcome(run(flags, "--max_source_length", 64))
    assert outcome(run_grafted(flags, "--max_source_length", 64)) == ours and ours["generated_predictions.jsonl"]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (["--train_file", "a.pdf"], "--train_file a.pdf: the file must end in"),
        (["--do_predict", "--test_file", "VALID"], "--do_predict answers questions"),
        (["--block_size", 0], "--block_size must be at least 1"),
        (["--lora_target_modules", "q_prj"], "the model has no layer 'q_prj'"),
        (["--adapter_name_or_path", "x", "--peft_type", "LORRA"], "--peft_type LORRA is not one of"),
    ],
)
def test_mistake_is_the_same_sentence_in_a_grafted_script(change, sentence, run_grafted, text_flags, text_files):
    change = [str(text_files / "valid.txt") if word == "VALID" else word for word in change]
    with pytest.raises(ValueError, match=sentence):
        run_grafted(text_flags, change)


def test_grafted_file_runs_as_a_script_with_a_file_of_arguments(grafted, run, text_flags, tmp_path):
    ours = outcome(run(text_flags, "--no_use_lora"))
    names = [str(word)[2:] for word in text_flags if str(word).startswith("--")]
    values = dict.fromkeys(names, True)
    for name, value in zip(text_flags, text_flags[1:], strict=False):
        if str(name).startswith("--") and not str(value).startswith("--"):
            values[name[2:]] = value if isinstance(value, int) else str(value)
    values |= {"no_use_lora": True, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    values |= {"learning_rate": 1e-2, "save_strategy": "no", "output_dir": str(tmp_path / "by_file")}
    (tmp_path / "arguments.json").write_text(json.dumps(values))
    command = [sys.executable, str(grafted()), str(tmp_path / "arguments.json")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert outcome(tmp_path / "by_file") == ours


@pytest.mark.parametrize(
    "old, new, place",
    [
        ("HfArgumentParser((", "MyParser((", "'arguments': HfArgumentParser"),
        (
            "data_collator=default_data_collator",
            "collate=default_data_collator",
            "'trainer': data_collator= of Trainer",
        ),
        ("trainer = Trainer(", "trainer = Seq2SeqTrainer(", "'trainer': trainer = Trainer"),
        ("model.resize_token_embeddings(", "model.resize(", "'adapter': model.resize_token_embeddings"),
        ("metrics = trainer.evaluate()", "metrics = {}", "'evaluation': trainer.evaluate"),
    ],
)
def test_place_that_is_not_found_is_named_and_nothing_is_written(old, new, place, tmp_path, capsys):
    text = stand_in(NEWEST)
    (tmp_path / "run_clm.py").write_text(text.replace(old, new))
    assert graft(tmp_path / "run_clm.py", "-o", tmp_path / "out.py") == 1
    message = capsys.readouterr().err
    line = int(re.search(r"run_clm.py, line (\d+): not found from here on: the place " + re.escape(place), message)[1])
    broken = text[: text.index(old)].count("\n") + 1
    assert broken - 130 < line <= broken and not (tmp_path / "out.py").exists()


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lines_that_are_not_grafted_stay_as_they_are(newline, tmp_path):
    text = stand_in(NEWEST).replace("\n", newline).replace("# Evaluation", "# Evaluation \u00fc \u2028\t ")
    (tmp_path / "run_clm.py").write_bytes(text.encode())
    assert graft(tmp_path / "run_clm.py", "-o", tmp_path / "out.py") == 0
    before, after = (tmp_path / name for name in ("run_clm.py", "out.py"))
    before, after = before.read_bytes().split(b"\n"), after.read_bytes().split(b"\n")
    kept = difflib.SequenceMatcher(a=before, b=after, autojunk=False).get_matching_blocks()
    assert len(before) + len(after) - 2 * sum(block.size for block in kept) == 39
    assert {line.endswith(b"\r") for line in after[:-1]} == {newline == "\r\n"}


@pytest.mark.parametrize(
    "text", ["def main(:", "x = 1", stand_in(NEWEST).replace("AutoModelForCausalLM", "AutoModel")]
)
def test_file_that_is_no_run_clm_is_refused(text, tmp_path, capsys):
    (tmp_path / "other.py").write_text(text)
    assert graft(tmp_path / "other.py", "-o", tmp_path / "out.py") == 2 and not (tmp_path / "out.py").exists()
    assert upstream.main(["diff", str(tmp_path / "other.py")]) == 2
    assert "other.py" in capsys.readouterr().err


def test_grafted_file_is_not_grafted_again_and_the_source_is_not_overwritten(grafted, tmp_path):
    once = grafted()
    assert (
        graft(once, "-o", tmp_path / "twice.py") == 2
        and graft(once.parent / "run_clm.py", "-o", once.parent / "run_clm.py") == 2
    )
    assert (once.parent / "run_clm.py").read_text() == stand_in(NEWEST)
