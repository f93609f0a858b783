"""The random models that are measured, and the ways of training them; no slow library is needed to name them."""

from typing import Any, NamedTuple


WAYS = ("static", "dynamic", "ours", "packed")  # benchmark.py says what they are


class Shape(NamedTuple):
    """What a configuration is made of, and how many tokens a pack holds."""

    sizes: dict[str, Any]
    pack: int = 8192


def first_generation(pack: int = 8192, **sizes) -> Shape:
    return Shape({"position_encoding_2d": True, **sizes}, pack)


def second_generation(pack: int = 8192, **sizes) -> Shape:
    released = {"generation": "chatglm3", "seq_length": 8192, "add_qkv_bias": True}
    return Shape({**released, "multi_query_attention": True, "multi_query_group_num": 2, **sizes}, pack)


NANO = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "pack": 512}
NARROW = {"num_layers": 8, "hidden_size": 256, "num_attention_heads": 8, "pack": 1024}
SHAPES = {
    "nano": second_generation(**NANO, ffn_hidden_size=128, kv_channels=16, padded_vocab_size=2048),
    "nano-6b": first_generation(**NANO, inner_hidden_size=128, vocab_size=2048, bos_token_id=2004, eos_token_id=2005,
                                mask_token_id=2000, gmask_token_id=2001),
    "tiny": second_generation(**NARROW, ffn_hidden_size=684, kv_channels=32),
    "tiny-6b": first_generation(**NARROW, inner_hidden_size=1024),
    "chatglm-6b": first_generation(vocab_size=130528, bos_token_id=130004, eos_token_id=130005, mask_token_id=130000,
                                   gmask_token_id=130001),
    "chatglm2-6b": second_generation(),
    "chatglm3-6b": second_generation(),
    "glm-4-9b": second_generation(num_layers=40, padded_vocab_size=151552),
}  # fmt: skip
