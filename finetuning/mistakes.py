"""A mistake of the user's is one sentence; a defect of ours or of a library keeps its traceback."""

import difflib
import linecache
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps


OURS = {"__main__", "run_chatglm_lora", "finetuning", "chatglm"}  # modules and packages
SENTENCES = (ValueError, OSError, FloatingPointError, MemoryError)  # beside classes of our own
FUSED_LAYERS = {  # layers that stand for several of other models
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "dense_h_to_4h": ("gate_proj", "up_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
EXIT_CODE = 2  # as argparse's


def reported(main: Callable[[], None]) -> Callable[[], None]:
    """`main` as a program: a user's mistake ends it with exit code 2 and one sentence on stderr.

    Under torchrun rank 0 says it, and torchrun repeats the first failure of all ranks at the end of its own report
    (`recorded`). The traceback is shown too with --log_level debug, and of all other exceptions always.
    """

    @wraps(main)
    def program():
        try:
            recorded(main)()
        except Exception as error:
            if not is_for_the_user(error):
                raise
            if wants_traceback():
                traceback.print_exc()
            if speaks():
                print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
            sys.exit(EXIT_CODE)

    return program


def recorded(main: Callable[[], None]) -> Callable[[], None]:
    """`main`, whose failure torchrun gets to know where it has started this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record  # seconds that a misspelt flag need not take

    return record(main)


def is_for_the_user(error: BaseException) -> bool:
    """Whether the error is of a class of ours, or one of `SENTENCES` that a `raise` in a file of ours made.

    So no raising line needs a class of its own for that, and chatglm/ none of finetuning/. An error that comes out of
    a library, or of an expression in our code (zip's, int's), was written for whoever mends the program. One that
    comes back from a worker process has lost the place where it was raised: there the class tells.
    """
    if type(error).__module__.partition(".")[0] in OURS:
        return True
    if not isinstance(error, SENTENCES):
        return False
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    raised = linecache.getline(frame.f_code.co_filename, line, frame.f_globals).lstrip().startswith("raise ")
    return raised and frame.f_globals["__name__"].partition(".")[0] in OURS


@contextmanager
def named(what, *kinds):
    """In the block, an error of some classes, which a library raises for what the user named, is a sentence."""
    try:
        yield
    except kinds as error:
        if is_for_the_user(error):
            raise
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error


def speaks() -> bool:
    """Whether this process says what is wrong: any but the other ranks of torchrun, whose report names the first."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


def wants_traceback() -> bool:
    """Whether --log_level is debug, also where the flags could not be parsed."""
    asked = re.search(r"--log[_-]level[ =]debug\b", " ".join(sys.argv))
    return bool(asked) or logging.getLogger("run_chatglm_lora").isEnabledFor(logging.DEBUG)


def did_you_mean(name: str, names, cutoff: float = 0.6) -> str:
    """A question that offers the nearest of some names, to be put behind a sentence; empty where none is near."""
    near = difflib.get_close_matches(str(name), [str(each) for each in names], n=1, cutoff=cutoff)
    return f" Did you mean '{near[0]}'?" if near else ""


def way_out(layer: str, layers) -> str:
    """A sentence about a layer that a model does not have: the one that does its work, the nearest, or all names."""
    for fused, parts in FUSED_LAYERS.items():
        if layer in parts and fused in layers:
            return f"In this model {', '.join(parts[:-1])} and {parts[-1]} are one layer, '{fused}'."
    return did_you_mean(layer, layers).strip() or f"It has {', '.join(layers)}."
