#!/usr/bin/env python
"""Answer the same questions in several ways, and print answers a second and whether all ways give the same ids.

    python scripts/answer_speed.py [--rows 64] [--batch_sizes 1 8 32] [--tokens 64] [--shape tiny]

unsorted     batches in the order of the rows
sorted       rows of like length share a batch: what --do_predict does
static       the same with a static cache, without compilation
continuous   `generate_batch`: a row that is finished makes room for the next

The model is random (float32 on a CPU, bfloat16 on a GPU) with LoRA on all linear layers; the questions are random
tokens in AdvertiseGen's lengths. One token in a hundred would end an answer, but a random model hardly says one: all
answers are as long as they may be, which is the worst case for `continuous`.
"""

import argparse
import sys
import time

import torch
from benchmark import SHAPES, adapted, random_model, random_rows
from transformers import ContinuousBatchingConfig, GenerationConfig, set_seed

from finetuning.prediction import generated_ids


END_SHARE = 0.01
PAGE = 32  # tokens


def prompts_of(rows) -> list[list[int]]:
    """The part of each row that is not trained."""
    return [[id for id, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100] for row in rows]


def in_batches(model, prompts, order, size, search) -> list[list[int]]:
    """The answers in the order of the prompts, generated in batches of the given order."""
    answers = [None] * len(prompts)
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        ids = generated_ids(model, [prompts[number] for number in numbers], pad_token_id=0, **search)
        answers = [ids[numbers.index(n)] if n in numbers else answers[n] for n in range(len(prompts))]
    return answers


def without_continuous_batching(way, model, prompts, size, search):
    order = list(range(len(prompts)))
    if way != "unsorted":
        order.sort(key=lambda number: -len(prompts[number]))
    more = {"cache_implementation": "static", "disable_compile": True} if way == "static" else {}
    return in_batches(model, prompts, order, size, {**search, **more})


def continuous(model, prompts, size, search):
    """The answers with `size` rows at a time; by default the library takes 60 % of a CPU's memory for their cache."""
    config = GenerationConfig(**search, pad_token_id=0, use_cache=True)
    pages = 2 + max(map(len, prompts)) // PAGE + search["max_new_tokens"] // PAGE  # of a row
    limits = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=size * pages, max_requests_per_batch=size, max_batch_tokens=1024
    )
    outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=limits)
    return [outputs[name].generated_tokens for name in sorted(outputs, key=lambda name: int(name.split("_")[-1]))]


def up_to_end(ids, ends) -> list[int]:
    """An answer without what follows its end token."""
    return ids[: next((place for place, id in enumerate(ids, 1) if id in ends), len(ids))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="of the random model (default tiny)")
    parser.add_argument("--ways", nargs="+", default=["unsorted", "sorted", "static", "continuous"])
    options = parser.parse_args()
    model = adapted(random_model(options.shape, "cuda" if torch.cuda.is_available() else "cpu")).eval()
    vocabulary = model.config.vocab_size
    prompts = prompts_of(random_rows(options.rows, model.config))
    set_seed(0)
    ends = torch.randperm(vocabulary)[: int(END_SHARE * vocabulary)].tolist()
    search = {"max_new_tokens": options.tokens, "do_sample": False, "eos_token_id": ends}
    for size in options.batch_sizes:
        expected = None
        for way in options.ways:
            began = time.perf_counter()
            if way == "continuous":
                answers = continuous(model, prompts, size, search)
            else:
                answers = without_continuous_batching(way, model, prompts, size, search)
            seconds = time.perf_counter() - began
            answers = [up_to_end(ids, set(ends)) for ids in answers]
            expected = expected or answers
            same = sum(a == b for a, b in zip(answers, expected, strict=True))
            lengths = sorted(map(len, answers))
            rates = f"{len(prompts) / seconds:7.2f} answers/s  {sum(lengths) / seconds:7.1f} tokens/s"
            print(f"batch {size:3}  {way:11} {rates}  {same} of {len(prompts)} as in the first way", flush=True)


if __name__ == "__main__":
    sys.exit(main())
