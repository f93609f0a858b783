"""Which weights are trained beside an adapter's, at which rates, and how long: LoRA+, last layers, early stopping."""

import logging

import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_optimizer import is_optimizer_factory


logger = logging.getLogger("run_chatglm_lora.methods")

OWN_WEIGHTS = {"params", "model", "optimizer_dict"}  # options of optimizers that choose their weights themselves


def check(lora_args, training_args):
    """Raise a ValueError for a method that what else is asked for would make ineffective."""
    if lora_args.loraplus_lr_ratio is not None:
        check_loraplus(lora_args, training_args)
    if lora_args.train_last_layers is not None and lora_args.pre_seq_len:
        raise ValueError("--train_last_layers and --pre_seq_len exclude each other: drop one of the flags.")
    if lora_args.early_stopping_patience is not None:
        check_patience(training_args)


# -------------------------------------------------------------------------------------------------------------- LoRA+


def check_loraplus(lora_args, training_args):
    if not lora_args.use_lora or lora_args.pre_seq_len or lora_args.peft_type != "LORA":
        raise ValueError("--loraplus_lr_ratio is for LoRA's two matrices: drop it, or train with --peft_type LORA.")
    if training_args.deepspeed and training_args.hf_deepspeed_config.config.get("optimizer"):
        raise ValueError(
            f"--loraplus_lr_ratio: {training_args.deepspeed} has an optimizer of its own, which knows one rate only: "
            "remove that section, as in ds_zero2.json."
        )


def optimizer_options(lora_args, training_args) -> dict:
    """What Trainer is given for --loraplus_lr_ratio; nothing without it."""
    if lora_args.loraplus_lr_ratio is None:
        return {}
    options = {"training_args": training_args, "ratio": lora_args.loraplus_lr_ratio}
    return {"optimizer_cls_and_kwargs": (LoraPlus, options)}


class LoraPlus:
    """The optimizer of --optim with the rates of LoRA+: B's is `ratio` times A's (Hayou et al., 2024).

    A factory in Trainer's sense, called when the model stands where it is trained. Raises ValueError for a model
    without LoRA, and for an optimizer that chooses its weights itself.
    """

    def __call__(self, model, training_args, ratio) -> torch.optim.Optimizer:
        if not any("lora_B" in name for name, parameter in model.named_parameters() if parameter.requires_grad):
            raise ValueError("--loraplus_lr_ratio is for LoRA's two matrices, which this adapter has not: drop it.")
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training_args, model)
        if is_optimizer_factory(optimizer_class) or OWN_WEIGHTS & options.keys():
            raise ValueError(f"--optim {training_args.optim} and --loraplus_lr_ratio exclude each other: drop one.")
        options["loraplus_weight_decay"] = training_args.weight_decay
        return create_loraplus_optimizer(model, optimizer_class, loraplus_lr_ratio=ratio, **options)


# ---------------------------------------------------------------------------------------------------- the last layers


def decoder_layers(model) -> torch.nn.ModuleList:
    """The layers of the decoder: the longest list in it that lies in no other one, as lists of experts do."""
    lists = {name: m for name, m in model.get_decoder().named_modules() if isinstance(m, torch.nn.ModuleList)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise ValueError(f"--train_last_layers: {type(model).__name__} has no list of layers.")
    return max(outer, key=len)


def with_last_layers_trained(model, count):
    """The model, of which the weights of the last `count` decoder layers are trained; a ValueError if it has fewer."""
    layers = decoder_layers(model)
    if not 1 <= count <= len(layers):
        raise ValueError(f"--train_last_layers must lie between 1 and {len(layers)}, not be {count}.")
    model.requires_grad_(False)
    layers[-count:].requires_grad_(True)
    trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
    logger.info(f"Trainable parameters: {trained:,} of {total:,} ({trained / total:.3%}), the last {count} layers")
    return model


# ----------------------------------------------------------------------------------------------------------- patience


def check_patience(training_args):
    if not training_args.load_best_model_at_end or training_args.eval_strategy == "no":
        raise ValueError(
            "--early_stopping_patience compares evaluations and ends with the best model: add "
            "--load_best_model_at_end, and --eval_strategy and --save_strategy (both steps, or both epoch)."
        )


def stop_early(trainer, patience):
    """With --early_stopping_patience, end the training when so many evaluations in a row brought nothing better.

    The callback comes last: other ones add what --metric_for_best_model may name. A resumed run goes on counting.
    """
    if patience is not None:
        trainer.args.restore_callback_states_from_checkpoint = True
        trainer.add_callback(EarlyStoppingCallback(patience))
