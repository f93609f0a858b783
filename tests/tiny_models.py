"""Tiny random checkpoints of any causal model of transformers."""

import dataclasses
import inspect

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


SIZES = {  # size: the names that it has in configurations
    32: "hidden_size d_model n_embd mamba_d_ssm",
    64: "intermediate_size ffn_hidden_size",
    2: "num_hidden_layers n_layer num_layers num_key_value_heads n_kv_heads num_experts_per_tok",
    4: "num_attention_heads n_head n_heads num_heads num_experts num_local_experts n_routed_experts mamba_n_heads",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_d_state mamba_d_head mamba_chunk_size state_size",
    16: "q_lora_rank kv_lora_rank moe_intermediate_size",
    256: "max_position_embeddings",
    1: "first_k_dense_replace n_group topk_group mamba_n_groups",
}
SIZES = {name: size for size, names in SIZES.items() for name in names.split()}
OWN_SIZES = {
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
}


def tiny_config(model_type, vocab_size, **options):
    """A configuration in which every size that has a known name is small."""
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)} | {
        *inspect.signature(config_class.__init__).parameters
    }
    sizes = {name: size for name, size in SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention has as many key heads as query heads
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return config_class(**{**sizes, "vocab_size": vocab_size, **OWN_SIZES.get(model_type, {}), **options})


def write_tiny(folder, model_type, tokenizer, **options):
    """A random checkpoint with a tokenizer, in a folder."""
    torch.manual_seed(0)
    end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = tiny_config(model_type, len(tokenizer), **{**end, **options})
    model = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
