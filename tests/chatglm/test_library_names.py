"""The cache under the names of transformers 5.17 to 5.24, and keywords that no forward knows."""

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache, GenerationConfig

from chatglm import ChatGLMForSequenceClassification
from chatglm.library_names import CACHE, RENAMED


pytestmark = pytest.mark.oldest

LOST = ["past_states", "attn_mask", "positions", "token_type_ids", "head_mask"]


def forwards(model) -> list:
    """Every public forward: the head model's, that of its body, a layer's and an attention's."""
    body = model.transformer
    states, tables = torch.randn(1, 3, model.config.hidden_size), (torch.ones(1, 3, 2), torch.ones(1, 3, 2))
    attention = next(
        part for name, part in body.layers[0].named_children() if "attention" in name and "norm" not in name
    )
    inner = [
        lambda each=each, **rest: each(states, position_embeddings=tables, **rest)
        for each in (body.layers[0], attention)
    ]
    ids = torch.tensor([[5, 9, 7]])
    return [lambda each=each, **rest: each(ids, **rest) for each in (model, body)] + inner


@pytest.mark.parametrize("name", LOST)
def test_no_forward_swallows_a_keyword_that_nobody_reads(model, name):
    for forward in forwards(model):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            forward(**{name: torch.ones(1, 3)})


@pytest.mark.parametrize("name", LOST)
def test_the_classifier_swallows_none_either(glm4_folder, name):
    model = ChatGLMForSequenceClassification.from_pretrained(glm4_folder)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        model(torch.tensor([[5, 9, 7]]), **{name: torch.ones(1, 3)})


@pytest.mark.parametrize("name", ["layer_past", "row_ends", "past_key_value"] + ([] if RENAMED else ["cache"]))
def test_a_cache_under_any_other_name_is_refused(model, name):
    for forward in forwards(model):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            forward(**{name: DynamicCache(config=model.config)})


def test_what_the_library_passes_down_is_taken(model, ids):
    bounds = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 8, "max_length_k": 8, "row_ends": [8]}
    asked = {"output_attentions": False, "output_hidden_states": True, "return_dict": True, "use_cache": False}
    with torch.no_grad():
        expected = model(ids).logits
        outputs = model(ids, labels=ids, num_items_in_batch=3, head_mask=None, **lengths, **asked)
    assert torch.equal(outputs.logits, expected)
    assert len(outputs.hidden_states) == model.config.num_layers + 1


def test_the_cache_is_taken_and_given_under_the_librarys_name(model, ids):
    with torch.no_grad():
        cache = getattr(model(ids, use_cache=True), CACHE)
        positions = {}
        if hasattr(model.config, "position_encoding_2d"):
            positions["position_ids"] = torch.tensor([[[6], [ids.shape[1] - 6]]])
        whole = model(torch.cat((ids, torch.tensor([[9]])), dim=1), use_cache=False).logits[:, -1:]
        rest = model(torch.tensor([[9]]), **{CACHE: cache}, **positions).logits
    torch.testing.assert_close(rest, whole, atol=1e-4, rtol=1e-4)
    for method in (model.forward, model.transformer.forward):
        assert {CACHE, "past_key_values"} <= set(inspect.signature(method).parameters)


@pytest.mark.skipif(not RENAMED, reason="`cache` is another thing before transformers 5.24")
def test_two_caches_are_refused(model, ids):
    caches = {name: DynamicCache(config=model.config) for name in ("cache", "past_key_values")}
    with pytest.raises(TypeError, match="two caches"):
        model(ids, **caches)


def test_evaluation_leaves_the_cache_out_of_the_predictions(model):
    assert model.config.keys_to_ignore_at_inference == [CACHE]
    assert CACHE in model._skip_keys_device_placement


def test_continuous_batching_generates_with_its_paged_cache(glm4_folder):
    """Up to 5.23 that cache has the name `cache`, under which no other comes, and passes through to the attention."""
    model = AutoModelForCausalLM.from_pretrained(glm4_folder, dtype=torch.float32).eval()
    prompts, new = [[5, 9, 7, 11, 6, 8], [4, 3, 12]], {"max_new_tokens": 5, "do_sample": False}
    expected = [model.generate(torch.tensor([ids]), eos_token_id=None, **new)[0, len(ids) :] for ids in prompts]
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)  # else it takes most of the memory
    options = GenerationConfig(eos_token_id=-1, pad_token_id=0, **new)
    results = model.generate_batch(prompts, generation_config=options, continuous_batching_config=small)
    assert sorted(each.generated_tokens for each in results.values()) == sorted(row.tolist() for row in expected)
