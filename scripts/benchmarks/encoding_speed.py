#!/usr/bin/env python
"""Read and encode a file of conversations as run_chatglm_lora.py does, without its cache, and print rows a second.

    python scripts/benchmarks/encoding_speed.py MODEL FILE [--rows 114000] [--processes 2]

The rows of the file are repeated up to the number. Printed are the seconds and the CPU seconds of reading and of
encoding, and a hash of the ids and labels, which no change that is for speed alone may change.
"""

import argparse
import os
import sys
import tempfile
import time
from hashlib import sha256
from itertools import cycle, islice
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def timed(name, rows, work):
    """What `work` returns; its time is printed."""
    began, cpu = time.perf_counter(), cpu_seconds()
    result = work()
    seconds = time.perf_counter() - began
    print(
        f"{name:8} {seconds:6.1f} s  {rows / seconds:8.0f} rows/s  {cpu_seconds() - cpu:6.1f} CPU seconds", flush=True
    )
    return result


def cpu_seconds() -> float:
    """Of this process and of the workers that have ended."""
    return sum(os.times()[:4])


def encode(options: argparse.Namespace, folder: str, path: Path, count: int):
    """Read and encode the rows in `path`, of which the first `count` differ; print the times and the hash."""
    import run_chatglm_lora as script  # late: it imports torch, which --help and mistakes do not need

    sys.argv[1:] = ["--model_name_or_path", options.model, "--train_file", str(path), "--do_train", "--use_cpu"]
    sys.argv += ["--preprocessing_num_workers", str(options.processes), "--output_dir", f"{folder}/out"]
    sys.argv += ["--cache_dir", f"{folder}/cache", "--report_to", "none"]
    model_args, data_args, chat_args, lora_args, training_args = script.parsed_arguments()
    raw, row_format = timed(
        "reading", options.rows, lambda: script.raw_datasets(model_args, data_args, chat_args, training_args)
    )
    script.register_chatglm(lora_args)
    config = script.loaded_config(model_args)
    tokenizer = script.with_chat_template(script.loaded_tokenizer(model_args), chat_args)
    arguments = (raw, row_format, tokenizer, config, chat_args, data_args, training_args)
    data = timed("encoding", options.rows, lambda: script.chats_as_ids(*arguments))
    rows = data["train"][:count]
    digest = sha256(repr([rows["input_ids"], rows["labels"]]).encode()).hexdigest()[:16]
    tokens = sum(map(len, rows["input_ids"])) / len(rows["input_ids"])
    print(f"{len(data['train'])} examples of {tokens:.0f} tokens, {len(tokenizer)} pieces, ids and labels {digest}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder with a configuration and a tokenizer")
    parser.add_argument("file", type=Path, metavar="FILE", help="a .jsonl file whose columns have known names")
    parser.add_argument("--rows", type=int, default=114_000, help="as many as AdvertiseGen has (default 114000)")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        lines = [line for line in options.file.read_text(encoding="utf-8").splitlines() if line.strip()]
        path.write_text("\n".join(islice(cycle(lines), options.rows)) + "\n", encoding="utf-8")
        encode(options, folder, path, len(lines))


if __name__ == "__main__":
    main()
