"""ChatGLM2, CodeGeeX2, ChatGLM3 and GLM-4 as the library's Glm model under the published parameter names.

Shapes: B batch, S tokens, H hidden size, n query heads, g key/value heads, d head size, R = d/2 rotated channels,
F inner size of the MLP, V vocabulary rows, L layers, P states of a trained prefix.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, GradientCheckpointingLayer
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import (
    GlmForCausalLM,
    GlmModel,
    GlmPreTrainedModel,
    GlmRMSNorm,
    GlmRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults

from .chat import ChatMixin, json_arguments, python_call_arguments
from .configuration_chatglm import GLM4_VOCABULARY, SECOND_GENERATION, ChatGLMConfig
from .language_model import CausalLMMixin, PrefixEncoder, PrefixTunedMixin, refuse_unknown
from .library_names import CACHE, for_peft, takes_cache
from .quantization import linear


RELEASED_STOP_IDS = {  # the end token, <|user|> and <|observation|>, by generation and vocabulary rows
    ("chatglm3", 65024): [2, 64795, 64797],
    ("glm4", GLM4_VOCABULARY): [151329, 151336, 151338],
}


class ChatGLMRotaryEmbedding(GlmRotaryEmbedding):
    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.angles_in_model_dtype = config.generation in SECOND_GENERATION

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, [B, S, R] each, in the dtype of `x`."""
        if not self.angles_in_model_dtype or x.dtype == torch.float32:
            return super().forward(x, position_ids)
        # ChatGLM2 was trained with these rounded angles: 0.1 apart from exact ones at position 2000 in float16.
        rope = self.config.rope_parameters
        channels = int(self.config.kv_channels * rope["partial_rotary_factor"])
        exponents = torch.arange(0, channels, 2, dtype=x.dtype, device=x.device) / channels  # [R/2]
        frequencies = 1.0 / (rope["rope_theta"] ** exponents)
        positions = position_ids.to(x.dtype) / rope.get("factor", 1.0)
        angles = (positions[..., None] * frequencies).float()  # [B, S, R/2]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class ChatGLMRMSNorm(GlmRMSNorm):
    def __init__(self, hidden_size: int, eps: float, stays_bfloat16: bool = False):
        super().__init__(hidden_size, eps)
        self.stays_bfloat16 = stays_bfloat16

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # Unlike Glm, the weight is applied before the result is rounded to half precision.
        rounded = self.stays_bfloat16 and hidden_states.dtype == torch.bfloat16
        states = hidden_states if rounded else hidden_states.float()
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * states).to(hidden_states.dtype)


class ChatGLMAttention(nn.Module):
    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.multi_query_group_num
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True

        channels = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        qkv_bias = config.add_qkv_bias or config.add_bias_linear
        bits = config.quantization_bit
        self.query_key_value = linear(config.hidden_size, channels, qkv_bias, bits)
        self.dense = linear(self.num_heads * self.head_dim, config.hidden_size, config.add_bias_linear, bits)

    def split_heads(self, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries [B, n, S, d], keys and values [B, g, S, d] of a fused projection [B, S, (n + 2g) d]."""
        heads = fused.unflatten(-1, (-1, self.head_dim))
        if self.config.multi_query_attention:
            parts = heads.split((self.num_heads, self.num_key_value_heads, self.num_key_value_heads), dim=2)
        else:
            parts = heads.unflatten(2, (self.num_heads, 3)).unbind(3)  # query, key, value side by side per head
        return tuple(part.transpose(1, 2) for part in parts)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        refuse_unknown(kwargs, self)
        query, key, value = self.split_heads(self.query_key_value(hidden_states))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        context, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )  # [B, S, n, d]
        return self.dense(context.flatten(2)), weights  # [B, S, H]


class ChatGLMMLP(nn.Module):
    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        bias, bits = config.add_bias_linear, config.quantization_bit
        self.dense_h_to_4h = linear(config.hidden_size, 2 * config.ffn_hidden_size, bias, bits)
        self.dense_4h_to_h = linear(config.ffn_hidden_size, config.hidden_size, bias, bits)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, states = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)  # [B, S, F] each
        return self.dense_4h_to_h(nn.functional.silu(gate) * states)


def chatglm_norm(config: ChatGLMConfig) -> nn.Module:
    if not config.rmsnorm:
        return nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
    return ChatGLMRMSNorm(config.hidden_size, config.layernorm_epsilon, config.generation == "codegeex2")


class ChatGLMDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.residual_after_norm = config.apply_residual_connection_post_layernorm
        self.input_layernorm = chatglm_norm(config)
        self.self_attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = chatglm_norm(config)
        self.mlp = ChatGLMMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)  # [B, S, H], as everything here
        attended, _ = self.self_attention(normed, **kwargs)
        hidden_states = (normed if self.residual_after_norm else hidden_states) + self.dropout(attended)

        normed = self.post_attention_layernorm(hidden_states)
        return (normed if self.residual_after_norm else hidden_states) + self.dropout(self.mlp(normed))


class ChatGLMPrefixCache(DynamicCache):
    """A past that takes nothing up: a layer that runs again in the backward pass sees the same prefix."""

    def __init__(self, prefix: list[tuple[torch.Tensor, torch.Tensor]]):
        super().__init__()
        for index, states in enumerate(prefix):
            super().update(*states, index)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        past = self.layers[layer_idx]
        return torch.cat((past.keys, key_states), dim=2), torch.cat((past.values, value_states), dim=2)


class ChatGLMPreTrainedModel(PrefixTunedMixin, GlmPreTrainedModel):
    config: ChatGLMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["ChatGLMDecoderLayer"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]  # in every published file, computed here
    _can_record_outputs = {"hidden_states": ChatGLMDecoderLayer, "attentions": ChatGLMAttention}


class ChatGLMModel(ChatGLMPreTrainedModel, GlmModel):
    """GlmModel's forward over the published module tree, which holds the output layer too."""

    def __init__(self, config: ChatGLMConfig):
        GlmPreTrainedModel.__init__(self, config)  # GlmModel's own modules would carry other names
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(config.padded_vocab_size, config.hidden_size)})
        self.rotary_pos_emb = ChatGLMRotaryEmbedding(config)
        self.encoder = nn.ModuleDict(
            {
                "layers": nn.ModuleList(ChatGLMDecoderLayer(config, index) for index in range(config.num_layers)),
                "final_layernorm": chatglm_norm(config) if config.post_layer_norm else nn.Identity(),
            }
        )
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        if config.pre_seq_len:
            self.prefix_encoder = PrefixEncoder(config, (config.multi_query_group_num, config.kv_channels))
            for layer in self.layers:
                layer._can_checkpoint_with_cache = True  # ChatGLMPrefixCache, the only one in training
        self.gradient_checkpointing = False
        self.post_init()
        self.freeze_untrained()

    @property
    def embed_tokens(self) -> nn.Embedding:
        return self.embedding.word_embeddings

    @property
    def layers(self) -> nn.ModuleList:
        return self.encoder.layers

    @property
    def norm(self) -> nn.Module:
        return self.encoder.final_layernorm

    @property
    def rotary_emb(self) -> ChatGLMRotaryEmbedding:
        return self.rotary_pos_emb

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.embedding.word_embeddings = value

    @takes_cache
    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """GlmModel's forward; a prefix becomes the past of every layer, before position 0.

        Shapes: input_ids and position_ids [B, S], attention_mask [B, all S so far], inputs_embeds [B, S, H].
        Raises ValueError for a prefix with another kind of mask, a static cache or a flattened batch, and TypeError
        for a keyword that is not one of `PassedOn`.
        """
        refuse_unknown(kwargs, self)
        if self.config.pre_seq_len:
            given = input_ids if inputs_embeds is None else inputs_embeds
            batch_size, length = given.shape[:2]
            self.refuse_what_has_no_place_for_a_prefix(attention_mask, position_ids, past_key_values)
            if past_key_values is None or past_key_values.get_seq_length() == 0:
                past_key_values = self.filled_with_prefix(past_key_values, batch_size, use_cache)
            past_length = past_key_values.get_seq_length()
            if attention_mask is not None:
                attention_mask = nn.functional.pad(
                    attention_mask, (past_length + length - attention_mask.shape[1], 0), value=1
                )
            if position_ids is None:
                first = past_length - self.config.pre_seq_len
                position_ids = torch.arange(first, first + length, device=given.device)[None]

        outputs = super().forward(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=use_cache,
            return_dict=True,
            **{CACHE: past_key_values},
            **kwargs,
        )
        if isinstance(past_key_values, ChatGLMPrefixCache):
            return BaseModelOutputWithPast(**{name: value for name, value in outputs.items() if name != CACHE})
        return outputs

    def refuse_what_has_no_place_for_a_prefix(
        self, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, cache: Cache | None
    ):
        static = cache is not None and cache.is_compileable
        if static or (attention_mask is not None and attention_mask.ndim != 2):
            raise ValueError("With pre_seq_len, attention_mask must be [B, S] and the cache a dynamic one.")
        if attention_mask is None and position_ids is not None and (position_ids.diff() < 0).any():
            raise ValueError("With pre_seq_len, rows cannot be flattened into one; pad them instead.")

    def filled_with_prefix(self, cache: Cache | None, batch_size: int, use_cache: bool) -> Cache:
        prefix = self.prefix_encoder(batch_size, self.embed_tokens.weight.dtype)
        if not use_cache:
            return ChatGLMPrefixCache(prefix)
        cache = DynamicCache(config=self.config) if cache is None else cache
        for index, states in enumerate(prefix):
            cache.update(*states, index)
        return cache


class ChatGLMForConditionalGeneration(
    ChatMixin, CausalLMMixin, ChatGLMPreTrainedModel, GlmForCausalLM, GenerationMixin
):
    """The language model, under the class name of the published code."""

    _tied_weights_keys = {}
    _tp_plan = {}
    _pp_plan = {}
    _fsdp_plan = {"transformer.output_layer": "keep_full_weight"}

    def __init__(self, config: ChatGLMConfig):
        GlmPreTrainedModel.__init__(self, config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    @property
    def history_of_pairs(self) -> bool:
        return self.config.generation in SECOND_GENERATION

    def fallback_token_id(self, tokenizer) -> int:
        return 198 if self.config.generation == "glm4" else 5

    @property
    def tool_arguments(self) -> Callable[[str], dict[str, Any] | None]:
        return json_arguments if self.config.generation == "glm4" else python_call_arguments

    @property
    def model(self) -> ChatGLMModel:
        return self.transformer

    @property
    def lm_head(self) -> nn.Linear:
        return self.transformer.output_layer

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding):
        self.transformer.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.transformer.output_layer = new_embeddings

    @takes_cache
    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, past_key_values=None, inputs_embeds=None, **kwargs
    ):
        """The library's inputs. It takes the prefix at the start of a given cache for text that was fed already."""
        goes_on = past_key_values is not None and past_key_values.get_seq_length() > 0
        if goes_on and kwargs.get("is_first_iteration") and next_sequence_length is not None:
            next_sequence_length += self.config.pre_seq_len or 0
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            **{CACHE: past_key_values},
            **kwargs,
        )
        return for_peft(inputs)

    @staticmethod
    def create_masks_for_generate(config, attention_mask, **kwargs):
        """The library's mask for a static cache; for flex attention, whose mask `generate` cannot hold, the one given.

        `forward` then makes flex attention's mask. Shapes: attention_mask [B, K] or None.
        """
        if config._attn_implementation == "flex_attention":
            return attention_mask
        return create_masks_for_generate(config=config, attention_mask=attention_mask, **kwargs)

    def adjust_generation_fn(self, *args, **kwargs):
        super().adjust_generation_fn(*args, **kwargs)
        # ChatGLM3 was released without generation_config.json, and its config.json names </s> only.
        released = RELEASED_STOP_IDS.get((self.config.generation, self.config.padded_vocab_size))
        if released and self.generation_config._from_model_config:
            self.generation_config.eos_token_id = released


class ChatGLMForSequenceClassification(GenericForSequenceClassification, ChatGLMPreTrainedModel):
    base_model_prefix = "transformer"

    def __init__(self, config: ChatGLMConfig):
        GlmPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = ChatGLMModel(config)
        self.classifier_head = nn.Linear(config.hidden_size, config.num_labels)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.post_init()
        self.freeze_untrained()

    def freeze_untrained(self):
        super().freeze_untrained()
        self.transformer.output_layer.requires_grad_(False)  # DDP would wait for gradients, of which there are none

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.classifier_head(self.dropout(hidden_states))  # [B, S, labels]
