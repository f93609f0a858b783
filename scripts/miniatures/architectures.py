"""A tiny random model of any causal architecture that transformers or chatglm/ has, and rows for it."""

import dataclasses
import inspect

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from chatglm import ChatGLMConfig

from .spreading import spread_weights


VOCABULARY, MOST_WEIGHTS = 96, 20_000_000
SIZES = {  # size: the names that it has
    64: "hidden_size d_model n_embd embedding_size intermediate_size ffn_hidden_size ffn_dim d_ff lru_width",
    4: "num_attention_heads n_head n_heads num_heads linear_num_value_heads index_n_heads encoder_attention_heads "
    "decoder_attention_heads num_hidden_layers n_layer n_layers num_layers num_experts num_local_experts "
    "n_routed_experts moe_num_experts",
    2: "num_key_value_heads n_kv_heads linear_num_key_heads num_experts_per_tok moe_k encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers eos_token_id",
    16: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim q_lora_rank kv_lora_rank linear_key_head_dim "
    "linear_value_head_dim index_head_dim rotary_dim mamba_chunk_size chunk_size mamba_d_state ssm_state_size "
    "mamba_d_head mamba_head_dim",
    32: "encoder_ffn_dim decoder_ffn_dim moe_intermediate_size shared_expert_intermediate_size",
    128: "mamba_d_ssm",
    512: "max_position_embeddings n_positions",
    8: "sliding_window mamba_n_heads mamba_num_heads",
    VOCABULARY: "vocab_size",
    0: "pad_token_id",
    1: "bos_token_id n_group topk_group moe_num_groups",
}
SIZES = {name: size for size, names in SIZES.items() for name in names.split()}
OWN_SIZES = {  # where the names above do not fit together
    "dots1": {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "plbart": {"encoder_attention_heads": 4},
    "recurrent_gemma": {"attention_window_size": 8},
    "reformer": {"is_decoder": True},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
CHATGLM = {  # checkpoints with one model_type; CodeGeeX2 is a ChatGLM2
    "ChatGLM-6B": {
        **{"position_encoding_2d": True, "inner_hidden_size": 64, "vocab_size": VOCABULARY, "hidden_size": 64},
        **{"num_layers": 4, "num_attention_heads": 4, "gmask_token_id": 3, "bos_token_id": 4, "eos_token_id": 2},
    },
    **{
        checkpoint: {
            **{"generation": generation, "padded_vocab_size": VOCABULARY, "hidden_size": 64, "ffn_hidden_size": 64},
            **{"num_layers": 4, "num_attention_heads": 4, "multi_query_group_num": 2, "kv_channels": 16},
            **{"pad_token_id": 0, "eos_token_id": 2},
        }
        for checkpoint, generation in {
            "ChatGLM2-6B": "chatglm2",
            "ChatGLM3-6B": "chatglm3",
            "GLM-4-9B": "glm4",
        }.items()
    },
}


def field_names(config_class) -> set[str]:
    if dataclasses.is_dataclass(config_class):
        return {field.name for field in dataclasses.fields(config_class)}
    return set(inspect.signature(config_class.__init__).parameters)


def tiny_config(name):
    if name in CHATGLM:
        return ChatGLMConfig.from_dict({"model_type": "chatglm", **CHATGLM[name]})
    return small(CONFIG_MAPPING[name], **OWN_SIZES.get(name, {}))


def small(config_class, **own_sizes):
    """A configuration in which every size that has a known name is small, and its parts likewise."""
    known = field_names(config_class)
    sizes = {size: value for size, value in SIZES.items() if size in known}
    if "kv_lora_rank" in known:  # latent attention has as many key heads as query heads
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    parts = {name: small(part) for name, part in config_class.sub_configs.items() if part is not AutoConfig}
    return config_class(**{**sizes, **parts, **own_sizes})


def tiny_model(name):
    """A random model whose layers keep the size of their inputs; with the usual 0.02 a leak would hardly show."""
    config = tiny_config(name)
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"{weights / 1e6:,.0f} million weights: it has sizes without a known name")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    spread_weights(model)
    return model


def random_rows(lengths, seed):
    """Rows of random ids, with the two that ChatGLM-6B needs before an answer."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        ids[2:4] = [3, 4]
        rows.append({"input_ids": ids, "labels": [-100] * 4 + ids[4:]})
    return rows
