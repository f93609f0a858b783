"""LoRA+, the last layers alone, early stopping, and the weighted sum of adapters."""

import json
import logging
import sys
from types import SimpleNamespace

import add_adapters
import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import CHAT_FLAGS, losses, results
from trained import write_adapter
from transformers import AutoModelForCausalLM, TrainingArguments

import chatglm  # noqa: F401
from finetuning import adapters, methods


@pytest.fixture
def flags(chatglm3, chats):
    return ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 4]


def saved(folder, name="adapter_model.safetensors"):
    return load_file(folder / name)


# -------------------------------------------------------------------------------------------------------------- LoRA+


def test_loraplus_moves_b_so_many_times_as_far_as_plain_lora_in_the_first_step(run, flags):
    """Adam's first step has the length of the rate; A's gradient is zero as long as B is, and decay moves it alone."""
    step = [flags, "--max_steps", 1, "--learning_rate", 1e-3, "--weight_decay", 0.5, "--lr_scheduler_type", "constant"]
    plain = saved(run(step))
    fast = saved(run(step, "--loraplus_lr_ratio", 16, output="fast"))
    for name, tensor in fast.items():
        ratio = 16 if "lora_B" in name else 1
        torch.testing.assert_close(tensor, plain[name] * ratio, rtol=1e-5, atol=1e-8)


def test_loraplus_goes_on_from_a_checkpoint_with_the_same_bytes(run, flags, tmp_path):
    flags = [flags, "--loraplus_lr_ratio", 8, "--weight_decay", 0.1, "--save_strategy", "steps", "--save_steps", 2]
    straight = run(flags)
    resumed = run(flags, "--resume_from_checkpoint", straight / "checkpoint-2", output="resumed")
    assert losses(resumed) == losses(straight) and losses(straight)[-1] < losses(straight)[0]
    name = "adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (straight / name).read_bytes()
    with pytest.raises(ValueError, match="--loraplus_lr_ratio 8.0, this run has 2.0: resume with the old value"):
        run(flags, "--loraplus_lr_ratio", 2, "--resume_from_checkpoint", straight / "checkpoint-2", output="other")


def test_loraplus_beside_an_optimizer_that_chooses_its_weights_is_refused(chatglm3, tmp_path, monkeypatch):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(chatglm3), peft.LoraConfig())
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    options = (None, {"params": [], "lr": 1})
    monkeypatch.setattr(methods.Trainer, "get_optimizer_cls_and_kwargs", lambda args, model: options)
    with pytest.raises(ValueError, match="and --loraplus_lr_ratio exclude each other"):
        methods.LoraPlus()(model, arguments, 16)
    with pytest.raises(ValueError, match="LoRA's two matrices, which this adapter has not"):
        methods.LoraPlus()(model.get_base_model().transformer.embedding, arguments, 16)


def test_loraplus_beside_an_optimizer_of_deepspeed_is_refused():
    config = {"optimizer": {"type": "AdamW"}}
    arguments = SimpleNamespace(deepspeed="ds.json", hf_deepspeed_config=SimpleNamespace(config=config))
    lora = SimpleNamespace(loraplus_lr_ratio=16, use_lora=True, pre_seq_len=None, peft_type="LORA")
    with pytest.raises(ValueError, match="--loraplus_lr_ratio: ds.json has an optimizer of its own"):
        methods.check_loraplus(lora, arguments)
    config.clear()
    methods.check_loraplus(lora, arguments)


# ---------------------------------------------------------------------------------------------------- the last layers


@pytest.mark.parametrize("checkpointing", [[], pytest.param(["--gradient_checkpointing"], marks=pytest.mark.slow)])
def test_last_layer_alone_is_trained_and_the_whole_model_saved(run, flags, chatglm3, checkpointing, caplog):
    """On another processor sums are rounded in another way, hence the tolerance of the losses."""
    with caplog.at_level(logging.INFO):
        folder = run(flags, "--train_last_layers", 1, "--log_level", "info", checkpointing)
    before = AutoModelForCausalLM.from_pretrained(chatglm3).state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {
        name for name in after if name.startswith("transformer.encoder.layers.1.") and "rotary" not in name
    }
    assert losses(folder) == pytest.approx(LAST_LAYER, rel=1e-4)
    assert "Part of the weights of" in (folder / "README.md").read_text()
    assert f"{sum(after[name].numel() for name in changed):,} of " in caplog.text


LAST_LAYER = [7.137836456298828, 5.844119548797607, 4.761228084564209, 4.24364709854126]


@pytest.mark.slow
def test_last_layers_go_on_from_a_checkpoint_with_the_same_bytes(run, flags):
    flags = [flags, "--train_last_layers", 1, "--save_strategy", "steps", "--save_steps", 2]
    straight = run(flags)
    resumed = run(flags, "--resume_from_checkpoint", straight / "checkpoint-2", output="resumed")
    assert (resumed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_layers_are_the_longest_list_that_lies_in_no_other(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.layers[0].mlp.experts = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(8))
    model.model.towers = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    assert methods.decoder_layers(model) is model.model.layers


def test_number_of_layers_that_the_model_has_not_is_refused(run, flags):
    with pytest.raises(ValueError, match="--train_last_layers must lie between 1 and 2, not be 3"):
        run(flags, "--train_last_layers", 3)


# ----------------------------------------------------------------------------------------------------------- patience


@pytest.fixture
def evaluated(flags, chats):
    """Evaluations whose loss falls at first and then grows, as the rate is far too high."""
    evaluation = [
        "--validation_file",
        chats,
        "--eval_strategy",
        "steps",
        "--eval_steps",
        1,
        "--save_strategy",
        "steps",
    ]
    return [flags, evaluation, "--save_steps", 1, "--load_best_model_at_end", "--learning_rate", 1, "--max_steps", 12]


def evaluations(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["eval_loss"] for entry in log if "eval_loss" in entry]


def test_training_ends_when_patience_does_with_the_best_model_and_a_resumed_one_goes_on_counting(run, evaluated):
    folder = run(evaluated, "--early_stopping_patience", 3)
    found = evaluations(folder)
    best = found.index(min(found))
    assert len(found) == best + 1 + 3 < 12
    assert (folder / "adapter_model.safetensors").read_bytes() == (
        folder / f"checkpoint-{best + 1}/adapter_model.safetensors"
    ).read_bytes()
    middle = folder / f"checkpoint-{best + 3}"  # two evaluations without a better one
    resumed = run(evaluated, "--early_stopping_patience", 3, "--resume_from_checkpoint", middle, output="resumed")
    assert evaluations(resumed) == found


# --------------------------------------------------------------------------------------- weighted sum of adapters


@pytest.fixture
def two(chatglm3, tmp_path):
    """Adapters of different ranks, scales and layers."""
    first = write_adapter(chatglm3, tmp_path / "first", target_modules=["query_key_value"])
    options = {"r": 2, "lora_alpha": 16, "target_modules": ["query_key_value", "dense"]}
    return [first, write_adapter(chatglm3, tmp_path / "second", **options)]


def test_weighted_sum_adds_what_the_adapters_add_to_each_weight(chatglm3, two):
    base = AutoModelForCausalLM.from_pretrained(chatglm3).state_dict()
    merged = [
        adapters.opened_adapter(AutoModelForCausalLM.from_pretrained(chatglm3), each, False).merge_and_unload()
        for each in two
    ]
    first, second = (model.state_dict() for model in merged)
    opened = adapters.weighted_sum(AutoModelForCausalLM.from_pretrained(chatglm3), two, [0.7, -0.3])
    assert list(opened.peft_config) == ["default"] and opened.active_peft_config.r == 6
    for name, tensor in opened.merge_and_unload().state_dict().items():
        expected = base[name] + 0.7 * (first[name] - base[name]) - 0.3 * (second[name] - base[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_sum_is_evaluated_and_answers(run, chatglm3, chats, two):
    how = ["--model_name_or_path", chatglm3, CHAT_FLAGS, "--validation_file", chats, "--test_file", chats, "--do_eval"]
    how = [how, "--do_predict", "--max_predict_samples", 2, "--max_target_length", 4]
    whole = ["--adapter_name_or_path", ",".join(two), "--adapter_weights"]
    alone = results(run(how, "--adapter_name_or_path", two[0], output="alone"), "eval")["eval_loss"]
    only_first = run(how, whole, "1,0", output="first")
    assert results(only_first, "eval")["eval_loss"] == pytest.approx(alone, rel=1e-6)
    assert results(run(how, whole, "0.5,0.5", output="both"), "eval")["eval_loss"] != pytest.approx(alone, rel=1e-3)
    assert len((only_first / "generated_predictions.jsonl").read_text().splitlines()) == 2


def test_sum_is_written_as_an_adapter_that_can_be_merged(chatglm3, two, tmp_path, monkeypatch, merge, capsys):
    monkeypatch.setattr(sys, "argv", ["add_adapters.py", ",".join(two), "0.7,-0.3", str(tmp_path / "sum")])
    add_adapters.main()
    with pytest.raises(SystemExit, match="Nothing was written: .*sum exists already"):
        add_adapters.main()
    folder, _ = merge(tmp_path / "sum")
    opened = adapters.weighted_sum(AutoModelForCausalLM.from_pretrained(chatglm3), two, [0.7, -0.3])
    expected = opened.merge_and_unload().state_dict()
    merged = load_file(folder / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"use_rslora": True}, {"bias": "all"}])
def test_adapter_that_is_more_than_two_matrices_is_not_added_up(chatglm3, two, tmp_path, option):
    more = write_adapter(chatglm3, tmp_path / "more", target_modules=["dense"], **option)
    with pytest.raises(ValueError, match=f"{more} was trained with {next(iter(option))}, which PEFT does not add up"):
        adapters.weighted_sum(AutoModelForCausalLM.from_pretrained(chatglm3), [two[0], more], [1, 1])


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--loraplus_lr_ratio 0", "--loraplus_lr_ratio must be above 0"),
        ("--loraplus_lr_ratio 16 --peft_type IA3", "for LoRA's two matrices: drop it, or train with --peft_type LORA"),
        (
            "--loraplus_lr_ratio 16 --no_use_lora",
            "--no_use_lora trains all weights and no adapter: drop it, or --lorap",
        ),
        (
            "--train_last_layers 1 --lora_r 4",
            "--train_last_layers trains whole layers and no adapter: drop it, or --lo",
        ),
        ("--train_last_layers 1 --pre_seq_len 4", "--train_last_layers and --pre_seq_len exclude each other"),
        ("--early_stopping_patience 0", "--early_stopping_patience must be at least 1, not 0"),
        ("--early_stopping_patience 3", "add --load_best_model_at_end, and --eval_strategy and --save_strategy"),
        ("--early_stopping_patience 3 --load_best_model_at_end", "add --eval_strategy and --save_strategy"),
        ("--adapter_name_or_path a,b", "--adapter_weights is a number for each .* it is None, and .* names 2"),
        ("--adapter_name_or_path a,b --adapter_weights 1", "it is 1, and --adapter_name_or_path names 2"),
        ("--adapter_name_or_path a --adapter_weights 1,2", "it is 1,2, and --adapter_name_or_path names 1"),
        ("--adapter_name_or_path a,b --adapter_weights 1,2", "to evaluate and predict with: drop it, or --do_train"),
    ],
)
def test_method_that_cannot_work_is_refused_before_anything_is_loaded(run, words, sentence):
    with pytest.raises(ValueError, match=sentence):
        run("--do_train", "--train_file", "x.jsonl", words.split())
