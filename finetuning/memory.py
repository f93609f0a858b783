"""Out of memory: what the run was at, what to change, and what is saved."""

from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size

from .checkpoints import whole_checkpoints


WAYS_OUT = (
    "Change, in this order: --dtype bfloat16, --gradient_checkpointing, a smaller --per_device_{stage}_batch_size "
    "(with more --gradient_accumulation_steps the result stays the same), a lower --max_source_length or "
    "--block_size, --load_in_4bit."
)


@contextmanager
def explained(trainer, stage):
    """Makes three lines of an out-of-memory error inside, as a MemoryError; `stage` is train or eval.

    accelerate knows the forms that the error has on a GPU, on an NPU and on a CPU.
    """
    last = {}
    hook = trainer.model.register_forward_pre_hook(lambda _, args, inputs: last.update(inputs), with_kwargs=True)
    try:
        yield
    except Exception as error:
        if not should_reduce_batch_size(error):
            raise
        raise MemoryError(lines(trainer, stage, last)) from error
    finally:
        hook.remove()


def lines(trainer, stage, inputs) -> str:
    step, args = trainer.state.global_step, trainer.args
    where = f"in step {step + 1} of {trainer.state.max_steps}" if stage == "train" else "in the evaluation"
    whole = whole_checkpoints(args.output_dir)
    saved = f"{whole[-1]} is saved: go on with --resume_from_checkpoint last." if whole else "Nothing is saved yet."
    return "\n".join([f"Out of memory {where}{batch_of(inputs)}.", WAYS_OUT.format(stage=stage), saved])


def batch_of(inputs) -> str:
    """The size of a batch [B, S], or of rows laid end to end [1, S], and its longest row, as the end of a sentence."""
    if "input_ids" not in inputs:
        return ""
    ids, positions, mask = inputs["input_ids"], inputs.get("position_ids"), inputs.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids) if mask is None or mask.dim() != 2 else mask.sum(1).tolist()
    if positions is not None and positions.shape == ids.shape and len(ids) == 1:
        starts = (positions[0] == 0).nonzero().flatten()  # [rows]
        lengths = torch.diff(starts, append=torch.tensor([ids.shape[1]], device=starts.device)).tolist()
    return f", at a batch of {len(lengths)} rows and {ids.numel()} tokens, the longest of {max(lengths)}"
