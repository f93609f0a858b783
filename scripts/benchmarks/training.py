"""Random models with LoRA, trained on random rows under Trainer in each of the ways, and what that costs."""

import tempfile
import time

import numpy as np
import peft
import torch
from torch.nn.functional import cross_entropy
from transformers import BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments, set_seed

from chatglm import (
    ChatGLM6BConfig,
    ChatGLM6BForConditionalGeneration,
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
)
from finetuning import batches
from finetuning.self_checks import SelfChecks
from finetuning.throughput import peak_memory
from run_chatglm_lora import ChatArguments

from .row_lengths import advertisegen_lengths
from .shapes import SHAPES


STATIC_LENGTH = 1024 + 128
WARM_UP = 2  # steps that are not timed
FORMAT_TOKENS = 6  # [gMASK] sop <|user|> \n ... <|assistant|> \n
MODELS = {ChatGLMConfig: ChatGLMForConditionalGeneration, ChatGLM6BConfig: ChatGLM6BForConditionalGeneration}


def configuration(shape):
    return ChatGLMConfig.from_dict({"model_type": "chatglm", **SHAPES[shape].sizes})


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
