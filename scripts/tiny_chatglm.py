"""Write a tiny random ChatGLM checkpoint in the published file layout, for tests and trial runs without a download.

    python scripts/tiny_chatglm.py DIR [--text FILE ...] [--generation chatglm2] [--hidden_size 64] [--num_layers 2]
                                      [--vocab_size 600] [--embedding_rows 65024]

The same arguments give the same files. The vocabulary is learnt from the strings in the text files (.json, .jsonl,
anything else line by line), or from a few built-in sentences.
"""

import argparse
import base64
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from chatglm import ChatGLM4Tokenizer, ChatGLM6BConfig, ChatGLM6BTokenizer, ChatGLMConfig, ChatGLMTokenizer


TEXT = """\
[Round 1]\n\n问：你好\n\n答：你好！很高兴见到你，有什么可以帮助你的吗？
今天天气怎么样？今天是晴天，适合出去走走。明天可能会下雨，记得带伞。
请介绍一下你自己。我是一个人工智能助手，可以回答问题、写文章和翻译。
这件上衣采用纯棉面料，柔软舒适，简约的版型显瘦百搭。裙子的图案很特别，适合夏天穿。
小姐，咱们回宫吧，皇上还等着呢。臣妾知道了，多谢姐姐提醒。
北京是中国的首都，上海是最大的城市。一加一等于二，二加二等于四。
Hello, how are you? I am fine, thank you. What is your name? My name is ChatGLM.
The weather is sunny today, so we walk slowly towards the quiet garden with the dog.
def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))
You are a helpful assistant. Follow the instructions of the user and answer in the same language.
"""
SETTLED_IDS = 3 + 256  # <unk>, <s>, </s> and the bytes
RELEASES = {  # what tells the published config.json files apart
    "chatglm": {"_name_or_path": "THUDM/chatglm-6b", "transformers_version": "4.23.1", "max_sequence_length": 2048},
    "chatglm2": {"_name_or_path": "THUDM/chatglm2-6b", "transformers_version": "4.27.1", "seq_length": 32768},
    "chatglm3": {"_name_or_path": "THUDM/chatglm3-6b", "transformers_version": "4.30.2", "seq_length": 8192},
    "glm4": {
        "_name_or_path": "THUDM/glm-4-9b-chat",
        "transformers_version": "4.44.0",
        "seq_length": 131072,
        "rope_ratio": 500,
        "layernorm_epsilon": 1.5625e-07,
    },
}
SPECIAL_PIECES = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]  # of ChatGLM-6B
WHITESPACE_PIECES = ["<|tab|>", *(f"<|blank_{size}|>" for size in range(2, 81))]
AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}
MARKER = "tiny_chatglm.json"  # the arguments; also says that the folder may be written over


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write the checkpoint")
    parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help="what to learn pieces from")
    parser.add_argument("--generation", choices=list(RELEASES), default="chatglm3")
    parser.add_argument("--hidden_size", type=int, default=64, help="a multiple of 16 (4 heads, half of each rotated)")
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--vocab_size", type=int, default=600, help=f"pieces at most; more than {SETTLED_IDS}")
    parser.add_argument("--embedding_rows", type=int, default=0, help="at least; default as many as there are tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    arguments = parser.parse_args()
    if arguments.hidden_size % 16 or arguments.hidden_size <= 0:
        parser.error(f"--hidden_size {arguments.hidden_size} is not a multiple of 16")
    if arguments.vocab_size <= SETTLED_IDS + 2:
        parser.error(f"--vocab_size {arguments.vocab_size} leaves no room beside the {SETTLED_IDS} fixed pieces")
    for path in arguments.text:
        if not path.is_file():
            parser.error(f"--text {path} is not a file")
    directory = arguments.directory
    if directory.exists() and not directory.is_dir():
        parser.error(f"{directory} is a file")
    if directory.exists() and any(directory.iterdir()) and not (directory / MARKER).is_file():
        parser.error(f"{directory} holds files that this program did not write; name another folder or empty it")
    return arguments


def strings_in(value: Any) -> Iterator[str]:
    """All strings of a parsed JSON value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


def lines_of(paths: list[Path]) -> list[str]:
    """The lines to learn pieces from."""
    texts = [] if paths else [TEXT]
    for path in paths:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            texts += [text for line in content.splitlines() if line.strip() for text in strings_in(json.loads(line))]
        else:
            texts += strings_in(json.loads(content)) if path.suffix == ".json" else [content]
    return [line for text in texts for line in text.splitlines() if line.strip()]


def trained_pieces(lines: list[str], vocab_size: int, **options) -> bytes:
    """A tokenizer.model laid out as the published one, at most half of its free ids single characters."""
    counts = Counter(character for line in lines for character in line if not character.isspace())
    common = dict(counts.most_common((vocab_size - SETTLED_IDS) // 2))
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        **options,
    }
    SentencePieceTrainer.train(
        sentence_iterator=("".join(c for c in line if c in common or c.isspace()) for line in lines),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,  # of what is left: rare characters fall back to bytes
        byte_fallback=True,
        max_sentence_length=1 << 20,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def first_generation_pieces(lines: list[str], vocab_size: int) -> bytes:
    """An ice_text.model laid out as the published one: text, special tokens, whitespace, bytes."""
    model = sentencepiece_model_pb2.ModelProto()
    options = {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    options |= {"allow_whitespace_only_pieces": False, "pad_id": 3, "user_defined_symbols": ["<n>"]}
    model.ParseFromString(trained_pieces(lines, vocab_size, **options))
    kinds = model.SentencePiece
    pieces = [piece for piece in model.pieces if piece.type != kinds.BYTE]
    pieces += [kinds(piece=piece, score=0.0, type=kinds.CONTROL) for piece in SPECIAL_PIECES]
    pieces += [kinds(piece=piece, score=0.0, type=kinds.USER_DEFINED) for piece in WHITESPACE_PIECES]
    pieces += [piece for piece in model.pieces if piece.type == kinds.BYTE]
    laid_out = sentencepiece_model_pb2.ModelProto(pieces=pieces)
    laid_out.trainer_spec.CopyFrom(model.trainer_spec)
    laid_out.normalizer_spec.CopyFrom(model.normalizer_spec)
    return laid_out.SerializeToString()


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


def trained_ranks(lines: list[str], vocab_size: int) -> bytes:
    """GLM-4's kind of tokenizer.model: lines of a token's bytes in base64 and its rank."""
    characters = bytes_to_unicode()
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=vocab_size, initial_alphabet=[*characters.values()], show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    bytes_of = {character: bytes([byte]) for byte, character in characters.items()}
    ranks = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = (b"".join(map(bytes_of.get, token)) for token, _ in ranks)
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


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
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
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


def main():
    arguments = parsed_arguments()
    folder, kind = arguments.directory, KINDS[arguments.generation]
    vocabulary = kind.vocabulary(lines_of(arguments.text), arguments.vocab_size)

    def write_json(name: str, content: dict):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    folder.mkdir(parents=True, exist_ok=True)
    write_json(MARKER, {name: str(value) for name, value in vars(arguments).items() if name != "directory"})
    (folder / kind.vocab_file).write_bytes(vocabulary)
    tokenizer_config = {
        "name_or_path": RELEASES[arguments.generation]["_name_or_path"],
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": kind.published_class,
        "auto_map": {"AutoTokenizer": [f"tokenization_chatglm.{kind.published_class}", None]},
    }
    if arguments.generation == "chatglm":
        tokenizer_config["num_image_tokens"] = 0
    write_json("tokenizer_config.json", tokenizer_config)
    # config.json, which tells the generations apart for the tokenizer, is not there yet.
    options = {} if arguments.generation == "chatglm" else {"generation": arguments.generation}
    tokenizer = kind.tokenizer_class.from_pretrained(folder, **options)
    config = kind.config(arguments, tokenizer)
    write_json("config.json", config)
    stops = {"eos_token_id": tokenizer.stop_token_ids, "pad_token_id": tokenizer.pad_token_id}
    write_json("generation_config.json", stops)
    weights = random_weights(ChatGLMConfig.from_dict(config), arguments.seed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    size = sum(weight.numel() for weight in weights.values())
    print(f"{folder}: {arguments.generation}, {size:,} weights, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
