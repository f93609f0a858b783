"""How fast a training is."""

from types import SimpleNamespace

import pytest
import torch

from finetuning.throughput import Throughput, rates


def test_rates_are_tokens_a_second_and_the_share_of_padding():
    found = rates(torch.tensor([10, 30, 40]), seconds=2.0)
    assert found["trained_tokens_per_second"] == 5.0 and found["tokens_per_second"] == 15.0
    assert found["padding_share"] == 0.25 and found["peak_memory_gib"] > 0


@pytest.mark.parametrize("mask, real", [(torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]), 5), (None, 8)])
def test_tokens_of_training_batches_alone_are_counted(mask, real):
    model = torch.nn.Module()
    model.forward = lambda input_ids, labels, attention_mask: None
    counter = Throughput()
    counter.on_train_begin(SimpleNamespace(device="cpu"), None, None, model)
    labels = torch.tensor([[1, -100, 3, 4], [1, 2, 3, -100]])
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": labels}
    model(**batch, attention_mask=mask)
    model.eval()(**batch, attention_mask=mask)
    assert counter.counts.tolist() == [4, real, 8]  # the first label of a row is for nobody
    counter.on_train_end(None, None, None)
    model.train()(**batch, attention_mask=mask)
    assert counter.counts.tolist() == [4, real, 8]
