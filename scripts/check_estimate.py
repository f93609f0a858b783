"""Hold the memory that --dry_run tells against the peak of real training steps on this machine's CPU.

    python scripts/check_estimate.py

Each shape is trained for two steps in a process of its own: random weights of a Llama, AdamW. What is measured is the
most that the process had resident, less what it had before the model was made; it takes a few GiB, and some minutes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peft
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetuning import estimate


SHAPES = {  # rows, tokens of each, and what else is different
    "LoRA": {"rows": 4, "tokens": 384},
    "LoRA, gradient checkpointing": {"rows": 8, "tokens": 384, "checkpointing": True},
    "all weights": {"rows": 2, "tokens": 256, "lora": False},
}
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="run this one here, and print its two numbers")
    name = parser.parse_args().shape
    if name:
        shape = SHAPES[name]
        ids = torch.ones(shape["rows"], shape["tokens"], dtype=torch.int64)
        batch = {"input_ids": ids, "labels": ids}
        print(json.dumps([told(shape, batch), measured(shape, batch)]))
        return
    # Small blocks go back to the system at once, so that resident is what lives.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    print(f"{'shape':<32}{'told, MiB':>12}{'measured':>12}{'ratio':>8}")
    for name in SHAPES:
        words = [sys.executable, __file__, "--shape", name]
        output = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        numbers = [count / 2**20 for count in json.loads(output.splitlines()[-1])]
        print(f"{name:<32}{numbers[0]:>12.0f}{numbers[1]:>12.0f}{numbers[0] / numbers[1]:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
