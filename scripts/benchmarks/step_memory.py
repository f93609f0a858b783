"""The memory of a training step on a CPU: what --dry_run tells, and what is measured."""

import resource
from types import SimpleNamespace

import peft
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetuning import estimate


SIZES = {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}


def made(shape):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=8))
    if shape.get("checkpointing"):
        model.enable_input_require_grads()
    if shape.get("lora", True):
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1))
    return model


def told(shape, batch) -> int:
    """Bytes that the estimate says."""
    args = SimpleNamespace(
        optim="adamw_torch", bf16=False, fp16=False, gradient_checkpointing=bool(shape.get("checkpointing")),
        gradient_checkpointing_kwargs=None, gradient_accumulation_steps=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = made(shape)
    return estimate.memory_of_step(model, batch, args).total


def measured(shape, batch) -> int:
    """Bytes that two steps took."""
    steps(made({**shape, "checkpointing": False}), {name: ids[:1, :8] for name, ids in batch.items()})  # loads kernels
    before = psutil.Process().memory_info().rss
    peak_before = peak()
    model = made(shape)
    if shape.get("checkpointing"):
        model.get_base_model().gradient_checkpointing_enable()
    steps(model, batch)
    if peak() == peak_before:
        raise RuntimeError("The shape is too small to be seen beside what was resident before.")
    return peak() - before


def steps(model, batch):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def told_and_measured(shape) -> list[int]:
    """Bytes, of a shape of check_estimate.py."""
    ids = torch.ones(shape["rows"], shape["tokens"], dtype=torch.int64)  # [B, S]
    batch = {"input_ids": ids, "labels": ids}
    return [told(shape, batch), measured(shape, batch)]
