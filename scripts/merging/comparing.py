"""Whether a merged folder is the same model as base and adapter: their logits, the folder's from a fresh process."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from answering.opening import opened, opened_base
from safetensors.torch import load_file

from chatglm.modeling_chatglm import ChatGLMRotaryEmbedding
from finetuning.self_checks import check_cached, relative_difference, rounding_bound

from .weights import Merge


ROOT = Path(__file__).resolve().parents[2]
MESSAGES = [{"role": "user", "content": "你好！请介绍一下你自己。\n\ndef add(a, b):\n    return a + b  # 3.14"}]

# Relative error of the logits, as a vector, up to which two models are the same: rounding merged weights to 16 bits
# moves them by some thousandths (float16) or hundredths (bfloat16); a forgotten or doubled adapter by much more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}

FRESH_PROCESS = """
import json, sys
folder, messages, out, package = sys.argv[1:]
if package:
    sys.path.insert(0, package)
    import chatglm
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder)
messages = json.loads(messages)
ids = tokenizer(messages[0]["content"])["input_ids"]
if tokenizer.chat_template:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": device})
with torch.no_grad():
    given = torch.tensor([ids], device=device)
    logits = model(given).logits[0].float().cpu()
    answer = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=1,
        use_cache=True, output_logits=True, return_dict_in_generate=True,
    )
    cached = torch.cat(answer.logits).float().cpu()
    whole = model(answer.sequences, use_cache=False).logits[0, len(ids) - 1 : -1].float().cpu().contiguous()
save_file({"ids": torch.tensor(ids), "logits": logits, "cached": cached, "whole": whole}, out)
"""


# --------------------------------------------------------------------------------------------------- the comparison


def compared(merge: Merge, folder: Path) -> float:
    """The largest difference between the logits of the folder, in a fresh process, and those of base and adapter.

    Raises ValueError if they are not the same model, or the folder's tokenizer writes another prompt.
    """
    ids, expected, dtype = unmerged_logits(merge)
    found = logits_in_fresh_process(folder, package=None if merge.native else ROOT)
    if found["ids"].tolist() != ids:
        raise ValueError(f"the tokenizer of the result encodes a prompt as {found['ids'].tolist()}, not as {ids}.")
    difference = found["logits"] - expected  # [S, V]
    error = float(difference.norm() / expected.norm())
    if not error <= TOLERANCE[dtype]:  # NaN too
        raise ValueError(
            f"the logits of the result differ from those of base and adapter by {error:.2%} (largest difference "
            f"{difference.abs().max():.3g}), more than rounding explains."
        )
    moved = relative_difference(found["cached"], found["whole"])
    check_cached(moved, rounding_bound(torch.finfo(dtype).eps), "The result")
    return float(difference.abs().max())


@torch.no_grad()
def unmerged_logits(merge: Merge) -> tuple[list[int], torch.Tensor, torch.dtype]:
    """Ids [S] of the prompt, logits [S, V] of base and adapter for it, and the dtype that they were computed in."""
    arguments, tokenizer = merge.arguments, merge.tokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loading = {"dtype": arguments.dtype, "device": device}
    if arguments.base_only:
        model = opened_base(merge.model_arguments, **loading)
    else:
        model, _ = opened(str(merge.adapter_folder), arguments.base_model, **loading)
    ids = tokenizer(MESSAGES[0]["content"])["input_ids"]
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    for module in model.modules():
        if merge.native and isinstance(module, ChatGLMRotaryEmbedding):
            module.angles_in_model_dtype = False  # see `weights.remarks`
    logits = model(torch.tensor([ids], device=device)).logits[0]
    return ids, logits.float().cpu(), logits.dtype


def logits_in_fresh_process(folder: Path, package: Path | None) -> dict[str, torch.Tensor]:
    """`ids` [S] and `logits` [S, V] of a folder, in a process that knows `chatglm` from `package` only."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "logits.safetensors")
        command = [sys.executable, "-c", FRESH_PROCESS, str(folder.resolve()), json.dumps(MESSAGES), str(out)]
        run = subprocess.run([*command, str(package or "")], cwd=scratch, capture_output=True, text=True)
        if run.returncode:
            raise ValueError(f"the result does not open: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
        return load_file(out)
