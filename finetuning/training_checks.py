"""Checks that stop a run which cannot end well, in its first minute where that is possible."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from .batches import IGNORE_INDEX
from .launching import on_any_process


logger = logging.getLogger("run_chatglm_lora.checks")

UNSEEN_STEPS = 100  # at most between two looks: the tokens of their batches are kept until then
EXCERPT_TOKENS = 40  # of each row of a batch whose loss is not finite
EXAMPLE_TOKENS = 1000  # of the first example, half at each end; more are not logged
EXAMPLE_LINES = 5  # at its beginning and at its end


class HopelessRun(RuntimeError):
    """What was saved is of no use."""


@dataclass
class JudgedStep:
    """A step, its batches (loss, inputs), and the verdicts on them, scalars on the device."""

    number: int
    learning_rate: float
    batches: list
    loss_is_bad: torch.Tensor
    gradient_is_bad: torch.Tensor

    def error(self, loss_is_bad, tokenizer) -> FloatingPointError:
        """What is said of a step whose loss or, if not that, gradient is not finite on some process."""
        batches = [inputs for loss, inputs in self.batches if not loss_is_bad or not loss.isfinite().all()]
        texts = [text for inputs in batches for text in batch_texts(tokenizer, inputs)]
        return FloatingPointError(
            f"The {'loss' if loss_is_bad else 'gradient'} of step {self.number} is not a finite number"
            f"{'' if batches else ' on another process'} (learning rate {self.learning_rate:g}). Nothing is saved "
            f"after step {self.number - 1}. Try a lower --learning_rate, and --bf16 or float32 instead of --fp16."
            + "".join(f"\nrow {number} of the batch: {text!r}" for number, text in enumerate(texts, 1))
        )


class TrainingChecks(TrainerCallback):
    """Losses that are not finite, tensors without gradient, models that cannot generate, adapters that hold nothing.

    Losses and gradients are judged on the device, at every step, and nobody waits for the verdict: it is looked at
    where the run stops to log anyway, after the first step, every hundred, and before anything is saved.
    """

    trainer = None  # known where the run is guarded; DeepSpeed keeps its gradients to itself

    def on_train_begin(self, args, state, control, model, processing_class, train_dataloader, **kwargs):
        example = next(iter(train_dataloader.dataset))
        logger.info(
            f"The first example; what stands in 【】 is trained:\n{few_lines(marked_text(processing_class, example))}"
        )
        self.batches = []  # (loss, inputs) of each forward pass of the step
        self.steps = []  # those since the last look, as JudgedStep
        self.has_gradient = set()
        self.loss_hooks = [model.register_forward_hook(self.note_loss, with_kwargs=True)]
        if self.trainer and self.trainer.compute_loss_func:  # gets the labels in place of the model
            self.loss_hooks.append(self.trainer.compute_loss_func.register_forward_hook(self.note_own_loss))
        self.gradient_hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self.has_gradient.add(name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def note_loss(self, model, args, inputs, output):
        self.inputs = inputs if model.training else None
        if model.training and output.loss is not None:
            self.batches.append((output.loss.detach(), inputs))

    def note_own_loss(self, loss_function, args, loss):
        if self.inputs is not None:
            self.batches.append((loss.detach(), self.inputs))

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, processing_class, **kwargs):
        losses = [loss.float().mean() for loss, _ in self.batches] or [torch.zeros(())]  # a Trainer may have its own
        loss_is_bad = ~torch.stack(losses).isfinite().all()
        gradient_is_bad = ~gradient_norm(args, self.trainer, model).isfinite()
        rate = optimizer.param_groups[0]["lr"]
        self.steps.append(JudgedStep(state.global_step + 1, rate, self.batches, loss_is_bad, gradient_is_bad))
        self.batches = []
        if self.gradient_hooks:
            check_gradients(model, self.has_gradient)
            while self.gradient_hooks:
                self.gradient_hooks.pop().remove()

    def on_step_end(self, args, state, control, model, processing_class, **kwargs):
        now = control.should_log or control.should_evaluate or control.should_save
        if now or state.global_step == 1 or len(self.steps) == UNSEEN_STEPS:
            self.look(args, processing_class)
        if control.should_save:
            check_finite(model)

    on_epoch_end = on_step_end

    def look(self, args, processing_class):
        """Raise a FloatingPointError if a loss or a gradient since the last look was not finite, on any process."""
        steps, self.steps = self.steps, []
        flags = [flag for step in steps for flag in (step.loss_is_bad, step.gradient_is_bad)]
        bad = on_any_process(*flags, device=args.device) if flags else []
        for step, loss_is_bad, gradient_is_bad in zip(steps, bad[::2], bad[1::2], strict=True):
            if loss_is_bad or gradient_is_bad:
                raise step.error(loss_is_bad, processing_class)

    def on_save(self, args, state, control, model, **kwargs):
        if args.should_save:
            self.check_saved(Path(args.output_dir, f"checkpoint-{state.global_step}"), model, state.global_step)

    def on_train_end(self, args, state, control, model, processing_class, **kwargs):
        self.look(args, processing_class)
        while self.loss_hooks:
            self.loss_hooks.pop().remove()
        check_finite(model)

    @staticmethod
    def check_saved(folder, model, steps):
        """Open a saved adapter again; HopelessRun if it lacks tensors, is not finite, or has learned nothing."""
        if not isinstance(model, peft.PeftModel):
            return
        saved = load_file(Path(folder, peft.utils.SAFETENSORS_WEIGHTS_NAME))
        # Under ZeRO-3 PEFT takes embeddings, empty on each process, for resized ones, and would want them saved.
        expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        if missing := expected.keys() - saved.keys():
            raise HopelessRun(f"{folder}: {len(missing)} adapter tensors were not saved ({min(missing)}, ...).")
        if bad := [name for name, tensor in saved.items() if not tensor.isfinite().all()]:
            raise HopelessRun(f"{folder}: {len(bad)} saved tensors are not finite ({bad[0]}, ...).")
        updates = [tensor for name, tensor in saved.items() if "lora_B" in name]
        # The first step of a warm-up has learning rate 0, so that an adapter saved after it may be untouched.
        if steps > 1 and updates and not any(tensor.any() for tensor in updates):
            raise HopelessRun(f"{folder}: every lora_B is still zero after {steps} steps. Is --learning_rate zero?")


def marked_text(tokenizer, example) -> str:
    """The text of an encoded example, with 【 and 】 around each run of tokens that are trained.

    Of a long one the beginning and the end are shown.
    """
    ids, labels = list(example["input_ids"]), list(example["labels"])
    if (hidden := len(ids) - EXAMPLE_TOKENS) > 0:
        half = EXAMPLE_TOKENS // 2
        parts = ({"input_ids": ids[part], "labels": labels[part]} for part in (slice(half), slice(-half, None)))
        return f" ... ({hidden} tokens) ... ".join(marked_text(tokenizer, part) for part in parts)
    runs = []  # [(ids, is trained)]
    for token, label in zip(ids, labels, strict=True):
        trained = label != IGNORE_INDEX
        if not runs or runs[-1][1] != trained:
            runs.append(([], trained))
        runs[-1][0].append(token)
    return "".join(f"【{tokenizer.decode(ids)}】" if trained else tokenizer.decode(ids) for ids, trained in runs)


def few_lines(text, most=EXAMPLE_LINES) -> str:
    """The first and the last lines of a text."""
    lines = text.split("\n")
    cut = len(lines) - 2 * most
    return "\n".join([*lines[:most], f"[{cut} lines]", *lines[-most:]]) if cut > 1 else text


def gradient_norm(args, trainer, model) -> torch.Tensor:
    """The norm of the gradients of this process, a scalar; 0 under fp16, whose scaler passes over infinite ones."""
    if args.fp16 or (args.deepspeed and trainer is None):
        return torch.tensor(0.0)
    if args.deepspeed:
        norm = float(trainer.deepspeed.get_global_grad_norm() or 0)
        return torch.tensor(norm if norm >= 0 else math.nan)  # DeepSpeed writes -1 for what is not finite
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm([g.to_local() if isinstance(g, DTensor) else g for g in gradients])


def batch_texts(tokenizer, inputs) -> list[str]:
    """The beginning of each row of a batch [B, S], or of each sequence of a flattened one, without padding."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    rows = [row[kept] for row, kept in zip(ids, mask.bool(), strict=True)] if mask is not None else ids
    positions = inputs.get("position_ids")
    if positions is not None and positions.shape == ids.shape and len(ids) == 1:
        rows = rows[0].tensor_split((positions[0] == 0).nonzero().flatten().tolist()[1:])
    return [tokenizer.decode(row.tolist()[:EXCERPT_TOKENS]) for row in rows]


def check_gradients(model, has_gradient):
    """Raise a RuntimeError if the first backward pass left out a tensor of the adapter."""
    without = [name for name, p in model.named_parameters() if p.requires_grad and name not in has_gradient]
    if without and isinstance(model, peft.PeftModel):
        raise RuntimeError(
            f"{len(without)} trainable tensors got no gradient ({', '.join(without[:3])}): the forward pass does not "
            "use them, or gradient checkpointing cuts them off from the loss. They would never be trained."
        )


def check_finite(model):
    """Raise a FloatingPointError if a trained tensor is not finite, before it is saved."""
    bad = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if bad:
        raise FloatingPointError(f"{len(bad)} trained tensors are not finite ({bad[0]}, ...); they are not saved.")
