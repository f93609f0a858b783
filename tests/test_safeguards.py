"""Whatever ends a run, the same command goes on from the last whole checkpoint and ends with the same adapter."""

import json
import os
import random
import signal
import socket
import time
from functools import partial

import pytest
from processes import finished, forked_run, kill_while_writing, limit_file_size, signal_at_step
from tiny import CHAT_FLAGS, COMMON, flat, losses

from finetuning import checkpoints
from finetuning.safeguards import STOPPED_EARLY, StopOnSignal


KILLS = int(os.environ.get("KILLS", 10))  # more: KILLS=500 pytest tests/test_safeguards.py -k random


@pytest.fixture(scope="module")
def words(chatglm3, chats):
    """A run of 12 steps with six checkpoints, dropout and gradient accumulation, that goes on where it was ended."""
    model = ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--log_level", "warning"]
    steps = ["--do_train", "--max_steps", 12, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    saves = ["--save_strategy", "steps", "--save_steps", 2, "--resume_from_checkpoint", "last"]
    return [*COMMON.split(), *flat([model, steps, saves])]


@pytest.fixture
def start(words, tmp_path):
    """Starts the run in an output folder; a function to be called before main() may do harm to it."""

    def begin(*more, before=None):
        flags = [*words, "--output_dir", tmp_path / "out", *more]
        return forked_run(flags, tmp_path / "log", before), tmp_path / "log", tmp_path / "out"

    return begin


@pytest.fixture
def run_to_end(start):
    """Exit code, log and output folder of the run."""

    def whole_run(*more, before=None):
        process, log, folder = start(*more, before=before)
        return *finished(process, log), folder

    return whole_run


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory):
    """Adapter, losses and seconds of the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for output in ("first", "second"):  # the first run encodes the data and fills caches
        begun = time.monotonic()
        code, log = finished(forked_run([*words, "--output_dir", folder / output], folder / "log"), folder / "log")
        assert code == 0, log
    assert adapter_bytes(folder / "first") == adapter_bytes(folder / "second")
    return adapter_bytes(folder / "first"), losses(folder / "first"), time.monotonic() - begun


@pytest.mark.timeout(300 + 20 * KILLS)
def test_kills_at_random_moments_do_not_change_the_adapter(words, undisturbed, tmp_path):
    seconds = undisturbed[2]  # of twelve steps: a kill may come before the first step and in the middle of any
    words, log = [*words, "--max_steps", 40], tmp_path / "log"
    code, text = finished(forked_run([*words, "--output_dir", tmp_path / "whole"], log), log)
    assert code == 0, text
    moments, killed, mid_save, runs = random.Random(5), 0, 0, 0
    while killed < KILLS:
        folder, runs, ended = tmp_path / f"run{runs}", runs + 1, False
        while not ended:
            process = forked_run([*words, "--output_dir", folder], log)
            process.join(moments.uniform(0.2, 1.0) * seconds if killed < KILLS else None)
            if ended := process.exitcode is not None:
                assert process.exitcode == 0, log.read_text()
            else:
                process.kill()
                process.join()
                killed += 1
                folders = checkpoints.checkpoints(folder)
                mid_save += any(checkpoints.damage(checkpoint) for checkpoint in folders)
        assert adapter_bytes(folder) == adapter_bytes(tmp_path / "whole")
    print(f"{killed} kills, {mid_save} of them left a half-written checkpoint, {runs} runs ended well")


FILES = ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "complete.json"]


@pytest.mark.parametrize("name", FILES)
def test_checkpoint_whose_writing_was_killed_is_named_and_passed_over(run_to_end, undisturbed, name):
    killed, _, folder = run_to_end(before=partial(kill_while_writing, name, 2))
    assert killed == -signal.SIGKILL and (folder / "checkpoint-4").exists()
    code, log, _ = run_to_end()
    assert code == 0, log
    assert f"{folder / 'checkpoint-4'} has no complete.json" in log and "It is passed over" in log
    assert adapter_bytes(folder) == undisturbed[0]


def test_kill_while_an_old_checkpoint_is_deleted_leaves_the_newest(run_to_end, undisturbed):
    limit = ["--save_total_limit", 1]
    killed, _, folder = run_to_end(*limit, before=partial(kill_while_writing, "checkpoint-2", 1))
    assert killed == -signal.SIGKILL
    code, log, _ = run_to_end(*limit)
    assert code == 0 and f"{folder / 'checkpoint-2'} has no complete.json" in log
    assert adapter_bytes(folder) == undisturbed[0]
    # What the kill left half deleted is for the user to remove.
    assert [path.name for path in checkpoints.checkpoints(folder)] == ["checkpoint-2", "checkpoint-12"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_a_checkpoint_and_exits_with_its_own_code(run_to_end, undisturbed, number):
    code, log, folder = run_to_end(before=partial(signal_at_step, number, 5))
    assert code == STOPPED_EARLY
    assert "Stopped early, by a signal, after step 5 of 12" in log and not (folder / "train_results.json").exists()
    assert checkpoints.whole_checkpoints(folder)[-1].name == "checkpoint-5"
    code, log, _ = run_to_end()
    assert code == 0, log
    assert adapter_bytes(folder) == undisturbed[0] and losses(folder) == undisturbed[1]


def test_signal_saves_even_where_no_checkpoints_were_asked_for(run_to_end):
    flags = ["--save_strategy", "no", "--save_only_model"]
    code, _, folder = run_to_end(*flags, before=partial(signal_at_step, signal.SIGTERM, 3))
    assert code == STOPPED_EARLY and (folder / "checkpoint-3/optimizer.pt").exists()


def test_run_that_was_finished_only_writes_its_result_again(run_to_end, undisturbed):
    """Trainer trained a thirteenth step here: it resumes in the middle of an epoch."""
    _, _, folder = run_to_end()
    results = (folder / "train_results.json").read_text()
    (folder / "adapter_model.safetensors").unlink()
    code, log, _ = run_to_end()
    assert code == 0 and "The run was finished at step 12" in log
    assert adapter_bytes(folder) == undisturbed[0]
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 12
    assert json.loads((folder / "train_results.json").read_text()) == json.loads(results)


def test_full_disk_leaves_the_earlier_checkpoints_and_a_sentence(run_to_end, undisturbed):
    _, _, folder = run_to_end(before=partial(signal_at_step, signal.SIGTERM, 2))
    room = max(path.stat().st_size for path in (folder / "checkpoint-2").iterdir()) - 1000  # optimizer.pt does not fit
    code, log, _ = run_to_end(before=partial(limit_file_size, room))
    assert code == 1
    assert f"OSError: {folder / 'checkpoint-4'} could not be written, and is removed" in log
    assert "keeps checkpoint-2; " in log and "--resume_from_checkpoint last" in log
    code, log, _ = run_to_end()
    assert code == 0 and adapter_bytes(folder) == undisturbed[0]


def test_result_that_could_not_be_written_does_not_look_whole(run_to_end):
    code, log, folder = run_to_end("--save_strategy", "no", before=partial(limit_file_size, 5000))
    assert code == 1 and f"The result could not be written to {folder}" in log
    assert not (folder / "adapter_model.safetensors").exists() and not (folder / "train_results.json").exists()


def test_output_folder_that_cannot_be_written_to_is_found_before_training(run_to_end, tmp_path):
    (tmp_path / "file").write_text("")
    code, log, _ = run_to_end("--output_dir", tmp_path / "file/out")
    assert code == 1 and f"ValueError: --output_dir {tmp_path / 'file/out'} cannot be written to" in log
    assert "Training arguments" not in log


def test_second_run_into_the_same_folder_is_refused_while_the_first_one_trains(start, words, tmp_path):
    first, _, folder = start("--max_steps", 400, "--save_strategy", "no")
    while first.is_alive() and not (folder / "_training_process").exists():
        time.sleep(0.01)
    log = tmp_path / "second.log"
    code, text = finished(forked_run([*words, "--output_dir", folder], log), log)
    first.kill()
    assert code == 1
    assert f"Another process trains into {folder}: process {first.pid} on {socket.gethostname()} holds" in text


def test_worker_that_is_forked_during_a_training_has_sigterm_blocked_from_its_start():
    def blocked_in_a_child() -> bool:
        if child := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        os._exit(3 if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []) else 0)

    with StopOnSignal():
        assert blocked_in_a_child() and signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert not blocked_in_a_child()
