"""What will a training need? Its tokens, steps and memory, told from shapes: no weights, no GPU, nothing is written.

A training step is run on tensors without numbers (torch's FakeTensorMode), and what is alive at each moment of it is
counted. torch's own MemTracker counts likewise, but refuses frozen weights. These modes of torch are no public
interface: only this room uses them, and tests/test_estimate.py holds what is counted against real tensors.

Shapes: B rows, S tokens of the longest.
"""

import copy
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice

import numpy as np
import peft
import torch
from accelerate.utils.modeling import calculate_maximum_sizes
from datasets import IterableDataset
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GradientCheckpointingLayer

from .batches import ChatCollator, base_of, example_lengths, takes_logits_to_keep


CARDS = (8, 12, 16, 24, 40, 80)  # GiB
RESERVED = 1.0  # GiB of a card that are taken for CUDA itself, its kernels and what lies between tensors
PROCESSES = (2, 4, 8)
STREAMED_ROWS = 1000  # of a stream, tell its lengths
# Bytes of optimizer state for a trained parameter, by a part of the optimizer's name; the first that fits holds.
STATES = {"8bit": 2, "4bit": 1, "sgd": 0, "adafactor": 0, "lion": 4, "rmsprop": 4, "adagrad": 4, "": 8}
# Bytes for a weight of a quantised layer, its scales included: NF4 in blocks of 64 whose scales are quantised too, and
# int8 whose rows have a float32 each, which is nothing.
QUANTISED = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0}


def dtype_of(config, flag) -> torch.dtype:
    """The type that --dtype asks for; by default the one that the configuration names."""
    if flag in (None, "auto"):
        return getattr(config, "dtype", None) or torch.float32
    return getattr(torch, flag)


def empty_model(auto_class, config, dtype, tokenizer, trust_remote_code):
    """The model of a configuration on the meta device: shapes without weights, of which no file is opened."""
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


# ------------------------------------------------------------------------------------------------------- the memory


@dataclass(frozen=True)
class Memory:
    """Bytes of one process by kind. `activations` are the most that live beside the others, gradients of them too."""

    weights: int  # that are not trained, and all of a model that is trained whole
    adapter: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and still alive, and the most that there ever were.

    It answers what tensors without numbers cannot: a mask is true everywhere, and a number that is asked for is 1. So
    every position of a batch counts as one that has a label, and no row as one that is padded.
    """

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set(map(storage_id, known))  # tensors that were there before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return args[0].dtype is torch.bool or 1
        if function is torch.ops.aten.index.Tensor:
            args = (args[0], [place for index in args[1] for place in places(index)])
        result = function(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if torch.is_tensor(made) and storage_id(made) not in self.seen:
                self.add(made.untyped_storage())
        return result

    def add(self, storage):
        self.seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, number, size):
        self.seen.remove(number)
        self.now -= size


def storage_id(tensor) -> int:
    return tensor.untyped_storage()._cdata


def places(index) -> list[torch.Tensor | None]:
    """An index as `aten.index` takes it; a mask becomes an index for each of its dimensions."""
    if not isinstance(index, FakeTensor) or index.dtype is not torch.bool:
        return [index]
    return [torch.empty(index.numel(), dtype=torch.int64, device=index.device)] * index.dim()


def memory_of_step(model, batch, args, bits=None) -> Memory:
    """What a step of a training needs, of a model on the meta device and a batch {name: tensor [B, S]}.

    `bits` (4 or 8): that the layers which bitsandbytes takes are quantised to. Raises what the model raises where it
    asks a tensor without numbers for more than `LiveBytes` says.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(bytes_of(t) for t in [*model.parameters(), *model.buffers()])
    adapter = sum(map(bytes_of, trained)) if isinstance(model, peft.PeftModel) else 0
    for layer in quantised_layers(model) if bits else ():
        weights += int(layer.weight.numel() * QUANTISED[bits]) - bytes_of(layer.weight)
    gradients = sum(map(bytes_of, trained))
    with FakeTensorMode(allow_non_fake_inputs=True):
        peak = peak_beside_weights(model, bits, batch, args)
    return Memory(
        weights=weights - adapter,
        adapter=adapter,
        gradients=gradients,
        optimizer=sum(p.numel() for p in trained) * bytes_of_state(args.optim),
        activations=max(0, peak - gradients),
    )


def bytes_of(tensor) -> int:
    return tensor.numel() * tensor.element_size()


def bytes_of_state(optimizer) -> int:
    """Bytes of an optimizer's state for a parameter."""
    name = str(getattr(optimizer, "value", optimizer))
    return next(count for part, count in STATES.items() if part in name)


def quantised_layers(model) -> list[torch.nn.Module]:
    """The layers that bitsandbytes quantises: all linear ones but the output layer and those of an adapter."""
    output = base_of(model).get_output_embeddings()
    return [
        layer
        for layer in base_of(model).modules()
        if type(layer) is torch.nn.Linear and layer is not output and not layer.weight.requires_grad
    ]


def peak_beside_weights(model, bits, batch, args) -> int:
    """Bytes: the most that lives beside weights and optimizer state, over two batches whose gradients add up.

    Of layers that are alike three and two are run: each other one adds what the third did.
    """
    layers = layers_alike(model)
    count = len(layers)
    del layers[3:]
    model.to_empty(device="cpu")
    base_of(model).tie_weights()
    model.train()
    for layer in quantised_layers(model) if bits else ():
        compute_in(layer, half_type(args))
    if args.gradient_checkpointing:
        base_of(model).gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    inputs = {name: torch.empty_like(tensor, device="cpu") for name, tensor in batch.items()}
    peak = peak_of_batches(model, inputs, args)
    if count <= 3:
        return peak
    del layers[2:]
    return peak + (peak - peak_of_batches(model, inputs, args)) * (count - 3)


def layers_alike(model) -> torch.nn.ModuleList:
    """The list of a model's layers, if all are of one class with parameters of the same shapes; else an empty one."""
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m))
    layers = next((m for m in lists if all(isinstance(each, GradientCheckpointingLayer) for each in m)), ())
    shapes = {(type(each), *((p.shape, p.requires_grad) for p in each.parameters())) for each in layers}
    return layers if len(shapes) == 1 else torch.nn.ModuleList()


def peak_of_batches(model, inputs, args) -> int:
    model.zero_grad()
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        for _ in range(min(2, args.gradient_accumulation_steps)):
            with torch.autocast("cpu", half_type(args), enabled=args.bf16 or args.fp16):
                loss = model(**inputs).loss
            loss.backward()
            del loss
    return live.peak


def half_type(args) -> torch.dtype:
    return torch.float16 if args.fp16 else torch.bfloat16


def compute_in(layer, dtype):
    """Let a layer compute as bitsandbytes' do: in a type of its own, between inputs and outputs of another."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, torch.nn.Parameter(parameter.to(dtype), requires_grad=False))
    layer.forward = lambda inputs: linear(inputs.to(dtype), layer.weight, layer.bias).to(inputs.dtype)


# --------------------------------------------------------------------------------------------------- several processes


def shared_out(memory, trained, layer, processes, half) -> dict[str, int]:
    """Bytes of each of several processes under ZeRO-2, ZeRO-3 and FSDP.

    `trained` parameters; `layer`: bytes of the largest layer, which is whole while it computes. For each trained
    parameter DeepSpeed has 2 bytes and shares out 18: two gradients, the one in float32, and weight and states of
    Adam in float32 (its own estimate_zero2_model_states_mem_needs and estimate_zero3_...). What is not trained is
    shared out by ZeRO-3 and FSDP.
    """
    trained_bytes = memory.adapter or memory.gradients
    frozen = memory.weights - (0 if memory.adapter else trained_bytes)
    whole, parted = (2, 18) if half else (4, 16)
    states = memory.optimizer + memory.gradients + trained_bytes
    return {
        "ZeRO-2": frozen + whole * trained + parted * trained // processes + memory.activations,
        "ZeRO-3": (frozen + parted * trained) // processes + 2 * layer + memory.activations,
        "FSDP": (frozen + states) // processes + 2 * layer + memory.activations,
    }


# ------------------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Setup:
    """A way to train: what it adds to the way before, all that was added to the flags that were given, and the
    arguments with that. `dtype` is that of the weights."""

    step: str
    added: str
    dtype: torch.dtype
    lora_args: object
    training_args: object

    def with_flags(self, flags, dtype=None, lora_args=None, training_args=None):
        return Setup(
            f"and {flags}",
            f"{self.added} {flags}".strip(),
            dtype or self.dtype,
            lora_args or self.lora_args,
            training_args or self.training_args,
        )


def setups(asked) -> Iterator[Setup]:
    """The setup as asked, and after it with ever more flags that save memory, in the order of memory.WAYS_OUT."""
    yield asked
    args, lora_args, bits = asked.training_args, asked.lora_args, bits_of(asked.lora_args)
    if args.gradient_checkpointing:
        without = changed(args, gradient_checkpointing=False)
        yield replace(asked, step="without --gradient_checkpointing", training_args=without)
    computed_in, mixed = half_type(args), args.bf16 or args.fp16
    # Where the types differ, autocast keeps a copy of each frozen weight for the backward pass.
    if not bits and (asked.dtype == torch.float32 or (mixed and asked.dtype != computed_in)):
        bf16 = "" if mixed else " --bf16"
        args = changed(args, bf16=not args.fp16)
        flags = f"--dtype {str(computed_in).removeprefix('torch.')}{bf16}"
        yield (asked := asked.with_flags(flags, dtype=computed_in, training_args=args))
    if not args.gradient_checkpointing and lora_args.peft_type != "PREFIX_TUNING":
        args = changed(args, gradient_checkpointing=True)
        yield (asked := asked.with_flags("--gradient_checkpointing", training_args=args))
    if (size := args.per_device_train_batch_size) > 1:
        count = size * args.gradient_accumulation_steps
        args = changed(args, per_device_train_batch_size=1, gradient_accumulation_steps=count)
        flags = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {count}"
        yield (asked := asked.with_flags(flags, training_args=args))
    if lora_args.use_lora and not bits and not lora_args.pre_seq_len:
        yield asked.with_flags("--load_in_4bit", lora_args=changed(lora_args, load_in_4bit=True))


def bits_of(lora_args) -> int | None:
    return 4 if lora_args.load_in_4bit else 8 if lora_args.load_in_8bit else None


def changed(arguments, **flags):
    """A copy of arguments with other flags, without the checks of their class, which look for packages and GPUs."""
    new = copy.copy(arguments)
    for name, value in flags.items():
        setattr(new, name, value)
    return new


def show(build: Callable, collator: Callable, data, dtype, lora_args, training_args):
    """Print what a training needs; `data` are the encoded splits.

    `build` makes the model of a dtype, LoraArguments and TrainingArguments on the meta device, `collator` the one that
    a model gets.
    """
    if not training_args.do_train:
        raise ValueError("--dry_run says what a training needs: add --do_train.")
    lora_args = changed(lora_args, init_lora_weights="true")  # others look at the weights, for the same shapes
    asked = Setup("as asked", "", dtype, lora_args, training_args)
    logging.getLogger("run_chatglm_lora").setLevel(logging.WARNING)  # a model is made for each line below
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what fails is a sentence below
    print("\n".join(about_steps(build(dtype, lora_args, training_args), data["train"], training_args)))
    print(line_of("GiB on one GPU", [*(field.name for field in fields(Memory)), "total"]))
    found = []  # [(setup, memory)]
    for setup in setups(asked):
        model = build(setup.dtype, setup.lora_args, setup.training_args)
        batch = longest_batch(model, collator(model), data["train"], setup.training_args)
        try:
            memory = memory_of_step(model, batch, setup.training_args, bits_of(setup.lora_args))
        except Exception as error:  # of a model that computes one way or another by the numbers that it sees
            raise ValueError(f"--dry_run: this model's memory cannot be told without numbers: {error}") from error
        found.append((setup, memory))
        print(line_of(setup.step, map(gib, [*vars(memory).values(), memory.total])), flush=True)
    if not bits_of(lora_args):
        print("\n".join(about_processes(build(dtype, lora_args, training_args), found[0][1], training_args)))
    print("\n".join(about_cards(found)))


def about_steps(model, data, args) -> list[str]:
    """Trained parameters and steps, as Trainer counts them."""
    trained, everything = model.num_parameters(only_trainable=True), model.num_parameters()
    size = args.train_batch_size * args.gradient_accumulation_steps
    steps = f"{args.max_steps}" if args.max_steps > 0 else f"{steps_of(len(data), args)}"
    return [
        f"Trainable parameters: {trained:,} of {everything:,} ({trained / everything:.3%})",
        f"Training: {steps} steps of {size} examples on one GPU; N GPUs take N times as many examples a step",
    ]


def steps_of(examples, args) -> int:
    whole, rest = divmod(examples, args.train_batch_size)
    batches = whole + (rest > 0 and not args.dataloader_drop_last)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def about_processes(model, memory, args) -> list[str]:
    """What each of several processes needs, as asked."""
    trained = model.num_parameters(only_trainable=True)
    layer = calculate_maximum_sizes(base_of(model))[1][0]
    shares = [shared_out(memory, trained, layer, count, args.bf16 or args.fp16) for count in PROCESSES]
    lines = [line_of("GiB a process, as asked", (f"{count} GPUs" for count in PROCESSES))]
    return lines + [line_of(name, (gib(share[name]) for share in shares)) for name in shares[0]]


def about_cards(found) -> list[str]:
    """For each size of card the first way that fits on it, with a GiB of room."""
    lines = [f"What fits on one GPU, where {RESERVED:g} GiB of it are taken for CUDA:"]
    for card in CARDS:
        ways = [setup.added or setup.step for setup, memory in found if memory.total / 2**30 + RESERVED <= card]
        lines.append(f"{card:>5} GiB: {ways[0] if ways else 'none of these; several GPUs with ZeRO-3 or FSDP'}")
    return lines


def gib(count) -> str:
    return f"{count / 2**30:.2f}"


def line_of(first, cells) -> str:
    return f"{first:<66}" + "".join(f"{cell:>12}" for cell in cells)


# ------------------------------------------------------------------------------------------------------- the data


def longest_batch(model, collator, data, args) -> dict[str, torch.Tensor]:
    """A batch of the longest examples, padded, as tensors [B, S]; logits are made where an answer is, if they can."""
    rows = longest_rows(data, args.train_batch_size)
    if isinstance(collator, ChatCollator):
        padded, single = collator.padded, len(rows) == 1
        chosen = takes_logits_to_keep(model) and padded.length is None
        collator = replace(padded, answers_only=chosen, multiple_of=1 if single else padded.multiple_of)
    batch = collator(rows)
    batch.pop("attention_mask", None)  # an upper bound: every row as long as the longest
    return batch


def longest_rows(data, count) -> list[dict]:
    if isinstance(data, IterableDataset):
        return sorted(islice(data, STREAMED_ROWS), key=lambda row: -len(row["input_ids"]))[:count]
    order = np.argsort(-example_lengths(data), kind="stable")[:count]
    rows = [data[int(number)] for number in order]
    return (rows * count)[:count]
