"""What the configurations of ChatGLM-6B to GLM-4 share."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .library_names import CACHE


@strict
class ChatGLMBaseConfig(PreTrainedConfig):
    """`quantization_bit` 4 or 8 is for quantised checkpoints. `pre_seq_len` adds a trainable prefix (P-Tuning v2) of
    so many states and freezes all else; with `prefix_projection` it passes through a small network.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = [CACHE]

    num_layers: int = 28
    hidden_size: int = 4096
    num_attention_heads: int = 32
    layernorm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 0
    quantization_bit: int | None = 0
    pre_seq_len: int | None = None
    prefix_projection: bool = False
