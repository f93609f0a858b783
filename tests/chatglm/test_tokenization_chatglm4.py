import base64
import json
import pickle
import random

import pytest
from goldens_io import recorded_texts
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chatglm import ChatGLM4Tokenizer


WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "查询天气", "parameters": {}}}
TALK = [
    {"role": "system", "content": "You are GLM-4."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！很高兴见到你。"},
    {"role": "user", "content": "天气"},
    {"role": "assistant", "metadata": "get_weather", "content": '{"city": "北京"}'},
    {"role": "observation", "content": "22"},
    {"role": "assistant", "content": "22 度"},
]
SPECIAL_TEXTS = ["[gMASK]", "a [MASK] b", "text<sop>more", "<|user|>hi<|assistant|>", "<|endoftext|>"]


@pytest.fixture(scope="module")
def published(glm4_folder):
    return AutoTokenizer.from_pretrained(glm4_folder)


@pytest.fixture(scope="module")
def saved(saved_folder):
    return AutoTokenizer.from_pretrained(saved_folder, trust_remote_code=True)


@pytest.fixture(scope="module", params=["tok_glm4", "tok_glm4-1m"])
def recorded(request):
    return recorded_texts(request.param)


def copied_tokenizer(folder, target, **changes):
    """A copy of the folder, in which tokenizer_config.json carries further keys."""
    for name in ("config.json", "tokenizer.model"):
        (target / name).write_bytes((folder / name).read_bytes())
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**content, **changes}))
    return AutoTokenizer.from_pretrained(target)


def recorded_token(token: str, tokenizer) -> str:
    """A recorded token, which is bytes in the original, under the name it has in a byte-level vocabulary."""
    if not token.startswith("b64:"):
        return token
    content = base64.b64decode(token[4:])
    (name,) = tokenizer.convert_ids_to_tokens([RANKS[content]])
    return name


RANKS = {}


@pytest.fixture(scope="module", autouse=True)
def ranks(goldens):
    for line in (goldens / "tokenizer" / "glm4_tok.model").read_text().splitlines():
        token, rank = line.split()
        RANKS[base64.b64decode(token)] = int(rank)


# --- the original's ids


@pytest.mark.oldest
def test_properties_equal_the_original(tokenizer, recorded):
    assert type(tokenizer) is ChatGLM4Tokenizer
    for name in ("vocab_size", "padding_side", "pad_token_id", "eos_token_id", "bos_token_id", "model_input_names"):
        assert getattr(tokenizer, name) == recorded[name]
    assert len(tokenizer) == recorded["len"]
    ids = recorded["special_ids"]
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert tokenizer.stop_token_ids == [900, 907, 909]
    assert tokenizer.end_of_reply_token_id == 907


@pytest.mark.oldest
@pytest.mark.parametrize("group", ["strings", "strings_with_special_token_text"])
def test_texts_equal_the_original(tokenizer, recorded, group):
    for golden in recorded[group]:
        assert tokenizer.encode(golden["text"], add_special_tokens=False) == golden["ids"]
        assert tokenizer(golden["text"])["input_ids"] == golden["ids_special"]
        assert tokenizer.tokenize(golden["text"]) == [recorded_token(each, tokenizer) for each in golden["tokens"]]
        assert tokenizer.decode(golden["ids"]) == golden["decode_ids"]
        assert tokenizer.decode(golden["ids_special"]) == golden["decode_ids_special"]
        assert tokenizer.decode(golden["ids_special"], skip_special_tokens=True) == golden["decode_ids_special_skip"]


@pytest.mark.oldest
def test_pairs_and_batches_equal_the_original(tokenizer, recorded):
    for pair in recorded["pairs"]:
        assert tokenizer(pair["a"], pair["b"], add_special_tokens=False)["input_ids"] == pair["ids_nospecial"]
        assert tokenizer(pair["a"], pair["b"])["input_ids"] == [902, 904, *pair["ids_nospecial"], 900]
    for batch in recorded["batches"]:
        encoding = tokenizer(batch["texts"], **batch["kwargs"])
        lists = {name: rows.tolist() if hasattr(rows, "tolist") else rows for name, rows in encoding.items()}
        assert lists == batch["result"]


@pytest.mark.oldest
def test_chat_prompts_equal_the_original(tokenizer, recorded, glm4_folder, tmp_path):
    if recorded["version"] == "glm4-1m":
        other_name = tokenizer.chat_template.replace("名为 ChatGLM 的", "名为 GLM-4 的")
        tokenizer = copied_tokenizer(glm4_folder, tmp_path, chat_template=other_name)
    for chat in recorded["chat"]:
        if "messages" in chat:
            options = {"add_generation_prompt": chat["add_generation_prompt"]}
            assert tokenizer.apply_chat_template(chat["messages"], **options) == chat["result"]
            assert tokenizer.apply_chat_template(chat["messages"], tokenize=False, **options) == chat["string"]
        elif "single_message" in chat:
            message = dict(zip(("role", "metadata", "content"), chat["single_message"], strict=True))
            assert tokenizer.apply_chat_template([message])["input_ids"][2:] == chat["ids"]


def test_long_context_model_is_known_by_its_config(glm4_folder, tmp_path):
    copied_tokenizer(glm4_folder, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "seq_length": 1048576}))
    assert "名为 GLM-4 的" in AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_random_texts_come_back(tokenizer):
    randomness = random.Random(0)
    alphabet = [
        "你好",
        "a",
        "ab",
        " ",
        "   ",
        "\n",
        "\t",
        "😀",
        "，",
        "ＡＢ",
        "　",
        "def ",
        "\r\n",
        "é",
        "1234",
        "'s",
        "\u200b",
    ]
    texts = ["".join(randomness.choices(alphabet, k=randomness.randint(0, 30))) for _ in range(500)]
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert tokenizer.decode(ids) == text
        assert ids == greedy_merges(text, tokenizer)


def greedy_merges(text: str, tokenizer) -> list[int]:
    """Byte pair encoding by ranks, written out: the pair of lowest rank is merged first."""
    ids = []
    for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text):
        parts = [CHARACTERS[character] for character in word]
        while merges := [
            (RANKS[left + right], index)
            for index, (left, right) in enumerate(zip(parts[:-1], parts[1:], strict=True))
            if left + right in RANKS
        ]:
            _, index = min(merges)
            parts[index : index + 2] = [parts[index] + parts[index + 1]]
        ids += [RANKS[part] for part in parts]
    return ids


def byte_characters() -> dict[str, bytes]:
    """The characters that stand for bytes in byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): bytes([byte]) for byte in printable}
    return characters | {chr(256 + index): bytes([byte]) for index, byte in enumerate(others)}


CHARACTERS = byte_characters()


# --- special tokens in text


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_special_tokens_in_messages_stay_text(tokenizer, text):
    talk = [{"role": "user", "content": text}, {"role": "assistant", "metadata": text, "content": text}]
    encoding = tokenizer.apply_chat_template(talk, add_generation_prompt=True)
    assert [index for index in encoding["input_ids"] if index >= 900] == [902, 904, 907, 908, 908]
    tools = [{"type": "function", "function": {"name": "f", "description": text}}]
    described = tokenizer.apply_chat_template(talk[:1], tools=tools)["input_ids"]
    assert [index for index in described if index >= 900] == [902, 904, 906, 907]
    plain = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert max(plain) < 900
    assert tokenizer.decode(plain) == text
    assert any(index >= 900 for index in tokenizer.encode(text, add_special_tokens=False))  # as in the published code


# --- chat template


def test_batch_equals_single_conversations(tokenizer):
    talks = [TALK, TALK[1:3], TALK[1:2]]
    batch = tokenizer.apply_chat_template(talks, return_assistant_tokens_mask=True)
    singles = [tokenizer.apply_chat_template(talk, return_assistant_tokens_mask=True) for talk in talks]
    assert set(batch) == {"input_ids", "attention_mask", "position_ids", "assistant_masks"}
    for name in batch:
        assert batch[name] == [single[name] for single in singles]
    padded = tokenizer.apply_chat_template(talks, padding=True, return_tensors="pt", return_assistant_tokens_mask=True)
    assert padded["assistant_masks"].shape == padded["input_ids"].shape
    assert padded["input_ids"][2, 0] == 900


def test_mask_covers_replies_and_the_role_that_ends_them(tokenizer):
    encoding = tokenizer.apply_chat_template(TALK, return_assistant_tokens_mask=True, tools=[WEATHER])
    pairs = zip(encoding["input_ids"], encoding["assistant_masks"], strict=True)
    learnt = [index for index, mask in pairs if mask]
    options = {"spaces_between_special_tokens": False}
    assert tokenizer.decode(learnt, **options) == (
        '\n你好！很高兴见到你。<|user|>get_weather\n{"city": "北京"}<|observation|>\n22 度'
    )
    silent = [*TALK[:2], {**TALK[2], "loss": False}, *TALK[3:]]
    mask = tokenizer.apply_chat_template(silent, return_assistant_tokens_mask=True)["assistant_masks"]
    assert 0 < sum(mask) < sum(encoding["assistant_masks"])


def test_prompt_is_the_beginning_of_the_conversation(tokenizer):
    whole = tokenizer.apply_chat_template(TALK)["input_ids"]
    for end in (2, 4, 6):
        prompt = tokenizer.apply_chat_template(TALK[:end], add_generation_prompt=True)["input_ids"]
        assert whole[: len(prompt)] == prompt
    assert tokenizer.apply_chat_template(TALK, continue_final_message=True)["input_ids"] == whole
    with pytest.raises(ValueError, match="add_generation_prompt"):
        tokenizer.apply_chat_template(TALK, continue_final_message=True, add_generation_prompt=True)


def test_text_form_and_other_programs_give_the_same_ids(tokenizer, saved_folder):
    plain = PreTrainedTokenizerFast.from_pretrained(saved_folder)
    assert type(plain) is not ChatGLM4Tokenizer
    for talk in (TALK, TALK[1:], TALK[:2]):
        for tools in (None, [WEATHER]):
            for cue in (False, True):
                options = {"tools": tools, "add_generation_prompt": cue}
                ids = tokenizer.apply_chat_template(talk, **options)["input_ids"]
                text = tokenizer.apply_chat_template(talk, tokenize=False, **options)
                assert tokenizer.encode(text, add_special_tokens=False) == ids
                assert plain.apply_chat_template(talk, **options)["input_ids"] == ids


def test_tools_follow_the_system_message_or_come_first(tokenizer):
    inside = [{**TALK[0], "tools": [WEATHER]}, *TALK[1:]]
    given = tokenizer.apply_chat_template(inside, tokenize=False)
    assert given == tokenizer.apply_chat_template(TALK, tools=[WEATHER], tokenize=False)
    assert given.index("# 可用工具\n## get_weather") < given.index("<|system|>\nYou are GLM-4.")
    bare = tokenizer.apply_chat_template(TALK, tools=[WEATHER["function"]], tokenize=False)
    assert bare == given
    with pytest.raises(Exception, match="built-in tool python"):
        tokenizer.apply_chat_template(TALK, tools=[{"type": "python"}])


def test_a_template_without_tools_is_named(glm4_folder, tmp_path):
    template = (
        "[gMASK]<sop>{% for item in messages %}{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n"
        "{{ item['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    template = template.replace("\n{{", "{{ '\\n' }}{{")
    tokenizer = copied_tokenizer(glm4_folder, tmp_path, chat_template=template)
    assert len(tokenizer.apply_chat_template(TALK)["input_ids"]) > 10
    with pytest.raises(ValueError, match="says nothing about tools"):
        tokenizer.apply_chat_template(TALK, tools=[WEATHER])


def test_a_template_that_says_something_else_is_used(glm4_folder, tmp_path):
    template = "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"
    tokenizer = copied_tokenizer(glm4_folder, tmp_path, chat_template=template)
    assert tokenizer.apply_chat_template(TALK[1:2])["input_ids"] == [907, 347, 337, 189]
    broken = tokenizer.apply_chat_template(TALK[1:2], chat_template="{{ messages[0].content }}")
    assert broken["input_ids"] == [347, 337, 189]


def test_a_template_that_says_the_same_gives_the_words_for_tools(glm4_folder, tmp_path):
    template = (
        "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>\nI am G."
        "{% for tool in item['tools'] %}\n## {{ tool['type'] }}{% endfor %}{% endif %}"
        "{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = copied_tokenizer(glm4_folder, tmp_path, chat_template=template)
    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert each.chat_template == template
        text = each.apply_chat_template(TALK[1:2], tools=[WEATHER, {"type": "python"}], tokenize=False)
        assert text == "[gMASK]<sop><|system|>\nI am G.## function## python<|user|>\n你好"  # trim_blocks
        typed = [{"role": "user", "content": "<|assistant|>"}]
        ids = each.apply_chat_template(typed, return_assistant_tokens_mask=True)
        assert [index for index in ids["input_ids"] if index >= 900] == [902, 904, 907]


@pytest.mark.parametrize(
    "talk, message",
    [
        ([], "at least one message"),
        ([{"role": "teacher", "content": "x"}], "'teacher'"),
        ([{"role": "user", "content": ["x"]}], "must be text"),
    ],
)
def test_faulty_conversations_are_named(tokenizer, talk, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template(talk)


# --- files


def test_saved_folder_is_complete_and_keeps_the_template(saved_folder, glm4_folder, published, saved):
    assert (saved_folder / "tokenizer.model").read_bytes() == (glm4_folder / "tokenizer.model").read_bytes()
    names = {path.name for path in saved_folder.iterdir()}
    assert names == {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"}
    assert saved.chat_template == published.chat_template


def test_tokens_listed_in_published_files_change_nothing(glm4_folder, published, tmp_path):
    listed = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    names = published.convert_ids_to_tokens(range(900, 914))
    tokenizer = copied_tokenizer(
        glm4_folder,
        tmp_path,
        added_tokens_decoder={str(900 + index): {"content": name, **listed} for index, name in enumerate(names)},
        additional_special_tokens=names,
        clean_up_tokenization_spaces=False,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        remove_space=False,
    )
    assert len(tokenizer) == len(published)
    assert tokenizer.apply_chat_template(TALK) == published.apply_chat_template(TALK)
    assert tokenizer("<|user|> x") == published("<|user|> x")


@pytest.mark.oldest
def test_added_tokens_survive_saving(glm4_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(glm4_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.convert_tokens_to_ids("<|extra|>") == 914 == len(again) - 1
    assert again("你好") == tokenizer("你好")


def test_wrong_or_missing_vocabulary_is_named(v3_folder):
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        ChatGLM4Tokenizer()
    with pytest.raises(ValueError, match="ChatGLMTokenizer"):
        ChatGLM4Tokenizer(str(v3_folder / "tokenizer.model"))


def test_tokenizer_can_be_sent_to_other_processes(published):
    assert pickle.loads(pickle.dumps(published)).apply_chat_template(TALK) == published.apply_chat_template(TALK)
