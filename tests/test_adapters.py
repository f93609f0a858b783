"""An adapter is opened on its own base, with its own tokenizer, and in its own shape; anything else is an error."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import CHAT_FLAGS, CHATML, results
from tokenizers import AddedToken
from transformers import AutoTokenizer

from finetuning import adapters


@pytest.fixture
def flags(chatglm3, chats):
    return ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 2]


@pytest.fixture
def evaluation(chats):
    return ["--validation_file", chats, CHAT_FLAGS, "--do_eval"]


def test_adapter_of_another_generation_is_refused_with_both_bases(run, flags, evaluation, chatglm2, chatglm3):
    folder = run(flags)
    wrong = [evaluation, "--model_name_or_path", chatglm2, "--adapter_name_or_path", folder]
    with pytest.raises(ValueError, match=rf"was trained on {chatglm3} \(chatglm3\), .*{chatglm2} \(chatglm2\)"):
        run(wrong, output="other")
    (folder / "provenance.json").unlink()  # as PEFT itself saves adapters
    with pytest.raises(ValueError, match=rf"was trained on {chatglm3} \(chatglm3\), .*{chatglm2} \(chatglm2\)"):
        run(wrong, output="other")


def test_adapter_of_other_weights_is_refused_and_a_moved_base_is_not(run, flags, evaluation, chatglm3, tmp_path):
    moved = shutil.copytree(chatglm3, tmp_path / "moved")
    folder = run(flags, "--model_name_or_path", moved)
    scores = [results(run(evaluation, "--model_name_or_path", moved, "--adapter_name_or_path", folder), "eval")]
    shutil.rmtree(moved)
    again = [evaluation, "--model_name_or_path", chatglm3, "--adapter_name_or_path", folder]
    scores.append(results(run(again, output="here"), "eval"))
    assert scores[0]["eval_loss"] == scores[1]["eval_loss"]
    record = json.loads((folder / "provenance.json").read_text())
    record["base_content"]["weights"] = "0"
    (folder / "provenance.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"was trained on {moved} .*{chatglm3}"):
        run(again, output="changed")
    (folder / "provenance.json").unlink()  # as other programs save adapters, on a base that is gone
    assert results(run(again, output="foreign"), "eval")["eval_loss"] == scores[0]["eval_loss"]


def test_adapter_that_does_not_fit_is_an_error_with_both_sizes(run, flags, evaluation, llama, tmp_path, chatglm3):
    folder = run(flags)
    (folder / "provenance.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 4, "base_model_name_or_path": None}))
    with pytest.raises(
        ValueError, match=r"lora_A.default.weight is \[8, 64\] in the adapter and \[4, 64\] here. Most"
    ):
        run(evaluation, "--model_name_or_path", chatglm3, "--adapter_name_or_path", folder, output="other")


def test_adapter_that_is_not_whole_is_an_error_and_not_the_base(run, flags, evaluation, chatglm3):
    """PEFT warns of weights that are missing, and goes on with those that an adapter begins with."""
    folder = run(flags)
    path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    again = [evaluation, "--model_name_or_path", chatglm3, "--adapter_name_or_path", folder]
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)
    with pytest.raises(ValueError, match="is not whole, or not of this model: it has no base_model.model.transformer"):
        run(again, output="other")
    path.unlink()
    with pytest.raises(ValueError, match="has no weights beside its adapter_config.json: copy adapter_model.safe"):
        run(again, output="other")
    save_file(tensors, path)
    config.write_text(config.read_text()[:50])
    with pytest.raises(ValueError, match="adapter_config.json is none that PEFT .* reads: "):
        run(again, output="other")


def test_adapter_brings_its_template(run, llama, chats, evaluation, tmp_path):
    (tmp_path / "own.jinja").write_text(CHATML.replace("<|im_start|>", "<|im_start|>the "))
    sizes = ["--max_target_length", 20, "--max_source_length", 60]
    model = ["--model_name_or_path", llama, sizes, evaluation]
    train = ["--train_file", chats, "--do_train", "--max_steps", 2, "--chat_template", tmp_path / "own.jinja"]
    trained = results(run(model, train), "eval")
    opened = results(run(model, "--adapter_name_or_path", tmp_path / "out", output="opened"), "eval")
    assert opened["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-6)


def test_adapter_brings_its_added_tokens(run, llama, chats, evaluation, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens([AddedToken("baker"), AddedToken("ferry")])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = ["--model_name_or_path", llama, "--max_target_length", 20, "--max_source_length", 60, evaluation]
    train = ["--train_file", chats, "--do_train", "--max_steps", 2, "--tokenizer_name", tmp_path / "tokenizer"]
    trained = results(run(model, train, "--lora_modules_to_save", "embed_tokens,lm_head"), "eval")
    opened = results(run(model, "--adapter_name_or_path", tmp_path / "out", output="opened"), "eval")
    assert opened["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-6)


def test_shape_of_an_adapter_is_not_for_flags_to_change(run, flags):
    again = [flags, "--adapter_name_or_path", run(flags, "--lora_r", 4)]
    for flag, value in {"--lora_r": 8, "--lora_target_modules": "dense", "--use_dora": True}.items():
        with pytest.raises(ValueError, match=f"whose settings stand in its folder: drop {flag}, or train a new"):
            run(again, flag, value, output="other")


KINDS = {"adapter": [], "full model": ["--no_use_lora"], "prefix": ["--pre_seq_len", 4]}


@pytest.mark.parametrize("old, new", [("adapter", "full model"), ("adapter", "prefix"), ("prefix", "adapter")])
def test_result_is_not_written_beside_one_of_another_kind(run, flags, old, new):
    run(flags, KINDS[old])
    with pytest.raises(ValueError, match=rf"kind: {old}\), and this one would write its own \(kind: {new}\)"):
        run(flags, KINDS[new])
    run(flags, KINDS[old])


def test_hash_of_weights_does_not_depend_on_files_and_types(chatglm3, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(Path(chatglm3) / "model.safetensors")
    names = sorted(weights)
    save_file({n: weights[n] for n in names[:5]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: weights[n] for n in names[5:]}, tmp_path / "model-00002-of-00002.safetensors")
    assert adapters.weights_hash(tmp_path) == adapters.weights_hash(Path(chatglm3))
    weights[names[0]] = weights[names[0]] + torch.ones_like(weights[names[0]])
    save_file(weights, tmp_path / "model-00001-of-00002.safetensors")
    assert adapters.weights_hash(tmp_path) != adapters.weights_hash(Path(chatglm3))
    assert adapters.weights_hash(tmp_path / "nowhere") is None
