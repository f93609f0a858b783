"""Runs that cannot end well stop early, with a sentence, and leave nothing behind that looks whole."""

import functools
import logging
import math
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CHAT_FLAGS, ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import chatglm
from finetuning import training_checks
from finetuning.batches import IGNORE_INDEX
from finetuning.training_checks import (
    TrainingChecks,
    batch_texts,
    check_finite,
    check_gradients,
    marked_text,
)


@pytest.fixture
def flags(chatglm3, chats):
    return ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 6]


@pytest.fixture
def adapted(chatglm3):
    return peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(chatglm3), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    )


def test_first_loss_that_is_not_finite_stops_the_run_before_the_weights_are_spoiled(run, flags, tmp_path):
    with pytest.raises(FloatingPointError, match=r"The loss of step \d is not a finite number \(learning rate .*e\+"):
        run(
            flags,
            "--learning_rate",
            "1e18",
            "--lora_target_modules",
            "all-linear",
            "--save_strategy",
            "steps",
            "--save_steps",
            1,
        )
    saved = list((tmp_path / "out").rglob("adapter_model.safetensors"))
    assert all(tensor.isfinite().all() for path in saved for tensor in load_file(path).values())
    assert tmp_path / "out/adapter_model.safetensors" not in saved


def test_adapter_that_learned_nothing_is_found_at_the_first_save(run, flags):
    with pytest.raises(RuntimeError, match="every lora_B is still zero after 3 steps. Is --learning_rate zero"):
        run(flags, "--learning_rate", 0, "--save_strategy", "steps", "--save_steps", 3)


def test_tensor_without_gradient_is_named(adapted):
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    check_gradients(adapted, set(names))
    with pytest.raises(RuntimeError, match=r"1 trainable tensors got no gradient \(.*query_key_value.lora_A"):
        check_gradients(adapted, set(names[1:]))


def test_layer_that_the_forward_pass_skips_stops_the_run(run, flags, monkeypatch):
    forward = peft.tuners.lora.Linear.forward
    skipped = []

    def forward_without_first_layer(self, x, *args, **kwargs):
        skipped.append(self) if not skipped else None
        return self.base_layer(x) if self is skipped[0] else forward(self, x, *args, **kwargs)

    monkeypatch.setattr(peft.tuners.lora.Linear, "forward", forward_without_first_layer)
    with pytest.raises(RuntimeError, match="2 trainable tensors got no gradient .*layers.0"):
        run(flags)


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda tensors: tensors.popitem(), "1 adapter tensors were not saved"),
        (lambda tensors: next(iter(tensors.values())).fill_(float("nan")), "1 saved tensors are not finite"),
        (lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name], "every lora_B is still zero"),
    ],
)
def test_damaged_adapter_is_found_when_it_is_opened_again(adapted, tmp_path, damage, sentence):
    adapted.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    TrainingChecks.check_saved(tmp_path, adapted, 5)
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(RuntimeError, match=sentence):
        TrainingChecks.check_saved(tmp_path, adapted, 5)


def test_weights_that_are_not_finite_are_not_saved(adapted):
    check_finite(adapted)
    next(p for p in adapted.parameters() if p.requires_grad).data[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="1 trained tensors are not finite"):
        check_finite(adapted)


def test_model_that_cannot_generate_is_found_before_training(run, flags, chats, monkeypatch):
    def broken(self, *args, **kwargs):
        raise AttributeError("no cache of that kind")

    monkeypatch.setattr(PreTrainedModel, "generate", broken, raising=False)
    monkeypatch.setattr(peft.PeftModelForCausalLM, "generate", broken)
    with pytest.raises(RuntimeError, match="this model cannot generate: no cache"):
        run(flags, "--do_predict", "--test_file", chats)


def test_trained_part_of_the_first_example_is_shown(run, flags, chatglm3, caplog):
    with caplog.at_level(logging.INFO):
        run(flags, "--log_level", "info", "--max_steps", 1)
    assert "[gMASK]sop<|user|> \n who paints the door<|assistant|>【\n the baker paints</s>】" in caplog.text
    example = {"input_ids": [64, 65, 66], "labels": [-100, 65, -100]}
    decoded = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    assert marked_text(decoded, example) == "@【A】B"
    assert AutoTokenizer.from_pretrained(chatglm3).eos_token == "</s>"


def test_loss_check_ignores_evaluation(adapted):
    checks = TrainingChecks()
    checks.batches = []
    output = SimpleNamespace(loss=torch.tensor(float("nan")))
    adapted.eval()
    checks.note_loss(adapted, (), {}, output)
    assert not checks.batches
    adapted.train()
    checks.note_loss(adapted, (), {}, output)
    assert checks.batches


def test_gradient_that_is_not_finite_stops_the_run_and_shows_the_rows(run, flags, monkeypatch, tmp_path):
    def spoil(self, args, state, control, model, **kwargs):
        if state.global_step == 2:
            next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = float("inf")
        check(self, args, state, control, model=model, **kwargs)

    check = TrainingChecks.on_pre_optimizer_step
    monkeypatch.setattr(TrainingChecks, "on_pre_optimizer_step", spoil)
    sentence = (
        r"The gradient of step 3 is not a finite number \(learning rate 0\.00\d+\)(.|\n)*row 2 of the batch: '\[gMASK"
    )
    saves = ["--save_strategy", "steps", "--save_steps", 1, "--per_device_train_batch_size", 2]
    with pytest.raises(FloatingPointError, match=sentence):
        run(flags, saves)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_rows_of_a_batch_are_shown_without_padding_and_flattened_ones_apart():
    decoded = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    ids = torch.tensor([[65, 66, 0], [67, 68, 69]])
    assert batch_texts(decoded, {"input_ids": ids, "attention_mask": ids > 0}) == ["AB", "CDE"]
    flat = {"input_ids": torch.tensor([[65, 66, 67, 68]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    assert batch_texts(decoded, flat) == ["AB", "CD"]


def test_loss_that_trainer_computes_itself_is_no_obstacle(run, flags):
    run(flags, "--label_smoothing_factor", 0.1, "--max_steps", 2)


def test_long_first_example_shows_both_ends(tokenizer):
    ids = tokenizer("a" * 600 + " door " + "b" * 900)["input_ids"]
    example = {"input_ids": ids, "labels": [IGNORE_INDEX] * (len(ids) - 1) + ids[-1:]}
    shown = marked_text(tokenizer, example)
    assert shown.startswith("aaa") and shown.endswith("】") and f"({len(ids) - 1000} tokens)" in shown


# ---------------------------------------------------------------------------------------------- nobody waits for a GPU


class Waits(TorchDispatchMode):
    """Operations that a GPU would have to be waited for, a number for the host or a size, by our line that asks.

    Those of a library are not ours (transformers looks once a forward whether rows are packed), and a collator's
    batches are not on the GPU yet.
    """

    operations = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.operations or function is torch.ops.aten.index.Tensor and boolean(args[1]):
            ours = (f"{ROOT}/finetuning", f"{ROOT}/chatglm", f"{ROOT}/run_")
            libraries = ("/transformers/", "/accelerate/", "/peft/")
            asking = next(
                frame for frame in reversed(traceback.extract_stack())
                if frame.filename.startswith(ours) or any(name in frame.filename for name in libraries)
            )  # fmt: skip
            path = Path(asking.filename)
            if asking.filename.startswith(ours) and path.name != "batches.py":
                self.places[f"{path.name}:{asking.lineno} {asking.line}"] += 1
        return function(*args, **kwargs or {})


def boolean(indices) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


@pytest.mark.parametrize("model", ["chatglm3", "llama"])
def test_step_waits_for_no_number(run, chats, model, request):
    flags = ["--model_name_or_path", request.getfixturevalue(model), "--train_file", chats, CHAT_FLAGS, "--do_train"]
    flags += ["--max_source_length", 60, "--max_target_length", 40, "--logging_steps", 100, "--no_plot_loss"]
    places = []
    for steps in (2, 5):
        with Waits() as waits:
            run(flags, "--max_steps", steps, output=f"out{steps}")
        places.append(waits.places)
    assert places[1] - places[0] == Counter()
    assert places[0]  # those before the first step and after the last


@pytest.mark.parametrize("unseen, looked_at", [(100, 4), (1, 3)], ids=["at the next save", "at the limit"])
def test_loss_that_is_not_finite_is_found_late_and_named_with_its_step(
    run, flags, monkeypatch, tmp_path, unseen, looked_at
):
    monkeypatch.setattr(training_checks, "UNSEEN_STEPS", unseen)
    forward = chatglm.ChatGLMForConditionalGeneration.forward
    calls = []

    def spoilt(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            calls.append(len(calls))
            output.loss = output.loss * (math.nan if len(calls) == 3 else 1)
        return output

    monkeypatch.setattr(chatglm.ChatGLMForConditionalGeneration, "forward", functools.wraps(forward)(spoilt))
    with pytest.raises(
        FloatingPointError, match="The loss of step 3 is not .* Nothing is saved after step 2"
    ) as error:
        run(flags, "--logging_steps", 5, "--save_strategy", "steps", "--save_steps", 2)
    assert len(calls) == looked_at and str(error.value).count("row 1 of the batch") == 1
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
