"""ChatGLM2, CodeGeeX2, ChatGLM3 and GLM-4 in the layout of the library's own `GlmForCausalLM`.

What is written with this loads in stock transformers, and in engines that know that class, without remote code.
Shapes: n query heads, g key/value heads, d head size, H hidden size, r rank of an adapter.
"""

import torch
from tokenizers import Tokenizer
from transformers import GlmConfig, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .configuration_chatglm import ChatGLMConfig
from .tokenization_parts import TRIMMED_ANSWERS, PartsTokenizer


NAMES = {  # parts of parameter names
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.output_layer": "lm_head",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.encoder.layers": "model.layers",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",  # the gate comes first in both
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
FUSED, SPLIT = "self_attention.query_key_value", [f"self_attn.{part}_proj" for part in "qkv"]
COMPUTED = "rotary_pos_emb.inv_freq"
EXPRESSED_ONLY = {  # what the native class computes: the only value that it can take over
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
    "pre_seq_len": None,
}


def native_config(config: PreTrainedConfig) -> GlmConfig:
    """The same model as a GlmConfig. Raises ValueError, with the reason, for a model that GlmForCausalLM is not."""
    if not isinstance(config, ChatGLMConfig):
        raise ValueError(
            f"{type(config).__name__}: only ChatGLM2, CodeGeeX2, ChatGLM3 and GLM-4 have a native counterpart. "
            "(ChatGLM-6B reads its context in both directions and counts positions twice, which no class of "
            "transformers does.) Use --format published."
        )
    for key, expressed in EXPRESSED_ONLY.items():
        if (getattr(config, key) or None) != (expressed or None):
            raise ValueError(f"GlmForCausalLM cannot express {key}={getattr(config, key)}: use --format published.")
    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "linear"):
        raise ValueError(f"rope_type {rope['rope_type']} was never part of ChatGLM: use --format published.")
    return GlmConfig(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.multi_query_group_num,
        head_dim=config.kv_channels,
        attention_dropout=config.attention_dropout,
        max_position_embeddings=config.seq_length,
        initializer_range=config.initializer_range,
        rms_norm_eps=config.layernorm_epsilon,
        rope_parameters=dict(rope),
        attention_bias=config.add_qkv_bias,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        architectures=["GlmForCausalLM"],
    )


def native_name(name: str) -> str:
    for published, native in NAMES.items():
        name = name.replace(published, native)
    return name


def native_tensors(name: str, tensor: torch.Tensor, config: ChatGLMConfig) -> dict[str, torch.Tensor]:
    """The native parameters that a published one, or one of an adapter for it, becomes: three, one or none."""
    if name.endswith(COMPUTED):
        return {}
    if FUSED not in name:
        return {native_name(name): tensor}
    parts = [tensor] * 3 if ".lora_A." in name else split_rows(tensor, config)
    return {native_name(name.replace(FUSED, part)): rows.clone() for part, rows in zip(SPLIT, parts, strict=True)}


def split_rows(fused: torch.Tensor, config: ChatGLMConfig) -> list[torch.Tensor]:
    """Rows of queries [n d, ..], keys and values [g d, ..] of a fused projection [(n + 2 g) d, ..]."""
    heads, groups = config.num_attention_heads, config.multi_query_group_num
    if config.multi_query_attention:
        return list(fused.split([size * config.kv_channels for size in (heads, groups, groups)]))
    return [part.flatten(0, 1) for part in fused.unflatten(0, (heads, 3, -1)).unbind(1)]


def served_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template for a folder that engines serve: it trims answers, where these begin with white space."""
    begins_blank = isinstance(tokenizer, PartsTokenizer) and not tokenizer.suffix  # all but ChatGLM-6B
    return TRIMMED_ANSWERS + tokenizer.chat_template if begins_blank else tokenizer.chat_template


def native_tokenizer(tokenizer: PartsTokenizer) -> PreTrainedTokenizerFast:
    """The library's plain fast tokenizer with the same vocabulary, prompts and special tokens.

    Unlike ours it finds special tokens that are written out in a message, and its template trims answers.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        chat_template=served_template(tokenizer),
        model_max_length=tokenizer.model_max_length,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
