"""Random weights of a size that keeps signals through the layers of a narrow model."""

import torch


def spread_weights(model: torch.nn.Module):
    """Draw each matrix anew, scaled by its inputs, and each embedding with a deviation of 1."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
