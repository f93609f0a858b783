"""ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B and CodeGeeX2-6B for current transformers.

    import chatglm  # makes the Auto classes know them
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
from transformers.utils import cached_file

from . import tokenization_chatglm
from .configuration_chatglm import ChatGLMConfig
from .configuration_chatglm_6b import ChatGLM6BConfig
from .modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification, ChatGLMModel
from .modeling_chatglm_6b import ChatGLM6BForConditionalGeneration, ChatGLM6BModel
from .tokenization_chatglm_6b import ChatGLM6BTokenizer


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class ChatGLMTokenizer(tokenization_chatglm.ChatGLMTokenizer):
    __doc__ = tokenization_chatglm.ChatGLMTokenizer.__doc__

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        # ChatGLM-6B published the same class name, with another vocabulary file.
        first_vocabulary = cached_file(
            pretrained_model_name_or_path,
            "ice_text.model",
            **{name: kwargs[name] for name in HUB_OPTIONS if name in kwargs},
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if first_vocabulary:
            return ChatGLM6BTokenizer.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


class ChatGLMTokenizerConfig(PreTrainedConfig):
    """Stands in for ChatGLMConfig, for which AutoTokenizer would let a checkpoint's own code come first."""

    model_type = "chatglm_tokenizer"


class ChatGLM6BTokenizerConfig(PreTrainedConfig):
    """The same for ChatGLM6BConfig."""

    model_type = "chatglm_6b_tokenizer"


AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
AutoModel.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)  # with its head, as published
AutoModel.register(ChatGLM6BConfig, ChatGLM6BForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(ChatGLM6BConfig, ChatGLM6BForConditionalGeneration, exist_ok=True)
AutoModelForSequenceClassification.register(ChatGLMConfig, ChatGLMForSequenceClassification, exist_ok=True)
AutoTokenizer.register(ChatGLMTokenizerConfig, ChatGLMTokenizer, exist_ok=True)
AutoTokenizer.register(ChatGLM6BTokenizerConfig, ChatGLM6BTokenizer, exist_ok=True)

__all__ = [
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
