"""Answers to a few fixed questions while a model is trained."""

import importlib.util
import json
import re
from types import SimpleNamespace

import pytest
from tiny import CHAT_FLAGS, losses

from finetuning import samples
from finetuning.prediction import write_lines


@pytest.fixture
def flags(llama, chats):
    lengths = ["--max_source_length", 64, "--max_target_length", 4, "--max_eval_samples", 2]
    files = ["--train_file", chats, "--validation_file", chats, "--do_train", "--do_eval", "--max_steps", 4]
    return ["--model_name_or_path", llama, files, CHAT_FLAGS, lengths]


@pytest.fixture
def questions(tmp_path):
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "seven lamps"}]
    file = tmp_path / "questions.txt"
    file.write_text("who paints the door\n\n" + json.dumps({"messages": messages}) + "\n")
    return ["--sample_prompts", file]


def lines(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_questions_are_answered_at_each_evaluation_and_at_the_end(run, flags, questions):
    folder = run(flags, questions, "--eval_strategy", "steps", "--eval_steps", 3)
    found = lines(folder)
    assert [(line["step"], line["prompt"]) for line in found] == [
        (step, prompt) for step in (3, 4) for prompt in ("who paints the door", "seven lamps")
    ]
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logged = {
        (entry["step"], name): entry[name] for entry in log for name in ("sample_1", "sample_2") if name in entry
    }
    assert list(logged.values()) == [line["answer"] for line in found]


@pytest.mark.parametrize(
    "more", [["--gradient_checkpointing"], ["--do_sample", "--temperature", 2, "--lora_dropout", 0.5]]
)
def test_training_goes_on_as_without_them(run, flags, questions, more):
    evaluations = ["--eval_strategy", "steps", "--eval_steps", 1, *more]
    without = run(flags, evaluations, output="without")
    having = run(flags, evaluations, questions, output="with")
    assert losses(having) == losses(without) and len(lines(having)) == 8
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (without, having)]
    assert weights[0] == weights[1]


def test_resumed_run_has_the_lines_of_one_that_was_not_stopped(run, flags, questions):
    evaluations = ["--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "steps", "--save_steps", 2]
    whole = run(flags, questions, evaluations)
    expected = lines(whole)
    with open(whole / "samples.jsonl", "a") as file:
        file.write('{"step": 4, "half')
    run(flags, questions, evaluations, "--resume_from_checkpoint", whole / "checkpoint-2")
    assert lines(whole) == expected


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("\n", "holds no question: write one a line."),
        ('{"messages": [{"role": "user"', "line 1, column"),
        ('{"messages": []}', "line 1, column 'messages': [] (a list) is found, a list of messages is expected."),
    ],
)
def test_mistake_in_the_file_is_named_with_its_line(run, flags, tmp_path, text, sentence):
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        run(flags, "--sample_prompts", tmp_path / "bad.txt")


def test_lines_of_questions_and_answers_end_at_newlines_alone(tmp_path):
    """A mark at the beginning of the file is none of the question; U+2028 and U+0085 stand within lines."""
    row = {"messages": [{"role": "user", "content": "a\u2028b\x85"}]}
    (tmp_path / "q.txt").write_text("\ufeffwho\n" + json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert [each["row"] for each in samples.sample_rows(tmp_path / "q.txt")] == [
        samples.row_of_line("who"), json.dumps(row, ensure_ascii=False)
    ]  # fmt: skip
    said = {"step": 1, "prompt": "p", "answer": "a\u2028b"}
    write_lines(tmp_path / "samples.jsonl", [said, {**said, "step": 5}], "w")
    args = SimpleNamespace(output_dir=tmp_path, should_save=True)
    samples.SampleAnswers.on_train_begin(None, args, SimpleNamespace(global_step=3), None)
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_bytes().splitlines()] == [said]
    (tmp_path / "q.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="q.txt, line 1: not UTF-8"):
        samples.sample_rows(tmp_path / "q.txt")


def test_file_without_a_good_question_is_told(run, flags, tmp_path):
    (tmp_path / "bad.txt").write_text("{}\n")
    with pytest.raises(ValueError, match="All 1 samples rows are bad; the first: --sample_prompts .*bad.txt, line 1"):
        run(flags, "--sample_prompts", tmp_path / "bad.txt", "--skip_bad_rows")


def test_questions_need_a_training_on_conversations(run, llama, text_files, questions):
    text = ["--model_name_or_path", llama, "--train_file", text_files / "train.txt", "--block_size", 16]
    with pytest.raises(ValueError, match="--sample_prompts are questions, of which plain text has none"):
        run(text, "--do_train", questions)
    with pytest.raises(ValueError, match="--sample_prompts are answered while a model is trained: add --do_train"):
        run(text, "--do_eval", questions)


def test_line_is_a_question_or_a_row(tmp_path):
    assert json.loads(samples.row_of_line(" 你好 "))["messages"] == [{"role": "user", "content": "你好"}]
    (tmp_path / "mark.txt").write_text("你好", "utf-8-sig")  # as Windows writes it
    assert json.loads(samples.sample_rows(tmp_path / "mark.txt")["row"][0])["messages"][0]["content"] == "你好"
    assert samples.row_of_line('{"messages": 1}') == '{"messages": 1}'


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="needs tensorboard")
def test_tensorboard_has_our_metrics_and_the_samples(run, flags, questions, monkeypatch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    folder = run(flags, questions, "--report_to", "tensorboard", "--eval_strategy", "epoch")
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert {"train/loss", "train/tokens_per_second", "eval/accuracy", "eval/token_loss"} <= set(
        events.Tags()["scalars"]
    )
    assert [round(event.value, 4) for event in events.Scalars("train/loss")] == [
        pytest.approx(loss, abs=1e-4) for loss in losses(folder)
    ]
    answers = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("train/sample_1/text_summary")]
    assert answers == [line["answer"] for line in lines(folder)[::2]]


@pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="needs trackio")
def test_trackio_has_our_metrics_and_the_samples_offline(run, flags, questions, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder = run(flags, questions, "--report_to", "trackio", "--run_name", "tea", "--project", "house")
    from trackio.sqlite_storage import SQLiteStorage

    logged = SQLiteStorage.get_logs("house", "tea")
    assert [entry["train/loss"] for entry in logged if "train/loss" in entry] == losses(folder)
    assert sum("train/tokens_per_second" in entry for entry in logged) == len(losses(folder))
    assert [entry["train/sample_1"] for entry in logged if "train/sample_1" in entry] == [lines(folder)[0]["answer"]]
