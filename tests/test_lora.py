"""Adapters: what is trained, what is saved, and that plain PEFT opens it."""

import json
import logging

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import CHAT_FLAGS, losses, results
from transformers import AutoModelForCausalLM, AutoTokenizer

import chatglm  # noqa: F401
import run_chatglm_lora
from finetuning.lora_layers import adapter_config, checked_modules
from run_chatglm_lora import LoraArguments


ATTENTION = ("query_key_value", "dense")


@pytest.fixture
def flags(chatglm3, chats):
    return ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 4]


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.oldest
def test_adapter_loads_in_plain_peft_and_gives_the_trained_model(run, flags, chatglm3, monkeypatch):
    trained = []
    monkeypatch.setattr(run_chatglm_lora, "publish", lambda trainer, *args: trained.append(trainer.model.eval()))
    folder = run(flags)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chatglm3), folder).eval()
    ids = torch.arange(5, 30)[None]
    assert torch.equal(loaded(ids).logits, trained[0](ids).logits)
    assert not torch.equal(loaded(ids).logits, AutoModelForCausalLM.from_pretrained(chatglm3)(ids).logits)
    assert isinstance(AutoTokenizer.from_pretrained(folder).encode("你好"), list)


def test_lora_goes_into_query_key_value_of_chatglm_by_default(run, flags, caplog):
    with caplog.at_level(logging.INFO):
        folder = run(flags, "--log_level", "info")
    assert set(adapter(folder)) == {
        f"base_model.model.transformer.encoder.layers.{layer}.self_attention.query_key_value.lora_{part}.weight"
        for layer in (0, 1)
        for part in "AB"
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 32, 0.1)
    trainable = sum(tensor.numel() for tensor in adapter(folder).values())
    assert f"Trainable parameters: {trainable:,} of " in caplog.text


@pytest.mark.parametrize(
    "value, layers",
    [
        ("dense,dense_4h_to_h", {"self_attention.dense", "mlp.dense_4h_to_h"}),
        (r".*layers\.1\.mlp\.dense.*", {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
        ("all-linear", {f"self_attention.{n}" for n in ATTENTION} | {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
    ],
)
def test_targets_are_names_a_regular_expression_or_all_linear(chatglm3, value, layers):
    model = AutoModelForCausalLM.from_pretrained(chatglm3)
    config = adapter_config(model, LoraArguments(lora_target_modules=value))
    names = [name for name, _ in peft.get_peft_model(model, config).named_parameters() if "lora_A" in name]
    assert {name.split("layers.")[1][2:].split(".lora_A")[0] for name in names} == layers


@pytest.mark.parametrize("flag", ["--lora_target_modules", "--lora_modules_to_save"])
def test_unknown_layer_is_refused_with_near_names(run, flags, flag):
    with pytest.raises(
        ValueError, match=f"{flag}: the model has no layer 'query_value'. Did you mean 'query_key_value'"
    ):
        run(flags, flag, "query_value")


def test_named_layers_are_saved_whole(run, flags):
    saved = adapter(run(flags, "--lora_modules_to_save", "output_layer"))
    assert [tuple(t.shape) for name, t in saved.items() if name.endswith("output_layer.weight")]
    assert checked_modules(torch.nn.Linear(1, 1), None, "") is None


VARIANTS = ["--use_rslora"], ["--use_dora"], ["--init_lora_weights", "pissa"], ["--lora_bias", "lora_only"]


@pytest.mark.parametrize("options", VARIANTS)
def test_variants_of_lora_train_and_reopen(run, flags, chatglm3, options):
    folder = run(flags, options)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chatglm3), folder)
    assert losses(folder)[-1] != losses(folder)[0]


@pytest.mark.oldest
@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--prefix_projection"]])
def test_prefix_tuning_trains_saves_and_predicts(run, flags, chats, options):
    options = ["--peft_type", "PREFIX_TUNING", "--num_virtual_tokens", 4, *options]
    predict = ["--do_predict", "--test_file", chats, "--max_predict_samples", 3, "--max_target_length", 8]
    folder = run(flags, options, predict)
    kept = run(flags[:4], CHAT_FLAGS, predict, "--adapter_name_or_path", folder, output="reloaded")
    answers = [(f / "generated_predictions.jsonl").read_text() for f in (folder, kept)]
    assert answers[0] == answers[1] and len(set(losses(folder))) == 4


@pytest.mark.oldest
@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatglm1", "chatglm2", "glm4_checkpoint"])
def test_every_generation_trains_evaluates_and_answers(run, name, chats, request):
    flags = ["--train_file", chats, "--validation_file", chats, "--test_file", chats, CHAT_FLAGS]
    stages = ["--do_train", "--do_eval", "--do_predict", "--max_steps", 6, "--max_target_length", 12]
    model = ["--model_name_or_path", request.getfixturevalue(name), "--max_predict_samples", 3]
    folder = run(model, flags, stages, "--learning_rate", 3e-2)
    assert losses(folder)[-1] < losses(folder)[0] and results(folder, "eval")["eval_loss"] < losses(folder)[0]
    assert all("query_key_value" in tensor for tensor in adapter(folder))
    answer = ["--do_predict", "--max_target_length", 12, "--adapter_name_or_path", folder]
    again = run(model, flags, answer, output="again")
    rows = [(path / "generated_predictions.jsonl").read_text() for path in (folder, again)]
    assert rows[0] == rows[1]


def test_prefix_and_gradient_checkpointing_are_refused_together(run, flags):
    with pytest.raises(ValueError, match="A trained prefix and gradient checkpointing exclude each other"):
        run(flags, "--peft_type", "PREFIX_TUNING", "--gradient_checkpointing")


def test_virtual_tokens_of_a_trained_prompt_are_left_out_of_the_accuracy(run, flags, chats):
    flags = [flags, "--peft_type", "PROMPT_TUNING", "--num_virtual_tokens", 3, "--learning_rate", 0]
    tuned = results(run(flags, "--do_eval", "--validation_file", chats), "eval")
    assert 0 <= tuned["eval_accuracy"] < 1 and tuned["eval_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["--load_in_4bit", "--load_in_8bit"])
@pytest.mark.parametrize("generation", ["chatglm1", "chatglm2", "chatglm3", "glm4_checkpoint"])
def test_quantised_base_is_tuned_resumed_and_asked(run, chats, request, generation, bits):
    pytest.importorskip("bitsandbytes")
    base = ["--model_name_or_path", request.getfixturevalue(generation), CHAT_FLAGS, bits]
    tuning = [base, "--train_file", chats, "--do_train", "--gradient_checkpointing", "--max_steps", 4]
    straight = run(tuning, "--save_strategy", "steps", "--save_steps", 2)
    resumed = run(tuning, "--resume_from_checkpoint", straight / "checkpoint-2", output="resumed")
    assert losses(resumed) == losses(straight)
    name = "adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (straight / name).read_bytes()
    assert {tensor.dtype for tensor in adapter(straight).values()} == {torch.float32}
    questions = ["--adapter_name_or_path", straight, "--do_predict", "--test_file", chats, "--max_predict_samples", 2]
    answers = run(base, questions, output="answers") / "generated_predictions.jsonl"
    assert len(answers.read_text().splitlines()) == 2


def test_another_method_of_peft_needs_no_code_of_ours(run, flags):
    folder = run(flags, "--peft_type", "loha", "--lora_target_modules", "query_key_value")
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LOHA"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_base_keeps_float32_adapters(run, flags, chats, dtype):
    folder = run(flags, "--dtype", dtype, "--do_predict", "--test_file", chats, "--max_predict_samples", 1)
    assert {tensor.dtype for tensor in adapter(folder).values()} == {torch.float32}


@pytest.mark.slow
def test_gradient_checkpointing_does_not_change_the_losses(run, flags):
    plain = run(flags, "--lora_dropout", 0)
    checkpointed = run(flags, "--lora_dropout", 0, "--gradient_checkpointing", output="checkpointed")
    assert losses(checkpointed) == losses(plain)
    assert all(torch.equal(a, b) for a, b in zip(adapter(plain).values(), adapter(checkpointed).values(), strict=True))


@pytest.mark.slow
def test_training_goes_on_from_an_adapter(run, flags):
    first = run(flags)
    second = run(flags, "--adapter_name_or_path", first, output="second")
    assert losses(second)[0] < losses(first)[0]
    assert any(not torch.equal(adapter(first)[name], tensor) for name, tensor in adapter(second).items())


@pytest.mark.oldest
@pytest.mark.slow
def test_resumed_run_ends_with_the_same_adapter_and_losses(run, flags):
    flags = [flags, "--save_strategy", "steps", "--save_steps", 2]  # with the default dropout of 0.1
    straight = run(flags)
    resumed = run(flags, "--resume_from_checkpoint", straight / "checkpoint-2", output="resumed")
    assert losses(resumed) == losses(straight)
    names = "adapter_model.safetensors"
    assert (resumed / names).read_bytes() == (straight / names).read_bytes()


@pytest.mark.oldest
def test_losses_are_those_recorded(run, flags):
    """On another processor the sums are rounded in another way, hence the tolerance."""
    assert losses(run(flags, "--seed", 3, "--no_padding_free")) == pytest.approx(RECORDED, rel=1e-4)


RECORDED = [7.126127243041992, 6.876293182373047, 6.577437400817871, 6.393866539001465]


def test_plain_text_is_tuned_with_lora_too(run, chatglm3, text_files):
    flags = ["--model_name_or_path", chatglm3, "--train_file", text_files / "train.txt", "--block_size", 32]
    folder = run(flags, "--do_train", "--max_steps", 3)
    assert losses(folder)[-1] < losses(folder)[0] and adapter(folder)


def test_trained_modules_are_reported_when_nothing_is_trainable(chatglm3):
    model = AutoModelForCausalLM.from_pretrained(chatglm3)
    config = adapter_config(model, LoraArguments(lora_r=4, use_rslora=True))
    assert (config.r, config.use_rslora, config.base_model_name_or_path) == (4, True, chatglm3)


def test_eva_starts_from_the_inputs_of_the_layers_in_the_first_batches(run, flags, caplog):
    """A holds orthonormal singular vectors of what the layers get; PEFT alone would leave it as it is by default."""
    folder = run(flags, "--init_lora_weights", "eva", "--lora_r", 4, "--learning_rate", 1e-9)
    for name, tensor in adapter(folder).items():
        if "lora_A" in name:
            assert torch.allclose(tensor @ tensor.T, torch.eye(4), atol=1e-4)


@pytest.mark.parametrize("method", ["corda", "loftq"])
def test_initialisation_that_needs_more_than_the_script_does_is_refused(run, flags, method):
    with pytest.raises(ValueError, match=f"--init_lora_weights {method} needs .*: take eva or pissa"):
        run(flags, "--init_lora_weights", method)
