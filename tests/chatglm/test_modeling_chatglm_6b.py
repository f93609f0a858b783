import copy
import json
import math

import pytest
import torch
from goldens_io import named, recorded_run, recorded_texts
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from processes import forked_program
from safetensors.torch import load_file, save_file
from tiny import ROOT
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    TextIteratorStreamer,
)

from chatglm import ChatGLM6BConfig, ChatGLM6BForConditionalGeneration, ChatGLM6BModel, ChatGLMConfig
from chatglm.modeling_chatglm_6b import rotary_tables
from chatglm.quantization import QuantizedLinear, packed_weight, unpacked_weight


CASES = [
    "auto_gmask_single",
    "auto_train_rightpad",
    "tok_leftpad_prompts",
    "tok_leftpad_train",
    "auto_mask_single",
    "auto_mask_and_gmask",
    "tok_mask_and_gmask",
    "auto_leftpad",
]
GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
BOS, EOS, MASK, GMASK, PAD = 172, 173, 168, 169, 3  # of the goldens


@pytest.fixture(scope="module")
def recorded():
    """Masks as bool, True = hidden."""
    tensors, notes = recorded_run("v1")
    tensors = {name: tensor.bool() if name.endswith("attention_mask") else tensor for name, tensor in tensors.items()}
    return tensors, notes


@pytest.fixture(scope="module")
def eager(v1_folder):
    return AutoModelForCausalLM.from_pretrained(v1_folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def sdpa(v1_folder):
    return AutoModelForCausalLM.from_pretrained(v1_folder, attn_implementation="sdpa").eval()


@pytest.fixture(params=["eager", "sdpa"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def batch(recorded):
    tensors, _ = recorded
    ids = tensors["tok_leftpad_train.input_ids"]
    return {"input_ids": ids, "attention_mask": ids.ne(PAD).long(), "labels": tensors["tok_leftpad_train.labels"]}


def tiny_config(**changes) -> ChatGLM6BConfig:
    sizes = {"vocab_size": 64, "num_layers": 2, "hidden_size": 48, "num_attention_heads": 3, "inner_hidden_size": 40}
    ids = {"bos_token_id": 60, "eos_token_id": 61, "mask_token_id": 62, "gmask_token_id": 63, "pad_token_id": 3}
    return ChatGLM6BConfig(**{**sizes, **ids, **changes})


def tiny_model(**changes) -> ChatGLM6BForConditionalGeneration:
    torch.manual_seed(0)
    model = ChatGLM6BForConditionalGeneration(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def tiny_ids(filled: int = 63) -> torch.Tensor:
    torch.manual_seed(1)
    ids = torch.randint(4, 60, (2, 12))
    ids[:, 5], ids[:, 6] = filled, 60
    return ids


def given(recorded, case: str) -> dict[str, torch.Tensor]:
    return {name: recorded[0][f"{case}.{name}"] for name in recorded[1]["cases"][case]["inputs_given"]}


def real_positions(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = inputs.get("attention_mask")
    return ~mask[:, 0].all(-2) if mask is not None else torch.ones_like(inputs["input_ids"]).bool()


# --- the original's numbers


@pytest.mark.oldest
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_the_original(model, recorded, case):
    inputs, note = given(recorded, case), recorded[1]["cases"][case]
    model.zero_grad()
    outputs = model(**inputs)
    assert (outputs.logits - recorded[0][f"{case}.logits"])[real_positions(inputs)].abs().max() < 1e-4
    if "loss" in note:
        assert outputs.loss.item() == pytest.approx(note["loss"], rel=1e-5)
        outputs.loss.backward()
        parameters = dict(model.named_parameters())
        norms = {name: parameters[name].grad.norm().item() for name in note["grad_norms"]}
        assert norms == pytest.approx(note["grad_norms"], rel=1e-3)


def test_flex_attention_equals_the_original(v1_folder, recorded):
    model = AutoModelForCausalLM.from_pretrained(v1_folder, attn_implementation="flex_attention").eval()
    inputs = given(recorded, "tok_leftpad_prompts")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # no backward pass on CPU, and 10 s to compile
        logits = model(**inputs).logits
    difference = (logits - recorded[0]["tok_leftpad_prompts.logits"])[real_positions(inputs)]
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("case", ["tok_leftpad_prompts", "tok_leftpad_train"])
def test_ordinary_mask_gives_what_the_published_mask_and_positions_give(model, recorded, case):
    inputs = given(recorded, case)
    real = real_positions(inputs)
    with torch.no_grad():
        logits = model(inputs["input_ids"], attention_mask=real.long()).logits
    assert (logits - recorded[0][f"{case}.logits"])[real].abs().max() < 1e-4


def flat(rows) -> dict:
    """The library's batch of rows end to end, with their bounds."""
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rows_end_to_end_give_the_padded_loss_and_gradients(attention):
    """One with [gMASK] and one with [MASK], whose next neighbour's [gMASK] is none of its own."""
    model = tiny_model()
    model.set_attn_implementation(attention)
    masked, plain = tiny_ids(filled=62)[0, :9], tiny_ids()[1]
    ids, real = torch.full((2, 12), 3), torch.ones(2, 12).long()
    ids[0, :9], ids[1], real[0, 9:] = masked, plain, 0
    labels = ids.masked_fill(real == 0, -100).masked_fill(torch.arange(12) < 7, -100)
    model(ids, attention_mask=real, labels=labels).loss.backward()
    expected = model(ids, attention_mask=real, labels=labels).loss
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    rows = [
        {"input_ids": row[:n].tolist(), "labels": label[:n].tolist()}
        for row, label, n in zip(ids, labels, (9, 12), strict=True)
    ]
    loss = model(**flat(rows)).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_rows_end_to_end_each_need_their_own_special_tokens():
    rows = [{"input_ids": row} for row in tiny_ids().tolist()]
    with pytest.raises(ValueError, match="has no <sop>"):
        tiny_model()(**flat([rows[0], {"input_ids": rows[1]["input_ids"][:6]}, rows[1]]))
    with pytest.raises(ValueError, match="With pre_seq_len, rows cannot be flattened"):
        tiny_model(pre_seq_len=2)(**flat(rows))


def test_derived_positions_equal_the_original(sdpa, recorded):
    for name, expected in recorded[0].items():
        if name.endswith(".derived_position_ids"):
            ids = recorded[0][name.replace("derived_position_ids", "input_ids")]
            assert torch.equal(sdpa.transformer.derived_position_ids(ids), expected)


@pytest.mark.oldest
def test_hidden_states_equal_the_original(model, recorded):
    expected = recorded[0]["auto_gmask_single.hidden_states"]  # the last one after the final norm
    with torch.no_grad():
        states = model(recorded[0]["auto_gmask_single.input_ids"], output_hidden_states=True).hidden_states
    for state, original in zip(states, expected, strict=True):
        torch.testing.assert_close(state, original, atol=1e-4, rtol=1e-4)


@pytest.mark.oldest
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=["cache", "no_cache", "static"]
)
@pytest.mark.parametrize("case", ["single_gmask", "single_mask", "batch_leftpad", "continued"])
def test_greedy_continuations_equal_the_original(model, recorded, case, options):
    inputs = named(f"gen.{case}.", recorded[0])
    expected, ids = inputs.pop("output_ids"), inputs["input_ids"]
    ways = [inputs, {"input_ids": ids, "attention_mask": ids.ne(PAD).long()}]
    if not options:
        ways += [{"input_ids": ids}, {name: tensor for name, tensor in inputs.items() if name != "position_ids"}]
    for way in ways:
        assert torch.equal(model.generate(**way, **GREEDY, **options), expected)


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rotary_tables_equal_the_original(goldens, dtype):
    path = goldens / "rope" / "v1_dim64"
    expected = load_file(f"{path}.safetensors")
    positions = torch.tensor(json.loads(path.with_suffix(".json").read_text())["rows(positions)"])[None]
    config = tiny_config(num_attention_heads=1, hidden_size=64, position_encoding_2d=False)
    cosines, sines = rotary_tables(positions, config, getattr(torch, dtype))  # [1, positions, 1, 64]
    assert torch.equal(cosines[0, :, 0], expected[f"cos.{dtype}"])
    assert torch.equal(sines[0, :, 0], expected[f"sin.{dtype}"])


# --- what the goldens leave out, against the published formulas written down plainly


def rotated(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Pairs (j, j + r/2) of [S, n, r] turned by their position [S]."""
    half = states.shape[-1] // 2
    frequencies = (10000.0 ** (-torch.arange(half) / half)).half().float()
    angles = (positions[:, None] * frequencies)[:, None]
    one, other = states[..., :half], states[..., half:]
    return torch.cat((one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()), dim=-1)


def plain_logits(model: ChatGLM6BForConditionalGeneration, ids: list[int]) -> torch.Tensor:
    """[S, V] for one row, position by position as section by section of the published description."""
    config, body, length = model.config, model.transformer, len(ids)
    context = ids.index(config.bos_token_id)
    filled = ids.index(config.gmask_token_id if config.gmask_token_id in ids else config.mask_token_id)
    place = torch.tensor([index if index < context else filled for index in range(length)])
    block = torch.tensor([max(0, index - context + 1) for index in range(length)])
    if not config.position_encoding_2d and config.gmask_token_id in ids:
        place = torch.arange(length)
    hidden = torch.tensor([[key > query and key >= context for key in range(length)] for query in range(length)])
    prefixes = [None] * config.num_layers
    if config.pre_seq_len:
        rows = body.prefix_encoder.embedding.weight
        if config.prefix_projection:
            rows = body.prefix_encoder.trans(rows)
        slots = rows.view(config.pre_seq_len, 2 * config.num_layers, config.num_attention_heads, -1)
        prefixes = [(slots[:, 2 * index], slots[:, 2 * index + 1]) for index in range(config.num_layers)]
        hidden = torch.cat((torch.zeros(length, config.pre_seq_len).bool(), hidden), dim=1)

    states = body.word_embeddings(torch.tensor(ids))
    for layer, prefix in zip(body.layers, prefixes, strict=True):
        normed = layer.input_layernorm(states)
        heads = layer.attention.query_key_value(normed).view(length, config.num_attention_heads, -1)
        query, key, value = heads.chunk(3, dim=-1)
        size = query.shape[-1]
        if config.position_encoding_2d:
            query, key = (
                torch.cat((rotated(part[..., : size // 2], place), rotated(part[..., size // 2 :], block)), dim=-1)
                for part in (query, key)
            )
        else:
            query, key = rotated(query, place), rotated(key, place)
        if prefix is not None:
            key, value = torch.cat((prefix[0], key)), torch.cat((prefix[1], value))
        scores = torch.einsum("qnd,knd->nqk", query, key) / math.sqrt(size)
        weights = scores.masked_fill(hidden, -10000.0).softmax(-1)
        attended = torch.einsum("nqk,knd->qnd", weights, value).reshape(length, -1)
        normed = layer.post_attention_layernorm(math.sqrt(56) * normed + layer.attention.dense(attended))
        inner = layer.mlp.dense_h_to_4h(normed)
        inner = 0.5 * inner * (1 + torch.tanh(0.7978845608028654 * inner * (1 + 0.044715 * inner * inner)))
        states = math.sqrt(56) * normed + layer.mlp.dense_4h_to_h(inner)
    return model.lm_head(body.final_layernorm(states))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position_encoding_2d": False},
        {"num_layers": 3, "num_attention_heads": 6},
        {"pre_seq_len": 4},
        {"pre_seq_len": 4, "prefix_projection": True, "position_encoding_2d": False},
        {"quantization_bit": 4},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
@pytest.mark.parametrize("filled", [62, 63], ids=["MASK", "gMASK"])
def test_variants_follow_the_published_formulas(changes, filled):
    model, ids = tiny_model(**changes), tiny_ids(filled)
    with torch.no_grad():
        expected = torch.stack([plain_logits(model, row.tolist()) for row in ids])
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        left = torch.nn.functional.pad(ids, (3, 0), value=3)
        logits = model(left, attention_mask=left.ne(3).long()).logits[:, 3:]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    row = ids[:1]
    with torch.no_grad():
        for _ in range(6):  # greedy, without anything that the library does for it
            row = torch.cat((row, plain_logits(model, row[0].tolist())[-1:].argmax(-1, keepdim=True)), dim=1)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids[:1], **{**GREEDY, "max_new_tokens": 6}, **options), row)


# --- loading and saving


@pytest.mark.oldest
@pytest.mark.parametrize("trust_remote_code", [None, True])
@pytest.mark.parametrize("auto_map", [True, False])
def test_published_folder_loads_through_the_auto_classes(v1_folder, tmp_path, auto_map, trust_remote_code):
    for path in v1_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if not auto_map:
        config = json.loads((tmp_path / "config.json").read_text())
        del config["auto_map"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"trust_remote_code": trust_remote_code}
    assert type(AutoConfig.from_pretrained(tmp_path, **options)) is ChatGLM6BConfig
    for auto_class in (AutoModel, AutoModelForCausalLM):
        model, report = auto_class.from_pretrained(tmp_path, output_loading_info=True, **options)
        assert type(model) is ChatGLM6BForConditionalGeneration
        assert not any(report.values())
        assert model.lm_head.weight is model.transformer.word_embeddings.weight


def test_every_way_to_the_configuration_tells_the_architectures_apart(v1_folder, v3_folder):
    assert type(ChatGLMConfig.from_pretrained(v1_folder)) is ChatGLM6BConfig
    assert type(ChatGLM6BConfig.from_pretrained(v1_folder)) is ChatGLM6BConfig
    assert type(AutoConfig.from_pretrained(v3_folder)) is ChatGLMConfig
    config = AutoConfig.from_pretrained(v1_folder, pre_seq_len=8)
    assert (config.pre_seq_len, config.num_hidden_layers, config.head_dim) == (8, 2, 16)


@pytest.mark.oldest
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_saved_and_reloaded_weights_keep_names_and_values(sdpa, v1_folder, tmp_path, kind):
    published = load_file(v1_folder / "model.safetensors")
    if kind == "bin":
        (tmp_path / "config.json").write_bytes((v1_folder / "config.json").read_bytes())
        torch.save(published, tmp_path / "pytorch_model.bin")
    else:
        sdpa.save_pretrained(tmp_path)
        names = set(load_file(tmp_path / "model.safetensors"))
        assert {name for name in published if "inv_freq" not in name} - names == {"lm_head.weight"}
        assert names <= set(published)
    model, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in published.items() if "inv_freq" not in name)


def test_bare_model_loads_the_same_weights(sdpa, v1_folder, recorded):
    bare = ChatGLM6BModel.from_pretrained(v1_folder).eval()
    ids = recorded[0]["auto_gmask_single.input_ids"]
    with torch.no_grad():
        states = bare(ids).last_hidden_state
        torch.testing.assert_close(sdpa.lm_head(states), sdpa(ids).logits)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of 4 x num_attention_heads"):
        tiny_config(hidden_size=50)
    with pytest.raises(ValueError, match="quantization_bit"):
        ChatGLM6BForConditionalGeneration(tiny_config(quantization_bit=3))


def test_tiny_checkpoint_loads_and_talks(tmp_path):
    options = ["--generation", "chatglm", "--hidden_size", 32, "--vocab_size", 400]
    for name in ("one", "two"):
        result = forked_program(ROOT / "scripts/tiny_chatglm.py", name, *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {"ice_text.model", "model.safetensors", "config.json", "tokenizer_config.json"} <= set(files)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(report.values())
    assert len(tokenizer) <= model.config.vocab_size
    response, history = model.chat(tokenizer, "你好", do_sample=False, max_length=20)
    assert history == [("你好", response)]


# --- a transformers model


def test_rows_without_the_tokens_that_divide_them_are_refused(sdpa):
    with pytest.raises(ValueError, match="no <sop>"):
        sdpa(torch.tensor([[9, 10, GMASK]]))
    with pytest.raises(ValueError, match="neither"):
        sdpa(torch.tensor([[9, 10, BOS]]))


@pytest.mark.parametrize("name", ["single_gmask", "batch_leftpad"])
def test_embeddings_give_what_their_ids_give(sdpa, recorded, name):
    ids = recorded[0][f"gen.{name}.input_ids"]
    mask = ids.ne(PAD).long()
    embeddings = sdpa.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        torch.testing.assert_close(sdpa(inputs_embeds=embeddings, attention_mask=mask).logits, sdpa(ids, mask).logits)
    new = sdpa.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY)
    assert torch.equal(new, recorded[0][f"gen.{name}.output_ids"][:, ids.shape[1] :])


@pytest.mark.oldest
def test_cached_steps_with_positions_equal_one_pass(model, recorded):
    ids = recorded[0]["auto_mask_single.input_ids"]
    positions = model.transformer.derived_position_ids(ids)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :12], use_cache=True)
        rest = model(ids[:, 12:], past_key_values=first.past_key_values, position_ids=positions[..., 12:]).logits
        with pytest.raises(ValueError, match="position_ids"):
            model(ids[:, 12:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, rest), dim=1), whole, atol=1e-4, rtol=1e-4)


def test_positions_of_one_stream_are_derived_anew(sdpa, recorded):
    ids = recorded[0]["auto_gmask_single.input_ids"]
    with torch.no_grad():
        plain = sdpa(ids, position_ids=torch.arange(ids.shape[1])[None]).logits
        assert torch.equal(plain, sdpa(ids).logits)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_agree_with_and_without_cache(sdpa, recorded, options):
    inputs = named("gen.batch_leftpad.", recorded[0])
    del inputs["output_ids"]
    expected = sdpa.generate(**inputs, **GREEDY, **options, use_cache=False)
    assert torch.equal(sdpa.generate(**inputs, **GREEDY, **options), expected)
    ids = inputs["input_ids"]
    assert torch.equal(sdpa.generate(ids, attention_mask=ids.ne(PAD).long(), **GREEDY, **options), expected)


def test_positions_given_once_serve_every_row(sdpa, recorded):
    ids = recorded[0]["auto_gmask_single.input_ids"][:1].repeat(2, 1)
    positions = sdpa.transformer.derived_position_ids(ids, None, None)[:1]  # [1, 2, S]
    expected = sdpa.generate(ids, **GREEDY)
    assert torch.equal(sdpa.generate(ids, position_ids=positions, **GREEDY), expected)


def test_generation_stops_at_the_end_token(fresh, recorded):
    assert fresh.generation_config.eos_token_id == EOS
    ids, expected = (recorded[0][f"gen.single_gmask.{name}"] for name in ("input_ids", "output_ids"))
    fresh.generation_config.eos_token_id = int(expected[0, -1])
    length = ids.shape[1] + expected[0, ids.shape[1] :].tolist().index(int(expected[0, -1])) + 1
    assert torch.equal(fresh.generate(ids, max_new_tokens=20, do_sample=False), expected[:, :length])


def test_logits_to_keep(sdpa, recorded):
    ids = recorded[0]["auto_gmask_single.input_ids"]
    with torch.no_grad():
        whole = sdpa(ids).logits
        torch.testing.assert_close(sdpa(ids, logits_to_keep=1).logits, whole[:, -1:])
        torch.testing.assert_close(sdpa(ids, logits_to_keep=torch.tensor([2, 5])).logits, whole[:, [2, 5]])


def test_training_computes_logits_of_labelled_positions_only(fresh, batch, recorded):
    expected = recorded[1]["cases"]["tok_leftpad_train"]["loss"]
    fresh.train()
    seen = []
    fresh.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    outputs = fresh(**batch)
    assert outputs.logits is None
    assert seen == [int(batch["labels"][:, 1:].ne(-100).sum())]
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)
    count = torch.tensor(100)
    total = fresh(**batch, num_items_in_batch=count).loss * count
    assert total.item() == pytest.approx(expected * seen[0], rel=1e-5)
    assert fresh(**batch, skip_logits=False).logits.shape == (*batch["input_ids"].shape, 520)
    assert fresh.eval()(**batch).logits is not None


@pytest.mark.oldest
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_ordinary_collator_gives_the_published_loss(sdpa, v1_folder, recorded, padding_side):
    tokenizer = AutoTokenizer.from_pretrained(v1_folder, padding_side=padding_side)
    ids, labels = (recorded[0][f"auto_train_rightpad.{name}"] for name in ("input_ids", "labels"))
    rows = []
    for row, targets in zip(ids, labels, strict=True):
        length = int(row.ne(PAD).sum())
        rows.append(
            {
                "input_ids": row[:length].tolist(),
                "attention_mask": [1] * length,
                "labels": targets[:length].tolist(),
            }
        )
    batch = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)(rows)
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    with torch.no_grad():
        loss = sdpa(**batch).loss.item()
    assert loss == pytest.approx(recorded[1]["cases"]["auto_train_rightpad"]["loss"], rel=1e-5)


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


def test_compiled_forward_equals_eager_one(fresh, recorded):
    inputs = given(recorded, "tok_leftpad_prompts")
    compiled = torch.compile(fresh, backend="eager", fullgraph=True)
    ids = inputs["input_ids"]
    with torch.no_grad():
        for way in (inputs, {"input_ids": ids}, {"input_ids": ids, "attention_mask": ids.ne(PAD).long()}):
            torch.testing.assert_close(compiled(**way, use_cache=False).logits, fresh(**way).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_forward_and_backward(v1_folder, batch, dtype):
    model = AutoModelForCausalLM.from_pretrained(v1_folder, dtype=dtype)
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert model.transformer.word_embeddings.weight.grad.dtype == dtype


def test_resizing_keeps_embedding_and_head_tied(fresh, batch):
    size = fresh.config.vocab_size + 16
    fresh.resize_token_embeddings(size)
    assert fresh.lm_head.weight is fresh.transformer.word_embeddings.weight
    assert fresh(**batch).logits.shape[-1] == fresh.config.vocab_size == size


def test_checkpoint_whose_head_and_embeddings_differ_keeps_both(fresh, batch, tmp_path):
    fresh.config.tie_word_embeddings = False
    fresh.lm_head.weight = torch.nn.Parameter(fresh.lm_head.weight + 0.01)
    fresh.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("tie_word_embeddings")  # as published
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = type(fresh).from_pretrained(tmp_path)
    assert not loaded.config.tie_word_embeddings
    loaded.tie_weights()
    torch.testing.assert_close(loaded(**batch).logits, fresh(**batch).logits, rtol=0, atol=0)


def test_attention_weights_are_prefix_causal(eager, recorded):
    ids = recorded[0]["auto_mask_single.input_ids"]
    with torch.no_grad():
        weights = eager(ids, output_attentions=True).attentions
    assert len(weights) == 2
    hidden = recorded[0]["auto_mask_single.derived_attention_mask"].bool()
    for weight in weights:  # [B, n, S, S]
        assert torch.equal(weight.eq(0).all(1, keepdim=True), hidden)


# --- adapters, prefixes, quantised weights


def trained(model, batch: dict, steps: int = 5) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM", r=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=["lora", "prefix_tuning"],
)
def test_adapters_train_generate_and_reload(fresh, sdpa, batch, tmp_path, config):
    adapted = get_peft_model(fresh, copy.deepcopy(config))
    if config.peft_type == "LORA":
        targets = {name.split(".lora_")[0].split(".")[-1] for name, _ in adapted.named_parameters() if "lora_" in name}
        assert targets == {"query_key_value"}
    losses = trained(adapted, batch)
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(sdpa), tmp_path).eval()
    adapted.eval()
    prompt = batch["input_ids"][:1, 6:13]
    with torch.no_grad():
        logits = adapted(prompt, attention_mask=torch.ones_like(prompt)).logits
        assert torch.equal(reloaded(prompt, attention_mask=torch.ones_like(prompt)).logits, logits)
    new = reloaded.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
    for _ in range(10):  # the same step by step, from the beginning each time
        with torch.no_grad():
            logits = adapted(prompt, attention_mask=torch.ones_like(prompt)).logits
        prompt = torch.cat((prompt, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(new, prompt)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_prefix_encoder_alone_trains_and_is_saved(v1_folder, batch, tmp_path, projection, checkpointing):
    torch.manual_seed(0)
    options = {"pre_seq_len": 4, "prefix_projection": projection}
    config = AutoConfig.from_pretrained(v1_folder, **options)
    model, report = AutoModel.from_pretrained(v1_folder, config=config, output_loading_info=True)
    assert {name.split(".")[1] for name in report["missing_keys"]} == {"prefix_encoder"}
    names = ["embedding.weight"]
    if projection:
        names += ["trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias"]
    learnt = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learnt == {f"transformer.prefix_encoder.{name}" for name in names}
    assert model.transformer.prefix_encoder.embedding.weight.std().item() == pytest.approx(1, abs=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    losses = trained(model, batch, steps=12)
    assert min(losses[-3:]) < losses[0]
    model.eval().save_pretrained(tmp_path)
    again, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)
    state = load_file(tmp_path / "model.safetensors")
    prefix = named("transformer.prefix_encoder.", state)
    again.transformer.prefix_encoder.load_state_dict(prefix)  # as the published recipe does


def quantized_folder(source, folder, bits: int):
    """A checkpoint as published with quantised weights."""
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".attention." in name or ".mlp." in name:
            if name.endswith(".weight"):
                scale = tensor.abs().amax(-1) / (2 ** (bits - 1) - 1)
                tensors[f"{name}_scale"] = scale.half()
                tensor = packed_weight((tensor / scale[:, None]).round().to(torch.int8), bits)
            elif "inv_freq" not in name:
                tensor = tensor.half()
        tensors[name] = tensor if tensor.dtype == torch.int8 else tensor.half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_bit": bits, "torch_dtype": "float16"}))


@pytest.mark.parametrize("bits, tolerance", [(8, 0.15), (4, 3.0)])
def test_quantised_checkpoint_runs_and_trains_an_adapter(sdpa, v1_folder, batch, tmp_path, bits, tolerance):
    quantized_folder(v1_folder, tmp_path, bits)
    model, report = AutoModel.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    layer = model.transformer.layers[0].mlp.dense_h_to_4h
    assert (type(layer), layer.weight.dtype, layer.weight.shape[1]) == (QuantizedLinear, torch.int8, 64 * bits // 8)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        difference = (model(**batch).logits - sdpa(**batch).logits)[real].abs()
    assert 0 < difference.mean() < tolerance
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4))
    losses = trained(adapted, batch)
    assert losses[-1] < losses[0]
    model = AutoModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert again.dtype == torch.float16
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layer_computes_what_its_weights_say(bits):
    torch.manual_seed(0)
    values = torch.randint(-7, 8, (5, 6), dtype=torch.int8)
    assert torch.equal(unpacked_weight(packed_weight(values, bits), bits), values)
    if bits == 4:
        assert packed_weight(torch.tensor([[1, -2]], dtype=torch.int8), 4).tolist() == [[0x1E]]
    linear = torch.nn.Linear(6, 5)
    layer = QuantizedLinear.from_linear(linear, bits)
    assert (layer.dequantized_weight() - linear.weight).abs().max() <= layer.weight_scale.max() / 2 + 1e-6
    plain = torch.nn.Linear(6, 5)
    plain.load_state_dict({"weight": layer.dequantized_weight(), "bias": layer.bias.detach()})
    states = torch.randn(2, 3, 6, requires_grad=True)
    torch.testing.assert_close(layer(states), plain(states))
    gradients = [torch.autograd.grad(module(states).square().sum(), states)[0] for module in (layer, plain)]
    torch.testing.assert_close(*gradients)


# --- chat


@pytest.fixture(scope="module")
def talker(v1_folder, goldens):
    """A model over the whole vocabulary of the token goldens, and that tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(v1_folder)
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "mask_token_id", "gmask_token_id")}
    config = tiny_config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **special)
    return ChatGLM6BForConditionalGeneration(config).eval(), tokenizer


def test_chat_sends_the_published_prompt_and_repairs_the_reply(talker, monkeypatch):
    model, tokenizer = talker
    for golden in recorded_texts("tok_v1")["chat"]:
        history = [tuple(turn) for turn in golden["history"]]
        before = list(history)

        def generate(input_ids, golden=golden, **kwargs):
            assert input_ids.tolist() == golden["input"]["input_ids"]
            assert {name: kwargs[name] for name in golden["gen_kwargs"]} == golden["gen_kwargs"]
            return torch.cat((input_ids, torch.tensor([golden["fake_output_ids"]])), dim=1)

        monkeypatch.setattr(model, "generate", generate)
        response, after = model.chat(tokenizer, golden["query"], history=history)
        assert response == golden["response"]
        assert after == [*before, (golden["query"], golden["response"])]
        assert history == before


def test_stream_chat_yields_the_reply_token_by_token(talker):
    model, tokenizer = talker
    options = {"do_sample": False, "max_length": 24}
    response, history = model.chat(tokenizer, "你好", **options)
    steps = list(model.stream_chat(tokenizer, "你好", **options))
    assert steps[-1] == (response, history)
    assert len(steps) > 1
    prompt = tokenizer("你好", return_tensors="pt")["input_ids"]
    third = int(model.generate(prompt, **options)[0, prompt.shape[1] + 2])
    rows = list(model.stream_generate(prompt, eos_token_id=third, **options))
    assert [row.shape[1] for row in rows][:2] == [prompt.shape[1] + 1, prompt.shape[1] + 2][: len(rows)]
    assert all(third not in row[0, prompt.shape[1] :] for row in rows)
    next(model.stream_chat(tokenizer, "你好", **options))  # a reader may leave early
    with pytest.raises(ValueError, match="no <sop>"):
        next(model.stream_generate(torch.tensor([[5, 6]])))


def test_library_streamers_work(talker):
    model, tokenizer = talker
    prompt = tokenizer("你好", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    ids = model.generate(**prompt, streamer=streamer, **GREEDY)
    assert "".join(streamer) == tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])
