"""Checks that stop a run which cannot end well, in its first minute where that is possible."""

import itertools
import logging
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from prediction import generated_ids


logger = logging.getLogger("run_chatglm_lora.checks")

IGNORE_INDEX = -100
EXAMPLE_TOKENS = 1000  # of the first example, more are not logged


class TrainingChecks(TrainerCallback):
    """Losses that are not finite, tensors without gradient, models that cannot generate, adapters that hold nothing.

    The loss is looked at before the optimizer steps, so that no weight is spoiled and no checkpoint is saved with it.
    """

    def on_train_begin(self, args, state, control, model, processing_class, train_dataloader, **kwargs):
        example = next(iter(train_dataloader.dataset))
        logger.info(f"The first example; what stands in 【】 is trained:\n{marked_text(processing_class, example)}")
        if args.do_predict:
            untrained = itertools.takewhile(lambda label: label == IGNORE_INDEX, example["labels"])
            check_generation(model, example["input_ids"][: len(list(untrained))])
        self.finite = torch.tensor(True, device=args.device)
        self.has_gradient = set()
        self.loss_hook = model.register_forward_hook(self.note_loss)
        self.gradient_hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self.has_gradient.add(name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def note_loss(self, model, inputs, output):
        if model.training and output.loss is not None:
            self.finite &= output.loss.detach().isfinite().all().to(self.finite.device)

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        if not self.finite:
            raise FloatingPointError(
                f"The loss of step {state.global_step + 1} is not a finite number (learning rate "
                f"{optimizer.param_groups[0]['lr']:g}). Nothing is saved after step {state.global_step}. "
                "Try a lower --learning_rate, and --bf16 or float32 instead of --fp16."
            )
        if self.gradient_hooks:
            check_gradients(model, self.has_gradient)
            while self.gradient_hooks:
                self.gradient_hooks.pop().remove()

    def on_step_end(self, args, state, control, model, **kwargs):
        if control.should_save:
            check_finite(model)

    def on_save(self, args, state, control, model, **kwargs):
        if args.should_save:
            self.check_saved(Path(args.output_dir, f"checkpoint-{state.global_step}"), model, state.global_step)

    def on_train_end(self, args, state, control, model, **kwargs):
        self.loss_hook.remove()
        check_finite(model)

    @staticmethod
    def check_saved(folder, model, steps):
        """Open a saved adapter again; RuntimeError if it lacks tensors, is not finite, or has learned nothing."""
        if not isinstance(model, peft.PeftModel):
            return
        saved = load_file(Path(folder, peft.utils.SAFETENSORS_WEIGHTS_NAME))
        if missing := peft.get_peft_model_state_dict(model).keys() - saved.keys():
            raise RuntimeError(f"{folder}: {len(missing)} adapter tensors were not saved ({min(missing)}, ...).")
        if bad := [name for name, tensor in saved.items() if not tensor.isfinite().all()]:
            raise RuntimeError(f"{folder}: {len(bad)} saved tensors are not finite ({bad[0]}, ...).")
        updates = [tensor for name, tensor in saved.items() if "lora_B" in name]
        # The first step of a warm-up has learning rate 0, so that an adapter saved after it may be untouched.
        if steps > 1 and updates and not any(tensor.any() for tensor in updates):
            raise RuntimeError(f"{folder}: every lora_B is still zero after {steps} steps. Is --learning_rate zero?")


def marked_text(tokenizer, example) -> str:
    """The text of an encoded example, with 【 and 】 around each run of tokens that are trained."""
    runs = []  # [(ids, is trained)]
    for token, label in zip(example["input_ids"][:EXAMPLE_TOKENS], example["labels"], strict=False):
        trained = label != IGNORE_INDEX
        if not runs or runs[-1][1] != trained:
            runs.append(([], trained))
        runs[-1][0].append(token)
    return "".join(f"【{tokenizer.decode(ids)}】" if trained else tokenizer.decode(ids) for ids, trained in runs)


def check_generation(model, prompt):
    """Generate two tokens, so that a model that cannot is found before training and not after."""
    try:
        generated_ids(model, [prompt], max_new_tokens=2, pad_token_id=0)
    except Exception as error:
        raise RuntimeError(f"--do_predict: this model cannot generate, found before training. {error}") from error


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
