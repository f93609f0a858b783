"""A resumed run is the run that was never stopped; with other settings it does not go on in silence."""

import json
import logging
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from tiny import CHAT_FLAGS, CHATML, CHATS, ROOT, losses, write_jsonl
from transformers import TrainingArguments

from finetuning.checkpoints import CHANGES_THE_RESULT, FROM_HERE_ON, HARMLESS, MANIFEST


@pytest.fixture
def flags(chatglm3, chats):
    model = ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 20]
    return [model, "--per_device_train_batch_size", 2, "--save_strategy", "steps", "--save_steps", 10]


RUNS = {
    "LoRA with dropout, rows end to end": [],
    "padded rows": ["--no_padding_free"],
    "packed rows": ["--pack_to_length", 128],
    "gradient accumulation": ["--gradient_accumulation_steps", 3, "--max_grad_norm", 0.5],
    "data loader workers": ["--dataloader_num_workers", 2],
    "full fine-tuning": ["--no_use_lora", "--learning_rate", 1e-3],
    "rows of like length together": ["--train_sampling_strategy", "group_by_length"],
    "prefix tuning": ["--peft_type", "PREFIX_TUNING", "--num_virtual_tokens", 4],
}


def history(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name: entry[name] for name in ("step", "loss", "grad_norm", "learning_rate")} for entry in log[:-1]]


@pytest.mark.slow
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_ten_steps_and_ten_more_are_twenty(run, flags, options):
    """Losses, gradient norms, learning rates, weights, and the random state at the end."""
    straight = run(flags, options)
    first = straight / "checkpoint-10"
    resumed = run(flags, options, "--resume_from_checkpoint", first, output="resumed")
    assert history(resumed) == history(straight) and len(history(straight)) == 20
    name = "model.safetensors" if "--no_use_lora" in options else "adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (straight / name).read_bytes()
    state = "checkpoint-20/rng_state.pth"
    assert (resumed / state).read_bytes() == (straight / state).read_bytes()


STREAMS = {
    "in one process": [],
    "by workers": ["--dataloader_num_workers", 2, "--gradient_accumulation_steps", 2],
    "packed": ["--pack_to_length", 128],
}


@pytest.mark.slow
@pytest.mark.parametrize("options", STREAMS.values(), ids=STREAMS.keys())
def test_streamed_data_go_on_where_they_stopped(run, flags, tmp_path, options):
    data = tmp_path / "data"
    data.mkdir()
    for part in range(2):  # a worker reads whole files
        write_jsonl(data / f"train-{part}.jsonl", CHATS[part:])
    flags = [flags, "--dataset_name", data, "--streaming", options]
    straight = run(flags)
    resumed = run(flags, "--resume_from_checkpoint", straight / "checkpoint-10", output="resumed")
    assert history(resumed) == history(straight) and len(history(straight)) == 20
    name = "adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (straight / name).read_bytes()


# ------------------------------------------------------------------------------------- which checkpoint is meant


@pytest.fixture
def stopped(run, flags):
    """Output folder with checkpoints of steps 2 and 4 of 6."""
    return run(flags, "--max_steps", 6, "--save_steps", 2)


@pytest.mark.parametrize("words", [["True"], ["last"], []], ids=["True", "last", "bare"])
def test_newest_whole_checkpoint_is_meant_by_true_last_and_no_word(run, flags, stopped, caplog, words):
    expected = losses(stopped)
    (stopped / "checkpoint-6" / MANIFEST).unlink()
    (stopped / "checkpoint-4/optimizer.pt").unlink()
    with caplog.at_level(logging.INFO):
        command = ["--log_level", "info", "--max_steps", 6, "--save_steps", 2, "--resume_from_checkpoint", *words]
        run(flags, command)
    assert f"{stopped / 'checkpoint-6'} has no {MANIFEST}" in caplog.text
    assert f"{stopped / 'checkpoint-4'} lacks optimizer.pt. It is passed over." in caplog.text
    assert f"Resuming from {stopped / 'checkpoint-2'}" in caplog.text
    assert losses(stopped) == expected


@pytest.mark.slow
def test_checkpoint_written_last_is_newest_after_a_run_that_started_anew(run, flags, caplog):
    folder = run(flags, "--max_steps", 4, "--save_steps", 4)
    run(flags, "--max_steps", 2, "--save_steps", 2)
    assert "holds checkpoints of an earlier run. This one starts anew" in caplog.text
    with caplog.at_level(logging.INFO):
        run(flags, "--max_steps", 2, "--log_level", "info", "--resume_from_checkpoint", "last")
    assert f"Resuming from {folder / 'checkpoint-2'}" in caplog.text


def test_last_starts_a_run_that_has_no_checkpoint_yet_and_true_does_not(run, flags, caplog):
    flags = [flags, "--max_steps", 2, "--resume_from_checkpoint"]
    with pytest.raises(ValueError, match="out holds no whole checkpoint"):
        run(flags, "True")
    assert len(losses(run(flags, "last"))) == 2
    assert "holds no whole checkpoint yet: the run starts at its first step" in caplog.text


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_missing_state_is_an_error_and_not_a_fresh_start(run, flags, stopped, name):
    (stopped / "checkpoint-4" / name).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-4 lacks {name}"):
        run(flags, "--resume_from_checkpoint", stopped / "checkpoint-4", output="resumed")
    (stopped / "checkpoint-4" / MANIFEST).unlink()  # as a checkpoint of another program is
    with pytest.raises(ValueError, match=f"checkpoint-4 cannot be resumed from: it lacks {name}"):
        run(flags, "--resume_from_checkpoint", stopped / "checkpoint-4", output="resumed")


def test_checkpoint_of_another_program_is_resumed_from_by_its_path(run, flags, stopped):
    for part in ("4", "6"):
        (stopped / f"checkpoint-{part}" / MANIFEST).unlink()
    flags = [flags, "--max_steps", 6, "--resume_from_checkpoint", stopped / "checkpoint-4"]
    assert losses(run(flags, output="resumed")) == losses(stopped)
    with pytest.raises(ValueError, match="--lora_alpha 32, this run has 16"):
        run(flags, "--lora_alpha", 16, output="other")


def test_file_of_another_programs_checkpoint_that_was_cut_short_is_named(run, flags, stopped):
    checkpoint = stopped / "checkpoint-4"
    (checkpoint / MANIFEST).write_text("{}")  # no manifest either
    with pytest.raises(ValueError, match=f"has no {MANIFEST}: it was not written to its end, or not by this script"):
        run(flags, "--resume_from_checkpoint", checkpoint, output="resumed")
    (checkpoint / MANIFEST).unlink()
    for name in ("trainer_state.json", "scheduler.pt", "adapter_model.safetensors"):  # the last in order first
        (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:50])
        with pytest.raises(ValueError, match=f"checkpoint-4/{name} cannot be read: copy the checkpoint again: "):
            run(flags, "--resume_from_checkpoint", checkpoint, output="resumed")


def test_path_that_is_no_folder_is_an_error(run, flags):
    with pytest.raises(ValueError, match="nowhere is no folder. Pass last"):
        run(flags, "--resume_from_checkpoint", "nowhere")


def test_truncated_file_is_named_with_its_size(run, flags, stopped):
    path = stopped / "checkpoint-4/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint-4 has 100 bytes of adapter_model.safetensors instead of \d+"):
        run(flags, "--resume_from_checkpoint", stopped / "checkpoint-4", output="resumed")


CHANGES = {
    "--weight_decay": ([0.1], "--weight_decay 0.0, this run has 0.1"),
    "--adam_beta2": ([0.9], "--adam_beta2 0.999, this run has 0.9"),
    "--warmup_steps": ([3], "--warmup_steps 0, this run has 3"),
    "--lr_scheduler_kwargs": (['{"last_epoch": -1}'], "--lr_scheduler_kwargs None, this run has {'last_epoch': -1}"),
    "--neftune_noise_alpha": ([5], "--neftune_noise_alpha None, this run has 5.0"),
    "--bf16": ([], "--bf16 False, this run has True"),
    "--init_lora_weights": (["pissa"], "--init_lora_weights 'true', this run has 'pissa'"),
    "--lora_alpha": ([16], "--lora_alpha 32, this run has 16: resume with the old value .--lora_alpha 32."),
    "--lora_r": ([4], "--lora_r 8, this run has 4"),
    "--lora_target_modules": (["dense"], "--lora_target_modules None, this run has 'dense'"),
    "--seed": ([7], "--seed 42, this run has 7"),
    "--learning_rate": ([1e-3], "--learning_rate 0.01, this run has 0.001"),
    "--per_device_train_batch_size": ([4], "--gradient_accumulation_steps 2, this run has 4"),
    "--max_source_length": ([9], "the training data .* '16 examples, .*', this run has '16 examples, "),
    "--no_use_lora": ([], "--use_lora True, this run has False"),
}


def test_other_settings_than_the_checkpoints_are_refused_with_both_values(run, flags, stopped, chats):
    resume = ["--resume_from_checkpoint", stopped / "checkpoint-4"]
    for flag, (value, sentence) in CHANGES.items():
        with pytest.raises(ValueError, match=sentence):
            run(flags, resume, flag, value, output="resumed")


def test_changes_from_here_on_are_said_in_a_line_each(run, flags, stopped, caplog):
    changes = ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2, "--no_padding_free"]
    run(flags, changes, "--max_steps", 8, "--resume_from_checkpoint", stopped / "checkpoint-4", output="resumed")
    changed = [line for line in caplog.messages if line.endswith("from here on.")]
    assert sorted(changed) == [
        "--gradient_accumulation_steps was 1 up to checkpoint-4, and is 2 from here on.",
        "--max_steps was 6 up to checkpoint-4, and is 8 from here on.",
        "--no_padding_free was False up to checkpoint-4, and is True from here on.",
        "--per_device_train_batch_size was 2 up to checkpoint-4, and is 1 from here on.",
    ]


def test_every_field_of_training_arguments_is_sorted_once():
    tables = [CHANGES_THE_RESULT, FROM_HERE_ON, HARMLESS]
    places = {field.name: sum(field.name in table for table in tables) for field in fields(TrainingArguments)}
    assert {name: count for name, count in places.items() if count != 1} == {}


def test_checkpoint_of_the_last_version_goes_on_with_the_losses_that_it_had_there(run, tmp_path, monkeypatch):
    """Written by commit 811b4dd with these flags; on another processor sums are rounded in another way."""
    shutil.copytree(ROOT / "tests/assets/checkpoint_of_811b4dd", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    flags = "--model_name_or_path base --train_file chats.jsonl --do_train --max_steps 4 --lora_r 2 --save_steps 2"
    flags += " --max_target_length 16 --max_source_length 32 --per_device_train_batch_size 2"
    folder = run(*flags.split(), "--resume_from_checkpoint", "checkpoint-2")
    assert losses(folder) == pytest.approx(LOSSES_OF_811B4DD, rel=1e-5)


LOSSES_OF_811B4DD = [3.328157663345337, 3.5176093578338623, 3.332681655883789, 3.073087453842163]


@pytest.mark.parametrize("flags_of_no_step", [["--dataloader_drop_last"], ["--num_train_epochs", 0]])
def test_run_without_a_step_is_an_error_and_saves_nothing(run, chatglm3, chats, tmp_path, flags_of_no_step):
    model = ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train"]
    with pytest.raises(ValueError, match="Nothing is trained, and nothing saved: 16 examples, .* make no step"):
        run(model, "--per_device_train_batch_size", 17, flags_of_no_step)
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def test_other_data_are_refused_and_moved_data_are_not(run, flags, stopped, chats, tmp_path):
    resume = ["--resume_from_checkpoint", stopped / "checkpoint-4"]
    rows = [json.loads(line) for line in Path(chats).read_text().splitlines()]
    moved = write_jsonl(tmp_path / "moved.jsonl", rows)
    assert losses(run(flags, "--max_steps", 6, "--train_file", moved, resume, output="moved")) == losses(stopped)
    rows[3]["response"] += " dawn"
    with pytest.raises(ValueError, match="the training data"):
        run(flags, "--train_file", write_jsonl(tmp_path / "changed.jsonl", rows), resume, output="changed")


def test_another_prompt_format_is_refused(run, flags, llama, tmp_path):
    flags = [flags, "--model_name_or_path", llama, "--max_target_length", 20, "--max_steps", 2, "--save_steps", 2]
    folder = run(flags)
    shutil.copytree(llama, tmp_path / "tokenizer")
    (tmp_path / "tokenizer/chat_template.jinja").write_text(CHATML.replace("<|im_start|>", "<|im_start|>the "))
    resume = ["--resume_from_checkpoint", folder / "checkpoint-2"]
    with pytest.raises(ValueError, match="the prompt format .*start[|]>assistant.*, this run has .*start[|]>the "):
        run(flags, "--tokenizer_name", tmp_path / "tokenizer", resume, output="format")


@pytest.mark.slow
def test_best_and_newest_checkpoints_survive_the_limit(run, flags, chats):
    evaluation = ["--do_eval", "--validation_file", chats, "--eval_strategy", "steps", "--eval_steps", 2]
    best = ["--load_best_model_at_end", "--metric_for_best_model", "loss", "--greater_is_better", "True"]
    folder = run(flags, evaluation, best, "--max_steps", 8, "--save_steps", 2, "--save_total_limit", 2)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-8"]
    result = folder / "adapter_model.safetensors"
    chosen = (folder / "checkpoint-2" / result.name).read_bytes()
    assert result.read_bytes() == chosen
    result.unlink()  # a finished run writes its result again: the best model, not the last
    run(flags, evaluation, best, "--max_steps", 8, "--save_steps", 2, "--resume_from_checkpoint", "last")
    assert result.read_bytes() == chosen
    folder = run(flags, evaluation, best, "--max_steps", 4, "--save_steps", 2, "--save_total_limit", 1, output="one")
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
