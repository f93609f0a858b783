"""What the library expects of its own models."""

import copy

import pytest
import torch
from goldens_io import recorded_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, StaticCache

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration


OPTIONS = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def recorded(version):
    return recorded_run(version)


@pytest.fixture(scope="module")
def model(folder):
    return ChatGLMForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture
def ids(recorded):
    return recorded[0]["plain_single.input_ids"]


def test_flex_attention_gives_the_original_logits(glm4_folder, goldens):
    model = ChatGLMForConditionalGeneration.from_pretrained(glm4_folder, attn_implementation="flex_attention").eval()
    tensors = load_file(goldens / "model" / "glm4_s0" / "goldens.safetensors")
    inputs = {name: tensors[f"train_leftpad.{name}"] for name in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # g++ would take a minute
        logits = model(**inputs).logits
    assert (logits - tensors["train_leftpad.logits"])[inputs["attention_mask"].bool()].abs().max() < 1e-4


@pytest.mark.oldest
@pytest.mark.parametrize("case", ["single", "batch_leftpad"])
def test_static_cache_gives_the_original_continuation(model, recorded, case):
    start = f"gen.{case}."
    inputs = {name.removeprefix(start): tensor for name, tensor in recorded[0].items() if name.startswith(start)}
    expected = inputs.pop("output_ids")
    assert torch.equal(model.generate(**inputs, **OPTIONS, cache_implementation="static"), expected)


def test_static_cache_in_forward(model, ids):
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 4)
    with torch.no_grad():
        first = model(ids[:, :3], past_key_values=cache).logits
        rest = model(ids[:, 3:], past_key_values=cache).logits
        torch.testing.assert_close(torch.cat((first, rest), dim=1), model(ids).logits, atol=1e-5, rtol=1e-5)


def test_beams_do_not_depend_on_the_cache(model, ids):
    beams = model.generate(ids, **OPTIONS, num_beams=3)
    assert torch.equal(beams, model.generate(ids, **OPTIONS, num_beams=3, use_cache=False))


@pytest.mark.oldest
def test_inputs_embeds_replace_ids(model, ids):
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    assert torch.equal(
        model.generate(inputs_embeds=embeds, **OPTIONS), model.generate(ids, **OPTIONS)[:, ids.shape[1] :]
    )
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=ids, inputs_embeds=embeds)


@pytest.mark.oldest
def test_attentions_are_given_by_eager_attention(folder, ids):
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    assert len(attentions) == model.config.num_layers
    for weights in attentions:
        assert weights.shape == (len(ids), model.config.num_attention_heads, ids.shape[1], ids.shape[1])
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("change", [-16, 16])
def test_resizing_keeps_the_rows_that_stay(model, ids, change, tmp_path):
    resized = copy.deepcopy(model)
    size = model.config.vocab_size + change
    resized.resize_token_embeddings(size)
    kept = min(size, model.config.vocab_size)
    low = ids.clamp(max=kept - 1)
    with torch.no_grad():
        torch.testing.assert_close(resized(low).logits[..., :kept], model(low).logits[..., :kept])
    resized.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert again.config.padded_vocab_size == size


def test_shards_are_written_and_read(model, ids, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_gradient_checkpointing_in_training_without_use_cache_given(model, ids):
    trained = copy.deepcopy(model).train()
    expected = trained(ids, labels=ids).loss
    trained.gradient_checkpointing_enable()
    assert torch.equal(trained(ids, labels=ids).loss, expected)


def test_classifier_trains_and_reloads(folder, ids, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.config.pad_token_id = 0
    loss = model(ids, labels=torch.arange(len(ids)) % 3).loss
    loss.backward()
    assert model.classifier_head.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_codegeex2_rounds_its_whole_norm_in_bfloat16():
    sizes = {"padded_vocab_size": 64, "num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 48, "kv_channels": 8}
    states = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    norms = {}
    for generation in ("chatglm2", "codegeex2"):
        config = ChatGLMConfig(**sizes, num_attention_heads=4, generation=generation)
        norms[generation] = ChatGLMForConditionalGeneration(config).transformer.norm
        norms[generation].weight.data.normal_(generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.float16):
        one, other = (norm.to(dtype)(states.to(dtype)) for norm in norms.values())
        assert torch.equal(one, other)
    norm, rounded = norms["codegeex2"].to(torch.bfloat16), states.bfloat16()
    scale = torch.rsqrt(rounded.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(rounded), norm.weight * (rounded * scale))
    assert not torch.equal(norm(rounded), norms["chatglm2"].to(torch.bfloat16)(rounded))


@pytest.mark.parametrize(
    "keys, generation",
    [
        ({"padded_vocab_size": 151552}, "glm4"),
        ({"layernorm_epsilon": 1.5625e-07}, "glm4"),
        ({"eos_token_id": [151329, 151336, 151338]}, "glm4"),
        ({"_name_or_path": "THUDM/glm-4-9b-chat-1m"}, "glm4"),
        ({"_name_or_path": "THUDM/chatglm3-6b", "eos_token_id": [2, 64795]}, "chatglm3"),
        ({"transformers_version": "4.30.2", "eos_token_id": [2, 64795]}, "chatglm3"),
    ],
)
def test_glm4_is_told_from_the_data(keys, generation):
    assert ChatGLMConfig(**keys).generation == generation


def test_rope_ratio_of_glm4_multiplies_the_base():
    config = ChatGLMConfig(padded_vocab_size=151552, rope_ratio=500)
    assert (config.rope_parameters["rope_type"], config.rope_parameters["rope_theta"]) == ("default", 5e6)


def test_released_glm4_stops_at_the_next_role():
    sizes = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "kv_channels": 4, "num_attention_heads": 2}
    released = ChatGLMConfig(padded_vocab_size=151552, eos_token_id=[151329, 151336, 151338], **sizes)
    assert ChatGLMForConditionalGeneration(released).generation_config.eos_token_id == [151329, 151336, 151338]


def test_attention_dropout_acts_in_training_only(folder, ids):
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, attention_dropout=0.5)
    with torch.no_grad():
        assert not torch.equal(model.train()(ids).logits, model(ids).logits)
        assert torch.equal(model.eval()(ids).logits, model(ids).logits)
