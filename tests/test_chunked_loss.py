"""The losses of a training come without the logits of all positions, and are those that come with them."""

import json
from types import SimpleNamespace

import peft
import pytest
import torch
from miniatures.architectures import VOCABULARY, random_rows, tiny_model
from tiny import CHAT_FLAGS, losses
from torch.utils._python_dispatch import TorchDispatchMode

from chatglm import language_model
from finetuning.batches import PaddedCollator
from finetuning.chunked_loss import ChunkedLoss, why_changed, why_whole
from finetuning.self_checks import Probe, evaluated, rounding_unit


PLAIN = SimpleNamespace(label_smoothing_factor=0, torch_compile=False, fsdp="", n_gpu=1)


def batch(seed=0):
    return PaddedCollator(0)(random_rows([23, 31, 12], seed=seed))


def why(model, args=PLAIN):
    with evaluated(model):
        return why_whole(Probe(model, 0, rounding_unit(model)), batch(), args)


def loss_and_gradients(model, **inputs):
    """Without dropout: only the model itself is in training mode."""
    for module in model.modules():
        module.training = module is model
    model.zero_grad()
    output = model(**batch(), **inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "granite", "gpt_oss", "cohere", "gpt_neox", "mixtral"])
def test_loss_and_gradients_are_those_of_whole_logits(name):
    model = tiny_model(name)
    whole, expected = loss_and_gradients(model, num_items_in_batch=torch.tensor(40))
    names = list(model.state_dict())
    assert why(model) is None
    ChunkedLoss(model).use()
    chunked, gradients = loss_and_gradients(model, num_items_in_batch=torch.tensor(40))
    assert chunked.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    assert "logits" in whole and "logits" not in chunked
    assert gradients.keys() == expected.keys() and list(model.state_dict()) == names
    for parameter in gradients:
        torch.testing.assert_close(gradients[parameter], expected[parameter], rtol=1e-4, atol=1e-6)


def test_evaluation_keeps_its_logits_and_a_failed_step_leaves_the_model_whole():
    model = tiny_model("llama")
    layer = model.lm_head
    ChunkedLoss(model).use()
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]), labels=torch.tensor([[1]]))
    assert model.lm_head is layer
    with torch.no_grad():
        output = model.eval()(**batch())
    assert output.logits.shape == (3, 32, VOCABULARY)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("gemma2", "the model does more with its logits than to scale them"),  # final_logit_softcapping 30
        ("bart", "the model does not compute its loss with its loss_function"),
        ("chatglm", "it makes no logits in training"),
    ],
)
def test_model_that_needs_its_logits_says_why(name, reason):
    assert why(tiny_model(name)) == reason


@pytest.mark.parametrize(
    "flag, reason",
    [
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor"),
        ({"torch_compile": True}, "--torch_compile"),
        ({"fsdp": "full_shard"}, "the model is in shards"),
        ({"n_gpu": 2}, "one process for several GPUs"),
    ],
)
def test_training_that_needs_logits_says_why(flag, reason):
    assert why(tiny_model("llama"), SimpleNamespace(**{**vars(PLAIN), **flag})) == reason


def test_wrong_loss_in_chunks_is_found(monkeypatch):
    right = language_model.causal_lm_loss
    monkeypatch.setattr(language_model, "causal_lm_loss", lambda *args: right(*args) * 1.01)
    assert why(tiny_model("llama")).startswith("the loss in chunks is ")


@pytest.mark.parametrize(
    "change, bias, reason",
    [
        (lambda x: x, True, None),
        (lambda x: x / 8, False, None),
        (lambda x: x / 8, True, "the model scales logits that have a bias"),
        (lambda x: x + 0.1, False, "the model does more with its logits than to scale them"),
        (lambda x: x[..., :5], False, "the model makes logits [2, 5] of [2, 6]"),
    ],
)
def test_what_a_model_does_with_its_logits_is_known(change, bias, reason):
    made = torch.tensor([[100.0, -40, 7, 13, -120, 90], [30, 60, -99, 1, 2, 3]])
    assert why_changed(made, change(made), torch.nn.Linear(4, 6, bias=bias)) == reason


class WidestLogits(TorchDispatchMode):
    """The most rows of a floating tensor [.., V] that an operation makes; the turned weight [H, V] is none."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        made = torch.is_tensor(result) and result.is_floating_point() and function is not torch.ops.aten.t.default
        if made and result.shape[-1:] == (VOCABULARY,):
            self.rows = max(self.rows, result.numel() // VOCABULARY)
        return result


def test_logits_exist_for_few_positions_at_a_time(monkeypatch):
    monkeypatch.setattr(language_model, "LOSS_ROWS", 8)
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM")).train()
    with WidestLogits() as whole:
        model(**batch()).loss.backward()
    ChunkedLoss(model).use()
    with WidestLogits() as chunked:
        model(**batch()).loss.backward()
    assert (whole.rows, chunked.rows) == (3 * 32, 8)


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "adapter",
    [
        ["--lora_dropout", 0, "--lora_target_modules", "q_proj,lm_head"],
        ["--lora_dropout", 0, "--lora_modules_to_save", "lm_head"],
        ["--peft_type", "PROMPT_TUNING", "--num_virtual_tokens", 8],
        ["--no_use_lora"],
    ],
)
def test_losses_of_a_run_are_those_with_whole_logits(run, llama, chats, adapter, monkeypatch):
    flags = ["--model_name_or_path", llama, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 3]
    flags += ["--max_source_length", 60, "--max_target_length", 40, "--learning_rate", 1e-2, *adapter]
    chunked = run(flags)
    assert json.loads((chunked / "provenance.json").read_text())["self_checks"]["training_loss"] == "in chunks"
    monkeypatch.setattr(ChunkedLoss, "use", lambda self: None)
    assert losses(chunked) == pytest.approx(losses(run(flags, output="whole")), rel=1e-6)


def test_blocks_of_text_without_an_adapter_keep_the_way_of_run_clm(run, llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 40)
    flags = ["--train_file", text, "--do_train", "--max_steps", 1, "--block_size", 32, "--no_use_lora"]
    found = json.loads((run("--model_name_or_path", llama, flags) / "provenance.json").read_text())["self_checks"]
    assert "training_loss" not in found
