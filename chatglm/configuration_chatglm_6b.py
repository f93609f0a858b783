"""Configuration of the first ChatGLM-6B."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_parts import ChatGLMBaseConfig


@strict
class ChatGLM6BConfig(ChatGLMBaseConfig):
    """Reads and writes the published config.json; the library's names for the same values work as attributes.

    Raises ValueError where the sizes do not fit together.
    """

    tokenizer_class = "ChatGLM6BTokenizer"  # for folders without tokenizer_config.json
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "layer_norm_eps": "layernorm_epsilon",
        "max_position_embeddings": "max_sequence_length",
    }
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {
        "word_embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "final_layernorm": "keep_full_weight",
    }

    vocab_size: int = 150528
    inner_hidden_size: int = 16384
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    tie_word_embeddings: bool = True  # the published file leaves it out, and the library of its time tied by default
    bos_token_id: int | None = 150004
    eos_token_id: int | list[int] | None = 150005
    mask_token_id: int = 150000
    gmask_token_id: int = 150001

    def __post_init__(self, **kwargs):
        streams = 2 if self.position_encoding_2d else 1
        if self.hidden_size % (2 * streams * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of {2 * streams} x num_attention_heads "
                f"{self.num_attention_heads}: each head rotates its channels in pairs for each of {streams} positions."
            )
        super().__post_init__(**kwargs)

    @staticmethod
    def describes(config: dict[str, Any]) -> bool:
        """Whether the keys of a config.json are those of ChatGLM-6B; all generations share its model_type."""
        return "padded_vocab_size" not in config and not {"inner_hidden_size", "position_encoding_2d"}.isdisjoint(
            config
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads
