"""What a person sees: a screen before the first step, known warnings left out, and what to do next."""

import logging
import warnings
from types import SimpleNamespace

import pytest
from tiny import CHAT_FLAGS

from finetuning import screen
from finetuning.training_checks import few_lines


@pytest.fixture
def log(caplog):
    """The lines that the script logged, without those of libraries."""

    def lines():
        records = [record for record in caplog.records if record.name.startswith("run_chatglm_lora")]
        return [line for record in records for line in record.getMessage().splitlines()]

    return lines


@pytest.fixture
def flags(chatglm3, chats):
    return ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 2]


def test_screen_before_the_first_step_holds_what_a_person_needs(run, flags, log):
    folder = run(flags, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2)
    lines = log()
    assert len(lines) <= 30
    text = "\n".join(lines)
    assert lines[0].startswith("1 process on cpu, mixed precision: no; torch ")
    assert "Data of train: 16 rows, 16 examples of " in text and " tokens in the median and " in text
    assert (
        "Model: ChatGLMForConditionalGeneration (chatglm), " in text
        and " weights in torch.float32, attention: " in text
    )
    assert "Trainable parameters: " in text
    assert "Training: 2 steps of 4 examples (2 a device, 2 batches accumulated), about " in text
    assert f"Saved to: {folder}" in text and "The first example; what stands in 【】 is trained:" in text
    assert "TrainingArguments(" not in text


def test_end_says_how_to_chat_predict_and_merge(run, flags, log, chatglm3):
    folder = run(flags)
    chat, predict, merge = log()[-3:]
    assert chat.startswith("Chat: ") and chat.endswith(f"scripts/chat.py {folder}")
    assert predict.endswith(f"scripts/predict.sh {chatglm3} {folder} QUESTIONS.jsonl {folder}_answers")
    assert merge.endswith(f"scripts/merge_lora.py {folder} {folder}_merged")


def test_log_level_info_shows_the_training_arguments_as_upstream_does(run, flags, log):
    run(flags, "--log_level", "info")
    assert any("Training arguments: TrainingArguments(" in line for line in log())


def test_libraries_are_heard_from_warnings_on(run, flags, caplog):
    run(flags)
    others = [record for record in caplog.records if not record.name.startswith("run_chatglm_lora")]
    assert all(record.levelno >= logging.WARNING for record in others)
    assert logging.getLogger("transformers").level == logging.WARNING


def test_replica_is_silent_unless_it_is_given_a_level(monkeypatch):
    for replica, expected in (("warning", logging.ERROR), ("info", logging.INFO)):
        args = SimpleNamespace(
            log_level="passive", should_log=False, log_level_replica=replica, world_size=2, bf16=False, fp16=False,
            get_process_log_level=lambda: logging.INFO, device=SimpleNamespace(type="cpu"),
        )  # fmt: skip
        screen.set_up_logging(args)
        assert screen.logger.level == expected


def test_harmless_warnings_are_left_out_and_any_other_stays():
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        screen.hide_harmless()
        warnings.warn("`torch.distributed.all_gather_into_tensor` is deprecated. Use", FutureWarning, stacklevel=1)
        warnings.warn("`torch.distributed.something_else` is deprecated. Use", FutureWarning, stacklevel=1)
    assert [str(each.message) for each in met] == ["`torch.distributed.something_else` is deprecated. Use"]
    assert all(reason for *_, reason in [*screen.HARMLESS_WARNINGS, *screen.HARMLESS_MESSAGES])


def test_long_first_example_keeps_its_first_and_last_lines():
    text = "\n".join(map(str, range(30)))
    assert few_lines(text).splitlines() == [*"01234", "[20 lines]", *map(str, range(25, 30))]
    assert few_lines("a\nb") == "a\nb"


def test_brief_line_names_level_and_library_of_a_warning():
    brief = screen.Brief()

    def line(name, level):
        return brief.format(logging.LogRecord(name, level, "", 0, "text", (), None))

    assert line("run_chatglm_lora.data", logging.INFO) == "text"
    assert line("run_chatglm_lora.data", logging.WARNING) == "WARNING: text"
    assert line("accelerate", logging.WARNING) == "WARNING (accelerate): text"


def test_answers_have_a_progress_bar(run, chatglm3, chats, capsys):
    predict = ["--do_predict", "--test_file", chats, CHAT_FLAGS, "--max_target_length", 4, "--disable_tqdm", "False"]
    run("--model_name_or_path", chatglm3, predict)
    assert "Answering: 100%" in capsys.readouterr().err
