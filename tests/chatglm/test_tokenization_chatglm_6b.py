import json
import pickle
import random

import pytest
from goldens_io import as_lists, recorded_texts
from jinja2.exceptions import TemplateError
from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig, AutoTokenizer, DataCollatorWithPadding

from chatglm import ChatGLM6BTokenizer, ChatGLMTokenizer


TALK = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！很高兴见到你。"},
    {"role": "user", "content": "今天天气怎么样？"},
    {"role": "assistant", "content": "晴天"},
]
SPECIAL_TEXTS = ["[gMASK]", "a [MASK] b", "<sop>", "x<eop>", "</s>", "<unk>", "<pad>", "<0x41>", "<image_5>", "<ENC>"]


@pytest.fixture(scope="module")
def recorded():
    return recorded_texts("tok_v1")


@pytest.fixture(scope="module")
def published(v1_folder):
    return AutoTokenizer.from_pretrained(v1_folder)


@pytest.fixture(scope="module")
def original(v1_folder):
    return SentencePieceProcessor(model_file=str(v1_folder / "ice_text.model"))


def marked(text: str) -> str:
    """What the published tokenizer hands to SentencePiece."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for size in range(80, 1, -1):
        text = text.replace(" " * size, f"<|blank_{size}|>")
    return text


def messages_of(history: list, query: str) -> list[dict]:
    messages = []
    for question, reply in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return [*messages, {"role": "user", "content": query}]


def check_texts(tokenizer, golden: dict):
    assert tokenizer.encode(golden["text"], add_special_tokens=False) == golden["ids"]
    assert tokenizer(golden["text"])["input_ids"] == golden["ids_special"]
    assert tokenizer.tokenize(golden["text"]) == golden["tokens"]
    assert tokenizer.convert_tokens_to_ids(golden["tokens"]) == golden["ids"]
    assert tokenizer.decode(golden["ids"]) == golden["decode_ids"]
    assert tokenizer.decode(golden["ids_special"]) == golden["decode_ids_special"]
    assert tokenizer.decode(golden["ids_special"], skip_special_tokens=True) == golden["decode_ids_special_skip"]


# --- the original's ids


@pytest.mark.oldest
def test_properties_equal_the_original(tokenizer, recorded):
    names = ["vocab_size", "padding_side", "model_input_names", "clean_up_tokenization_spaces"]
    names += [f"{name}_token_id" for name in ("pad", "eos", "bos", "mask", "gmask", "end")]
    assert {name: getattr(tokenizer, name) for name in names} == {name: recorded[name] for name in names}
    assert len(tokenizer) == recorded["len"]
    assert [tokenizer.num_special_tokens_to_add(pair) for pair in (False, True)] == recorded["num_special_to_add"]
    assert tokenizer.stop_token_ids == [tokenizer.eos_token_id]


@pytest.mark.oldest
@pytest.mark.parametrize("group", ["strings", "strings_with_special_token_text"])
def test_texts_equal_the_original(tokenizer, recorded, group):
    for golden in recorded[group]:
        check_texts(tokenizer, golden)


@pytest.mark.oldest
def test_pairs_and_batches_equal_the_original(tokenizer, recorded):
    for pair in recorded["pairs"]:
        assert tokenizer(pair["a"], pair["b"])["input_ids"] == pair["ids"]
        assert tokenizer(pair["a"], pair["b"], add_special_tokens=False)["input_ids"] == pair["ids_nospecial"]
    for batch in recorded["batches"]:
        assert as_lists(tokenizer(batch["texts"], **batch["kwargs"])) == batch["result"]


def test_padding_afterwards_equals_padding_at_once(tokenizer, recorded):
    for batch in recorded["batches"]:
        options = dict(batch["kwargs"])
        if options.get("padding") and "truncation" not in options:
            rows = tokenizer(batch["texts"], add_special_tokens=options.pop("add_special_tokens", True))
            assert dict(tokenizer.pad(rows, **options)) == batch["result"]
    padded_twice = tokenizer.pad(tokenizer(["你好", "a"], padding=True), padding="max_length", max_length=12)
    assert dict(padded_twice) == dict(tokenizer(["你好", "a"], padding="max_length", max_length=12))


@pytest.mark.oldest
def test_chat_prompts_equal_the_original(tokenizer, recorded):
    for golden in recorded["chat"]:
        messages = messages_of(golden["history"], golden["query"])
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        assert prompt["input_ids"].tolist() == golden["input"]["input_ids"]
        assert tokenizer.decode(golden["fake_output_ids"]) == golden["raw_decode"]


def test_image_tokens_come_before_the_vocabulary(v1_folder, tmp_path):
    golden = recorded_texts("tok_v1_offset20000")
    published = ChatGLM6BTokenizer.from_pretrained(v1_folder, num_image_tokens=20000)
    published.save_pretrained(tmp_path)
    for tokenizer in (published, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.vocab_size == golden["vocab_size"]
        assert {token: tokenizer.convert_tokens_to_ids(token) for token in golden["ids"]} == golden["ids"]
        names = {index: tokenizer.convert_ids_to_tokens(int(index)) for index in golden["id_to_token"]}
        assert names == golden["id_to_token"]
        for each in golden["strings"]:
            check_texts(tokenizer, each)
        assert tokenizer.decode(golden["decode_with_image_ids"]["ids"]) == golden["decode_with_image_ids"]["text"]


@pytest.mark.oldest
def test_training_rows_equal_the_official_script(tokenizer):
    for golden in recorded_texts("train_format")["v1_ptuning"]:
        examples, column = golden["examples"], golden["history_column"]
        source, target = golden["max_source_length"], golden["max_target_length"]
        rows = zip(examples["content"], examples["summary"], examples["history"], strict=True)
        for index, (query, answer, history) in enumerate(rows):
            messages = [*messages_of(history if column else [], query), {"role": "assistant", "content": answer}]
            encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
            reply = [id for id, mine in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mine]
            if column and not history:
                continue  # the script numbers even a first round, which chat does not
            prompt = encoded["input_ids"][: -len(reply) - 2][: source - 1]
            ids = [*prompt, *encoded["input_ids"][len(encoded["input_ids"]) - len(reply) - 2 :][:2]]
            ids += [*reply[: target - 2], tokenizer.eos_token_id]
            assert ids == golden["input_ids"][index][: len(ids)]
            assert set(golden["input_ids"][index][len(ids) :]) <= {tokenizer.pad_token_id}


def test_any_text_equals_sentencepiece(tokenizer, original, recorded):
    generator = random.Random(0)
    pieces = [golden["text"] for golden in recorded["strings"]] + SPECIAL_TEXTS
    pieces += [
        "\u3000",
        "\u00a0",
        "ﬁ",
        "①",
        "ｶﾞ",
        "e\u0301",
        "½\u200d",
        "\u00a0\u200d",
        "²\u200d♂\ufe0f",
        "Ａ\u0301",
        "\r",
        "<0x",
        "  ",
        "～",
        "한글",
        "\u2028",
        "𝒳",
        "🇨🇳",
        "'",
        "[",
    ]
    texts = [" ".join(generator.choices(pieces, k=generator.randint(1, 3))) for _ in range(300)]
    texts += ["".join(generator.choices(pieces, k=generator.randint(1, 6))) for _ in range(300)]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text, ids in zip(texts, encoded, strict=True):
        expected = original.encode(marked(text))
        assert ids == expected, text
        decoded = original.decode(expected)
        for plain in ("\n", "\t", *(" " * size for size in range(2, 81))):
            decoded = decoded.replace(marked(plain), plain)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == decoded


def test_long_runs_of_blanks_are_cut_from_the_longest(tokenizer):
    tokens = tokenizer.tokenize("a" + " " * 85 + "b")
    assert tokens == ["▁a", "<|blank_80|>", "<|blank_5|>", "b"]


# --- chat


def test_text_and_template_render_the_same_prompt(tokenizer):
    conversations = [TALK[:1], TALK[:2], TALK[:3], TALK, [{"role": "system", "content": "s"}, *TALK[:3]]]
    for messages in conversations:
        for cue in (True, False):
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=cue, tokenize=False)
            template = tokenizer.get_chat_template() + " "  # a template of its own, which the library renders
            rendered = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=cue, tokenize=False
            )
            assert rendered.removesuffix(" ") == text
    assert tokenizer.apply_chat_template(TALK[:1], tokenize=False) == "你好[gMASK]<sop>"
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == (
        "[Round 0]\n问：你好\n答：你好！很高兴见到你。\n[Round 1]\n问：今天天气怎么样？\n答：[gMASK]<sop>晴天"
    )


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_special_tokens_in_messages_stay_text(tokenizer, original, text):
    special = set(tokenizer.convert_tokens_to_ids(["[MASK]", "[gMASK]", "<sop>", "<eop>", "</s>", "<pad>", "<unk>"]))
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    plain = original.encode(text)
    assert not special & set(plain)
    assert encoded["input_ids"] == [*plain, tokenizer.gmask_token_id, tokenizer.bos_token_id, *plain]
    assert encoded["assistant_masks"] == [0] * (len(plain) + 2) + [1] * len(plain)
    assert tokenizer("<sop>", add_special_tokens=False)["input_ids"] == [tokenizer.bos_token_id]  # plain calls as ever


def test_only_the_final_reply_is_trained_unless_its_message_says_otherwise(tokenizer):
    encoded = tokenizer.apply_chat_template(TALK, return_assistant_tokens_mask=True)
    reply = tokenizer("晴天", add_special_tokens=False)["input_ids"]
    assert encoded["input_ids"][-len(reply) :] == reply
    assert encoded["assistant_masks"] == [0] * (len(encoded["input_ids"]) - len(reply)) + [1] * len(reply)
    silent = [*TALK[:-1], {**TALK[-1], "loss": False}]
    assert sum(tokenizer.apply_chat_template(silent, return_assistant_tokens_mask=True)["assistant_masks"]) == 0
    opened = tokenizer.apply_chat_template(TALK, continue_final_message=True)
    assert opened["input_ids"] == encoded["input_ids"]


def test_batches_pad_and_truncate_with_the_ordinary_mask(tokenizer):
    encoded = tokenizer.apply_chat_template(
        [TALK[:2], TALK], padding=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    assert {name: rows.shape for name, rows in encoded.items()} == dict.fromkeys(
        ["input_ids", "attention_mask", "assistant_masks"], encoded["input_ids"].shape
    )
    assert encoded["attention_mask"].bool().equal(encoded["input_ids"].ne(tokenizer.pad_token_id))
    single = tokenizer.apply_chat_template(TALK[:2], return_assistant_tokens_mask=True)
    for name in encoded:
        assert encoded[name][0, -len(single["input_ids"]) :].tolist() == single[name]
    cut = tokenizer.apply_chat_template(TALK, truncation=True, max_length=7)
    assert cut["input_ids"] == encoded["input_ids"][1].tolist()[:7]
    assert tokenizer.apply_chat_template(TALK, return_dict=False) == encoded["input_ids"][1].tolist()


@pytest.mark.parametrize(
    "messages, words",
    [
        ([], "at least one message"),
        ([{"role": "system", "content": "s"}], "at least one user message"),
        ([{"role": "tool", "content": "s"}], "Unknown role 'tool'"),
        ([TALK[0], TALK[0]], "Message 2 has role 'user'"),
        ([TALK[1]], "Message 1 has role 'assistant'"),
        ([{"role": "user", "content": ["x"]}], "must be text"),
    ],
)
def test_conversations_without_a_prompt_are_refused(tokenizer, messages, words):
    with pytest.raises((ValueError, TemplateError), match=words):
        tokenizer.apply_chat_template(messages)


# --- masks for today's callers


def test_ordinary_mask_on_request_and_for_rows_that_bring_one(tokenizer):
    texts = ["你好", "The quiet garden"]
    asked = tokenizer(texts, padding=True, return_attention_mask=True)
    rows = [tokenizer(text, return_attention_mask=True) for text in texts]
    assert set(asked) == set(rows[0]) == {"input_ids", "attention_mask"}
    assert dict(tokenizer.pad(rows)) == dict(asked)
    assert asked["attention_mask"] == [[int(id != 3) for id in ids] for ids in asked["input_ids"]]
    assert set(tokenizer(texts, padding=True, return_attention_mask=False)) == {"input_ids"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_makes_the_published_tensors(tokenizer, side):
    texts = ["你好", "The quiet garden"]
    collator = DataCollatorWithPadding(tokenizer)
    tokenizer.padding_side = side
    try:
        batch = collator([tokenizer(text) for text in texts])
        at_once = tokenizer(texts, padding=True, return_tensors="pt")
    finally:
        tokenizer.padding_side = "left"
    size = batch["input_ids"].shape[1]
    assert (batch["attention_mask"].shape, batch["position_ids"].shape) == ((2, 1, size, size), (2, 2, size))
    assert all(batch[name].equal(at_once[name]) for name in batch)


# --- loading


@pytest.mark.parametrize("trust_remote_code", [None, True])
@pytest.mark.parametrize("folder", ["v1_folder", "saved_folder"])
def test_every_way_of_loading_gives_this_tokenizer(request, folder, trust_remote_code):
    folder = request.getfixturevalue(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    others = [ChatGLMTokenizer.from_pretrained(folder), ChatGLM6BTokenizer.from_pretrained(folder)]
    others.append(pickle.loads(pickle.dumps(tokenizer)))
    for each in (tokenizer, *others):
        assert type(each) is ChatGLM6BTokenizer
        assert each("a\nb")["input_ids"] == [17, 4, 627, 633, 636]


def test_folder_without_tokenizer_config_counts_its_image_tokens(v1_folder, tmp_path):
    (tmp_path / "ice_text.model").write_bytes((v1_folder / "ice_text.model").read_bytes())
    config = AutoConfig.from_pretrained(v1_folder)
    config.bos_token_id = 100 + 636
    config.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (type(tokenizer), tokenizer.bos_token_id, tokenizer.decode([99])) == (
        ChatGLM6BTokenizer,
        736,
        "<image_99>",
    )


def test_saved_folder_is_complete(saved_folder, v1_folder):
    assert {"tokenizer.json", "tokenizer_config.json", "ice_text.model"} <= {p.name for p in saved_folder.iterdir()}
    assert (saved_folder / "ice_text.model").read_bytes() == (v1_folder / "ice_text.model").read_bytes()
    written = json.loads((saved_folder / "tokenizer_config.json").read_text())
    published = json.loads((v1_folder / "tokenizer_config.json").read_text())
    names = set(published) - {"tokenizer_class", "name_or_path", "auto_map"}
    assert {name: written[name] for name in names} == {name: published[name] for name in names}


@pytest.mark.oldest
def test_added_tokens_survive_saving(v1_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(v1_folder)
    tokenizer.add_tokens(["<mine>"])
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(tokenizer) == 977
    assert again.tokenize("a<mine>b") == tokenizer.tokenize("a<mine>b")
    assert 976 in again.encode("a<mine>b")


def test_missing_vocabulary_is_named():
    with pytest.raises(ValueError, match="ice_text.model"):
        ChatGLM6BTokenizer()
