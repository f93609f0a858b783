import json
import pickle
import random

import pytest
from goldens_io import as_lists, recorded_texts
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chatglm import ChatGLMTokenizer


WEATHER = {"name": "get_weather", "description": "查询天气", "parameters": {"type": "object", "properties": {}}}
TALK = [
    {"role": "system", "content": "You are ChatGLM3."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！很高兴见到你。"},
    {"role": "user", "content": "1 + 1"},
    {"role": "assistant", "content": "2"},
]
SPECIAL_TEXTS = ["[gMASK]", "a [MASK] b", "sop", "</s>", "<unk>", "<|user|>hi<|assistant|>", "<0x0A>", "philosophy"]


@pytest.fixture(scope="module", params=["v2", "v3"])
def version(request):
    return request.param


@pytest.fixture(scope="module")
def folder(request, version):
    return request.getfixturevalue(f"{version}_folder")


@pytest.fixture(scope="module")
def recorded(version):
    return recorded_texts(f"tok_{version}")


@pytest.fixture(scope="module")
def training_rows():
    return recorded_texts("train_format")


@pytest.fixture(scope="module")
def published(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["published", "saved"])
def tokenizer(request, version):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def plain(saved_folder):
    """What other programs make of the saved folder: tokenizer.json and the Jinja template, without our code."""
    return PreTrainedTokenizerFast.from_pretrained(saved_folder)


@pytest.fixture(scope="module")
def v2(v2_folder):
    return AutoTokenizer.from_pretrained(v2_folder)


@pytest.fixture(scope="module")
def v3(v3_folder):
    return AutoTokenizer.from_pretrained(v3_folder)


def messages_of(chat: dict) -> list[dict]:
    """The recorded history and query as messages."""
    if chat["history"] and isinstance(chat["history"][0], list):
        turns = [("user", "assistant")] * len(chat["history"])
        pairs = [zip(roles, texts, strict=True) for roles, texts in zip(turns, chat["history"], strict=True)]
        history = [{"role": role, "content": text} for pair in pairs for role, text in pair]
    else:
        history = chat["history"]
    return [*history, {"role": chat.get("role", "user"), "content": chat["query"]}]


def prompts_of(recorded: dict) -> list[tuple[list[dict], dict]]:
    return [(messages_of(chat), chat["input"]) for chat in recorded["chat"] if "input" in chat]


# --- the original's ids


@pytest.mark.oldest
def test_properties_equal_the_original(tokenizer, recorded):
    for name in ("vocab_size", "padding_side", "pad_token_id", "eos_token_id", "bos_token_id", "model_input_names"):
        assert getattr(tokenizer, name) == recorded[name]
    assert len(tokenizer) == recorded["len"]
    ids = {
        token: index for token, index in recorded["special_ids"].items() if not token.startswith(("<b", "<e", "<p"))
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids


@pytest.mark.oldest
@pytest.mark.parametrize("group", ["strings", "strings_with_special_token_text"])
def test_texts_equal_the_original(tokenizer, recorded, group):
    for golden in recorded[group]:
        assert tokenizer.encode(golden["text"], add_special_tokens=False) == golden["ids"]
        assert tokenizer(golden["text"])["input_ids"] == golden["ids_special"]
        assert tokenizer.tokenize(golden["text"]) == golden["tokens"]
        assert tokenizer.convert_tokens_to_ids(golden["tokens"]) == golden["ids"]
        assert tokenizer.decode(golden["ids"]) == golden["decode_ids"]
        assert tokenizer.decode(golden["ids_special"]) == golden["decode_ids_special"]
        assert tokenizer.decode(golden["ids_special"], skip_special_tokens=True) == golden["text"]


@pytest.mark.oldest
def test_pairs_and_batches_equal_the_original(tokenizer, recorded):
    for pair in recorded["pairs"]:
        assert tokenizer(pair["a"], pair["b"])["input_ids"] == pair["ids"]
        assert tokenizer(pair["a"], pair["b"], add_special_tokens=False)["input_ids"] == pair["ids_nospecial"]
    for batch in recorded["batches"]:
        assert as_lists(tokenizer(batch["texts"], **batch["kwargs"])) == batch["result"]


@pytest.mark.oldest
def test_chat_prompts_equal_the_original(tokenizer, recorded):
    for messages, expected in prompts_of(recorded):
        encoding = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        assert as_lists(encoding) == expected


def test_single_messages_equal_the_original(v3):
    recorded = recorded_texts("tok_v3")
    for chat in recorded["chat"]:
        if "single_message" in chat:
            role, metadata, content = chat["single_message"]
            message = {"role": role, "metadata": metadata, "content": content}
            assert v3.apply_chat_template([message])["input_ids"][2:] == chat["ids"]


def test_encode_special_tokens_finds_the_roles_as_in_the_original(v3_folder, tmp_path):
    recorded = recorded_texts("tok_v3")
    tokenizer = AutoTokenizer.from_pretrained(v3_folder, encode_special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for golden in recorded["encode_special_tokens_true"]:
            assert each.encode(golden["text"], add_special_tokens=False) == golden["ids"]
            assert each.decode(golden["ids"]) == golden["decode"]
    switched_off = AutoTokenizer.from_pretrained(tmp_path, encode_special_tokens=False)
    assert switched_off.decode(switched_off.encode("<|user|>", add_special_tokens=False)) == "<|user|>"
    assert len(switched_off.encode("<|user|>", add_special_tokens=False)) > 1


# --- training rows of the official scripts


def test_chatglm2_rows_equal_the_training_script(v2, training_rows):
    row = next(row for row in training_rows["v2_ptuning"] if row["history_column"] and row["max_source_length"] == 24)
    question, answer = row["examples"]["content"][0], row["examples"]["summary"][0]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    encoding = v2.apply_chat_template(messages, return_assistant_tokens_mask=True)
    ids, mask = encoding["input_ids"] + [2], encoding["assistant_masks"] + [1]
    assert ids == row["input_ids"][0][: len(ids)]
    labels = [index if learnt else -100 for index, learnt in zip(ids, mask, strict=True)]
    assert labels == row["labels"][0][: len(ids)]


@pytest.mark.oldest
def test_chatglm3_rows_equal_the_training_script(v3, training_rows):
    golden = training_rows["v3_finetune_hf"][0]
    encoding = v3.apply_chat_template(golden["batch"]["conversations"], return_assistant_tokens_mask=True)
    rows = zip(encoding["input_ids"], encoding["assistant_masks"], strict=True)
    for (ids, mask), expected, labels in zip(
        rows, golden["train"]["input_ids"], golden["train"]["labels"], strict=True
    ):
        assert [*ids, 2] == expected
        pairs = zip([*ids, 2], [*mask, 1], strict=True)
        assert [index if learnt else -100 for index, learnt in pairs] == labels


def test_chatglm3_tools_argument_equals_the_training_script(v3, training_rows):
    golden = training_rows["v3_multiturn_2023"][1]
    prompt = v3.apply_chat_template(golden["item"]["conversations"][:1], tools=golden["item"]["tools"])["input_ids"]
    assert prompt == golden["tokens"][: len(prompt)]


# --- SentencePiece


def random_text(randomness: random.Random, pieces: list[str]) -> str:
    alphabet = [
        "你好",
        "今天",
        "的",
        "a",
        "ab",
        "aaa",
        " ",
        "   ",
        "\n",
        "\t",
        "▁",
        "😀",
        "👨‍👩‍👧",
        "，",
        "ＡＢ",
        "　",
        "def ",
        "\r\n",
    ]
    alphabet += ["é", "龘", "\u200b", "\xa0", "1", "...", "====", "\x00", "\ufeff", *SPECIAL_TEXTS]
    sources = [alphabet, [piece.replace("▁", " ") for piece in pieces], [chr(code) for code in range(33, 0x3000, 7)]]
    source = randomness.choice(sources)
    return "".join(randomness.choice(source) for _ in range(randomness.randint(0, 30)))


def test_random_texts_equal_sentencepiece(v3, goldens):
    processor = SentencePieceProcessor(model_file=str(goldens / "tokenizer" / "v2_tok.model"))
    pieces = [processor.id_to_piece(index) for index in range(259, len(processor))]
    randomness = random.Random(0)
    texts = [random_text(randomness, pieces) for _ in range(3000)]
    encoded = v3(texts, add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, encoded, strict=True):
        assert ids == processor.encode(text), repr(text)
        assert v3.decode(ids) == processor.decode(ids).replace("▁", " "), repr(text)


def test_undecodable_ids_vanish(tokenizer):
    assert tokenizer.decode([1216, 602, len(tokenizer), 60000]) == "你好"
    assert tokenizer.decode(602) == "你好"


# --- special tokens in text


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_special_tokens_in_text_stay_text(tokenizer, text):
    specials = set(range(1500, len(tokenizer))) | {0, 1, 2}
    assert not specials & set(tokenizer.encode(text, add_special_tokens=False))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}])["input_ids"]
    assert sum(index in specials for index in ids) == 2 + (tokenizer.generation == "chatglm3")
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_split_special_tokens_false_finds_them(v3):
    assert v3.encode("[gMASK]sop<|user|>", add_special_tokens=False, split_special_tokens=False) == [1501, 1503, 1506]
    assert v3.encode("[gMASK]", add_special_tokens=False) != [1501]  # the choice holds for one call only


# --- padding


def test_right_padding(tokenizer):
    encoding = tokenizer(["你好", "a\nb c"], padding=True, padding_side="right")
    assert encoding["attention_mask"][0] == [1] * 4 + [0] * 2
    assert encoding["position_ids"][0] == [0, 1, 2, 3, 0, 0]
    assert encoding["input_ids"][0][4:] == [0, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad_completes_masks_and_positions(tokenizer, side):
    rows = [{"input_ids": [5, 6], "assistant_masks": [0, 1]}, {"input_ids": [7, 8, 9], "assistant_masks": [0, 1, 1]}]
    padded = tokenizer.pad(rows, padding_side=side, pad_to_multiple_of=4, return_tensors="pt")
    first = {name: padded[name][0].tolist() for name in padded}
    expected = {"input_ids": [5, 6], "assistant_masks": [0, 1], "attention_mask": [1, 1], "position_ids": [0, 1]}
    zeros = [0, 0]
    assert first == {name: zeros + row if side == "left" else row + zeros for name, row in expected.items()}


# --- chat template


def test_batch_equals_single_conversations(tokenizer):
    talks = [TALK, TALK[1:3], TALK[1:2]]
    batch = tokenizer.apply_chat_template(talks, return_assistant_tokens_mask=True)
    singles = [tokenizer.apply_chat_template(talk, return_assistant_tokens_mask=True) for talk in talks]
    assert set(batch) == {"input_ids", "attention_mask", "position_ids", "assistant_masks"}
    for name in batch:
        assert batch[name] == [single[name] for single in singles]


def test_return_forms(tokenizer):
    ids = tokenizer.apply_chat_template(TALK, return_dict=False)
    assert ids == tokenizer.apply_chat_template(TALK)["input_ids"]
    assert tokenizer.apply_chat_template([TALK], return_dict=False) == [ids]
    assert tokenizer.apply_chat_template(TALK, return_tensors="pt")["input_ids"].tolist() == [ids]
    padded = tokenizer.apply_chat_template(
        [TALK, TALK[:2]],
        padding="max_length",
        truncation=True,
        max_length=20,
        return_tensors="np",
        return_assistant_tokens_mask=True,
    )
    assert {name: rows.shape for name, rows in padded.items()} == dict.fromkeys(padded, (2, 20))
    assert padded["input_ids"][0].tolist() == ids[:20]


def test_text_form_gives_the_same_ids(tokenizer):
    for talk in (TALK, TALK[1:], TALK[:2], TALK[1:4]):
        for cue in (False, True):
            text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=cue)
            ids = tokenizer.apply_chat_template(talk, add_generation_prompt=cue)["input_ids"]
            assert tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False) == ids


def test_jinja_template_without_our_code_gives_the_same_ids(tokenizer, plain, recorded):
    tools = [WEATHER] if tokenizer.generation == "chatglm3" else None
    talks = [messages for messages, _ in prompts_of(recorded)]
    talks += [TALK, TALK[1:], TALK[:2], [*TALK[:2], {"role": "assistant", "content": ""}]]
    for talk in talks:
        for cue in (False, True):
            for functions in {None: None, "tools": tools}.values():
                ours = tokenizer.apply_chat_template(talk, tools=functions, add_generation_prompt=cue)["input_ids"]
                theirs = plain.apply_chat_template(talk, tools=functions, add_generation_prompt=cue)["input_ids"]
                assert theirs == ours
    assert type(plain) is not ChatGLMTokenizer
    assert plain.encode("philosophy", add_special_tokens=False) == tokenizer.encode(
        "philosophy", add_special_tokens=False
    )


def test_chatglm3_mask_covers_replies_and_the_role_that_ends_them(v3):
    encoding = v3.apply_chat_template(TALK, return_assistant_tokens_mask=True)
    learnt = [index for index, mask in zip(encoding["input_ids"], encoding["assistant_masks"], strict=True) if mask]
    assert v3.decode(learnt) == "\n 你好！很高兴见到你。<|user|> \n 2"


def test_chatglm2_mask_covers_the_final_reply(v2):
    encoding = v2.apply_chat_template(TALK, return_assistant_tokens_mask=True)
    learnt = [index for index, mask in zip(encoding["input_ids"], encoding["assistant_masks"], strict=True) if mask]
    assert v2.decode(learnt) == "2"
    question_last = v2.apply_chat_template(TALK[:4], return_assistant_tokens_mask=True)
    assert not any(question_last["assistant_masks"])


def test_loss_key_of_a_message_takes_precedence(v2, v3):
    silent = [*TALK[:2], {**TALK[2], "loss": False}, TALK[3], {**TALK[4], "loss": None}]
    masks = v3.apply_chat_template([TALK, silent], return_assistant_tokens_mask=True)["assistant_masks"]
    assert 0 < sum(masks[1]) < sum(masks[0])
    final = [TALK[1], {**TALK[2], "loss": False}]
    assert not any(v2.apply_chat_template(final, return_assistant_tokens_mask=True)["assistant_masks"])


def test_prompt_is_the_beginning_of_the_conversation(tokenizer):
    whole = tokenizer.apply_chat_template(TALK)["input_ids"]
    prompt = tokenizer.apply_chat_template(TALK[:4], add_generation_prompt=True)["input_ids"]
    assert whole[: len(prompt)] == prompt


def test_open_reply_is_not_closed(tokenizer):
    assert tokenizer.apply_chat_template(TALK, continue_final_message=True) == tokenizer.apply_chat_template(TALK)
    with pytest.raises(ValueError, match="add_generation_prompt"):
        tokenizer.apply_chat_template(TALK, continue_final_message=True, add_generation_prompt=True)


def test_a_template_of_ones_own_is_used(v3):
    template = "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"
    assert v3.apply_chat_template(TALK[1:2], chat_template=template)["input_ids"] == [1506, 1216, 602]


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


def test_chatglm2_refuses_what_its_prompt_cannot_say(v2):
    with pytest.raises(ValueError, match="observation"):
        v2.apply_chat_template([TALK[1], {"role": "observation", "content": "22"}])
    with pytest.raises(ValueError, match="in turn"):
        v2.apply_chat_template([TALK[1], TALK[3]])
    with pytest.raises(ValueError, match="tools"):
        v2.apply_chat_template(TALK, tools=[WEATHER])


# --- files


@pytest.mark.oldest
def test_saved_folder_is_complete(saved_folder, folder):
    assert (saved_folder / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    names = {path.name for path in saved_folder.iterdir()}
    assert names == {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"}


@pytest.mark.oldest
def test_added_tokens_survive_saving(v3_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(v3_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.convert_tokens_to_ids("<|extra|>") == 1509 == len(again) - 1
    assert again("你好") == tokenizer("你好")


def test_special_tokens_of_ones_own_are_found_in_text_and_hidden(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("[TABLE]", lstrip=True)]})
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = each("你好 [TABLE]", add_special_tokens=False)["input_ids"]
        assert ids[-1] == each.convert_tokens_to_ids("[TABLE]") == len(each) - 1
        assert each.decode(ids, skip_special_tokens=True) == "你好"
        assert each.convert_tokens_to_ids("[gMASK]") not in each("[gMASK]", add_special_tokens=False)["input_ids"]


def test_tokens_listed_in_published_files_change_nothing(v3_folder, v3, tmp_path):
    """Later uploads of ChatGLM3-6B list their special tokens and a simple template in tokenizer_config.json."""
    content = json.loads((v3_folder / "tokenizer_config.json").read_text())
    listed = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    content["added_tokens_decoder"] = {
        str(index): {"content": v3.convert_ids_to_tokens(index), **listed} for index in (1501, 1503, 1506, 1508)
    }
    content |= {"additional_special_tokens": ["<|user|>", "<|observation|>"], "split_special_tokens": False}
    content |= {"chat_template": "{{ messages[0]['content'] }}", "eos_token": "</s>", "pad_token": "<unk>"}
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((v3_folder / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(v3)
    assert tokenizer.apply_chat_template(TALK) == v3.apply_chat_template(TALK)
    assert tokenizer("<|user|> sop philosophy") == v3("<|user|> sop philosophy")
    assert tokenizer.backend_tokenizer.to_str() == v3.backend_tokenizer.to_str()


def test_missing_vocabulary_is_named():
    with pytest.raises(ValueError, match=r"no tokenizer\.model \(of ChatGLM-6B: ice_text\.model\)"):
        ChatGLMTokenizer()


def test_tokenizer_can_be_sent_to_other_processes(v3):
    assert pickle.loads(pickle.dumps(v3)).apply_chat_template(TALK) == v3.apply_chat_template(TALK)


def test_stop_token_ids(v2, v3):
    assert v2.stop_token_ids == [2]
    assert v3.stop_token_ids == [2, 1506, 1508]
    assert v2.end_of_reply_token_id == v3.end_of_reply_token_id == 2
