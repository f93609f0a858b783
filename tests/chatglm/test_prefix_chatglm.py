"""P-Tuning v2 (pre_seq_len) and PEFT's prefix tuning."""

import copy

import pytest
import torch
from peft import PrefixTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification


SIZES = {"padded_vocab_size": 64, "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "kv_channels": 8}
GROUPS = {"num_attention_heads": 4, "multi_query_attention": True, "multi_query_group_num": 2, "seq_length": 128}
P = 5


@pytest.fixture(params=["chatglm2", "chatglm3"])
def config(request) -> ChatGLMConfig:
    return ChatGLMConfig(**SIZES, **GROUPS, add_qkv_bias=True, generation=request.param, pre_seq_len=P)


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return ChatGLMForConditionalGeneration(config).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def reference_attention(layer, normed, prefix_key, prefix_value, cosines, sines):
    """Attention of one layer written out: queries see the whole prefix and, causally, the text."""
    query, key, value = layer.split_heads(layer.query_key_value(normed))

    def rotated(states):  # adjacent pairs of the first half
        first, rest = states[..., :4], states[..., 4:]
        x, y = first[..., ::2], first[..., 1::2]
        turned = torch.stack((x * cosines - y * sines, y * cosines + x * sines), dim=-1).flatten(-2)
        return torch.cat((turned, rest), dim=-1)

    key = torch.cat((prefix_key, rotated(key)), dim=2).repeat_interleave(2, dim=1)
    value = torch.cat((prefix_value, value), dim=2).repeat_interleave(2, dim=1)
    scores = rotated(query) @ key.transpose(2, 3) / 8**0.5
    length = normed.shape[1]
    hidden = torch.ones(length, length).triu(1).bool()
    scores[..., P:] = scores[..., P:].masked_fill(hidden, float("-inf"))
    context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return layer.dense(context)


@pytest.mark.parametrize("projection", [False, True], ids=["embedding", "projection"])
def test_prefix_is_the_unrotated_past_of_every_layer(config, ids, projection):
    torch.manual_seed(0)
    config.prefix_projection = projection
    model = ChatGLMForConditionalGeneration(config).eval()
    encoder = model.transformer.prefix_encoder
    rows = encoder.trans(encoder.embedding.weight)  # [P, 2 L g d], slots key 0, value 0, key 1, value 1
    slots = rows.view(P, 4, 2, 8).permute(1, 2, 0, 3).unsqueeze(1).expand(-1, 2, -1, -1, -1)
    frequencies = 10000.0 ** (-torch.arange(0, 4, 2) / 4)
    angles = torch.arange(9.0)[:, None] * frequencies
    with torch.no_grad():
        states = model.get_input_embeddings()(ids)
        for index, layer in enumerate(model.transformer.layers):
            normed = layer.input_layernorm(states)
            states = states + reference_attention(
                layer.self_attention, normed, slots[2 * index], slots[2 * index + 1], angles.cos(), angles.sin()
            )
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        expected = model.lm_head(model.transformer.norm(states))
        for options in ({}, {"use_cache": False}, {"attention_mask": torch.ones_like(ids)}):
            torch.testing.assert_close(model(ids, **options).logits, expected, atol=1e-5, rtol=1e-5)


def test_published_names_and_shapes(config):
    plain = ChatGLMForConditionalGeneration(config).state_dict()
    assert plain["transformer.prefix_encoder.embedding.weight"].shape == (P, 64)
    config.prefix_projection = True
    names = {name for name in ChatGLMForConditionalGeneration(config).state_dict() if "prefix" in name}
    parts = ["embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias"]
    assert names == {f"transformer.prefix_encoder.{part}" for part in parts}


def test_only_the_prefix_is_trained_and_starts_as_torch_does(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    for each in (model, loaded):
        trained = [name for name, parameter in each.named_parameters() if parameter.requires_grad]
        assert trained == ["transformer.prefix_encoder.embedding.weight"]
        assert each.transformer.prefix_encoder.embedding.weight.std().item() == pytest.approx(1, abs=0.15)
    assert torch.equal(loaded.state_dict()[trained[0]], model.state_dict()[trained[0]])


def test_prefix_checkpoint_goes_on_top_of_a_plain_base(model, config, ids, tmp_path):
    base = copy.deepcopy(config)
    base.pre_seq_len = None
    weights = {name: tensor for name, tensor in model.state_dict().items() if "prefix_encoder" not in name}
    ChatGLMForConditionalGeneration(base).save_pretrained(tmp_path, state_dict=weights)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, config=config).eval()
    prefix = {name: tensor for name, tensor in model.state_dict().items() if "prefix_encoder" in name}
    report = loaded.load_state_dict(prefix, strict=False)
    assert not report.unexpected_keys
    own = {name.removeprefix("transformer.prefix_encoder."): tensor for name, tensor in prefix.items()}
    loaded.transformer.prefix_encoder.load_state_dict(own)  # the official way
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_equals_repeated_forward_and_ignores_padding(model, ids, attention, use_cache):
    model.set_attn_implementation(attention)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "use_cache": use_cache}
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat((expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(ids, **options), expected)
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], expected)
    beams = model.generate(ids, **options, num_beams=2)
    assert beams.shape == expected.shape


def test_prefix_learns_and_gradient_checkpointing_keeps_its_gradients(model, ids):
    encoder = model.transformer.prefix_encoder
    encoder.dropout.p = 0.0
    model.train()
    model(ids, labels=ids).loss.backward()
    expected = encoder.embedding.weight.grad.clone()
    assert expected.norm() > 0
    encoder.embedding.weight.grad = None
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(encoder.embedding.weight.grad, expected)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_static_caches_and_flattened_rows_are_refused(model, ids):
    with pytest.raises(ValueError, match="pre_seq_len"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="flattened"):
        model(ids[:1], position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]))


def test_classifier_head_is_trained_beside_the_prefix(config):
    model = ChatGLMForSequenceClassification(config)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"transformer", "classifier_head"}


def test_half_precision_model_with_float_prefix(model, ids):
    model.half().transformer.prefix_encoder.float()
    model.train()(ids, labels=ids).loss.backward()
    assert model.transformer.prefix_encoder.embedding.weight.grad.dtype == torch.float32


def test_peft_prefix_tuning_trains_generates_and_reloads(folder, ids, tmp_path):
    base = ChatGLMForConditionalGeneration.from_pretrained(folder)
    model = get_peft_model(base, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
    model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    model.eval()
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert output.shape[0] == 2
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].shape[0] == 4


@pytest.mark.parametrize("length", [2, 5, 16])
def test_generation_goes_on_from_a_cache_that_begins_with_the_prefix(config, ids, length):
    torch.manual_seed(0)
    config.pre_seq_len = length
    model = ChatGLMForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.transformer.prefix_encoder.embedding.weight)
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    whole = model.generate(padded, attention_mask=mask, max_new_tokens=8, **options)
    first = model.generate(padded, attention_mask=mask, max_new_tokens=4, **options)
    mask = torch.nn.functional.pad(mask, (0, 4), value=1)
    rest = model.generate(
        first.sequences, attention_mask=mask, max_new_tokens=4, past_key_values=first.past_key_values, **options
    )
    assert torch.equal(rest.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(rest.logits), torch.stack(whole.logits[4:]), atol=1e-5, rtol=0)
