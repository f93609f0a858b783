"""scripts/merge_lora.py: the merged folder is the tuned model, in either layout, or there is no folder."""

import json
import os
import re
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from answering.opening import opened
from jinja2 import Environment
from merging import weights, writing
from peft import AutoPeftModelForCausalLM, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CHATML
from trained import write_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm import ChatGLMForConditionalGeneration
from chatglm.native import native_tokenizer
from chatglm.quantization import QuantizedLinear


ALL_LINEAR = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
CHECKPOINTS = {"chatglm": "chatglm1", "chatglm2": "chatglm2", "chatglm3": "chatglm3", "glm4": "glm4_checkpoint"}
IDS = torch.tensor([[5, 9, 300, 41, 7, 7, 120, 260, 33, 12]])


@pytest.fixture
def checkpoint(request, tmp_path):
    """The tiny checkpoint of a generation, by name."""

    def folder(generation):
        if generation in CHECKPOINTS:
            return request.getfixturevalue(CHECKPOINTS[generation])
        copy = shutil.copytree(request.getfixturevalue("chatglm2"), tmp_path / "codegeex2-6b")
        changed(copy / "config.json", _name_or_path="THUDM/codegeex2-6b", interleaved_qkv=False)
        return str(copy)

    return folder


def changed(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits


def merged_by_peft(adapter):
    """Parameters by name after PEFT's own merge of the whole model."""
    return AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().state_dict()


def assert_same_weights(folder, expected, tolerance=2e-6):
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=tolerance, rtol=0, msg=name)


def leftovers(tmp_path):
    return [path.name for path in tmp_path.iterdir() if "merged" in path.name]


@pytest.mark.parametrize("generation", ["chatglm", "chatglm2", "codegeex2", "chatglm3", "glm4"])
def test_published_layout_keeps_names_files_and_generation(generation, checkpoint, merge, tmp_path):
    base = Path(checkpoint(generation))
    (tmp_path / "base").mkdir()
    base = Path(shutil.copytree(base, tmp_path / "base" / base.name))
    for name in ("modeling_chatglm.py", "MODEL_LICENSE"):
        (base / name).write_text("# published\n")
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=ALL_LINEAR)
    folder, text = merge(adapter)
    assert float(re.search(r"largest difference of a logit (\S+)\.\n", text).group(1)) < 1e-5
    assert_same_weights(folder, merged_by_peft(adapter))
    assert load_file(folder / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    config, published = (json.loads((place / "config.json").read_text()) for place in (folder, base))
    assert {**config, **published} == config and set(config) - set(published) <= {"generation"}
    assert config.get("generation", "chatglm") == generation  # whatever the name of the folder
    for path in base.iterdir():
        if path.suffix == ".model" or path.name in ("tokenizer_config.json", "modeling_chatglm.py", "MODEL_LICENSE"):
            assert (folder / path.name).read_bytes() == path.read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == sorted(tokenizer.stop_token_ids)


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["chatglm2", "codegeex2", "chatglm3", "glm4"])
def test_native_layout_is_the_same_model_in_stock_transformers(generation, checkpoint, merge, tmp_path):
    adapter = write_adapter(checkpoint(generation), tmp_path / "adapter", target_modules=ALL_LINEAR)
    folder, _ = merge(adapter, "--format", "native", fresh_process=generation == "glm4")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__ == "transformers.models.glm.modeling_glm"
    tuned = AutoPeftModelForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(logits(model), logits(tuned), atol=1e-5, rtol=0)
    ours, stock = (
        AutoTokenizer.from_pretrained(tuned.base_model.model.name_or_path),
        AutoTokenizer.from_pretrained(folder),
    )
    assert type(stock).__module__.startswith("transformers.")
    messages = [
        {"role": "user", "content": "今天  天气\n怎么样？"},
        {"role": "assistant", "content": "It is sunny, 3.14."},
        {"role": "user", "content": "philosophy"},
    ]
    prompts = [tokenizer.apply_chat_template(messages, add_generation_prompt=True) for tokenizer in (ours, stock)]
    assert prompts[0]["input_ids"] == prompts[1]["input_ids"] and "token_type_ids" not in prompts[1]
    assert stock.padding_side == "left" and stock.pad_token_id == model.config.pad_token_id
    assert model.generation_config.eos_token_id == model.config.eos_token_id == sorted(ours.stop_token_ids)
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == model.config.rope_parameters["rope_theta"] == (5e6 if generation == "glm4" else 1e4)
    assert config["rope_ratio"] == config["rope_theta"] / 1e4  # these three by the names that llama.cpp reads
    published = ("seq_length", model.config.max_position_embeddings), ("layernorm_epsilon", model.config.rms_norm_eps)
    assert all(config[name] == value for name, value in published)
    assert "auto_map" not in config and not list(folder.glob("*.py"))
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.slow
def test_published_folder_opens_in_a_fresh_process(chatglm1, merge, tmp_path):
    folder, text = merge(write_adapter(chatglm1, tmp_path / "adapter"), fresh_process=True)
    assert "The same model" in text and (folder / "ice_text.model").is_file()


VARIANTS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "rank_pattern": {"dense": 2}, "alpha_pattern": {"layers.1.*dense_h_to_4h": 32}},
    "lora_bias": {"lora_bias": True, "target_modules": ["query_key_value"]},
    "bias": {"bias": "all"},
    "some layers": {"layers_to_transform": [1], "target_modules": ["query_key_value"]},
    "regular expression": {"target_modules": r".*layers\.0\..*dense"},
    "embedding": {"target_modules": ["word_embeddings", "output_layer"]},
    "whole modules": {"modules_to_save": ["output_layer", "final_layernorm"]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora_are_merged_as_peft_merges_them(variant, chatglm3, merge, tmp_path):
    adapter = write_adapter(chatglm3, tmp_path / "adapter", **{"target_modules": ALL_LINEAR, **VARIANTS[variant]})
    folder, _ = merge(adapter)
    assert_same_weights(folder, merged_by_peft(adapter), tolerance=1e-5)


def test_interpolated_positions_of_the_32k_model_stay(chatglm2, merge, tmp_path):
    base = shutil.copytree(chatglm2, tmp_path / "chatglm2-6b-32k")
    changed(base / "config.json", rope_ratio=16)
    adapter = write_adapter(base, tmp_path / "adapter")
    folder, _ = merge(adapter, "--format", "native")
    ids = torch.randint(3, 500, (1, 600), generator=torch.manual_seed(0))
    tuned = AutoPeftModelForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(folder), ids), logits(tuned, ids), atol=2e-5, rtol=0
    )


def test_fused_layers_without_groups_are_split_by_head(chatglm3, merge, tmp_path):
    base = shutil.copytree(chatglm3, tmp_path / "base")
    changed(base / "config.json", multi_query_attention=False)
    torch.manual_seed(3)
    config = ChatGLMForConditionalGeneration.config_class.from_pretrained(base)
    save_file(ChatGLMForConditionalGeneration(config).state_dict(), base / "model.safetensors", {"format": "pt"})
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["query_key_value"])
    folder, _ = merge(adapter, "--format", "native")
    tuned = AutoPeftModelForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(tuned), atol=1e-5, rtol=0)


@pytest.mark.parametrize("format", ["published", "native"])
def test_half_precision_is_kept_or_chosen(format, chatglm3, merge, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(chatglm3, base)
    weights = {name: weight.half() for name, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    changed(base / "config.json", torch_dtype="float16")
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=ALL_LINEAR)
    for flags, dtype in (([], torch.float16), (["--dtype", "bfloat16"], torch.bfloat16)):
        folder, _ = merge(adapter, "--format", format, *flags, out=f"merged-{dtype}")
        assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {dtype}
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype


@pytest.mark.parametrize("stored", ["safetensors", "bin"])
def test_shards_are_read_and_written_with_an_index(stored, chatglm3, merge, tmp_path):
    base = shutil.copytree(chatglm3, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    stem = "model" if stored == "safetensors" else "pytorch_model"
    files = {name: f"{stem}-{index % 3 + 1:05}-of-00003.{stored}" for index, name in enumerate(weights)}
    for file in set(files.values()):
        part = {name: weights[name] for name in weights if files[name] == file}
        save_file(part, base / file, {"format": "pt"}) if stored == "safetensors" else torch.save(part, base / file)
    (base / f"{stem}.{stored}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=ALL_LINEAR)
    folder, _ = merge(adapter, "--max_shard_size", "100KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys() and len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
    assert_same_weights(folder, merged_by_peft(adapter))


@pytest.mark.parametrize("generation, format", [("chatglm", "published"), ("chatglm2", "native")])
def test_quantised_base_is_dequantised_first(generation, format, checkpoint, merge, tmp_path):
    base = shutil.copytree(checkpoint(generation), tmp_path / "int4")
    model = AutoModelForCausalLM.from_pretrained(base)
    weights = load_file(base / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            quantised = QuantizedLinear.from_linear(module, 4)
            weights |= {f"{name}.weight": quantised.weight.data, f"{name}.weight_scale": quantised.weight_scale}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    changed(base / "config.json", quantization_bit=4)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["query_key_value"])
    folder, text = merge(adapter, "--format", format)
    assert "quantised to 4 bits: its weights are dequantised to float32 first" in text
    merged = load_file(folder / "model.safetensors")
    assert not any("scale" in name for name in merged) and {w.dtype for w in merged.values()} == {torch.float32}
    assert "quantization_bit" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "all", "modules_to_save": ["output_layer"]}])
def test_adapter_alone_fits_the_native_layout_exactly(options, chatglm3, merge, tmp_path):
    adapter = write_adapter(chatglm3, tmp_path / "adapter", target_modules=ALL_LINEAR, **options)
    exported, _ = merge(adapter, "--format", "native", "--adapter_only", out="exported")
    base, _ = merge(adapter, "--format", "native", "--base_only", out="merged-base")
    names = json.loads((exported / "adapter_config.json").read_text())["target_modules"]
    assert sorted(names) == ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    native, _ = opened(str(exported), base_model=str(base))  # as chat.py opens it: a PeftModel
    tuned = AutoPeftModelForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(logits(native), logits(tuned), atol=1e-5, rtol=0)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (base, chatglm3)]
    torch.testing.assert_close(*map(logits, models), atol=1e-5, rtol=0)


def test_tokenizer_of_the_training_goes_along_where_it_is_another_one(chatglm3, merge, tmp_path):
    adapter = write_adapter(chatglm3, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(chatglm3)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(adapter)
    folder, _ = merge(adapter)
    assert AutoTokenizer.from_pretrained(folder).chat_template.endswith(CHATML)


def test_other_models_are_merged_too(llama, merge, tmp_path):
    adapter = write_adapter(llama, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    folder, _ = merge(adapter)
    assert_same_weights(folder, merged_by_peft(adapter))


def test_result_that_is_not_the_tuned_model_is_thrown_away(chatglm3, merge, tmp_path, monkeypatch):
    adapter = write_adapter(chatglm3, tmp_path / "adapter")
    monkeypatch.setattr(weights.Adapter, "weight", lambda self, name, base: base.tensor(name))  # forgets it
    with pytest.raises(SystemExit, match="Nothing was written: the logits of the result differ from those of base"):
        merge(adapter)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("event", ["disk full", "Ctrl-C", "SIGTERM"])
def test_interrupted_merge_leaves_nothing(event, chatglm3, merge, tmp_path, monkeypatch):
    def interrupted(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        if event == "disk full":
            raise OSError(28, "No space left on device")
        if event == "Ctrl-C":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(writing, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt if event == "Ctrl-C" else SystemExit):
        merge(write_adapter(chatglm3, tmp_path / "adapter"))
    assert leftovers(tmp_path) == [] and signal.getsignal(signal.SIGTERM) is before


def of_another_base(chatglm3, tmp_path):
    adapter = write_adapter(chatglm3, tmp_path / "adapter")
    weights = load_file(Path(adapter, "adapter_model.safetensors"))
    weights = {name: w.repeat(1, 2) if "lora_A" in name else w.repeat(2, 1) for name, w in weights.items()}
    save_file(weights, Path(adapter, "adapter_model.safetensors"))
    return adapter


def with_field(name, value):
    def adapter(chatglm3, tmp_path):
        changed(Path(write_adapter(chatglm3, tmp_path / "adapter"), "adapter_config.json"), **{name: value})
        return tmp_path / "adapter"

    return adapter


def with_base(name):
    return with_field("base_model_name_or_path", name)


def without_weights(chatglm3, tmp_path):
    adapter = Path(write_adapter(chatglm3, tmp_path / "adapter"))
    (adapter / "adapter_model.safetensors").unlink()
    return adapter


def of_an_adapter(chatglm3, tmp_path):
    return with_base(write_adapter(chatglm3, tmp_path / "adapter"))(chatglm3, tmp_path)


def of_a_smaller_vocabulary(chatglm3, tmp_path):
    adapter = write_adapter(chatglm3, tmp_path / "adapter", modules_to_save=["output_layer"])
    path = Path(adapter, "adapter_model.safetensors")
    weights = load_file(path)
    (name,) = (name for name in weights if "output_layer" in name)
    weights[name] = torch.cat((weights[name], weights[name][:64]))
    save_file(weights, path, {"format": "pt"})
    return adapter


def prefix(chatglm3, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(chatglm3)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def cut_short(base, folder):
    adapter = Path(write_adapter(base, folder / "cut"))
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return str(adapter)


@pytest.mark.parametrize(
    "adapter, sentence",
    [
        (cut_short, "cut/adapter_model.safetensors is damaged or was cut short .*: copy it again"),
        (lambda base, _: base, "is not an adapter: there is no adapter_config.json in it"),
        (lambda *_: "nowhere", "nowhere is neither a folder nor found on the hub or in its cache"),
        (prefix, "This script merges LoRA. .* is PREFIX_TUNING, which has no weights to merge"),
        (
            of_another_base,
            r"trained on another base: it changes .*query_key_value.weight \[256, 128\], this one has \[1",
        ),
        (with_field("r", 7), "does not fit the weights beside it: .* size mismatch for transformer"),
        (with_field("peft_type", "LORI"), "adapter/adapter_config.json is none that PEFT .* reads: 'LORI'"),
        (without_weights, "adapter has no weights beside its adapter_config.json: copy adapter_model.safetensors"),
        (of_an_adapter, "adapter, is an adapter itself: merge it into its base, and name the result"),
        (of_a_smaller_vocabulary, r"more tokens than its base: .*output_layer.weight has 704 rows, in the base 640"),
        (with_base("/gone/chatglm3"), "is not at /gone/chatglm3 any more: pass its place with --base_model"),
        (with_base("gone/chatglm3"), "gone/chatglm3 is neither a folder nor found on the hub or in its cache"),
        (with_base(None), "names no base model: pass --base_model"),
    ],
)
def test_mistakes_get_a_sentence(adapter, sentence, chatglm3, merge, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        merge(adapter(chatglm3, tmp_path))
    assert leftovers(tmp_path) == []


def test_next_merge_removes_what_a_killed_one_left(chatglm3, merge, tmp_path):
    (tmp_path / ".merged.unfinished-999999999").mkdir()
    folder, output = merge(write_adapter(chatglm3, tmp_path / "adapter"))
    assert "Removing" in output and leftovers(tmp_path) == [folder.name]


def test_merge_into_a_folder_that_another_process_writes_is_refused(chatglm3, merge, tmp_path):
    (tmp_path / f".merged.unfinished-{os.getppid()}").mkdir()
    with pytest.raises(SystemExit, match=f"process {os.getppid()} is writing .*merged: wait for it"):
        merge(write_adapter(chatglm3, tmp_path / "adapter"))
    assert (tmp_path / f".merged.unfinished-{os.getppid()}").is_dir()


TALK = [{"role": role, "content": text} for role, text in (("user", "一"), ("assistant", "二"), ("user", "三"))]
CAME_BACK = [TALK[0], {"role": "assistant", "content": "\n 二"}, TALK[2]]


@pytest.mark.parametrize("generation", ["chatglm2", "chatglm3", "glm4"])
def test_exported_template_takes_answers_back_as_they_were_generated(generation, checkpoint, merge, tmp_path):
    adapter = write_adapter(checkpoint(generation), tmp_path / "adapter")
    folder, _ = merge(adapter, "--format", "native")
    ours, stock = AutoTokenizer.from_pretrained(checkpoint(generation)), AutoTokenizer.from_pretrained(folder)
    prompts = [
        tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"] for tokenizer in (ours, stock)
    ]
    prompts.append(stock.apply_chat_template(CAME_BACK, add_generation_prompt=True)["input_ids"])
    assert prompts[0] == prompts[1] == prompts[2]


@pytest.mark.parametrize("generation", ["chatglm", "chatglm2", "chatglm3", "glm4"])
def test_published_merge_brings_a_template_that_takes_answers_back(generation, checkpoint, merge, tmp_path):
    base = checkpoint(generation)
    folder, _ = merge(write_adapter(base, tmp_path / "adapter"))
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    ours, merged = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(folder)
    prompt = ours.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    assert merged.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"] == prompt
    given = TALK if generation == "chatglm" else CAME_BACK  # ChatGLM-6B's answers begin with no white space
    engine = native_tokenizer(ours)  # reads the template as any engine does
    text = engine.apply_chat_template(given, chat_template=template, add_generation_prompt=True, tokenize=False)
    assert text == ours.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)


def rendered_by_ollama(text, messages):
    """The prompt of a Modelfile: its Go template, which has `range`, `if ne`, `end` and fields, in Jinja's words."""
    template, opened, last = re.search('TEMPLATE """(.*?)"""', text, re.S).group(1), [], 0
    words = {"range .Messages": "for m in messages", 'if ne .Role "assistant"': 'if m.role != "assistant"'}
    jinja = ""
    for action in re.finditer(r"{{ (.*?) }}", template):
        jinja += template[last : action.start()]
        last = action.end()
        if action.group(1) == "end":
            jinja += f"{{% end{opened.pop()} %}}"
        elif action.group(1) in words:
            opened.append(words[action.group(1)].split()[0])
            jinja += f"{{% {words[action.group(1)]} %}}"
        else:
            jinja += f"{{{{ m{action.group(1).lower()} }}}}"
    return Environment(keep_trailing_newline=True).from_string(jinja + template[last:]).render(messages=messages)


@pytest.mark.parametrize("generation, layout", [("chatglm3", "published"), ("glm4", "native")])
def test_modelfile_gives_ollama_the_prompt_of_training(generation, layout, checkpoint, merge, tmp_path):
    base = checkpoint(generation)
    folder, _ = merge(write_adapter(base, tmp_path / "adapter"), "--format", layout, "--ollama")
    text, ours = (folder / "Modelfile").read_text(encoding="utf-8"), AutoTokenizer.from_pretrained(base)
    assert text.startswith("FROM ./model.gguf\n") and text.count("PARAMETER stop") == 2
    system = {"role": "system", "content": "简短"}
    blank = " " if generation == "chatglm3" else ""  # with which an answer comes back
    given = [system, TALK[0], {"role": "assistant", "content": blank + "二"}, TALK[2]]
    ids = native_tokenizer(ours).encode(rendered_by_ollama(text, given), add_special_tokens=False)
    answer = {"role": "assistant", "content": "四"}
    said = ours.apply_chat_template([system, *TALK, answer])["input_ids"]
    assert said[: len(ids)] == ids and ours.decode(said[len(ids) :]) == "四"


def test_folder_may_be_the_empty_one_at_hand_or_one_that_a_link_names(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path("."), tmp_path / "link"):
        with writing.unfinished(out) as folder:
            (folder / "config.json").write_text("{}")
    assert [(tmp_path / name / "config.json").read_text() for name in ("here", "there")] == ["{}", "{}"]
    assert leftovers(tmp_path) == []


def test_existing_folder_is_left_as_it_is(chatglm3, merge, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/weights").write_text("mine")
    with pytest.raises(SystemExit, match="merged exists already: name another folder, or remove it"):
        merge(chatglm3)
    assert (tmp_path / "merged/weights").read_text() == "mine"


def test_full_disk_is_noticed_before_writing(chatglm3, merge, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 9 * 10**5, 10**5)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match=r"0\.0 GB are to be written, but .* has 0\.0 GB left"):
        merge(write_adapter(chatglm3, tmp_path / "adapter"))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "generation, flags, options, sentence",
    [
        ("chatglm", ["--format", "native"], {}, "ChatGLM-6B reads its context in both directions"),
        ("chatglm", [], {"target_modules": ["word_embeddings"]}, "word_embeddings, which shares its matrix"),
        ("chatglm2", ["--ollama"], {}, "--ollama writes the prompts of ChatGLM3 and GLM-4"),
        ("chatglm3", ["--ollama", "--format", "native"], {}, "pass --format published with --ollama"),
        (
            "chatglm3",
            ["--format", "native", "--adapter_only"],
            {"rank_pattern": {"dense": 2}},
            "rank_pattern or alpha",
        ),
        (
            "chatglm3",
            ["--format", "native", "--adapter_only"],
            {"init_lora_weights": "olora"},
            "olora belongs to a base",
        ),
        ("chatglm3", [], {"trainable_token_indices": [5, 6]}, "trained with trainable_token_indices, which"),
    ],
)
def test_what_cannot_be_exact_is_refused(generation, flags, options, sentence, checkpoint, merge, tmp_path):
    adapter = write_adapter(checkpoint(generation), tmp_path / "adapter", **{"target_modules": ALL_LINEAR, **options})
    with pytest.raises(SystemExit, match=sentence):
        merge(adapter, *flags)
    assert leftovers(tmp_path) == []
