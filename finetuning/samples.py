"""What does the model say to a few fixed questions, evaluation by evaluation? The answers of --sample_prompts."""

import json
from pathlib import Path

import datasets
import torch
from transformers import TrainerCallback

from .chat_rows import RowFormat
from .data_files import ROW_FEATURES, check_files
from .file_rows import decoded
from .prediction import generated_ids, search_options, write_lines


FILE = "samples.jsonl"
MESSAGES = RowFormat("messages", messages="messages")


def check(row_format, chat_args, training_args):
    """Raise a ValueError where --sample_prompts has nothing to say: without a training, or of plain text."""
    if chat_args.sample_prompts and not training_args.do_train:
        raise ValueError("--sample_prompts are answered while a model is trained: add --do_train, or drop it.")
    if chat_args.sample_prompts and not row_format:
        raise ValueError(
            "--sample_prompts are questions, of which plain text has none: train conversations, or drop it."
        )


def sample_rows(path) -> datasets.Dataset:
    """The lines of a file as rows of messages: a line is one already, an object, or the question of one.

    Raises ValueError for a file without a line.
    """
    check_files([path])
    lines = decoded(path, Path(path).read_bytes()).split("\n")  # splitlines parts at U+2028 as well
    rows = [
        {"row": row_of_line(line), "place": f"--sample_prompts {path}, line {number}", "problem": None}
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not rows:
        raise ValueError(f"--sample_prompts {path} holds no question: write one a line.")
    return datasets.Dataset.from_list(rows, ROW_FEATURES)


def row_of_line(line) -> str:
    if line.lstrip().startswith("{"):
        return line
    return json.dumps({"messages": [{"role": "user", "content": line.strip()}]}, ensure_ascii=False)


class SampleAnswers(TrainerCallback):
    """Answers the questions at each evaluation of a training and after its last step, into samples.jsonl.

    They are logged too, so that each tracker has them. All processes answer, since under ZeRO-3 and FSDP none can do
    so alone, and the main one writes. The training goes on as without them: random numbers that --do_sample draws are
    given back.
    """

    def __init__(self, trainer, tokenizer, rows, chat_args, pad_token_id):
        self.trainer, self.tokenizer, self.rows = trainer, tokenizer, list(rows)
        self.options = {"pad_token_id": pad_token_id, **search_options(chat_args)}
        self.length = chat_args.max_target_length
        self.answered_at = None  # the step

    def on_train_begin(self, args, state, control, **kwargs):
        """A file of an earlier run ends where this one goes on: it is empty where it begins."""
        path = Path(args.output_dir, FILE)
        if args.should_save and path.exists():
            whole, _, _ = path.read_bytes().rpartition(b"\n")  # bytes, whose lines do not end at U+2028
            lines = [line for line in map(json.loads, whole.splitlines()) if line["step"] <= state.global_step]
            write_lines(path, lines, "w")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and not control.should_evaluate:
            self.answer(args, state)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.trainer.is_in_train:
            self.answer(args, state)

    def answer(self, args, state):
        if self.answered_at == state.global_step:  # an evaluation after the last epoch
            return
        self.answered_at = state.global_step
        prompts = [row["input_ids"] for row in self.rows]
        size = args.per_device_eval_batch_size
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        with given_back(args.device):
            ids = [
                answer
                for batch in batches
                for answer in generated_ids(self.trainer.model, batch, self.length, **self.options)
            ]
        texts = [self.tokenizer.decode(each, skip_special_tokens=True).strip() for each in ids]
        lines = [
            {"step": state.global_step, "prompt": row["prompt"], "answer": text}
            for row, text in zip(self.rows, texts, strict=True)
        ]
        if args.should_save:
            write_lines(Path(args.output_dir, FILE), lines, "a")
        self.trainer.log({f"sample_{number}": line["answer"] for number, line in enumerate(lines, 1)})


def given_back(device):
    """A context after which the random numbers go on as if none had been drawn in it."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)
