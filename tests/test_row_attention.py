"""One call a layer for rows end to end on a GPU: which attention is taken, what the kernel is given, and the numbers.

The kernel runs on GPUs only. A stand-in with its signature computes the same by sdpa, row by row; that the real one
is called with what it takes is tried on fake tensors.
"""

import inspect
from itertools import pairwise

import pytest
import torch
from test_batches import ROWS, loss_and_gradient, with_marks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from chatglm import modeling_chatglm_6b
from finetuning import row_attention
from finetuning.batches import FlattenedCollator, PaddedCollator
from finetuning.row_attention import ROWWISE, VARLEN, row_attentions, varlen_takes


ALL = ["chatglm1", "chatglm2", "chatglm3", "glm4_checkpoint", "llama"]
HOPPER, TURING = (9, 0), (7, 5)


def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
           enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    """`varlen_attn` with causal rows or whole ones; it is as strict as flash attention about what it is given."""
    for states in (query, key, value):
        assert states.dim() == 3 and states.stride(-1) == 1 and states.dtype == query.dtype
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q.is_contiguous()
    assert cu_seq_q[0] == 0 and cu_seq_q[-1] == len(query) and cu_seq_q.diff().min() >= 0
    assert type(max_q) is int and cu_seq_q.diff().max() <= max_q and cu_seq_k.diff().max() <= max_k
    assert key.shape[1] == query.shape[1] or enable_gqa
    kernel.calls += 1
    rows = []
    for start, end in pairwise(cu_seq_q.tolist()):
        row = (states[None, start:end].transpose(1, 2) for states in (query, key, value))  # [1, heads, S, d]
        index = torch.arange(end - start)
        distance = index[:, None] - index
        left, right = (size if size >= 0 else end for size in window_size)
        seen = (distance <= left) & (-distance <= right)
        rows.append(scaled_dot_product_attention(*row, seen, scale=scale, enable_gqa=enable_gqa).transpose(1, 2)[0])
    return torch.cat(rows)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(row_attention, "varlen_attn", kernel)
    monkeypatch.setattr(kernel, "calls", 0, raising=False)
    return kernel


@pytest.fixture
def in_float32(stand_in, monkeypatch):
    monkeypatch.setattr(row_attention, "HALF", (torch.float32,))
    return stand_in


needs_kernel = pytest.mark.skipif(row_attention.varlen_attn is None, reason="torch below 2.10 has none")


@needs_kernel
def test_stand_in_has_the_signature_of_the_kernel():
    real = inspect.signature(row_attention.varlen_attn).parameters.values()
    assert [(p.name, p.kind, p.default) for p in real] == [
        (p.name, p.kind, p.default) for p in inspect.signature(kernel).parameters.values()
    ]


@pytest.mark.parametrize(
    ("own", "device", "dtype", "capability", "expected"),
    [
        ("sdpa", "cuda", torch.bfloat16, HOPPER, [VARLEN, ROWWISE, "sdpa"]),
        ("sdpa", "cuda", torch.float16, (8, 0), [VARLEN, ROWWISE, "sdpa"]),
        ("sdpa", "cuda", torch.float32, HOPPER, [ROWWISE, "sdpa"]),
        ("sdpa", "cuda", torch.float16, TURING, [ROWWISE, "sdpa"]),
        ("sdpa", "cpu", torch.bfloat16, None, [ROWWISE, "sdpa"]),
        ("flash_attention_2", "cuda", torch.bfloat16, HOPPER, ["flash_attention_2"]),
        ("eager", "cpu", torch.float32, None, ["eager"]),
    ],
)
def test_attentions_are_tried_from_the_fastest_that_runs(own, device, dtype, capability, expected):
    assert row_attentions(own, device, dtype, capability, kernel) == expected


@pytest.mark.parametrize("old", [None, lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: 0])
def test_older_torch_goes_row_by_row(old):
    assert row_attentions("sdpa", "cuda", torch.bfloat16, HOPPER, old) == [ROWWISE, "sdpa"]


def test_kernel_takes_heads_of_one_size_without_dropout():
    assert varlen_takes(torch.bfloat16, 128, 128, 0.0) and varlen_takes(torch.float16, 256, 256, 0)
    refused = [(128, 128, 0.1), (192, 128, 0.0), (264, 264, 0.0), (20, 20, 0.0)]
    assert not any(varlen_takes(torch.bfloat16, *each) for each in refused)


@pytest.mark.parametrize("name", ALL)
def test_one_call_a_layer_gives_the_padded_loss_and_gradient(name, request, in_float32):
    """Two for ChatGLM-6B; with checkpointing a layer runs again in the backward pass."""
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name)).train()
    rows = with_marks(ROWS, model.config) if name == "chatglm1" else ROWS
    loss, gradient = loss_and_gradient(model, PaddedCollator(pad_token_id=0)(rows))
    model.set_attn_implementation(VARLEN)
    padded_loss, _ = loss_and_gradient(model, PaddedCollator(pad_token_id=0)(rows))
    assert padded_loss == loss and in_float32.calls == 0
    for passes in (1, 2):
        same_loss, same_gradient = loss_and_gradient(model, FlattenedCollator()(rows))
        torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(same_gradient, gradient, rtol=1e-4, atol=1e-6)
        assert in_float32.calls == passes * model.config.num_hidden_layers * (2 if name == "chatglm1" else 1)
        in_float32.calls = 0
        model.gradient_checkpointing_enable({"use_reentrant": False})


@pytest.mark.parametrize("name", ["chatglm1", "chatglm3", "llama"])
def test_mixed_precision_gives_the_kernel_half_precision(name, request, stand_in):
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name), dtype=torch.float32)
    rows = with_marks(ROWS, model.config) if name == "chatglm1" else ROWS
    model.set_attn_implementation(ROWWISE)
    expected, _ = loss_and_gradient(model, FlattenedCollator()(rows))
    model.set_attn_implementation(VARLEN)
    same, _ = loss_and_gradient(model, FlattenedCollator()(rows))
    torch.testing.assert_close(same, expected, rtol=1e-5, atol=0)
    assert stand_in.calls == 0  # float32, though the kernel is chosen: row by row
    with torch.autocast("cpu", torch.bfloat16):
        near, _ = loss_and_gradient(model, FlattenedCollator()(rows))
    torch.testing.assert_close(near, expected, rtol=2e-2, atol=0)
    assert stand_in.calls == model.config.num_hidden_layers * (2 if name == "chatglm1" else 1)


def test_window_and_dropout(in_float32):
    query, bounds = torch.randn(1, 4, 9, 16), torch.tensor([0, 5, 9], dtype=torch.int32)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    rows = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5, "max_length_k": 5}
    states = (query, query[:, :2], query[:, :2])
    context, _ = row_attention.varlen_attention(module, *states, None, scaling=0.25, sliding_window=1, **rows)
    torch.testing.assert_close(context, query[:, :2].repeat_interleave(2, 1).transpose(1, 2))  # each sees itself only
    row_attention.varlen_attention(module, *states, None, dropout=0.5, **rows)
    assert in_float32.calls == 1  # dropout is not the kernel's


@needs_kernel
@pytest.mark.parametrize("name", ALL)
def test_real_kernel_is_called_without_a_look_at_a_number(name, request, monkeypatch):
    """On fake tensors, of which any look at a number, for which a GPU would have to be waited for, is an error."""
    monkeypatch.setattr(modeling_chatglm_6b, "check_special_tokens", lambda *found: None)  # not in training on a GPU
    config = AutoConfig.from_pretrained(request.getfixturevalue(name))
    rows = with_marks(ROWS, config) if name == "chatglm1" else ROWS
    batch = {n: x for n, x in FlattenedCollator()(rows).items() if n not in ("labels", "logits_to_keep")}
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=VARLEN).train()
        batch = {n: fake.from_tensor(x) if torch.is_tensor(x) else x for n, x in batch.items()}
        states = model.base_model(**batch, use_cache=False)[0]
        states.sum().backward()
    assert states.shape[:2] == batch["input_ids"].shape and states.dtype == torch.bfloat16


@needs_kernel
def test_real_kernel_has_gradients_for_shared_heads():
    with FakeTensorMode():
        query, key = (torch.randn(1, heads, 9, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2))
        bounds = torch.zeros(3, dtype=torch.int32)
        rows = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5, "max_length_k": 5}
        states = (query, key, key)
        context, _ = row_attention.varlen_attention(None, *states, None, scaling=0.25, is_causal=True, **rows)
        context.sum().backward()
        assert context.shape == (1, 9, 4, 16) and key.grad.shape == key.shape
