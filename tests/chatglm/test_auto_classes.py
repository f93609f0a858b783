import importlib
import json
import sys

import pytest
from miniatures.vocabularies import lines_of
from processes import forked_program
from tiny import ROOT
from trained import script
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import chatglm


GENERATIONS = {"v2": "chatglm2", "v3": "chatglm3", "glm4": "glm4"}
TINY = ROOT / "scripts" / "tiny_chatglm.py"


@pytest.mark.oldest
@pytest.mark.parametrize("trust_remote_code", [None, True])
def test_published_folder_loads_through_the_auto_classes(folder, version, trust_remote_code):
    options = {"trust_remote_code": trust_remote_code}
    tokenizer = chatglm.ChatGLM4Tokenizer if version == "glm4" else chatglm.ChatGLMTokenizer
    assert type(AutoConfig.from_pretrained(folder, **options)) is chatglm.ChatGLMConfig
    assert type(AutoTokenizer.from_pretrained(folder, **options)) is tokenizer
    assert type(AutoModel.from_pretrained(folder, **options)) is chatglm.ChatGLMForConditionalGeneration
    assert type(AutoModelForCausalLM.from_pretrained(folder, **options)) is chatglm.ChatGLMForConditionalGeneration
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    assert type(classifier) is chatglm.ChatGLMForSequenceClassification


def test_folder_without_auto_map_or_tokenizer_config_loads(folder, version, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    assert type(AutoConfig.from_pretrained(tmp_path)) is chatglm.ChatGLMConfig
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    expected = chatglm.ChatGLM4Tokenizer if version == "glm4" else chatglm.ChatGLMTokenizer
    assert (type(tokenizer), tokenizer.generation) == (expected, GENERATIONS[version])


def test_registering_again_is_harmless(v3_folder):
    importlib.reload(chatglm)
    assert type(AutoTokenizer.from_pretrained(v3_folder, trust_remote_code=True)) is chatglm.ChatGLMTokenizer
    assert type(AutoModel.from_pretrained(v3_folder)) is chatglm.ChatGLMForConditionalGeneration


@pytest.mark.parametrize("generation", ["chatglm2", "glm4"])
def test_tiny_checkpoint_is_deterministic_and_loads(tmp_path, generation):
    text = tmp_path / "rows.jsonl"
    text.write_text(
        json.dumps({"content": "类型#上衣*颜色#白色", "summary": ["白色的上衣很百搭"]}, ensure_ascii=False)
    )
    options = ["--generation", generation, "--text", text, "--vocab_size", 300, "--hidden_size", 32]
    for name in ("one", "two"):
        result = forked_program(TINY, name, *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(report.values())
    assert (tokenizer.generation, model.config.generation) == (generation, generation)
    assert model.generation_config.eos_token_id == tokenizer.stop_token_ids
    assert len(tokenizer) <= model.config.vocab_size
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] <= ids["input_ids"].shape[1] + 3


def test_tiny_checkpoint_leaves_foreign_files_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = forked_program(TINY, tmp_path)
    assert result.returncode == 2
    assert "did not write" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_empty_pair_ends_like_any_pair(version, request):
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(f"{version}_folder"))
    ids = [*tokenizer("x")["input_ids"], tokenizer.eos_token_id]
    assert tokenizer("x", "")["input_ids"] == ids and tokenizer(["x"], [""])["input_ids"] == [ids]
    assert tokenizer("x", "", return_tensors="pt")["input_ids"].tolist() == [ids]
    bare = {"add_special_tokens": False}
    assert tokenizer("x", "", **bare)["input_ids"] == tokenizer("x", **bare)["input_ids"]


@pytest.mark.parametrize(
    "text, flags, sentence",
    [
        (None, ["--num_layers", "0"], "--num_layers must be at least 1 and less than 2**32, not 0"),
        (b"{", [], "a.jsonl cannot be read: Expecting property name"),
        (b"\xff", [], "a.jsonl cannot be read: 'utf-8' codec can't decode byte 0xff"),
        (b"5\n", [], "there is no text in it to learn from"),
    ],
)
def test_mistakes_in_the_making_of_a_tiny_checkpoint_are_named(text, flags, sentence, tmp_path, monkeypatch, capsys):
    if text is not None:
        (tmp_path / "a.jsonl").write_bytes(text)
        flags = ["--text", str(tmp_path / "a.jsonl")]
    monkeypatch.setattr(sys, "argv", ["tiny_chatglm.py", str(tmp_path / "tiny"), *flags])
    with pytest.raises(SystemExit) as end:
        script("tiny_chatglm").main()
    assert sentence in f"{end.value.code} {capsys.readouterr().err}"


def test_line_separators_of_unicode_part_no_lines_of_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "x\u2028y"}\n["z"]\n', encoding="utf-8")
    assert lines_of([tmp_path / "a.jsonl"]) == ["x", "y", "z"]
