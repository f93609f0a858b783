"""Train the same model on the same rows with this project and with the tools that people would pick instead.

    python scripts/compare_tools.py [--work comparison] [--only ours,llamafactory] [--rounds 3] [--steps 30]
    python scripts/compare_tools.py --encoding [--rows 114000]     rows a second that each tool encodes
    python scripts/compare_tools.py --flags                        ours alone, with one flag more or less

LLaMA-Factory, ms-swift, TRL and plain Trainer are installed into environments of their own under the folder of --work,
and stay there. All train a random GLM-4 of 8 layers, 256 wide, with 65,024 rows in the embedding: theirs in the layout
of transformers' GlmForCausalLM, ours, the same weights, as GLM-4 is published. The 1,070 rows are made here in
AdvertiseGen's lengths. LoRA of rank 8 on all linear layers without dropout, AdamW at 1e-3, 8 rows a step (packs of
1,024 tokens, about 8 rows, where a tool packs), float32 on a CPU; each tool otherwise at its own best. With --flags a
ChatGLM-6B of these sizes comes along, too.

The tools run in turns, so that a noisy machine harms all alike. The table has the medians of the rounds with their
range: rows a second once the first steps are over, the peak memory of a run's largest process, the losses of the first
and the last step. A tool that cannot be installed or run stands under it with the last line that it wrote. Linux.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import psutil
from benchmarks.row_lengths import advertisegen_lengths


REPOSITORY = Path(__file__).resolve().parent.parent
CHARACTERS = [*map(chr, range(0x4E00, 0x4E00 + 300)), *"，" * 30]  # each a token; a comma after every tenth
VOCABULARY = 600  # the bytes, the characters and a few pairs of them
ROWS = 1070
WARM_UP = 2  # steps that are not timed
STEP = re.compile(r"'loss': '?([\d.]+)'?.*'epoch': '?([\d.e-]+)")  # how every tool built on Trainer logs one


class Step(NamedTuple):
    """What is seen of a step when it is logged."""

    seconds: float  # since the start of the program
    loss: float
    epoch: float
    memory: float  # GiB, the most so far


class ToolFailed(Exception):
    """A tool could not be installed or run; the message is its last line."""


class Tool(NamedTuple):
    """One line of the table: a program in an environment, with flags beside COMMON; the last of a flag counts."""

    name: str
    setting: str
    environment: str
    program: str
    flags: str


ENVIRONMENTS = {  # what each has beside torch; ours is the one that runs this
    "ours": [],
    "llamafactory": ["llamafactory"],
    "swift": ["ms-swift"],
    "trl": ["trl", "peft"],
    "trainer": ["transformers", "peft", "datasets", "accelerate"],
}
COMMON = (
    "--output_dir {run}/out --max_steps {steps} --per_device_train_batch_size 8 --gradient_accumulation_steps 1 "
    "--learning_rate 1e-3 --lr_scheduler_type constant --seed 0 --logging_steps 1 --save_strategy no --report_to none "
    "--disable_tqdm true"
)
LLAMAFACTORY = (
    "--stage sft --do_train true --model_name_or_path {native} --dataset rows --dataset_dir {data} "
    "--template glm4 --cutoff_len 1024 --preprocessing_num_workers 2 --finetuning_type lora --lora_rank 8 "
    "--lora_alpha 32 --lora_target all --flash_attn sdpa --disable_gradient_checkpointing true"
)
SWIFT = (
    "--model {native} --model_type glm_edge --template glm4 --torch_dtype float32 --dataset {data}/rows.jsonl "
    "--dataset_num_proc 2 --lora_rank 8 --lora_alpha 32 --lora_dropout 0 --target_modules all-linear "
    "--max_length 1024 --split_dataset_ratio 0 --gradient_checkpointing false --attn_impl sdpa"
)
TRL = (
    "--model_name_or_path {native} --dtype float32 --dataset_name {data}/prompts --dataset_num_proc 2 --use_peft "
    "--lora_r 8 --lora_alpha 32 --lora_dropout 0 --lora_target_modules all-linear --max_length 1024 --bf16 false "
    "--gradient_checkpointing false"
)
PLAIN = f"{{python}} {REPOSITORY}/scripts/benchmarks/plain_trainer.py"
TRAINER = "--model_name_or_path {native} --train_file {data}/rows.jsonl"


def ours(setting: str, flags: str = "", name: str = "ours", model: str = "published", variable: str = "") -> Tool:
    """This project's script with more flags, and with a variable in its environment."""
    always = (
        f"--model_name_or_path {{{model}}} --train_file {{data}}/rows.jsonl --max_target_length 256 --lora_dropout 0 "
        "--lora_target_modules all-linear --preprocessing_num_workers 2 --do_train"
    )
    program = f"env {variable} {{python}} {REPOSITORY}/run_chatglm_lora.py"
    return Tool(name, setting, "ours", program, f"{always} {flags}")


TOOLS = [
    ours("as it comes"),
    Tool("LLaMA-Factory", "padded to the longest", "llamafactory", "{bin}/llamafactory-cli train", LLAMAFACTORY),
    Tool(
        "LLaMA-Factory", "neat packing", "llamafactory", "{bin}/llamafactory-cli train",
        LLAMAFACTORY + " --neat_packing true --per_device_train_batch_size 1",
    ),
    Tool(
        "ms-swift", "by length", "swift", "{bin}/swift sft",
        SWIFT + " --group_by_length true",
    ),
    Tool("ms-swift", "packing", "swift", "{bin}/swift sft", SWIFT + " --packing true --per_device_train_batch_size 1"),
    Tool("TRL", "padded to the longest", "trl", "{bin}/trl sft", TRL),
    Tool("TRL", "packing", "trl", "{bin}/trl sft", TRL + " --packing true --per_device_train_batch_size 1"),
    Tool(
        "Trainer", "by length", "trainer", PLAIN,
        TRAINER + " --train_sampling_strategy group_by_length",
    ),
    Tool(
        "Trainer", "all rows padded to 1152, as in the guides", "trainer", PLAIN,
        TRAINER + " --pad_to 1152",
    ),
]  # fmt: skip

PADDED = "--no_padding_free --train_sampling_strategy group_by_length"
WAYS = [  # of ours, for --flags
    ours("as it comes"),
    ours("padded, by length", PADDED),
    ours("packed into 1,024 tokens", "--pack_to_length 1024 --per_device_train_batch_size 1"),
    ours("LoRA's default dropout", "--lora_dropout 0.1"),
    ours("AdamW without the fused kernel", "--optim adamw_torch"),
    ours("checkpoints of all layers", "--activation_checkpointing"),
    ours(
        "checkpoints of every second layer",
        """--activation_checkpointing --activation_checkpointing_kwargs '{{"every_n_layers": 2}}'""",
    ),
    ours("bfloat16 (autocast)", "--bf16"),
    ours("weights in bfloat16", "--dtype bfloat16"),
    ours("8 bits", "--load_in_8bit"),
    ours("4 bits", "--load_in_4bit"),
    ours("compiled", "--torch_compile"),
    ours("compiled by layers", "--torch_compile", variable="ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=true"),
    ours("as it comes", name="ours, ChatGLM-6B", model="first"),
    ours("padded, by length", PADDED, name="ours, ChatGLM-6B", model="first"),
]


def random_rows(count: int, seed: int = 0) -> list[list[dict]]:
    """Conversations of a question and an answer in random characters, in AdvertiseGen's lengths."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        texts = ["".join(random.choice(CHARACTERS, length)) for length in advertisegen_lengths(random)]
        rows.append([{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)])
    return rows


def write_rows(folder: Path, count: int):
    """The same rows in the columns that the tools read: `messages`, and for TRL `prompt` and `completion`."""
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    rows = random_rows(count)
    for path, columns in (
        (folder / "rows.jsonl", [{"messages": row} for row in rows]),
        (folder / "prompts/rows.jsonl", [{"prompt": row[:-1], "completion": row[-1:]} for row in rows]),
    ):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in columns), encoding="utf-8")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": columns}))  # LLaMA-Factory's


def write_models(work: Path, data: Path):
    """The published layout by tiny_chatglm.py, the native one by merge_lora.py from an adapter of one step."""
    published, native, adapter = work / "published", work / "native", work / "adapter"
    if native.exists():
        return
    for folder, generation in ((work / "first", "chatglm"), (published, "glm4")):
        called(
            REPOSITORY / "scripts/tiny_chatglm.py", folder, "--text", data / "rows.jsonl", "--generation", generation,
            "--num_layers", 8, "--hidden_size", 256, "--vocab_size", VOCABULARY, "--embedding_rows", 65024,
        )  # fmt: skip
    called(
        REPOSITORY / "run_chatglm_lora.py", "--model_name_or_path", published, "--train_file", data / "rows.jsonl",
        "--do_train", "--max_steps", 1, "--max_train_samples", 8, "--output_dir", adapter, "--use_cpu",
    )  # fmt: skip
    called(REPOSITORY / "scripts/merge_lora.py", adapter, native, "--format", "native", "--base_only")


def called(*command):
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)


def environment_python(work: Path, name: str) -> Path:
    """The Python of an environment, which is made if it is not there. Raises CalledProcessError."""
    if not ENVIRONMENTS[name]:
        return Path(sys.executable)
    folder = work / "environments" / name
    python = folder / "bin/python"
    if not (folder / "installed").exists():
        print(f"Installing {' '.join(ENVIRONMENTS[name])} into {folder} ...", file=sys.stderr, flush=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", folder],
            [*pip, "torch==2.13.0"],  # first, and held: a plain torch brings gigabytes of CUDA
            [*pip, "torch==2.13.0", *ENVIRONMENTS[name]],
            # Text needs neither, and those that tools bring do not load beside a CPU build of torch.
            [python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True)
        next(folder.glob("lib/*/site-packages")).joinpath("torchaudio.py").touch()  # LLaMA-Factory imports one
        (folder / "installed").touch()
    return python


def command_of(tool: Tool, work: Path, data: Path, steps: int) -> list[str]:
    python = environment_python(work, tool.environment)
    places = {"python": python, "bin": python.parent, "run": work / "run", "data": data, "steps": steps}
    places |= {layout: work / layout for layout in ("native", "published", "first")}
    cpu = "" if shutil.which("nvidia-smi") else " --use_cpu true"
    return shlex.split(f"{tool.program} {COMMON}{cpu} {tool.flags}".format(**places))


def run_of(tool: Tool, work: Path, data: Path, steps: int, limit: float) -> list[Step]:
    """The steps of one training, which is ended after `limit` seconds.

    Raises ToolFailed, with the last line of the installation or the run, where there are too few to be timed.
    """
    shutil.rmtree(work / "run", ignore_errors=True)
    (work / "run").mkdir(parents=True)
    try:
        command = command_of(tool, work, data, steps)
    except subprocess.CalledProcessError as error:
        raise ToolFailed(last_line(error.stderr)) from error
    settings = {name: str(work / "run/cache") for name in ("HF_HOME", "MODELSCOPE_CACHE")}  # nothing is encoded before
    settings |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    began, output, logged = time.perf_counter(), [], []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        cwd=work / "run", env={**os.environ, **settings},
    )  # fmt: skip
    timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    for line in process.stdout:
        output.append(line)
        if step := STEP.search(line):
            loss, epoch = map(float, step.groups())
            logged.append(Step(time.perf_counter() - began, loss, epoch, peak_memory(process.pid)))
    process.wait()
    timer.cancel()
    (work / f"{tool.name}, {tool.setting}.log").write_text(shlex.join(command) + "\n" + "".join(output))
    if len(logged) < min(steps, WARM_UP + 2):
        ended = f"ended after {limit:g} s: " if time.perf_counter() - began > limit else ""
        raise ToolFailed(ended + last_line("".join(output)))
    return logged


def peak_memory(pid: int) -> float:
    """GiB that the largest process of a tree has had at most so far (Linux)."""
    peaks = [0]
    for process in (root := psutil.Process(pid), *root.children(recursive=True)):
        with suppress(OSError):  # it is gone
            peaks += map(int, re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()))
    return max(peaks) / 2**20


def last_line(text: str) -> str:
    """The last line with words in it: Python's, pip's and the tools' errors end with what is wrong."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return lines[-1] if lines else "it wrote nothing"


def figures(steps: list[Step], rows: int) -> dict[str, float]:
    """A run's figures; its epochs, of so many rows, tell how many were trained, however they were packed."""
    first, last = steps[WARM_UP - 1], steps[-1]
    return {
        "samples_per_second": (last.epoch - first.epoch) * rows / (last.seconds - first.seconds),
        "peak_memory_gib": last.memory,
        "first_loss": steps[0].loss,
        "last_loss": last.loss,
        "steps": len(steps),
    }


def encoding_speed(tool: Tool, work: Path, folders: dict[int, Path], limit: float) -> dict[str, float]:
    """Rows a second: more rows over the time by which they put off the first step, so that nothing else counts."""
    (few, short), (many, long) = ((rows, run_of(tool, work, data, 1, limit)[0]) for rows, data in folders.items())
    return {"rows_per_second": (many - few) / (long.seconds - short.seconds)}


def table(results: dict[Tool, list[dict[str, float]]], failures: dict[Tool, str]) -> str:
    """Markdown: of each tool the medians of its rounds with their range, and how much faster the first one is."""
    names = list(next(iter(results.values()), [{}])[0])
    rates = {tool: median(run[names[0]] for run in runs) for tool, runs in results.items()}
    first = next(iter(results), TOOLS[0])
    lines = [["tool", "setting", *(name.replace("_", " ") for name in names), f"{first.name} is faster"]]
    lines.append(["---"] * len(lines[0]))
    for tool, runs in results.items():
        cells = [spread([run[name] for run in runs]) for name in names]
        lines.append([tool.name, tool.setting, *cells, f"{rates[first] / rates[tool]:.2f} x"])
    reasons = [f"{tool.name}, {tool.setting}: no result. `{line}`" for tool, line in failures.items()]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *(f"\n{reason}" for reason in reasons)])


def spread(values: list[float]) -> str:
    middle, low, high = (f"{value:.4g}" for value in (median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def versions(work: Path, environment: str) -> str:
    """What is installed of the packages that matter."""
    program = "from importlib.metadata import version\nfor name in {}:\n    print(name, version(name))"
    packages = ["torch", "transformers", "peft", "datasets", *ENVIRONMENTS[environment]]
    command = [environment_python(work, environment), "-c", program.format(list(dict.fromkeys(packages)))]
    return ", ".join(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("comparison"), help="folder of environments and reports")
    parser.add_argument("--only", default=",".join(ENVIRONMENTS), help=f"some of {','.join(ENVIRONMENTS)}")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tool (default 3)")
    parser.add_argument("--steps", type=int, default=30, help=f"of a run, the first {WARM_UP} untimed (default 30)")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a run is ended (default 300)")
    parser.add_argument("--encoding", action="store_true", help="measure the rows a second that are encoded instead")
    parser.add_argument("--rows", type=int, default=114_000, help="rows for --encoding (default 114,000)")
    parser.add_argument("--flags", action="store_true", help="measure ours with several flags instead")
    arguments = parser.parse_args()
    work, chosen = arguments.work.resolve(), arguments.only.split(",")
    if arguments.steps < WARM_UP + 2:
        parser.error(f"--steps {arguments.steps}: at least {WARM_UP + 2}")
    if unknown := set(chosen) - set(ENVIRONMENTS):
        parser.error(f"--only {','.join(unknown)}: there are {', '.join(ENVIRONMENTS)}")
    data = {rows: work / f"data/{rows}" for rows in (ROWS, *([arguments.rows] if arguments.encoding else []))}
    for rows, folder in data.items():
        write_rows(folder, rows)
    write_models(work, data[ROWS])
    results, failures = {}, {}
    tools = WAYS if arguments.flags else [tool for tool in TOOLS if tool.environment in chosen]
    for turn, tool in product(range(arguments.rounds), tools):
        if tool in failures:
            continue
        try:
            if arguments.encoding:
                found = encoding_speed(tool, work, data, arguments.limit)
            else:
                found = figures(run_of(tool, work, data[ROWS], arguments.steps, arguments.limit), ROWS)
        except ToolFailed as error:
            failures[tool] = str(error)
            found = error
        else:
            results.setdefault(tool, []).append(found)
        print(f"Round {turn + 1}, {tool.name}, {tool.setting}: {found}", file=sys.stderr, flush=True)
    used = dict.fromkeys(tool.environment for tool in results)
    report = "\n\n".join(
        [
            f"`python {shlex.join(sys.argv)}` on {os.cpu_count()} CPUs ({platform.machine()})",
            table(results, failures),
            "\n".join(f"* {environment}: {versions(work, environment)}" for environment in used),
        ]
    )
    name = "encoding" if arguments.encoding else "flags" if arguments.flags else "training"
    (work / f"{name}.md").write_text(report + "\n", encoding="utf-8")
    runs = {f"{tool.name}, {tool.setting}": found for tool, found in results.items()}
    (work / f"{name}.json").write_text(json.dumps(runs, indent=2) + "\n")
    print(report)


if __name__ == "__main__":
    main()
