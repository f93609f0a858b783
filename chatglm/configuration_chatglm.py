"""Configuration of ChatGLM2-6B, CodeGeeX2-6B, ChatGLM3-6B and GLM-4-9B."""

import os
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.modeling_rope_utils import RopeParameters

from .configuration_chatglm_6b import ChatGLM6BConfig
from .configuration_parts import ChatGLMBaseConfig


# ChatGLM2 and CodeGeeX2 divide positions by rope_ratio and work out rotary angles in the model's own dtype; ChatGLM3
# and GLM-4 multiply the base by rope_ratio and keep the angles in float32. Their prompts differ as well.
SECOND_GENERATION = ("chatglm2", "codegeex2")
GENERATIONS = (*SECOND_GENERATION, "chatglm3", "glm4")
NAMES = {**{generation: generation for generation in GENERATIONS}, "glm-4": "glm4"}  # as parts of a checkpoint's name
RELEASED_WITH = {"4.27.1": "chatglm2", "4.30.2": "chatglm3"}  # transformers_version in the published config.json
GLM4_VOCABULARY = 151552
GLM4_EPSILON = 1.5625e-7

# What no released checkpoint uses and this code does not compute: the only value that it accepts.
SUPPORTED_ONLY = {
    "inner_hidden_size": None,  # ChatGLM-6B, the first generation
    "position_encoding_2d": None,  # likewise
    "fp32_residual_connection": False,
}


def generation_of(config: dict[str, Any], name_or_path: str = "") -> str:
    """Which of `GENERATIONS` the keys of a config.json and the checkpoint's name or folder point to."""
    if config.get("generation") is not None:
        return config["generation"]
    if config.get("padded_vocab_size") == GLM4_VOCABULARY or config.get("layernorm_epsilon") == GLM4_EPSILON:
        return "glm4"
    for name in (config.get("_name_or_path") or "", name_or_path):
        folder = os.path.basename(os.path.abspath(name)).lower() if name else ""
        for part, generation in NAMES.items():
            if part in folder:
                return generation
    if "interleaved_qkv" in config:
        return "codegeex2"
    several_end_tokens = isinstance(config.get("eos_token_id"), (list, tuple))
    return RELEASED_WITH.get(config.get("transformers_version"), "glm4" if several_end_tokens else "chatglm3")


@strict
class ChatGLMConfig(ChatGLMBaseConfig):
    """Reads and writes the published config.json; the library's names for the same values work as attributes.

    `generation` is "chatglm2", "codegeex2", "chatglm3" or "glm4"; where it is not given, `generation_of` decides.
    Raises ValueError for a checkpoint that this model cannot compute, ChatGLM-6B among them.
    """

    tokenizer_class = "ChatGLMTokenizer"  # for folders without tokenizer_config.json
    tie_last_hidden_states = False  # hidden_states end with the state before the final norm, as published
    attribute_map = {
        "vocab_size": "padded_vocab_size",
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels",
        "num_key_value_heads": "multi_query_group_num",
        "rms_norm_eps": "layernorm_epsilon",
        "max_position_embeddings": "seq_length",
        "attention_bias": "add_qkv_bias",
    }
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {
        "embedding.word_embeddings": "free_full_weight",
        "encoder.layers.*": "free_full_weight",
        "encoder.final_layernorm": "keep_full_weight",
    }

    padded_vocab_size: int = 65024
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    multi_query_attention: bool = False
    multi_query_group_num: int = 1
    seq_length: int = 2048
    rope_ratio: float | int = 1
    original_rope: bool = True
    rope_parameters: RopeParameters | dict | None = None
    rmsnorm: bool = True
    post_layer_norm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2
    generation: Literal["chatglm2", "codegeex2", "chatglm3", "glm4"] | None = None

    def __post_init__(self, **kwargs):
        for key, supported in SUPPORTED_ONLY.items():
            if kwargs.get(key, supported) not in (supported, None):
                raise ValueError(
                    f"config.json sets {key}={kwargs[key]!r}, which this ChatGLM2/ChatGLM3 code cannot compute; "
                    "load the plain checkpoint of ChatGLM2-6B, ChatGLM3-6B or CodeGeeX2-6B instead."
                )
        told_by = ("generation", "transformers_version", "padded_vocab_size", "layernorm_epsilon", "eos_token_id")
        self.generation = generation_of(
            {**{key: getattr(self, key) for key in told_by}, **kwargs}, kwargs.pop("name_or_path", "")
        )
        if self.generation == "glm4":
            self.tokenizer_class = "ChatGLM4Tokenizer"
        if not self.multi_query_attention:
            self.multi_query_group_num = self.num_attention_heads
        if self.rope_parameters is None:
            self.rope_parameters = self.published_rope_parameters()
        super().__post_init__(**kwargs)

    def published_rope_parameters(self) -> dict[str, Any]:
        """What `rope_ratio` means for this generation, in the library's terms: half of each head is rotated."""
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        if self.rope_ratio == 1:
            return rope
        if self.generation in SECOND_GENERATION:
            return {**rope, "rope_type": "linear", "factor": float(self.rope_ratio)}
        return {**rope, "rope_theta": 10000.0 * self.rope_ratio}

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return {"name_or_path": str(pretrained_model_name_or_path), **config}, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        # ChatGLM-6B published the same model_type, for which AutoConfig can know one class only.
        if ChatGLM6BConfig.describes(config_dict):
            return ChatGLM6BConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        # PEFT reads the shape of a prefix from this dict, under the library's names.
        library = {"num_key_value_heads": self.multi_query_group_num, "head_dim": self.kv_channels}
        if self.generation == "glm4":  # whose published config.json has both names
            library["num_hidden_layers"] = self.num_layers
        return {**super().to_dict(), **library}
