"""Out of memory: where, what to change, and what is saved."""

import pytest
import torch
from tiny import CHAT_FLAGS
from transformers import Trainer

from finetuning.memory import batch_of


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: can't allocate memory"]
)
def test_full_memory_in_a_step_is_three_lines(run, chatglm3, chats, monkeypatch, message):
    step = Trainer.training_step

    def full(self, model, inputs, *rest):
        loss = step(self, model, inputs, *rest)
        if self.state.global_step == 2:
            raise RuntimeError(message)
        return loss

    monkeypatch.setattr(Trainer, "training_step", full)
    flags = ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 4]
    with pytest.raises(MemoryError) as error:
        run(flags, "--save_strategy", "steps", "--save_steps", 1, "--per_device_train_batch_size", 2)
    where, change, saved = str(error.value).splitlines()
    assert where.startswith("Out of memory in step 3 of 4, at a batch of 2 rows and ")
    assert change.index("--gradient_checkpointing") < change.index("--per_device_train_batch_size")
    assert saved.endswith("checkpoint-2 is saved: go on with --resume_from_checkpoint last.")


def test_another_error_stays_as_it_is(run, chatglm3, chats, monkeypatch):
    def broken(*args):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Trainer, "training_step", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run("--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 4)


def test_longest_row_of_a_batch_is_found_padded_and_end_to_end():
    ids = torch.ones(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    assert (
        batch_of({"input_ids": ids, "attention_mask": mask})
        == ", at a batch of 2 rows and 10 tokens, the longest of 4"
    )
    flat = {"input_ids": ids[:1], "position_ids": torch.tensor([[0, 1, 0, 1, 2]])}
    assert batch_of(flat) == ", at a batch of 2 rows and 5 tokens, the longest of 3"
