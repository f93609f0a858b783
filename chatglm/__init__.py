"""ChatGLM2-6B, CodeGeeX2-6B, ChatGLM3-6B and GLM-4-9B for current transformers.

Importing makes the Auto classes know them:

    import chatglm
    model = AutoModelForCausalLM.from_pretrained("folder or hub name with the published files")

No trust_remote_code is needed, and where it is given the classes here still come first.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
)

from .configuration_chatglm import ChatGLMConfig
from .modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification, ChatGLMModel
from .tokenization_chatglm import ChatGLMTokenizer
from .tokenization_chatglm4 import ChatGLM4Tokenizer


class ChatGLMTokenizerConfig(PreTrainedConfig):
    """Stands in for ChatGLMConfig, for which AutoTokenizer would let a checkpoint's own code come first."""

    model_type = "chatglm_tokenizer"


class ChatGLM4TokenizerConfig(PreTrainedConfig):
    model_type = "chatglm4_tokenizer"


AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
AutoModel.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)  # with its head, as published
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
AutoModelForSequenceClassification.register(ChatGLMConfig, ChatGLMForSequenceClassification, exist_ok=True)
AutoTokenizer.register(ChatGLMTokenizerConfig, ChatGLMTokenizer, exist_ok=True)
AutoTokenizer.register(ChatGLM4TokenizerConfig, ChatGLM4Tokenizer, exist_ok=True)

__all__ = [
    "ChatGLM4Tokenizer",
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMForSequenceClassification",
    "ChatGLMModel",
    "ChatGLMTokenizer",
]
