"""Plain text: run_clm.py's job, to the digit, and where its defects are mended."""

import json
import math
import shutil
from itertools import chain

import datasets
import pytest
from datasets import load_dataset
from processes import forked_program
from safetensors.torch import load_file
from tiny import COMMON, LINES, ROOT, losses, results
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import run_chatglm_lora


@pytest.fixture
def flags(llama, text_files):
    return [
        "--model_name_or_path", llama, "--train_file", text_files / "train.txt", "--validation_file",
        text_files / "valid.txt", "--block_size", 32, "--no_use_lora",
    ]  # fmt: skip


def test_losses_equal_those_of_a_program_that_only_calls_the_libraries(run, flags, llama, tmp_path):
    folder = run(flags, "--do_train", "--do_eval", "--max_steps", 6, "--seed", 7)

    set_seed(7)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    files = {"train": str(flags[3]), "validation": str(flags[5])}
    text = load_dataset("text", data_files=files, keep_linebreaks=True)
    blocks = {}
    for split, rows in text.items():
        ids = list(chain.from_iterable(tokenizer(rows["text"][:])["input_ids"]))
        cut = [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
        blocks[split] = datasets.Dataset.from_dict({"input_ids": cut, "labels": cut})
    args = TrainingArguments(
        str(tmp_path / "plain"), use_cpu=True, report_to="none", logging_steps=1, learning_rate=1e-2, max_steps=6,
        seed=7, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(llama), args, default_data_collator, blocks["train"], blocks["validation"]
    )
    trainer.train()
    assert losses(folder) == [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluation = results(folder, "eval")
    assert evaluation["eval_loss"] == trainer.evaluate()["eval_loss"]
    assert evaluation["perplexity"] == math.exp(evaluation["eval_loss"])
    assert (evaluation["eval_samples"], results(folder, "train")["train_samples"]) == (
        len(blocks["validation"]),
        len(blocks["train"]),
    )
    assert 0 < evaluation["eval_accuracy"] < 1


def test_run_writes_the_files_that_run_clm_writes(run, flags):
    folder = run(flags, "--do_train", "--do_eval", "--max_steps", 1)
    expected = "README.md all_results.json train_results.json eval_results.json trainer_state.json training_args.bin"
    expected += " config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json"
    assert set(expected.split()) <= {path.name for path in folder.iterdir()}


@pytest.fixture
def copied(tmp_path, flags):
    """Runs a copy of the script in a folder of its own, with what is installed at a place."""
    shutil.copy(ROOT / "run_chatglm_lora.py", tmp_path)

    def run_copy(installed):
        words = [*flags, "--do_train", "--max_steps", 1, "--output_dir", tmp_path / "out", *COMMON.split()]
        return forked_program("run_chatglm_lora.py", *words, cwd=tmp_path, packages=[installed])

    return run_copy


def test_copy_of_the_script_trains_where_the_package_is_installed(copied, tmp_path):
    for package in ("chatglm", "finetuning"):
        shutil.copytree(ROOT / package, tmp_path / "site" / package)
    assert copied(tmp_path / "site").returncode == 0
    assert (tmp_path / "out/model.safetensors").is_file()


def test_copy_of_the_script_without_the_package_says_so_in_one_sentence(copied, tmp_path):
    ended = copied(tmp_path / "nothing")
    assert ended.returncode == 1 and ended.stdout == ""
    assert "run_chatglm_lora.py needs its package `finetuning`: run it where it lies, or pip install" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_resumed_run_ends_with_the_same_weights_and_losses(run, flags):
    steps = ["--do_train", "--max_steps", 6, "--save_strategy", "steps", "--save_steps", 3]
    straight = run(flags, steps)
    resumed = run(flags, steps, "--resume_from_checkpoint", straight / "checkpoint-3", output="resumed")
    assert losses(resumed) == losses(straight)
    assert (resumed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_every_file_type_gives_the_same_losses(run, llama, tmp_path, suffix):
    rows = datasets.Dataset.from_dict({"number": list(range(40)), "text": LINES[:40]})
    path = tmp_path / f"train.{suffix}"
    getattr(rows, "to_" + suffix.replace("jsonl", "json"))(path)
    flags = ["--model_name_or_path", llama, "--do_train", "--max_steps", 2, "--block_size", 16, "--no_use_lora"]
    folder = run(flags, "--train_file", path)
    text = tmp_path / "train.txt"
    text.write_text("\n".join(LINES[:40]))
    expected = run(flags, "--train_file", text, "--no_keep_linebreaks", output="txt")
    assert losses(folder) == losses(expected)


@pytest.fixture
def folder_dataset(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.txt").write_text("\n".join(LINES[:100]))
    return folder


def test_streamed_split_loses_no_row(folder_dataset):
    args = run_chatglm_lora.DataTrainingArguments(dataset_name=str(folder_dataset), streaming=True)
    train = load_dataset(str(folder_dataset), split="train", streaming=True)
    parts = run_chatglm_lora.train_and_validation(train, args)
    rows = [[row["text"] for row in part] for part in parts]
    assert rows == [LINES[5:100], LINES[:5]]


@pytest.mark.parametrize(
    "percentage, sentence",
    [(100, "100 leaves no row of 100 to train on: lower it"), (101, "must lie between 0 and 100")],
)
def test_percentage_that_cannot_split_the_rows_is_refused(run, llama, text_files, percentage, sentence):
    flags = ["--model_name_or_path", llama, "--train_file", text_files / "train.txt", "--do_train"]
    with pytest.raises(ValueError, match=f"--validation_split_percentage.* {sentence}"):
        run(flags, "--validation_split_percentage", percentage)


def test_streaming_works_without_sample_caps(run, llama, folder_dataset):
    folder = run(
        "--model_name_or_path", llama, "--dataset_name", folder_dataset, "--streaming", "--do_train", "--do_eval",
        "--max_steps", 2, "--block_size", 16, "--no_use_lora",
    )  # fmt: skip
    assert "train_loss" in results(folder, "train") and "perplexity" in results(folder, "eval")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (["--block_size", 0], "--block_size must be at least 1, not 0"),
        (["--block_size", 60, "--validation_file", "short.txt"], "The validation data do not fill one block of 60"),
        (["--train_file", "blank.txt"], "The train data have no text: the column 'text' is empty in every row."),
        (["--predict_with_generate"], "--predict_with_generate answers questions, of which plain text has none"),
        (["--do_predict"], "--do_predict needs rows to answer: pass --test_file"),
    ],
)
def test_mistake_in_the_data_is_found_before_the_weights_are_loaded(
    run, flags, monkeypatch, tmp_path, change, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("seven lamps")
    (tmp_path / "blank.txt").write_text("\n" * 99)
    monkeypatch.setattr(run_chatglm_lora, "loaded_model", lambda *a: pytest.fail("the weights were loaded"))
    with pytest.raises(ValueError, match=sentence):
        run(flags, "--do_train", "--do_eval", change)


def test_training_without_a_training_split_says_so(run, llama, text_files):
    with pytest.raises(ValueError, match="--do_train needs training data: pass --train_file"):
        run("--model_name_or_path", llama, "--validation_file", text_files / "valid.txt", "--do_train")


def test_chatglm_6b_is_not_given_blocks_of_text(run, chatglm1, text_files):
    with pytest.raises(ValueError, match="ChatGLM-6B needs a .gMASK. and a <sop> in every row"):
        run("--model_name_or_path", chatglm1, "--train_file", text_files / "train.txt", "--do_train")


def test_model_from_scratch_follows_the_seed_and_the_overrides(run, llama, text_files):
    flags = [
        "--model_type", "gpt2", "--tokenizer_name", llama, "--train_file", text_files / "train.txt", "--do_train",
        "--config_overrides", "n_embd=16,n_layer=1,n_head=2,n_positions=64,vocab_size=320", "--max_steps", 1,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no weights to adapt: train them all with --no_use_lora"):
        run(flags)
    first, second = run(flags, "--no_use_lora"), run(flags, "--no_use_lora", output="again")
    assert load_file(first / "model.safetensors")["transformer.wte.weight"].shape == (320, 16)
    assert losses(first) == losses(second)
    assert json.loads((first / "config.json").read_text())["n_layer"] == 1
    with pytest.raises(ValueError, match="--config_overrides n=1: key n isn't in the original config"):
        run(flags, "--no_use_lora", "--config_overrides", "n=1")
    with pytest.raises(
        ValueError, match="--model_type gtp2 is none of transformers' model types. Did you mean 'gpt2'"
    ):
        run(flags, "--no_use_lora", "--model_type", "gtp2")


def test_tokens_that_the_model_lacks_get_embeddings(run, flags, llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folder = run(flags, "--tokenizer_name", tmp_path / "tokenizer", "--do_train", "--max_steps", 1)
    assert load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape[0] == len(tokenizer)


@pytest.mark.parametrize(
    "block_size, longest, positions, expected",
    [
        (None, 64, 128, 64),
        (None, 10**30, 2048, 1024),
        (None, 10**30, 512, 512),
        (None, 64, -1, 1024),
        (99, 64, 16, 64),
    ],
)
def test_block_size_follows_tokenizer_and_model(block_size, longest, positions, expected, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "model_max_length", longest)
    args = run_chatglm_lora.DataTrainingArguments(train_file="a.txt", block_size=block_size)
    config = GPT2Config(n_positions=positions)
    assert run_chatglm_lora.chosen_block_size(args, tokenizer, config) == expected


def test_stream_of_one_text_file_is_split_as_upstream_splits_it(run, llama, text_files):
    flags = ["--model_name_or_path", llama, "--train_file", text_files / "train.txt", "--block_size", 32]
    folder = run(flags, "--no_use_lora", "--streaming", "--do_train", "--max_steps", 2)
    assert len(losses(folder)) == 2


def test_csv_cells_are_trained_as_they_are_written_and_null_is_an_empty_text(run, llama, tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + '007\nNA\n1.10\n""\n' * 9)
    (tmp_path / "a.jsonl").write_text('{"text": "007"}\n{"text": "NA"}\n{"text": "1.10"}\n{"text": null}\n' * 9)
    (tmp_path / "a.txt").write_text("007\nNA\n1.10\n\n" * 9)
    common = ["--model_name_or_path", llama, "--do_train", "--max_steps", 2, "--block_size", 8, "--no_use_lora"]
    common += ["--no_keep_linebreaks", "--validation_split_percentage", 0]
    found = [
        losses(run(common, "--train_file", tmp_path / f"a.{name}", output=name)) for name in ("csv", "jsonl", "txt")
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.txt", "你好".encode("gb18030") * 9, "a.txt, line 1: not UTF-8. If it is a Chinese encoding: iconv"),
        ("a.txt", "你好".encode("utf-16"), "a.txt is UTF-16. Save it as UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', "a.jsonl, line 2, column 10: not JSON: Unterminated"),
        (
            "a.jsonl",
            b'{"text": 12}\n' * 9,
            r"column 'text' is to be trained as text, and 12 \(a number\) is found in it",
        ),
        (
            "a.csv",
            b"id,body\n7,seven lamps\n" * 9,
            r"The data have the columns \['id', 'body'\], whose names are not kno",
        ),
    ],
)
def test_text_that_cannot_be_read_or_is_none_is_named(run, llama, tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        run("--model_name_or_path", llama, "--do_train", "--train_file", tmp_path / name, "--block_size", 8)


def test_text_of_one_line_is_trained_though_no_row_is_left_for_validation(run, llama, tmp_path):
    (tmp_path / "a.txt").write_text("seven lamps before dawn " * 9)
    flags = ["--model_name_or_path", llama, "--do_train", "--train_file", tmp_path / "a.txt", "--block_size", 8]
    assert len(losses(run(flags, "--max_steps", 1))) == 1


def test_dropping_the_last_batch_of_an_evaluation_is_said_and_dropping_all_is_an_error(run, flags, caplog):
    run(flags, "--do_eval", "--dataloader_drop_last", "--per_device_eval_batch_size", 2)
    assert "--dataloader_drop_last leaves the last rows of evaluations out as well" in caplog.text
    with pytest.raises(ValueError, match="--do_eval: --dataloader_drop_last left no batch: lower --per_device_eval_b"):
        run(flags, "--do_eval", "--dataloader_drop_last", "--per_device_eval_batch_size", 4096)
