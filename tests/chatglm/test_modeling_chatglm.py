import copy
import json
import warnings

import pytest
import torch
import transformers
from goldens_io import named, recorded_run
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification
from chatglm.modeling_chatglm import ChatGLMRMSNorm, ChatGLMRotaryEmbedding


CASES = [
    "plain_single",
    "train_rightpad_mask",
    "train_rightpad_nomask",
    "train_leftpad",
    "leftpad_defaultpos",
    "allones_mask",
    "custom_positions",
]


@pytest.fixture(scope="module")
def recorded(version):
    return recorded_run(version)


@pytest.fixture(scope="module")
def eager(folder):
    return ChatGLMForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def sdpa(folder):
    return ChatGLMForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").eval()


@pytest.fixture(params=["eager", "sdpa"])
def model(request, version):
    return request.getfixturevalue(request.param)


@pytest.fixture
def batch(recorded):
    tensors, _ = recorded
    return {name: tensors[f"train_leftpad.{name}"] for name in ("input_ids", "attention_mask", "labels")}


def tiny_config(**changes) -> ChatGLMConfig:
    sizes = {"padded_vocab_size": 64, "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "kv_channels": 8}
    groups = {"num_attention_heads": 4, "multi_query_attention": True, "multi_query_group_num": 2, "seq_length": 128}
    return ChatGLMConfig(**{**sizes, **groups, "add_qkv_bias": True, **changes})


# --- the original's numbers


@pytest.mark.oldest
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_the_original(model, recorded, case):
    tensors, notes = recorded
    note = notes["cases"][case]
    inputs = {name: tensors[f"{case}.{name}"] for name in note["inputs_given"]}
    model.zero_grad()
    outputs = model(**inputs)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    assert (outputs.logits - tensors[f"{case}.logits"])[real].abs().max() < 1e-4
    if "loss" in note:
        assert outputs.loss.item() == pytest.approx(note["loss"], rel=1e-5)
        outputs.loss.backward()
        parameters = dict(model.named_parameters())
        norms = {name: parameters[name].grad.norm().item() for name in note["grad_norms"]}
        assert norms == pytest.approx(note["grad_norms"], rel=1e-3)


@pytest.mark.oldest
def test_hidden_states_equal_the_original(model, recorded):
    tensors, _ = recorded
    expected = tensors["plain_single.hidden_states"]  # the last one before the final norm
    with torch.no_grad():
        states = model(tensors["plain_single.input_ids"], output_hidden_states=True).hidden_states
    assert len(states) == len(expected)
    # before 5.18 the library always puts the normalised state last
    count = len(expected) if Version(transformers.__version__) >= Version("5.18") else len(expected) - 1
    for state, original in zip(states[:count], expected[:count], strict=True):
        torch.testing.assert_close(state, original, atol=1e-4, rtol=1e-4)


@pytest.mark.oldest
@pytest.mark.parametrize(  # every pair of them once
    "case, use_cache, given_positions",
    [("single", True, True), ("single", False, False), ("batch_leftpad", True, False), ("batch_leftpad", False, True)],
)
def test_greedy_continuations_equal_the_original(model, recorded, case, use_cache, given_positions):
    inputs = named(f"gen.{case}.", recorded[0])
    expected = inputs.pop("output_ids")
    if not given_positions:
        inputs.pop("position_ids", None)
    actual = model.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=None, use_cache=use_cache)
    assert torch.equal(actual, expected)


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rotary_tables_equal_the_original(goldens, version, dtype):
    path = goldens / "rope" / {"glm4": "glm4_dim64_ratio1"}.get(version, f"{version}_dim64")
    expected = load_file(f"{path}.safetensors")[f"cache.{dtype}"]  # [positions, 32, cos and sin]
    positions = torch.tensor(json.loads(path.with_suffix(".json").read_text())["rows(positions)"])[None]
    rotary = ChatGLMRotaryEmbedding(
        tiny_config(kv_channels=128, generation={"v2": "chatglm2", "v3": "chatglm3", "glm4": "glm4"}[version])
    )
    cosines, sines = rotary(torch.zeros(1, dtype=getattr(torch, dtype)), positions)  # [1, positions, 64]
    assert torch.equal(torch.stack((cosines[0, :, :32], sines[0, :, :32]), dim=-1), expected)


def test_norm_applies_the_weight_in_float32():
    torch.manual_seed(0)
    norm = ChatGLMRMSNorm(64, eps=1e-5).half()
    norm.weight.data.normal_()
    states = torch.randn(8, 64).half()
    exact = copy.deepcopy(norm).double()(states.double())
    assert torch.equal(norm(states), exact.float().half())


# --- a transformers model


@pytest.mark.oldest
def test_cached_steps_equal_one_pass(model, recorded):
    ids = recorded[0]["plain_single.input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :3], use_cache=True)
        rest = model(ids[:, 3:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat((first.logits, rest), dim=1), whole, atol=1e-5, rtol=1e-5)


def test_left_padding_does_not_change_a_continuation(sdpa, recorded):
    ids = recorded[0]["plain_single.input_ids"][:1]
    padded = torch.nn.functional.pad(ids, (5, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (5, 0))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    alone = sdpa.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(sdpa.generate(padded, attention_mask=mask, **options)[:, 5:], alone)


@pytest.mark.oldest
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_keeps_loss_and_gradients(fresh, batch, use_reentrant):
    def loss_and_gradients():
        fresh.zero_grad()
        loss = fresh.train()(**batch, use_cache=False).loss
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in fresh.parameters()]

    expected_loss, expected = loss_and_gradients()
    fresh.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    fresh.enable_input_require_grads()
    loss, gradients = loss_and_gradients()
    assert loss == expected_loss
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))


def test_logits_to_keep(sdpa, recorded):
    ids = recorded[0]["plain_single.input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(sdpa(ids, logits_to_keep=1).logits, sdpa(ids).logits[:, -1:])


def test_compiled_forward_equals_eager_one(fresh, recorded):
    ids = recorded[0]["plain_single.input_ids"]
    compiled = torch.compile(fresh, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, fresh(ids).logits)


@pytest.mark.oldest
def test_saved_files_carry_the_published_names_and_values(sdpa, folder, tmp_path):
    sdpa.save_pretrained(tmp_path)
    published, saved = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(published) - set(saved) == {"transformer.rotary_pos_emb.inv_freq"}  # computed, never read
    assert all(torch.equal(saved[name], published[name]) for name in saved)
    written, original = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    changed = {"torch_dtype", "transformers_version", "architectures", "attn_implementation"}
    assert {name: written[name] for name in set(original) - changed} == {
        name: original[name] for name in set(original) - changed
    }
    again, report = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert again.config.generation == sdpa.config.generation


def test_loading_published_weights_reports_nothing(folder):
    _, report = ChatGLMForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())


def test_bin_weights_load(sdpa, folder, tmp_path):
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, sdpa.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_half_precision_forward_and_backward(folder, batch):
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert model.transformer.output_layer.weight.grad.dtype == torch.bfloat16


def test_resizing_changes_embedding_and_output_layer(fresh, batch):
    size = fresh.config.vocab_size + 16
    fresh.resize_token_embeddings(size)
    assert fresh.config.padded_vocab_size == size
    assert fresh.transformer.embedding.word_embeddings.weight.shape[0] == size
    assert fresh.transformer.output_layer.weight.shape[0] == size
    assert fresh(**batch).logits.shape[-1] == size


@pytest.mark.oldest
def test_lora_on_the_default_target_trains_and_reloads(fresh, batch, sdpa, tmp_path):
    adapted = get_peft_model(fresh, LoraConfig(task_type="CAUSAL_LM", r=4))
    targets = {name.split(".lora_")[0].split(".")[-1] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert targets == {"query_key_value"}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        first = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.lora_A.weight"
        assert first in file.keys()  # noqa: SIM118
    adapted.eval()
    reloaded = PeftModel.from_pretrained(copy.deepcopy(sdpa), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, adapted(**batch).logits)


# --- configuration


def test_generation_is_told_from_the_data():
    assert ChatGLMConfig().generation == "chatglm3"
    assert ChatGLMConfig(transformers_version="4.27.1").generation == "chatglm2"
    assert ChatGLMConfig(transformers_version="4.27.1", interleaved_qkv=False).generation == "codegeex2"
    assert ChatGLMConfig(transformers_version="4.27.1", _name_or_path="THUDM/chatglm3-6b").generation == "chatglm3"
    assert ChatGLMConfig(_name_or_path="THUDM/chatglm3-6b", generation="chatglm2").generation == "chatglm2"


def test_generation_is_told_from_the_folder_and_survives_saving(tmp_path):
    ChatGLMConfig().save_pretrained(tmp_path / "ChatGLM2-6B-copy")
    path = tmp_path / "ChatGLM2-6B-copy" / "config.json"
    content = json.loads(path.read_text())
    del content["generation"]
    path.write_text(json.dumps(content))
    config = ChatGLMConfig.from_pretrained(path.parent)
    assert config.generation == "chatglm2"
    config.save_pretrained(tmp_path / "plain")
    assert ChatGLMConfig.from_pretrained(tmp_path / "plain").generation == "chatglm2"


def test_rope_ratio_divides_positions_or_multiplies_the_base():
    second = ChatGLMConfig(generation="chatglm2", rope_ratio=8).rope_parameters
    third = ChatGLMConfig(generation="chatglm3", rope_ratio=8).rope_parameters
    assert (second["rope_type"], second["factor"], second["rope_theta"]) == ("linear", 8.0, 10000.0)
    assert (third["rope_type"], third["rope_theta"]) == ("default", 80000.0)


def test_library_names_read_and_write_the_published_ones():
    config = tiny_config()
    assert (config.num_hidden_layers, config.head_dim, config.num_key_value_heads) == (2, 8, 2)
    config.vocab_size = 100
    assert json.loads(config.to_json_string())["padded_vocab_size"] == 100


@pytest.mark.parametrize(
    "key, value",
    [
        ("inner_hidden_size", 16384),
        ("position_encoding_2d", True),
        ("fp32_residual_connection", True),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key):
        ChatGLMConfig(**{key: value})


@pytest.mark.parametrize(
    "change",
    [
        {"multi_query_attention": False},
        {"rmsnorm": False},
        {"post_layer_norm": False},
        {"add_bias_linear": True},
        {"apply_residual_connection_post_layernorm": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_unreleased_variants_train_and_generate(change):
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(tiny_config(**change))
    ids = torch.randint(3, 64, (2, 9))
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    model.eval()
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))


def test_heads_without_multi_query_are_packed_side_by_side():
    model = ChatGLMForConditionalGeneration(tiny_config(multi_query_attention=False))
    fused = torch.arange(96.0)[None, None]  # 4 heads of query, key, value with 8 channels each
    query, key, value = model.transformer.layers[0].self_attention.split_heads(fused)
    assert query[0, 1, 0].tolist() == list(range(24, 32))
    assert key[0, 1, 0].tolist() == list(range(32, 40))
    assert value[0, 3, 0].tolist() == list(range(88, 96))


def test_released_chatglm3_stops_at_the_next_role_without_generation_config(tmp_path):
    model = ChatGLMForConditionalGeneration(tiny_config(padded_vocab_size=65024, hidden_size=8, kv_channels=4))
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == [2, 64795, 64797]


def test_sequence_classification_reads_the_last_real_token():
    torch.manual_seed(0)
    model = ChatGLMForSequenceClassification(tiny_config(num_labels=3)).eval()
    ids = torch.randint(3, 64, (2, 9))
    left, right = torch.nn.functional.pad(ids, (4, 0)), torch.nn.functional.pad(ids, (0, 4))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = model(ids, labels=torch.tensor([0, 2]))
        padded = [model(padded, attention_mask=padded.ne(0).long()).logits for padded in (left, right)]
    assert torch.isfinite(alone.loss)
    for logits in padded:
        torch.testing.assert_close(logits, alone.logits, atol=1e-5, rtol=1e-5)
    assert model.state_dict()["classifier_head.weight"].shape == (3, 32)


def test_sequence_classification_trains_all_but_the_output_layer(tmp_path):
    model = ChatGLMForSequenceClassification(tiny_config(num_labels=3))
    model.save_pretrained(tmp_path)
    for each in (model, ChatGLMForSequenceClassification.from_pretrained(tmp_path)):
        each(torch.randint(3, 64, (1, 9)), labels=torch.tensor([1])).loss.backward()
        trained = {name for name, parameter in each.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, parameter in each.named_parameters() if parameter.grad is not None}
        assert set(each.state_dict()) - trained == {"transformer.output_layer.weight"}
