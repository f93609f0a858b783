"""Checkpoints with quantization_bit 4 and 8."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm.quantization import QuantizedLinear


LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@pytest.fixture(scope="module", params=[4, 8])
def bits(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def plain(folder):
    return ChatGLMForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def quantized_folder(folder, bits, tmp_path_factory):
    """The published layout: int8 weight and weight_scale in place of each weight of a layer."""
    path = tmp_path_factory.mktemp("quantized")
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module.rpartition(".")[2] in LAYERS:
            scale = tensor.abs().amax(-1) / (2 ** (bits - 1) - 1)
            values = (tensor / scale[:, None]).round().to(torch.int8)
            weights[f"{module}.weight_scale"] = scale
            tensor = values if bits == 8 else (values[:, ::2] << 4) | (values[:, 1::2] & 15)
        weights[name] = tensor.contiguous()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_bit": bits}))
    return path


@pytest.fixture(scope="module")
def quantized(quantized_folder):
    model, report = ChatGLMForConditionalGeneration.from_pretrained(quantized_folder, output_loading_info=True)
    assert not any(report.values())
    return model.eval()


def test_logits_are_those_of_the_rounded_weights(quantized, plain, bits):
    rounded = copy.deepcopy(plain)
    for name, layer in rounded.named_modules():
        if name.rpartition(".")[2] in LAYERS:
            scale = layer.weight.data.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
            layer.weight.data = (layer.weight.data / scale).round() * scale
    ids = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(quantized(ids).logits, rounded(ids).logits, atol=1e-5, rtol=1e-5)
    assert quantized.generate(ids, max_new_tokens=4, do_sample=False).shape[0] == 2


def test_half_precision_keeps_the_stored_integers(quantized_folder, quantized):
    half = ChatGLMForConditionalGeneration.from_pretrained(quantized_folder, dtype=torch.bfloat16)
    layer, original = (each.transformer.layers[0].mlp.dense_h_to_4h for each in (half, quantized))
    assert torch.equal(layer.weight, original.weight)
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int8, torch.bfloat16)
    ids = torch.arange(3, 12)[None]
    assert torch.isfinite(half(ids, labels=ids).loss)


def test_saving_gives_the_same_files_back(quantized, quantized_folder, tmp_path):
    quantized.save_pretrained(tmp_path)
    written, published = (load_file(path / "model.safetensors") for path in (tmp_path, quantized_folder))
    assert set(published) - set(written) == {"transformer.rotary_pos_emb.inv_freq"}
    assert all(torch.equal(written[name], published[name]) for name in written)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_bit"] == quantized.config.quantization_bit


def test_lora_on_top_trains(quantized):
    model = get_peft_model(copy.deepcopy(quantized), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=[*LAYERS]))
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert isinstance(model.base_model.model.transformer.layers[0].mlp.dense_h_to_4h.base_layer, QuantizedLinear)


def test_gradient_reaches_the_embedding_through_quantised_layers(quantized):
    model = copy.deepcopy(quantized).train()
    model.gradient_checkpointing_enable()
    ids = torch.arange(3, 12)[None]
    model(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_built_from_a_configuration_it_is_quantised():
    sizes = {"padded_vocab_size": 64, "num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 48, "kv_channels": 8}
    config = ChatGLMConfig(**sizes, num_attention_heads=4, multi_query_attention=True, quantization_bit=4)
    model = ChatGLMForConditionalGeneration(config)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 4
    assert not isinstance(model.transformer.output_layer, QuantizedLinear)
    with pytest.raises(ValueError, match="quantization_bit"):
        ChatGLMForConditionalGeneration(ChatGLMConfig(**sizes, quantization_bit=3))
