"""ChatGLM-6B, ChatGLM2-6B, CodeGeeX2-6B, ChatGLM3-6B and GLM-4-9B for current transformers.

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
from .configuration_chatglm_6b import ChatGLM6BConfig
from .modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification, ChatGLMModel
from .modeling_chatglm_6b import ChatGLM6BForConditionalGeneration, ChatGLM6BModel
from .tokenization_chatglm import ChatGLMTokenizer
from .tokenization_chatglm4 import ChatGLM4Tokenizer
from .tokenization_chatglm_6b import ChatGLM6BTokenizer


# AutoTokenizer lets a checkpoint's own code come before a class that is registered for its config, but not before one
# that is registered for any other: each tokenizer has a config that stands in.
class ChatGLMTokenizerConfig(PreTrainedConfig):
    model_type = "chatglm_tokenizer"


class ChatGLM4TokenizerConfig(PreTrainedConfig):
    model_type = "chatglm4_tokenizer"


class ChatGLM6BTokenizerConfig(PreTrainedConfig):
    model_type = "chatglm_6b_tokenizer"


AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForCausalLM):  # AutoModel gives the model with its head, as published
    auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
    auto_class.register(ChatGLM6BConfig, ChatGLM6BForConditionalGeneration, exist_ok=True)
AutoModelForSequenceClassification.register(ChatGLMConfig, ChatGLMForSequenceClassification, exist_ok=True)
AutoTokenizer.register(ChatGLMTokenizerConfig, ChatGLMTokenizer, exist_ok=True)
AutoTokenizer.register(ChatGLM4TokenizerConfig, ChatGLM4Tokenizer, exist_ok=True)
AutoTokenizer.register(ChatGLM6BTokenizerConfig, ChatGLM6BTokenizer, exist_ok=True)

__all__ = [
    "ChatGLM4Tokenizer",
    "ChatGLM6BConfig",
    "ChatGLM6BForConditionalGeneration",
    "ChatGLM6BModel",
    "ChatGLM6BTokenizer",
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMForSequenceClassification",
    "ChatGLMModel",
    "ChatGLMTokenizer",
]
