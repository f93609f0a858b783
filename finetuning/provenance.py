"""What a result is made from: base, code, prompt format and versions, for provenance.json."""

import hashlib
import inspect
import subprocess
from pathlib import Path

import datasets
import peft
import torch
import transformers

from . import __version__, adapters


PROJECT = Path(__file__).resolve().parent.parent


def record(model, tokenizer, model_args, row_format):
    """What the result is made from: base, revision, code, prompt format and versions."""
    model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    question, prompt = [{"role": "user", "content": "..."}], None
    if row_format:
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    return {
        "base_model": model_args.model_name_or_path,
        "revision": model_args.model_revision,
        "commit": getattr(model.config, "_commit_hash", None),
        "base_content": adapters.base_content(model.name_or_path, getattr(model.config, "_commit_hash", None)),
        "checkpoint_code": code_revision(model),
        "model_code": code_in_words(model),
        "project": {"version": __version__, "commit": project_commit()},
        "prompt_format": prompt,
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, peft, datasets)},
    }


def code_revision(model) -> dict | None:
    """File, hash and commit of the checkpoint code that a model runs on; None for installed code."""
    if not type(model).__module__.startswith("transformers_modules."):
        return None
    source = Path(inspect.getsourcefile(type(model)))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return {"file": source.name, "sha256": digest, "commit": getattr(model.config, "_commit_hash", None)}


def code_in_words(model) -> str:
    """Whose code a model runs: the checkpoint's, this project's, or that of transformers."""
    if own := code_revision(model):
        return f"{own['file']} of the checkpoint, commit {own['commit']}, sha256 {own['sha256']}"
    if type(model).__module__.startswith("chatglm."):
        return f"chatglm/ of {project_in_words()}"
    return f"transformers {transformers.__version__}"


def project_in_words() -> str:
    return f"chatglm-lora {__version__}, commit {project_commit() or 'unknown'}"


def project_commit() -> str | None:
    """The commit of this project's clone, with -dirty where files were changed; None where it is no clone."""
    if not (PROJECT / ".git").exists():
        return None
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git on this machine, or a clone of somebody else
        return None
