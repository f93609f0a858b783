"""The loss: without logits in training, over accumulated batches, over flattened ones."""

import copy

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from chatglm import ChatGLMForConditionalGeneration


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


def test_accumulated_batches_give_the_loss_of_one_large_batch(model, rows, tmp_path):
    large = trainer_losses(copy.deepcopy(model), rows * 2, tmp_path, per_device_train_batch_size=4)
    small = trainer_losses(
        copy.deepcopy(model), rows * 2, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    assert small == pytest.approx(large, abs=2e-4)


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
