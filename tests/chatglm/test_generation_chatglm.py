"""Ways to generate with tiny random models of all generations: each must agree with the plainest one."""

import copy

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import chatglm  # noqa: F401


pytestmark = pytest.mark.oldest

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
SAMPLED = {**GREEDY, "do_sample": True, "top_k": 5}
BEAMS = {**GREEDY, "num_beams": 3}


def padded(ids, model, size=3):
    """The prompt behind padding, and its mask."""
    padding = torch.full((len(ids), size), model.config.pad_token_id or 0)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)], dim=1)
    return torch.cat([padding, ids], dim=1), mask


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, BEAMS], ids=["greedy", "sampled", "beams"])
def test_left_padding_changes_no_continuation(model, ids, options):
    row, mask = padded(ids, model)
    torch.manual_seed(0)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    torch.manual_seed(0)
    actual = model.generate(row, attention_mask=mask, **options)
    assert torch.equal(actual[:, row.shape[1] :], expected[:, ids.shape[1] :])


def test_guessed_tokens_change_no_continuation(model, ids):
    """Assisted decoding and prompt lookup, whose wrong guesses are cropped from the cache."""
    torch.manual_seed(1)
    draft = type(model)(model.config).eval()  # other weights: most guesses are wrong
    draft.generation_config.num_assistant_tokens = 3
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    for guesses in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **guesses, **GREEDY), expected)


@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"use_cache": False}, {"logits_to_keep": 1}], ids=str
)
def test_every_cache_gives_the_greedy_continuation(model, ids, options):
    row, mask = padded(ids, model)
    expected = model.generate(row, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(row, attention_mask=mask, **options, **GREEDY), expected)


@pytest.mark.parametrize(
    "options", [GREEDY, BEAMS, {**GREEDY, "use_cache": False}, {**GREEDY, "cache_implementation": "static"}], ids=str
)
def test_flex_attention_gives_the_same_continuation(model, ids, options):
    """Not compiled: torch 2.13 compiles flex attention for CPUs to a wrong result at some lengths."""
    row, mask = padded(ids, model)
    expected = model.generate(row, attention_mask=mask, **options)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        actual = model.generate(row, attention_mask=mask, **options)
    model.set_attn_implementation("sdpa")
    assert torch.equal(actual, expected)


def test_embeddings_give_what_their_ids_give(model, ids):
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY), expected)


def test_continuation_goes_on_from_its_cache(model, ids):
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    half = {**GREEDY, "max_new_tokens": NEW // 2}
    first = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **half)
    mask = torch.ones_like(first.sequences)
    actual = model.generate(first.sequences, attention_mask=mask, past_key_values=first.past_key_values, **half)
    assert torch.equal(actual, expected)


def test_several_samples_of_one_prompt(model, ids):
    sequences = model.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=3, **SAMPLED)
    assert sequences.shape == (3, ids.shape[1] + NEW)
    beams = model.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=3, **BEAMS)
    assert len({tuple(row) for row in beams.tolist()}) == 3


def test_generate_returns_scores_states_and_attentions(model, ids):
    model.set_attn_implementation("eager")
    wanted = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "output_attentions": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **wanted, **GREEDY)
    model.set_attn_implementation("sdpa")
    size, config = ids.shape[1], model.config
    assert [tuple(scores.shape) for scores in out.scores] == [(1, out.logits[0].shape[-1])] * NEW
    assert torch.equal(torch.stack(out.scores).argmax(-1).T, out.sequences[:, size:])
    for step, (states, weights) in enumerate(zip(out.hidden_states, out.attentions, strict=True)):
        new = size if step == 0 else 1
        assert {tuple(each.shape) for each in states} == {(1, new, config.hidden_size)}
        assert len(states) == config.num_hidden_layers + 1
        assert {tuple(each.shape) for each in weights} == {(1, config.num_attention_heads, new, size + step)}
        assert len(weights) == config.num_hidden_layers


def with_prefix(model, kind: str):
    """The model with a prefix of 4 states that matters, of `pre_seq_len` or of PEFT."""
    torch.manual_seed(0)
    if kind == "peft":
        adapted = get_peft_model(
            copy.deepcopy(model), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        ).eval()
        torch.nn.init.normal_(adapted.prompt_encoder.default.embedding.weight, std=3)
        return adapted
    config = AutoConfig.from_pretrained(model.name_or_path, pre_seq_len=4)
    prefixed = AutoModelForCausalLM.from_pretrained(model.name_or_path, config=config, dtype=torch.float32).eval()
    torch.nn.init.normal_(prefixed.transformer.prefix_encoder.embedding.weight, std=3)
    return prefixed


def without_cache(model, ids, mask):
    """The greedy continuation by one forward over the whole text for each token."""
    for _ in range(NEW):
        inputs = {"input_ids": ids, "attention_mask": mask}
        if not hasattr(model.config, "position_encoding_2d"):  # ChatGLM-6B derives its own
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids


@pytest.mark.parametrize("kind", ["pre_seq_len", "peft"])
def test_cached_generation_with_a_prefix_equals_whole_forwards(model, ids, kind):
    prefixed = with_prefix(model, kind)
    for row, mask in ((ids, torch.ones_like(ids)), padded(ids, model)):
        expected = without_cache(prefixed, row, mask)
        assert not torch.equal(expected, without_cache(model, row, mask))
        assert torch.equal(prefixed.generate(input_ids=row, attention_mask=mask, **GREEDY), expected)
