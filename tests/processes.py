"""Scripts in processes of their own that start at once: they are forked from one that has imported the libraries.

Nothing of ours is imported there: a forked script finds what a script finds that is started by hand, 9 s of CPU time
earlier.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from tiny import ROOT


SEARCHED = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
OURS = {str(ROOT / folder) for folder in ("", "scripts", "tests", "tests/chatglm")}  # what pytest searches
SERVER = multiprocessing.get_context("forkserver")


def forked(target, *args):
    """A process that has begun to run a function."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *SEARCHED])
    SERVER.set_forkserver_preload(["processes", "preloaded"])
    process = SERVER.Process(target=target, args=args)
    process.start()
    return process


def forked_program(path, *words, cwd=ROOT, typed="", packages=()) -> subprocess.CompletedProcess:
    """What `python path words` does: exit code, standard output and error.

    It is run in the folder `cwd`, finds what lies beside it and in the folders `packages`, and reads what is `typed`.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("in", "out", "err")]
        streams[0].write_text(typed)
        words = [str(path), *map(str, words)]
        process = forked(run_as_program, words, cwd, streams, [*map(str, packages)])
        code, out = finished(process, streams[1])
        return subprocess.CompletedProcess(words, code, out, streams[2].read_text())


def run_as_program(words, cwd, streams, packages):
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = open(0)  # noqa: SIM115
    path = os.path.join(cwd, words[0])
    sys.path[:] = [os.path.dirname(path), *packages, *(each for each in sys.path if each not in ("", *OURS))]
    os.chdir(cwd)
    sys.argv = words
    runpy.run_path(path, run_name="__main__")


def forked_run(words, log, before=None):
    """Start main() on a command line; what it prints goes to the file `log`. `before` is called in the new process."""
    return forked(logged_main, [str(word) for word in words], str(log), before)


def logged_main(words, log, before):
    import run_chatglm_lora

    sys.argv = ["run_chatglm_lora.py", *words]
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        if before:
            before()
        try:
            run_chatglm_lora.main()
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
            raise SystemExit(1) from error


def finished(process, log):
    """Exit code of a run, and what it printed; a run that hangs is killed after four minutes."""
    process.join(240)
    process.kill()
    process.join()
    return process.exitcode, Path(log).read_text()


# ------------------------------------------------------------------- what a run may be given to do to itself


def kill_while_writing(name, nth):
    """End the process, as kill -9 does, in the middle of the nth writing of a file of a checkpoint."""
    import shutil

    import peft.peft_model
    import torch
    from transformers.trainer_callback import TrainerState

    left = [nth]

    def dying(write, path_of, half):
        def write_or_die(*args, **kwargs):
            path = Path(path_of(*args))
            left[0] -= name == path.name
            if left[0] or name != path.name:
                return write(*args, **kwargs)
            half(write, path, *args)
            os.kill(os.getpid(), signal.SIGKILL)

        return write_or_die

    def half_of_it(write, path, *args):
        write(*args)
        os.truncate(path, path.stat().st_size // 2)

    torch.save = dying(torch.save, lambda value, path, *rest: path, half_of_it)
    peft.peft_model.safe_save_file = dying(peft.peft_model.safe_save_file, lambda value, path: path, half_of_it)
    TrainerState.save_to_json = dying(TrainerState.save_to_json, lambda state, path: path, half_of_it)
    os.replace = dying(os.replace, lambda source, target: target, lambda *args: None)
    half_removed = lambda remove, path, *args: (path / "optimizer.pt").unlink()  # noqa: E731
    shutil.rmtree = dying(shutil.rmtree, lambda path, *rest, **options: path, half_removed)


def signal_at_step(number, step):
    """Send the own process a signal in the middle of a step."""
    from finetuning import safeguards

    begin = safeguards.StopOnSignal.on_step_begin

    def begin_and_signal(self, args, state, control, **kwargs):
        begin(self, args, state, control, **kwargs)
        if state.global_step + 1 == step:
            os.kill(os.getpid(), number)

    safeguards.StopOnSignal.on_step_begin = begin_and_signal


def limit_file_size(size):
    """Let no file grow beyond `size` bytes, which a program meets as it meets a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# ------------------------------------------------------------------------------- several processes of one run


def forked_ranks(words, folder, count=2, before=None):
    """Exit codes and logs of processes that train together, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [folder / f"rank{rank}.log" for rank in range(count)]
    places = [partial(take_rank, rank, count, port, before) for rank in range(count)]
    processes = [forked_run(words, log, place) for log, place in zip(logs, places, strict=True)]
    return [finished(process, log) for process, log in zip(processes, logs, strict=True)]


def take_rank(rank, count, port, before):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    if before:
        before()


def spoil_loss_of_rank_1():
    """Give the second process a loss that is not a number in step 3."""
    from finetuning import training_checks

    note = training_checks.TrainingChecks.note_loss

    def note_spoiled(self, model, args, inputs, output):
        if os.environ["RANK"] == "1" and self.trainer.state.global_step == 2:
            output.loss = output.loss * float("nan")
        note(self, model, args, inputs, output)

    training_checks.TrainingChecks.note_loss = note_spoiled


def signal_rank_1():
    if os.environ["RANK"] == "1":
        signal_at_step(signal.SIGTERM, 3)
