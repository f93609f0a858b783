"""What the tests of scripts/ share: the scripts as modules, and adapters that change what a model says."""

import importlib.util
import sys

import torch
from peft import LoraConfig, get_peft_model
from tiny import ROOT
from transformers import AutoModelForCausalLM

import chatglm  # noqa: F401


def script(name):
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path  # a script puts the repository there
    return module


def write_adapter(base, folder, dtype=None, **options):
    """An adapter for `base` whose every tensor is far from where training starts."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype or "auto")
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **options})
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)
