#!/usr/bin/env python
"""Train the same model on the same rows in several ways, and print what each costs.

    python scripts/benchmark.py [--output FILE.json] [--steps 10] [--shape tiny|chatglm3-6b|glm-4-9b|...]

static    every row padded to 1024 + 128 tokens, logits of every position: the recipe of the ChatGLM guides
dynamic   rows padded to the longest of their batch, logits of every position: what other tools do
ours      rows end to end without padding, logits where an answer is: the default of run_chatglm_lora.py
packed    rows gathered into packs of 8,192 tokens (of 1,024 in the tiny shape): --pack_to_length

Each way runs in a process of its own, under Trainer, with LoRA of rank 8 without dropout, so that the losses of the
first three are the same. The rows are random tokens in the lengths of AdvertiseGen (1,070 rows in GLM-4's vocabulary).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from row_lengths import advertisegen_lengths
from torch.nn.functional import cross_entropy
from transformers import BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments, set_seed


sys.path.insert(0, str(Path(__file__).parent.parent))
from chatglm import (  # noqa: E402
    ChatGLM6BConfig,
    ChatGLM6BForConditionalGeneration,
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
)
from finetuning import batches  # noqa: E402
from finetuning.self_checks import SelfChecks  # noqa: E402
from finetuning.throughput import peak_memory  # noqa: E402
from run_chatglm_lora import ChatArguments  # noqa: E402


WAYS = ("static", "dynamic", "ours", "packed")
STATIC_LENGTH = 1024 + 128
WARM_UP = 2  # steps that are not timed
FORMAT_TOKENS = 6  # [gMASK] sop <|user|> \n ... <|assistant|> \n


class Shape(NamedTuple):
    """What a model is built with, and how many tokens a pack holds."""

    config: type
    sizes: dict[str, Any]
    pack: int = 8192


def second_generation(**sizes) -> Shape:
    released = {"generation": "chatglm3", "seq_length": 8192, "add_qkv_bias": True}
    return Shape(ChatGLMConfig, {**released, "multi_query_attention": True, "multi_query_group_num": 2, **sizes})


NANO = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
NARROW = {"num_layers": 8, "hidden_size": 256, "num_attention_heads": 8}
SHAPES = {
    "nano": second_generation(**NANO, ffn_hidden_size=128, kv_channels=16, padded_vocab_size=2048)._replace(pack=512),
    "nano-6b": Shape(ChatGLM6BConfig, {**NANO, "inner_hidden_size": 128, "vocab_size": 2048, "bos_token_id": 2004,
                                       "eos_token_id": 2005, "mask_token_id": 2000, "gmask_token_id": 2001}, pack=512),
    "tiny": second_generation(**NARROW, ffn_hidden_size=684, kv_channels=32)._replace(pack=1024),
    "tiny-6b": Shape(ChatGLM6BConfig, {**NARROW, "inner_hidden_size": 1024}, pack=1024),
    "chatglm-6b": Shape(ChatGLM6BConfig, {"vocab_size": 130528, "bos_token_id": 130004, "eos_token_id": 130005,
                                          "mask_token_id": 130000, "gmask_token_id": 130001}),
    "chatglm2-6b": second_generation(),
    "chatglm3-6b": second_generation(),
    "glm-4-9b": second_generation(num_layers=40, padded_vocab_size=151552),
}  # fmt: skip
MODELS = {ChatGLMConfig: ChatGLMForConditionalGeneration, ChatGLM6BConfig: ChatGLM6BForConditionalGeneration}


def configuration(shape):
    return SHAPES[shape].config(**SHAPES[shape].sizes)


def random_rows(count, config, seed=0) -> list[dict]:
    """Encoded rows in AdvertiseGen's lengths; the answer is trained."""
    random = np.random.default_rng(seed)
    # what ChatGLM-6B tells the prompt from the answer by
    ending = [config.gmask_token_id, config.bos_token_id] if isinstance(config, ChatGLM6BConfig) else []
    rows = []
    for _ in range(count):
        prompt, answer = advertisegen_lengths(random)
        length, vocabulary = prompt + FORMAT_TOKENS + answer, config.get_text_config().vocab_size
        ids = random.integers(100, vocabulary - 1000, length).tolist()
        ids[length - answer - len(ending) : length - answer] = ending
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - answer) + ids[-answer:]})
    return rows


def random_model(shape, device, bits=16):
    """A random ChatGLM, made on the device; in bfloat16 on a GPU, and there or here in 8 or 4 bits."""
    config = configuration(shape)
    set_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" or bits < 16 else torch.float32)
    with torch.device(device):
        model = MODELS[type(config)](config)
    torch.set_default_dtype(torch.float32)
    if bits == 16:
        return model
    how = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
               "bnb_4bit_compute_dtype": torch.bfloat16}, 8: {"load_in_8bit": True}}[bits]  # fmt: skip
    model = type(model).from_pretrained(
        None, config=config, state_dict=model.state_dict(), quantization_config=BitsAndBytesConfig(**how),
        device_map={"": device}, dtype=torch.bfloat16,
    )  # fmt: skip
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def adapted(model):
    """The model with an adapter of rank 8 on all linear layers."""
    model.enable_input_require_grads()  # for layers that are checkpointed
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
    head = config.vocab_size * config.hidden_size
    tables = 1 if config.tie_word_embeddings else 2
    body = sum(weight_count(p) for name, p in model.named_parameters() if "lora" not in name) - tables * head
    flops = 0.0
    for row in rows:
        length, trained = len(row["input_ids"]), sum(label != -100 for label in row["labels"])
        attention = 2 * length**2 * config.num_layers * config.num_attention_heads * config.head_dim  # q k and p v
        flops += 4 * (body * length + head * trained) + 3 * attention
    return flops


def weight_count(parameter) -> int:
    """Numbers of a weight; two of 4 bits share a byte."""
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)


def collator_and_checks(way, shape, rows, args):
    """How a way makes its batches, and the callbacks that settle that on the model."""
    if way in ("static", "dynamic"):
        return batches.PaddedCollator(0, length=STATIC_LENGTH if way == "static" else None), []
    chat_args = ChatArguments(pack_to_length=SHAPES[shape].pack if way == "packed" else None)
    collator = batches.chat_collator(0, chat_args, args, SHAPES[shape].pack)
    return collator, [SelfChecks(collator, {"train": rows}, chat_args, 0, is_pretrained=False)]


def packs_of(rows, length) -> list[dict]:
    """Rows gathered into packs."""
    columns = batches.packed({name: [row[name] for row in rows] for name in ("input_ids", "labels")}, length)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def trained(model, way, shape, rows, batch_size, callbacks=(), **flags) -> float:
    """Train a model on rows in order, `batch_size` of them a step, once; the mean loss. Flags are Trainer's."""
    device = next(model.parameters()).device.type
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=batch_size, learning_rate=1e-3, save_strategy="no",
            train_sampling_strategy="sequential", report_to="none", logging_strategy="no", disable_tqdm=True,
            bf16=device == "cuda", use_cpu=device == "cpu", remove_unused_columns=False, dataloader_drop_last=True,
            **flags,
        )  # fmt: skip
        collator, checks = collator_and_checks(way, shape, rows, args)
        trainer = Trainer(
            model, args, data_collator=collator, train_dataset=rows, callbacks=[*checks, *callbacks],
            compute_loss_func=loss_of_all_logits if way in ("static", "dynamic") else None,
        )  # fmt: skip
        return trainer.train().training_loss


def speed(model, way, shape, steps, batch_size, **flags) -> dict:
    """Figures of the steps after the warm-up. A pack is a step of its own, of as many rows as it holds."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    rows = random_rows((WARM_UP + steps) * batch_size, model.config)
    if way == "packed":
        rows, batch_size = packs_of(rows, SHAPES[shape].pack), 1
    timer = Timer()
    loss = trained(model, way, shape, rows, batch_size, [timer], **flags)
    timed = rows[WARM_UP * batch_size :]
    count = sum(row["position_ids"].count(0) for row in timed) if way == "packed" else len(timed)
    return {
        "samples_per_second": count / timer.seconds,
        "tokens_per_second": sum(len(row["input_ids"]) for row in timed) / timer.seconds,
        "peak_memory_gib": peak_memory() / 2**30,
        "loss": loss,
        "tflops": flops_of_rows(model, timed) / timer.seconds / 1e12,
    }


def measured(way, shape, steps, batch_size) -> dict:
    """One way's figures, of a model of its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return speed(adapted(random_model(shape, device)), way, shape, steps, batch_size)


def table(results) -> str:
    """The figures of all ways, one line each, with their rates against the padded ways'."""
    columns = list(results[WAYS[0]])
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
