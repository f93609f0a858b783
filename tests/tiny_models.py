"""Tiny random checkpoints of any causal model of transformers."""

import torch
from miniatures.architectures import OWN_SIZES, small
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


def write_tiny(folder, model_type, tokenizer, **options):
    """A random checkpoint with a tokenizer, in a folder."""
    torch.manual_seed(0)
    end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    own = {**OWN_SIZES.get(model_type, {}), **end, "vocab_size": len(tokenizer), **options}
    config = small(CONFIG_MAPPING[model_type], **own)
    model = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
