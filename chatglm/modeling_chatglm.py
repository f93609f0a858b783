"""ChatGLM2, ChatGLM3 and CodeGeeX2 as the library's Glm model under the published parameter names.

Shapes: B batch, S tokens, H hidden size, n query heads, g key/value heads, d head size, R = d/2 rotated channels,
F inner size of the MLP, V vocabulary rows.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
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

from .configuration_chatglm import SECOND_GENERATION, ChatGLMConfig


RELEASED_VOCABULARY = 65024
RELEASED_CHATGLM3_STOP_IDS = [2, 64795, 64797]  # </s>, <|user|>, <|observation|>


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
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # Unlike Glm, the weight is applied before the result is rounded to half precision.
        states = hidden_states.float()
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
        self.query_key_value = nn.Linear(config.hidden_size, channels, bias=qkv_bias)
        self.dense = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.add_bias_linear)

    def split_heads(self, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries [B, n, S, d], keys and values [B, g, S, d] of a fused projection [B, S, (n + 2g) d]."""
        heads = fused.unflatten(-1, (-1, self.head_dim))
        if self.config.multi_query_attention:
            parts = heads.split((self.num_heads, self.num_key_value_heads, self.num_key_value_heads), dim=2)
        else:
            parts = heads.unflatten(2, (self.num_heads, 3)).unbind(3)  # query, key, value side by side per head
        return tuple(part.transpose(1, 2) for part in parts)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.split_heads(self.query_key_value(hidden_states))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        context, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )  # [B, S, n, d]
        return self.dense(context.flatten(2)), weights  # [B, S, H]


class ChatGLMMLP(nn.Module):
    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        bias = config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=bias)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, states = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)  # [B, S, F] each
        return self.dense_4h_to_h(nn.functional.silu(gate) * states)


def chatglm_norm(config: ChatGLMConfig) -> nn.Module:
    return (ChatGLMRMSNorm if config.rmsnorm else nn.LayerNorm)(config.hidden_size, eps=config.layernorm_epsilon)


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


class ChatGLMPreTrainedModel(GlmPreTrainedModel):
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
        self.gradient_checkpointing = False
        self.post_init()

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


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GlmForCausalLM):
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

    def adjust_generation_fn(self, *args, **kwargs):
        super().adjust_generation_fn(*args, **kwargs)
        # ChatGLM3 was released without generation_config.json, and its config.json names </s> only.
        released = self.config.generation == "chatglm3" and self.config.padded_vocab_size == RELEASED_VOCABULARY
        if released and self.generation_config._from_model_config:
            self.generation_config.eos_token_id = RELEASED_CHATGLM3_STOP_IDS


class ChatGLMForSequenceClassification(GenericForSequenceClassification, ChatGLMPreTrainedModel):
    base_model_prefix = "transformer"

    def __init__(self, config: ChatGLMConfig):
        GlmPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = ChatGLMModel(config)
        self.classifier_head = nn.Linear(config.hidden_size, config.num_labels)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.post_init()

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.classifier_head(self.dropout(hidden_states))  # [B, S, labels]
