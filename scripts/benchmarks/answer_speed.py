#!/usr/bin/env python
"""Answer the same questions in several ways, and print answers a second and whether all ways give the same ids.

    python scripts/benchmarks/answer_speed.py [--rows 64] [--batch_sizes 1 8 32] [--tokens 64] [--shape tiny]

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
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes import SHAPES


END_SHARE = 0.01


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="of the random model (default tiny)")
    parser.add_argument("--ways", nargs="+", default=["unsorted", "sorted", "static", "continuous"])
    options = parser.parse_args()

    import torch  # late, as all that imports it: --help and mistakes need none
    from transformers import set_seed

    from benchmarks.answers import continuous, prompts_of, up_to_end, without_continuous_batching
    from benchmarks.training import adapted, random_model, random_rows

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
    main()
