"""P-Tuning v2 in the form published with ChatGLM: trained, saved, resumed, evaluated and predicted with."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import CHAT_FLAGS, losses, results
from transformers import AutoConfig, AutoModelForCausalLM

import chatglm  # noqa: F401


@pytest.fixture
def flags(chats):
    return ["--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 4, "--pre_seq_len", 3]


@pytest.mark.parametrize("checkpoint", ["chatglm3", "chatglm1"])
@pytest.mark.parametrize(
    "options", [[], ["--prefix_projection", "--gradient_checkpointing"]], ids=["plain", "projected"]
)
def test_prefix_encoder_alone_is_trained_saved_and_loaded(run, flags, chats, checkpoint, options, request):
    base = request.getfixturevalue(checkpoint)
    predict = ["--test_file", chats, "--do_predict", "--max_predict_samples", 3, "--max_target_length", 8]
    model = ["--model_name_or_path", base]
    folder = run(flags, model, predict, options, "--do_eval", "--validation_file", chats)
    saved = load_file(folder / "model.safetensors")
    assert all(name.startswith("transformer.prefix_encoder.") for name in saved) and len(set(losses(folder))) == 4
    assert not (folder / "adapter_config.json").exists()
    assert json.loads((folder / "config.json").read_text())["pre_seq_len"] == 3

    # The way of the published code: the base with pre_seq_len, and the saved tensors by their names without the start.
    config = AutoConfig.from_pretrained(base, pre_seq_len=3, prefix_projection=bool(options))
    loaded = AutoModelForCausalLM.from_pretrained(base, config=config)
    start = len("transformer.prefix_encoder.")
    loaded.transformer.prefix_encoder.load_state_dict({name[start:]: tensor for name, tensor in saved.items()})

    evaluate = ["--do_eval", "--validation_file", chats, CHAT_FLAGS, predict]
    again = run(model, evaluate, "--adapter_name_or_path", folder, output="again")
    assert results(again, "eval")["eval_loss"] == results(folder, "eval")["eval_loss"]
    answers = [(path / "generated_predictions.jsonl").read_text() for path in (folder, again)]
    assert answers[0] == answers[1]


def test_resumed_prefix_is_that_of_a_run_without_a_stop(run, flags, chatglm3):
    flags = [flags, "--model_name_or_path", chatglm3, "--save_strategy", "steps", "--save_steps", 2]
    straight = run(flags)
    resumed = run(flags, "--resume_from_checkpoint", straight / "checkpoint-2", output="resumed")
    assert losses(resumed) == losses(straight)
    assert (resumed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="--pre_seq_len 3, this run has 4"):
        run(flags, "--pre_seq_len", 4, "--resume_from_checkpoint", straight / "checkpoint-2", output="other")


def test_prefix_stays_in_float32_on_a_half_precision_base(run, flags, chatglm3):
    folder = run(flags, "--model_name_or_path", chatglm3, "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}


def test_prefix_of_chatglm_is_refused_for_other_models(run, flags, llama):
    with pytest.raises(ValueError, match="for other models take --peft_type PREFIX_TUNING"):
        run(flags, "--model_name_or_path", llama)


def test_folder_without_a_prefix_is_refused(run, flags, chatglm3, tmp_path):
    with pytest.raises(ValueError, match="no model.safetensors with a prefix encoder"):
        run(flags, "--model_name_or_path", chatglm3, "--adapter_name_or_path", tmp_path)
