"""An Ollama Modelfile for a merged ChatGLM3 or GLM-4: for merge_lora.py."""

from pathlib import Path

from .weights import Merge


GGUF = "model.gguf"  # what the Modelfile expects beside it
LAYOUTS = {"chatglm3": "published", "glm4": "native"}  # those that llama.cpp's converter takes
BLANKS = {"chatglm3": " ", "glm4": ""}  # what a tokenizer puts before each text; a given answer has it already
PROBE = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "bye"},
]


def check_ollama(merge: Merge):
    """Raise a ValueError where a Modelfile could not say the prompt, or llama.cpp not read the weights."""
    tokenizer, layout = merge.tokenizer, merge.arguments.format
    generation = getattr(tokenizer, "generation", None)
    if generation not in LAYOUTS:
        raise ValueError("--ollama writes the prompts of ChatGLM3 and GLM-4; other models' have no such template.")
    if layout != LAYOUTS[generation]:
        raise ValueError(
            f"llama.cpp converts this model in the other layout: pass --format {LAYOUTS[generation]} with --ollama."
        )
    said = "".join(f"<|{each['role']}|>\n{BLANKS[generation]}{each['content']}" for each in PROBE)
    text = tokenizer.apply_chat_template(PROBE, tokenize=False, add_generation_prompt=True)
    if text != "".join(tokenizer.prefix) + said + "<|assistant|>":
        raise ValueError(
            "--ollama writes the published prompt, and this model was trained with a template of its own."
        )


def modelfile(tokenizer) -> str:
    """The Modelfile. Its prompt ends with the newline that every answer begins with, so that answers come without."""
    blank = BLANKS[tokenizer.generation]
    blank = blank and '{{ if ne .Role "assistant" }}' + blank + "{{ end }}"
    turns = "{{ range .Messages }}<|{{ .Role }}|>\n" + blank + "{{ .Content }}{{ end }}<|assistant|>\n"
    stops = "".join(f'PARAMETER stop "<|{role}|>"\n' for role in ("user", "observation"))
    return f'FROM ./{GGUF}\nTEMPLATE """{"".join(tokenizer.prefix)}{turns}"""\n{stops}'


def write_modelfile(merge: Merge, folder: Path):
    (folder / "Modelfile").write_text(modelfile(merge.tokenizer), encoding="utf-8")
