"""Arguments in a .json or .yaml file."""

import json
import sys

import pytest
from tiny import losses

import run_chatglm_lora


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_one_file_of_arguments_equals_the_command_line(suffix, tmp_path, monkeypatch, run, llama, text_files):
    flags = ["--model_name_or_path", llama, "--train_file", text_files / "train.txt", "--max_steps", 2, "--do_train"]
    by_flags = run(flags, "--no_use_lora", "--learning_rate", "1e-2")
    lines = {
        "model_name_or_path": llama, "train_file": str(text_files / "train.txt"), "max_steps": 2, "do_train": True,
        "no_use_lora": True, "learning_rate": "1e-2", "output_dir": str(tmp_path / "by_file"), "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    path = tmp_path / f"arguments.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps({**lines, "learning_rate": 1e-2}))
    else:  # YAML reads 1e-2 as a string
        path.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    monkeypatch.setattr(sys, "argv", ["run_chatglm_lora.py", str(path)])
    run_chatglm_lora.main()
    assert losses(tmp_path / "by_file") == losses(by_flags)


def test_flags_after_a_file_of_arguments_override_it(tmp_path, monkeypatch):
    path = tmp_path / "args.yaml"
    path.write_text("learning_rate: 1e-4\nlora_r: 4\nuse_lora: true\nmax_steps: 7\noutput_dir: out\n")
    words = [str(path), "--lora_r", "16", "--no_padding_free", "--learning_rate=2e-3", "--use_cpu"]
    monkeypatch.setattr(sys, "argv", ["run_chatglm_lora.py", *words])
    _, _, chat_args, lora_args, training_args = run_chatglm_lora.parsed_arguments()
    assert (lora_args.lora_r, training_args.learning_rate, training_args.max_steps) == (16, 2e-3, 7)
    assert chat_args.no_padding_free and lora_args.lora_alpha == 32


@pytest.mark.parametrize("suffix", ["json", "yaml"])
@pytest.mark.parametrize("value, meant", [("true", "True"), ("false", None)])
def test_true_and_false_for_resuming_in_a_file_are_what_the_flag_means(tmp_path, monkeypatch, suffix, value, meant):
    path = tmp_path / f"args.{suffix}"
    path.write_text(f'{{"resume_from_checkpoint": {value}, "output_dir": "out", "use_cpu": true}}')
    monkeypatch.setattr(sys, "argv", ["run_chatglm_lora.py", str(path)])
    assert run_chatglm_lora.parsed_arguments()[-1].resume_from_checkpoint == meant


def arguments_in(path, text, monkeypatch):
    path.write_text(text + "\noutput_dir: out\nuse_cpu: true\n", "utf-8")
    monkeypatch.setattr(sys, "argv", ["run_chatglm_lora.py", str(path)])
    return run_chatglm_lora.parsed_arguments()


def test_values_in_a_file_are_read_as_those_of_a_command_line_are(tmp_path, monkeypatch):
    text = "lora_r: '8'\nuse_lora: 'false'\ntrain_file: [a.jsonl, b.jsonl]\nreport_to: [none]\nlora_dropout:\n"
    text = text.replace("use_lora", "do_sample") + "lr_scheduler_kwargs: {power: 2}\neval_strategy: off\n"
    _, data_args, chat_args, lora_args, training_args = arguments_in(tmp_path / "a.yaml", text, monkeypatch)
    assert (lora_args.lora_r, lora_args.lora_dropout, chat_args.do_sample) == (8, 0.1, False)
    assert (data_args.train_file, training_args.report_to) == ("a.jsonl,b.jsonl", [])
    assert (training_args.lr_scheduler_kwargs, training_args.eval_strategy) == ({"power": 2}, "no")


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("lora_r: 8.5", "--lora_r: invalid int value: '8.5'"),
        ("use_rslora: maybe", "--use_rslora: Truthy value expected: got maybe"),
        ("lora_bias: wrong", "--lora_bias: invalid choice: 'wrong'"),
        ("lora_r: 4\nlora_r: 8", "a.yaml: lora_r stands there twice: delete one."),
        ("learning_rate: .nan", "--learning_rate must be at least 0, not nan."),
    ],
)
def test_mistake_in_a_file_is_the_sentence_of_the_command_line(tmp_path, monkeypatch, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        arguments_in(tmp_path / "a.yaml", text, monkeypatch)
