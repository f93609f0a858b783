#!/usr/bin/env python
"""Train the same model on the same rows in three ways, and print what each costs.

    python scripts/benchmark.py [--output FILE.json] [--steps 10] [--shape tiny|chatglm3-6b|glm-4-9b|...]

static    every row padded to 1024 + 128 tokens, logits of every position: the recipe of the ChatGLM guides
dynamic   rows padded to the longest of their batch, logits of every position: what other tools do
ours      rows end to end without padding, logits where an answer is: the default of run_chatglm_lora.py

Each way runs in a process of its own, under Trainer, with LoRA of rank 8 without dropout, so that the losses of all
ways are the same. The rows are random tokens in the lengths of AdvertiseGen (1,070 rows in GLM-4's vocabulary).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import peft
import torch
from row_lengths import advertisegen_lengths
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed


sys.path.insert(0, str(Path(__file__).parent.parent))
from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration  # noqa: E402
from finetuning import batches  # noqa: E402
from finetuning.self_checks import SelfChecks  # noqa: E402
from finetuning.throughput import peak_memory  # noqa: E402
from run_chatglm_lora import ChatArguments  # noqa: E402


WAYS = ("static", "dynamic", "ours")
STATIC_LENGTH = 1024 + 128
WARM_UP = 2  # steps that are not timed
FORMAT_TOKENS = 6  # [gMASK] sop <|user|> \n ... <|assistant|> \n
SHAPES = {
    "tiny": {"num_layers": 8, "hidden_size": 256, "ffn_hidden_size": 684, "num_attention_heads": 8, "kv_channels": 32},
    "chatglm2-6b": {},
    "chatglm3-6b": {},
    "glm-4-9b": {"num_layers": 40, "padded_vocab_size": 151552},
}
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "A10": 125}  # dense, 16 bit


def random_rows(count, vocabulary, seed=0) -> list[dict]:
    """Encoded rows in AdvertiseGen's lengths; the answer is trained."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        prompt, answer = advertisegen_lengths(random)
        ids = random.integers(100, vocabulary - 1000, prompt + FORMAT_TOKENS + answer).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - answer) + ids[-answer:]})
    return rows


def adapted_model(shape, device):
    """A random ChatGLM with a LoRA adapter, made on the device; in bfloat16 on a GPU."""
    set_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        config = ChatGLMConfig(generation="chatglm3", multi_query_attention=True, seq_length=8192, **SHAPES[shape])
        model = ChatGLMForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0, target_modules="all-linear")
    return peft.get_peft_model(model, lora)


def loss_of_all_logits(outputs, labels, num_items_in_batch=None):
    """Cross entropy in float32 with logits of every position, as the published models compute it."""
    logits = outputs.logits[:, :-1].float()  # [B, S - 1, V]
    total = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


class Timer(TrainerCallback):
    """Seconds of the steps after the warm-up."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            self.began = now(args)

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = now(args) - self.began


def now(args) -> float:
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def flops_of_rows(model, rows) -> float:
    """Useful floating-point operations of a LoRA step over rows: 4 for each weight and real token (forward and the
    gradients of activations; frozen weights need none), the head's for trained tokens only, and causal attention."""
    config = model.config
    head = config.padded_vocab_size * config.hidden_size
    body = sum(p.numel() for name, p in model.named_parameters() if "lora" not in name) - 2 * head
    flops = 0.0
    for row in rows:
        length, trained = len(row["input_ids"]), sum(label != -100 for label in row["labels"])
        attention = 2 * length**2 * config.num_layers * config.num_attention_heads * config.kv_channels  # q k and p v
        flops += 4 * (body * length + head * trained) + 3 * attention
    return flops


def measured(way, shape, steps, batch_size) -> dict:
    """One way's figures."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = adapted_model(shape, device)
    rows = random_rows((WARM_UP + steps) * batch_size, model.config.padded_vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=WARM_UP + steps, per_device_train_batch_size=batch_size, learning_rate=1e-3,
            train_sampling_strategy="sequential", report_to="none", logging_steps=WARM_UP + steps, save_strategy="no",
            disable_tqdm=True, bf16=device == "cuda", use_cpu=device == "cpu", remove_unused_columns=False,
        )  # fmt: skip
        checks = []
        if way == "ours":
            chat_args = ChatArguments()
            collator = batches.chat_collator(0, chat_args, args, STATIC_LENGTH)
            checks = [SelfChecks(collator, {"train": rows}, chat_args, 0, is_pretrained=False)]
        else:
            collator = batches.PaddedCollator(0, length=STATIC_LENGTH if way == "static" else None)
        timer = Timer()
        trainer = Trainer(
            model, args, data_collator=collator, train_dataset=rows, callbacks=[*checks, timer],
            compute_loss_func=None if way == "ours" else loss_of_all_logits,
        )  # fmt: skip
        result = trainer.train()
    timed = rows[WARM_UP * batch_size :]
    figures = {
        "samples_per_second": len(timed) / timer.seconds,
        "trained_tokens_per_second": sum(label != -100 for row in timed for label in row["labels"]) / timer.seconds,
        "peak_memory_gib": peak_memory() / 2**30,
        "loss": result.training_loss,
    }
    if device == "cuda":
        name = torch.cuda.get_device_name()
        peak = next((tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)
        figures["device"] = name
        if peak:
            figures["flops_utilisation"] = flops_of_rows(model, timed) / timer.seconds / (peak * 1e12)
    return figures


def table(results) -> str:
    """The figures of all ways, one line each, with their rates against the static way's."""
    columns = [name for name in results[WAYS[-1]] if name != "device"]
    lines = [["way", *columns, "against static", "against dynamic"]]
    for way, figures in results.items():
        speeds = [figures["samples_per_second"] / results[other]["samples_per_second"] for other in WAYS[:2]]
        lines.append([way, *(f"{figures[name]:.4g}" for name in columns), *(f"{speed:.2f} x" for speed in speeds)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each way (default 10)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="of the random model (default tiny)")
    parser.add_argument("--way", choices=WAYS, help="measure this way only, in this process, and print it as JSON")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measured(options.way, options.shape, options.steps, options.batch_size)))
        return
    results = {}
    for way in WAYS:
        print(f"Training in the way '{way}' ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--way", way, "--steps", str(options.steps)]
        command += ["--shape", options.shape, "--batch_size", str(options.batch_size)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[way] = json.loads(output.splitlines()[-1])
    print(table(results))
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
