"""How fast a device trains and answers: of the rate of matrix products that it reaches, how much, and what is lost."""

import time
from itertools import cycle, islice

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from benchmarks.shapes import SHAPES
from benchmarks.training import STATIC_LENGTH, adapted, packs_of, random_model, random_rows, speed, trained
from finetuning.batches import FlattenedCollator
from finetuning.prediction import generated_ids


CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
# On a CPU the compiler takes minutes; only the tracing is tried.
COMPILED = {"torch_compile": True, "torch_compile_backend": "inductor" if torch.cuda.is_available() else "aot_eager"}
WAYS = {  # way of the benchmark, bits of the weights, flags of Trainer
    "the guides' recipe": ("static", 16, {}),
    "dynamic padding": ("dynamic", 16, {}),
    "ours": ("ours", 16, {}),
    "ours, packed": ("packed", 16, {}),
    "ours, packed, checkpointed": ("packed", 16, CHECKPOINTED),
    "ours, packed, compiled": ("packed", 16, COMPILED),
    "ours, packed, QLoRA": ("packed", 4, CHECKPOINTED),
}
STEPS = 8  # timed
MATRIX = {"cuda": 8192, "cpu": 512}
LONGEST_ROW = {"cuda": 2**18, "cpu": 2**11}
NEW_TOKENS = {"cuda": 128, "cpu": 16}
PROMPT = 64
PROFILED_STEP = 3


def matrix_peak(device) -> dict:
    """TFLOP/s of products of two square matrices of random numbers: bfloat16 on a GPU."""
    size = MATRIX[device]
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    for _ in range(3):
        a @ b
    began, count = clock(), 20
    for _ in range(count):
        a @ b
    return {"tflops": count * 2 * size**3 / (clock() - began) / 1e12}


def clock() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def rows_a_step(way, shape) -> int:
    """Rows that make about a pack's tokens a step in each way: 8,192 in the released shapes."""
    pack, mean = SHAPES[shape].pack, 115  # tokens of a row
    return max(1, pack // (STATIC_LENGTH if way == "static" else mean))


def check_training(results, shape, device, peak, ways=WAYS):
    """Each way on one model; the quantised one is another model. `peak` (TFLOP/s) is what a share is told of."""

    def measured(model, way, flags):
        figures = speed(model, way, shape, STEPS, rows_a_step(way, shape), **flags)
        return {**figures, "share_of_peak": figures["tflops"] / peak}

    for bits in (16, 4):
        model = None
        for name, (way, its_bits, flags) in ways.items():
            if its_bits == bits:
                model = model or adapted(random_model(shape, device, bits))
                results.add(f"{shape}, {name}", measured, model, way, flags)
                model.gradient_checkpointing_disable()
        del model


def check_profile(results, shape, device):
    model = adapted(random_model(shape, device))
    results.add(f"one step of {shape}, packed", step_profile, model, shape)
    results.add(f"longest row of {shape}, checkpointed", longest_row, model, device)


class Profiler(TrainerCallback):
    """Records the kernels of one step, from its begin to its end."""

    def __init__(self, activity):
        self.recording = profile(activities=[activity])

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == PROFILED_STEP:
            self.began = clock()
            self.recording.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == PROFILED_STEP + 1:
            self.seconds = clock() - self.began
            self.recording.stop()


def step_profile(model, shape) -> dict:
    """The ten kernels that take longest in one step, and the share of the step in which none runs."""
    on_gpu = torch.cuda.is_available()
    profiler = Profiler(ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU)
    rows = packs_of(random_rows(6 * rows_a_step("packed", shape), model.config), SHAPES[shape].pack)
    trained(model, "packed", shape, rows, 1, [profiler])
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels = [event for event in profiler.recording.events() if event.device_type == kind]
    totals = {}
    for event in kernels:
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        totals[event.name] = totals.get(event.name, 0) + microseconds
    longest = sorted(totals.items(), key=lambda item: -item[1])[:10]
    busy = covered([(event.time_range.start, event.time_range.end) for event in kernels]) / 1e6
    return {
        "step_seconds": profiler.seconds,
        "idle_share": max(0.0, 1 - busy / profiler.seconds),
        "kernels": {name[:120]: microseconds / 1e3 for name, microseconds in longest},  # milliseconds
    }


def covered(intervals) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def longest_row(model, device) -> dict:
    """The longest row, doubled from 512 tokens, whose training step fits into the memory."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    length, fits, seconds = 512, 0, 0.0
    while length <= LONGEST_ROW[device]:
        ids = list(islice(cycle(random_rows(1, model.config)[0]["input_ids"]), length))
        began = clock()
        try:
            batch = FlattenedCollator()([{"input_ids": ids, "labels": [-100] * (length - 64) + ids[-64:]}])
            batch = {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()}
            model(**batch, use_cache=False).loss.backward()
        except torch.OutOfMemoryError:
            break
        fits, seconds, length = length, clock() - began, 2 * length
        model.zero_grad()
    return {"tokens": fits, "step_seconds": seconds, "limit_tried": LONGEST_ROW[device]}


def check_answers(results, shape, device):
    """Tokens that --do_predict makes in a second, in batches of 1 and of 32 rows."""
    model = random_model(shape, device).eval()
    for batch_size in (1, 32):
        results.add(f"answers of {shape}, batch {batch_size}", answering, model, batch_size, NEW_TOKENS[device])


def answering(model, batch_size, count) -> dict:
    config = model.config
    rows = random_rows(batch_size, config)
    prompts = [row["input_ids"][: row["labels"].count(-100)] for row in rows]
    options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_new_tokens": count}
    generated_ids(model, prompts, 4, 0, **{**options, "min_new_tokens": 4})  # warm-up
    began = clock()
    generated_ids(model, prompts, count, 0, **options)
    return {"tokens_per_second": batch_size * count / (clock() - began)}
