"""The loss: without logits in training, over accumulated batches, over flattened ones."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from chatglm import ChatGLMForConditionalGeneration
from chatglm.language_model import LOSS_ROWS, causal_lm_loss


@pytest.fixture(scope="module")
def model(folder):
    return ChatGLMForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def rows():
    """Rows of different lengths, with different shares of labels."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length, prompt in ((5, 2), (12, 9), (7, 1), (9, 4)):
        ids = torch.randint(3, 400, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A left-padded batch."""
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    width = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    columns = {name: [[fill] * (width - len(row[name])) + row[name] for row in rows] for name, fill in fills.items()}
    return {name: torch.tensor(column) for name, column in columns.items()}


@pytest.fixture(scope="module")
def batch(rows):
    return padded(rows)


def gradients_of(model, **inputs):
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def library_loss(model, batch, **options):
    """GlmForCausalLM's own."""
    logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return model.loss_function(logits=logits, labels=batch["labels"], vocab_size=model.config.vocab_size, **options)


@pytest.mark.oldest
def test_loss_and_gradients_are_the_librarys(model, batch):
    model.zero_grad()
    expected = library_loss(model, batch)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for mode in (True, False):
        outputs, ours = gradients_of(model.train(mode), **batch)
        assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert (outputs.logits is None) == mode
        for name, gradient in gradients.items():
            torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4)
    total = library_loss(model, batch, num_items_in_batch=50)
    assert model(**batch, num_items_in_batch=50).loss.item() == pytest.approx(total.item(), rel=1e-6)


def test_logits_on_request(model, batch):
    full = model.eval()(**batch)
    assert full.logits.shape == (*batch["input_ids"].shape, model.config.vocab_size)
    asked = model.train()(**batch, skip_logits=False)
    torch.testing.assert_close(asked.logits, full.logits)
    assert model.eval()(**batch, skip_logits=True).logits is None
    last = model(**batch, logits_to_keep=2)
    torch.testing.assert_close(last.logits, full.logits[:, -2:])
    assert last.loss.item() == full.loss.item()
    chosen = model(**batch, logits_to_keep=torch.tensor([0, 3]))
    torch.testing.assert_close(chosen.logits, full.logits[:, [0, 3]])


def test_outputs_keep_the_librarys_form(model, batch):
    model.eval()
    outputs = model(**batch, output_hidden_states=True, use_cache=True)
    assert len(outputs.hidden_states) == model.config.num_layers + 1
    assert outputs.past_key_values.get_seq_length() == batch["input_ids"].shape[1]
    loss, logits, *_ = model(**batch, return_dict=False)
    assert torch.equal(loss, outputs.loss)
    assert torch.equal(logits, outputs.logits)
    assert len(model.train()(**batch, return_dict=False, use_cache=False)) == 1


@pytest.mark.parametrize("trained", [True, False], ids=["trained_head", "frozen_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_loss_in_chunks_is_the_whole_one(trained, dtype):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 300, bias=False, dtype=dtype).requires_grad_(trained)
    states = torch.randn(2, LOSS_ROWS + 100, 16, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 300, states.shape[:2])
    targets[:, ::7] = -100
    learnt = [states, head.weight] if trained else [states]

    whole = cross_entropy(head(states).float().flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(3 * whole, learnt)
    widest = []
    handle = head.register_forward_hook(lambda module, inputs, logits: widest.append(len(logits)))
    loss = causal_lm_loss(states, targets, head)
    gradients = torch.autograd.grad(3 * loss, learnt)
    handle.remove()
    assert max(widest) == LOSS_ROWS and len(widest) == 3
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    assert [each.dtype for each in gradients] == [dtype] * len(learnt)
    for gradient, other in zip(gradients, expected, strict=True):
        assert (gradient - other).norm() < (1e-6 if dtype == torch.float32 else 1e-2) * other.norm()
    with torch.no_grad():
        assert causal_lm_loss(states, targets, head).item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_chosen_positions_without_a_target_count_for_nothing(trained):
    head = torch.nn.Linear(4, 11).requires_grad_(trained)
    states, targets = torch.randn(1, 10, 4, requires_grad=True), torch.arange(10)[None]
    targets[0, [0, 4, 9]] = -100
    learnt = [states, *(weight for weight in head.parameters() if trained)]
    sought, chosen = (causal_lm_loss(states, targets, head, chosen=chosen) for chosen in (False, True))
    torch.testing.assert_close(chosen, sought, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(chosen, learnt), torch.autograd.grad(sought, learnt))


def test_loss_trains_an_adapter_on_the_output_layer(v3_folder, batch):
    model = ChatGLMForConditionalGeneration.from_pretrained(v3_folder)
    model = get_peft_model(model, LoraConfig(target_modules=["output_layer"], init_lora_weights=False))
    expected = library_loss(model, batch)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(expected, weights)
    ours = torch.autograd.grad(model.train()(**batch).loss, weights)
    for gradient, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-4)


def trainer_losses(model, rows, folder, **arguments) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=padded)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.oldest
def test_accumulated_batches_give_the_loss_of_one_large_batch(model, rows, tmp_path):
    large = trainer_losses(copy.deepcopy(model), rows * 2, tmp_path, per_device_train_batch_size=4)
    small = trainer_losses(
        copy.deepcopy(model), rows * 2, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    assert small == pytest.approx(large, abs=2e-4)


@pytest.mark.oldest
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flattened_rows_give_the_padded_loss_and_logits(folder, rows, batch, attention):
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, attn_implementation=attention).eval()
    flat = DataCollatorWithFlattening()(rows)
    assert flat["position_ids"][0, 5] == 0
    whole, expected = gradients_of(model, **batch, use_cache=False)
    flattened, gradients = gradients_of(model, **flat, use_cache=False)
    assert flattened.loss.item() == pytest.approx(whole.loss.item(), abs=1e-5)
    torch.testing.assert_close(flattened.logits[0], whole.logits[batch["attention_mask"].bool()], atol=1e-5, rtol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)


def rows_apart(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention within each row of a flattened batch, as variable-length kernels do it."""
    assert attention_mask is None
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == 12
    assert torch.equal(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"])
    sizes = kwargs["cu_seq_lens_q"].diff().tolist()
    parts = zip(*(states.split(sizes, dim=2) for states in (query, key, value)), strict=True)
    options = {"is_causal": True, "scale": scaling, "enable_gqa": True}
    return torch.cat([scaled_dot_product_attention(*part, **options) for part in parts], dim=2).transpose(1, 2), None


def test_an_attention_function_of_the_users_own_gets_the_flattened_rows(folder, rows, batch):
    AttentionInterface.register("rows_apart", rows_apart)
    AttentionMaskInterface.register("rows_apart", lambda *args, **kwargs: None)
    model = ChatGLMForConditionalGeneration.from_pretrained(folder).train()
    whole, expected = gradients_of(model, **batch, use_cache=False)
    model.set_attn_implementation("rows_apart")
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    flattened, gradients = gradients_of(model, **flat, use_cache=False)
    assert flattened.loss.item() == pytest.approx(whole.loss.item(), abs=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.oldest
@pytest.mark.parametrize("skip_logits", [True, False])
def test_shifted_labels_say_what_the_kept_positions_predict(folder, rows, batch, skip_logits):
    model = ChatGLMForConditionalGeneration.from_pretrained(folder).train()
    whole, expected = gradients_of(model, **batch, use_cache=False, num_items_in_batch=torch.tensor(17))
    flat = DataCollatorWithFlattening()(rows)
    kept = (flat["labels"][0, 1:] != -100).nonzero()[:, 0]  # [N]
    shift_labels = flat["labels"][:, kept + 1]  # [1, N]
    shifted = {**flat, "logits_to_keep": kept, "shift_labels": shift_labels, "use_cache": False}
    outputs, gradients = gradients_of(model, **shifted, num_items_in_batch=17, skip_logits=skip_logits)
    assert outputs.loss.item() == pytest.approx(whole.loss.item(), abs=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)
    if skip_logits:
        assert outputs.logits is None
    else:
        library = model.loss_function(outputs.logits, None, model.config.vocab_size, shift_labels=shift_labels)
        assert library.item() == pytest.approx(model(**shifted).loss.item(), rel=1e-6)


def test_logits_of_positions_that_differ_by_row(model, batch):
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    full = model.eval()(**ids).logits
    chosen = torch.tensor([[8, 11], [0, 3], [6, 7], [5, 9]])
    torch.testing.assert_close(model(**ids, logits_to_keep=chosen).logits, full.take_along_dim(chosen[..., None], 1))
    flags = batch["labels"] != -100
    torch.testing.assert_close(model(**ids, logits_to_keep=flags).logits, full[flags])
