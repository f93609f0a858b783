"""A tiny random ChatGLM in the files that its generation is published in."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoModel, PreTrainedTokenizerBase

from chatglm import ChatGLM4Tokenizer, ChatGLM6BConfig, ChatGLM6BTokenizer, ChatGLMConfig, ChatGLMTokenizer

from .releases import MARKER, RELEASES
from .spreading import spread_weights
from .vocabularies import first_generation_pieces, lines_of, trained_pieces, trained_ranks


AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}


def first_generation_config(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A config.json with the keys of ChatGLM-6B."""
    kept = ("AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM")
    return {
        **RELEASES["chatglm"],
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {name: AUTO_MAP[name] for name in kept},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "gmask_token_id": tokenizer.gmask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_size": arguments.hidden_size,
        "inner_hidden_size": 2 * arguments.hidden_size,
        "layernorm_epsilon": 1e-5,
        "num_attention_heads": 4,
        "num_layers": arguments.num_layers,
        "position_encoding_2d": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": rows_for(tokenizer, arguments.embedding_rows),
    }


def rows_for(tokenizer: PreTrainedTokenizerBase, least: int) -> int:
    """Rows of the embedding: a multiple of 64, as released models have more of them than tokens."""
    return -(-max(len(tokenizer), least) // 64) * 64


def published_config(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A config.json with the keys of the released ones."""
    return {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": AUTO_MAP,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "ffn_hidden_size": 2 * arguments.hidden_size,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": arguments.hidden_size,
        "kv_channels": arguments.hidden_size // 4,
        "layernorm_epsilon": 1e-5,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "num_attention_heads": 4,
        "num_layers": arguments.num_layers,
        "original_rope": True,
        "padded_vocab_size": rows_for(tokenizer, arguments.embedding_rows),
        "post_layer_norm": True,
        "rmsnorm": True,
        "use_cache": True,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.stop_token_ids if arguments.generation == "glm4" else tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **RELEASES[arguments.generation],
    }


def random_weights(config: ChatGLMConfig | ChatGLM6BConfig, seed: int) -> dict[str, torch.Tensor]:
    """Weights under the published names, the rotary buffers and the second copy of tied weights included.

    Each matrix is scaled by its inputs. With the library's 0.02 the logits of so narrow a model stay within 2.5, and
    no adapter under its frozen output layer could make it sure of an answer.
    """
    torch.manual_seed(seed)
    model = AutoModel.from_config(config)
    spread_weights(model)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    if isinstance(config, ChatGLMConfig):
        return {**weights, "transformer.rotary_pos_emb.inv_freq": model.transformer.rotary_pos_emb.inv_freq.clone()}
    channels = config.head_dim // 2
    frequencies = 10000.0 ** (-torch.arange(0, channels, 2) / channels)
    for index in range(config.num_layers):
        weights[f"transformer.layers.{index}.attention.rotary_emb.inv_freq"] = frequencies.clone()
    return weights


class Kind(NamedTuple):
    """What the files of a generation are made with."""

    vocab_file: str
    vocabulary: Callable[[list[str], int], bytes]
    tokenizer_class: type[PreTrainedTokenizerBase]
    published_class: str
    config: Callable[[argparse.Namespace, PreTrainedTokenizerBase], dict[str, Any]]


SECOND = Kind("tokenizer.model", trained_pieces, ChatGLMTokenizer, "ChatGLMTokenizer", published_config)
KINDS = {
    "chatglm": Kind(
        "ice_text.model", first_generation_pieces, ChatGLM6BTokenizer, "ChatGLMTokenizer", first_generation_config
    ),
    "chatglm2": SECOND,
    "chatglm3": SECOND,
    "glm4": Kind("tokenizer.model", trained_ranks, ChatGLM4Tokenizer, "ChatGLM4Tokenizer", published_config),
}


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(arguments: argparse.Namespace) -> str:
    """Write the files that the flags of tiny_chatglm.py ask for; a line about them."""
    folder, kind = arguments.directory, KINDS[arguments.generation]
    vocabulary = kind.vocabulary(lines_of(arguments.text), arguments.vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    said = {name: str(value) for name, value in vars(arguments).items() if name != "directory"}
    write_json(folder / MARKER, said)
    (folder / kind.vocab_file).write_bytes(vocabulary)
    tokenizer = written_tokenizer(folder, arguments.generation)
    config = kind.config(arguments, tokenizer)
    write_json(folder / "config.json", config)
    stops = {"eos_token_id": tokenizer.stop_token_ids, "pad_token_id": tokenizer.pad_token_id}
    write_json(folder / "generation_config.json", stops)
    weights = random_weights(ChatGLMConfig.from_dict(config), arguments.seed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    size = sum(weight.numel() for weight in weights.values())
    return f"{folder}: {arguments.generation}, {size:,} weights, {len(tokenizer)} tokens"


def written_tokenizer(folder: Path, generation: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a vocabulary in the folder, when its configuration is written."""
    kind = KINDS[generation]
    config = {
        "name_or_path": RELEASES[generation]["_name_or_path"],
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": kind.published_class,
        "auto_map": {"AutoTokenizer": [f"tokenization_chatglm.{kind.published_class}", None]},
    }
    if generation == "chatglm":
        config["num_image_tokens"] = 0
    write_json(folder / "tokenizer_config.json", config)
    # config.json, which tells the generations apart for the tokenizer, is not there yet.
    options = {} if generation == "chatglm" else {"generation": generation}
    return kind.tokenizer_class.from_pretrained(folder, **options)
