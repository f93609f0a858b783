"""Whether the device computes what was recorded from the published code, and the same in each of our ways.

Every check gives {"error": what was found, "bound": the most that is right}, and is right where error <= bound.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.utils import compile_regions
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from benchmarks.training import adapted, random_model, random_rows
from finetuning.batches import FlattenedCollator, PaddedCollator, chat_collator
from finetuning.self_checks import SelfChecks
from run_chatglm_lora import ChatArguments


ROOT = Path(__file__).resolve().parents[3]
GOLDENS = ROOT / "tests/chatglm/goldens/model"
RECORDED = {  # version: a case with labels, and one of generation
    "v1": ("auto_train_rightpad", "batch_leftpad"),
    "v2": ("train_leftpad", "batch_leftpad"),
    "v3": ("train_leftpad", "batch_leftpad"),
    "glm4": ("train_leftpad", "batch_leftpad"),
}
# Relative error of logits, losses and gradients, as vectors: 16 eps of half precision, 24 layers of rounding or so
BOUNDS = {torch.float32: 1e-4, torch.float16: 2**-6, torch.bfloat16: 2**-3}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NEW_TOKENS = 10


def check(results, device):
    """Try all but the demo."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for version, (training, generation) in RECORDED.items():
        for name, dtype in DTYPES.items():
            results.add(f"logits of {version}, {name}", recorded_logits, version, training, dtype, device)
        results.add(f"answers of {version}", recorded_answers, version, generation, device)
    for shape in ("nano", "nano-6b"):
        for name, dtype in DTYPES.items():
            results.add(f"end to end = padded, {shape}, {name}", end_to_end, shape, dtype, device)
        results.add(f"cache = no cache, {shape}", cached, shape, device)
        results.add(f"compiled = not, {shape}", compiled, shape, device)
    for bits in (8, 4):
        results.add(f"{bits} bit near 16", quantised, bits, device)


def check_demo(results, device):
    """The script, on a tiny checkpoint, in processes of its own."""
    for flags in (["--bf16"], ["--fp16"]) if device == "cuda" else ([],):
        results.add(f"demo {' '.join(flags)}".strip(), demo, flags, results.path.parent)


def loaded(version, dtype, device):
    return AutoModelForCausalLM.from_pretrained(GOLDENS / f"{version}_s0", dtype=dtype).to(device).eval()


def recorded(version, case, device) -> dict[str, torch.Tensor]:
    """The tensors of a case, by their names in it."""
    tensors = load_file(GOLDENS / f"{version}_s0/goldens.safetensors", device=device)
    return {name.removeprefix(f"{case}."): x for name, x in tensors.items() if name.startswith(f"{case}.")}


def inputs_of(case) -> dict[str, torch.Tensor]:
    return {name: case[name] for name in ("input_ids", "attention_mask", "position_ids") if name in case}


@torch.no_grad()
def recorded_logits(version, name, dtype, device):
    """How far the logits of real tokens are from the recorded ones, relative."""
    case = recorded(version, name, device)
    logits = loaded(version, dtype, device)(**inputs_of(case)).logits.float()  # [B, S, V]
    mask = case.get("attention_mask", torch.ones_like(case["input_ids"]))
    real = mask.bool() if mask.dim() == 2 else torch.ones_like(case["input_ids"]).bool()  # [B, S]
    error = (logits - case["logits"])[real].norm() / case["logits"][real].norm()
    return {"error": error.item(), "bound": BOUNDS[dtype]}


def recorded_answers(version, name, device):
    """Tokens of greedy answers that are not those recorded."""
    case = recorded(version, f"gen.{name}", device)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    ids = loaded(version, torch.float32, device).generate(**inputs_of(case), **options)
    return {"error": (ids != case["output_ids"]).sum().item(), "bound": 0}


def loss_and_gradients(model, batch, device) -> tuple[float, torch.Tensor]:
    """The loss of a batch and the gradients of all trained weights, end to end."""
    model.zero_grad()
    batch = {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()}
    loss = model(**batch, use_cache=False).loss  # as Trainer has it
    loss.backward()
    gradients = [p.grad.flatten().float() for p in model.parameters() if p.requires_grad]
    return loss.item(), torch.cat(gradients)


def trained_alike(model, batch, other_model, other_batch, device) -> float:
    """How far two ways are apart, relative: of their losses, or of their gradients where that is more."""
    loss, gradients = loss_and_gradients(model, batch, device)
    other_loss, other_gradients = loss_and_gradients(other_model, other_batch, device)
    apart = (other_gradients - gradients).norm() / gradients.norm()
    return max(abs(other_loss - loss) / loss, apart.item())


def end_to_end(shape, dtype, device):
    """Rows end to end against the same rows padded."""
    model = adapted(random_model(shape, device).to(dtype)).train()
    rows = random_rows(8, model.config)
    checks = settled_checks(model, rows)
    padded, flat = PaddedCollator(0, answers_only=True)(rows), FlattenedCollator()(rows)
    error = trained_alike(model, padded, model, flat, device)
    return {"error": error, "bound": BOUNDS[dtype], "attention": checks["attention"], "batches": checks["batches"]}


def settled_checks(model, rows) -> dict:
    """What the self-checks find out about a model, whose attention they choose."""
    args = TrainingArguments("unused", do_train=True, use_cpu=not torch.cuda.is_available(), report_to="none")
    chat_args = ChatArguments()
    checks = SelfChecks(chat_collator(0, chat_args, args, 1024), {"train": rows}, chat_args, 0, False)
    checks.check(model, args)
    return checks.results


def cached(shape, device):
    """Greedy tokens that are others without a cache."""
    model = random_model(shape, device).float().eval()
    prompts = [row["input_ids"][: row["labels"].count(-100)] for row in random_rows(1, model.config)]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    ways = [model.generate(torch.tensor(prompts, device=device), use_cache=way, **options) for way in (True, False)]
    return {"error": (ways[0] != ways[1]).sum().item(), "bound": 0}


def compiled(shape, device):
    """Compiled layers against others, in float32. On a CPU only the tracing is tried: the compiler takes minutes."""
    backend = "inductor" if device == "cuda" else "aot_eager"
    model = adapted(random_model(shape, device).float()).train()
    batch = PaddedCollator(0, answers_only=True)(random_rows(4, model.config))
    error = trained_alike(model, batch, compile_regions(copy.deepcopy(model), backend=backend), batch, device)
    return {"error": error, "bound": BOUNDS[torch.float32]}


def quantised(bits, device):
    """The loss with quantised weights, which rounds as it should: near that in 16 bits."""
    plain, coarse = random_model("nano", device).to(torch.bfloat16), random_model("nano", device, bits)
    batch = PaddedCollator(0, answers_only=True)(random_rows(4, plain.config))
    batch = {name: x.to(device) for name, x in batch.items()}
    with torch.no_grad():
        losses = [model(**batch).loss.item() for model in (plain, coarse)]
    return {"error": abs(losses[1] - losses[0]) / losses[0], "bound": 5e-2}


def demo(flags, folder):
    """The share of the demo's answers that do not come back word for word after tuning."""
    environment = {**os.environ, "PYTHON": sys.executable, "DEMO_FLAGS": " ".join(flags) or "--use_cpu"}
    command = ["bash", str(ROOT / "scripts/demo.sh"), str(folder / f"demo{''.join(flags)}")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError((ended.stderr or ended.stdout).strip().rpartition("\n")[-1])
    return {"error": 1 - float(ended.stdout.rpartition("\n\n")[-1].partition("%")[0]) / 100, "bound": 0.1}
