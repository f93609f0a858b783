"""Reading of what was recorded from the published models."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


GOLDENS = Path(__file__).parent / "goldens"


def recorded_run(version: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, notes) of the original code's runs."""
    path = GOLDENS / "model" / f"{version}_s0"
    return load_file(path / "goldens.safetensors"), json.loads((path / "goldens.json").read_text())


def recorded_texts(name: str) -> dict[str, Any]:
    """What the original tokenizer made of texts and conversations."""
    return json.loads((GOLDENS / "tokenizer" / f"{name}.json").read_text())


def named(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def as_lists(encoding) -> dict[str, list]:
    return {name: rows.tolist() if torch.is_tensor(rows) else rows for name, rows in encoding.items()}
