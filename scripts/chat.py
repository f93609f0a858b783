"""Talk to a model or to an adapter, in the terminal or as a page in the browser.

    python scripts/chat.py out                     a conversation with the adapter in out, on the base of its training
    python scripts/chat.py out --prompt "Hello"    one answer on standard output; --prompt - reads standard input
    python scripts/chat.py out --web               the same as a page, for this computer: http://127.0.0.1:7860

MODEL is an adapter folder, a model folder or a hub name. The prompt is the one of training: the tokenizer's own.
"""

import argparse
import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

with contextlib.suppress(ImportError):  # Windows has none, and its terminal edits lines by itself
    import readline  # noqa: F401 - from now on input() edits lines and remembers them

import torch
import transformers
from chatbot import Chatbot, is_call, next_message, text_of, training_row
from opening import opened

from finetuning.self_checks import SelfCheckFailed, check_answers
from run_chatglm_lora import padding_id


QUESTIONS = ["你好", "Who are you?"]  # of the self-check: two lengths
HELP = '''\
/clear         forget the conversation
/undo          take the last question and its answer back
/regenerate    answer the last question again
/system TEXT   begin anew under this system message, or under none
/save FILE     append the conversation to FILE as one row of training data
/exit          leave, as Ctrl-D does; Ctrl-C stops an answer
A line that ends with \\ goes on in the next one; lines between """ and """ are one question.'''
BLOCK = '"""'


def add_model_flags(parser: argparse.ArgumentParser):
    """What `loaded` reads."""
    parser.add_argument("model", metavar="MODEL", help="adapter folder, model folder or hub name")
    parser.add_argument("--base_model", help="the base of an adapter, where it is not at the place noted in it")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python files that the checkpoint brings")

    loading = parser.add_argument_group("where and how the model is loaded")
    loading.add_argument("--device", help="default: the accelerator if there is one, else cpu")
    loading.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="default: bfloat16 (float16 on older cards), on the CPU as stored",
    )
    loading.add_argument(
        "--no_self_check",
        action="store_false",
        dest="self_check",
        help="do not compare answers with and without cache",
    )
    bits = loading.add_mutually_exclusive_group()
    bits.add_argument("--load_in_4bit", action="store_const", const=4, dest="bits", help="needs bitsandbytes")
    bits.add_argument("--load_in_8bit", action="store_const", const=8, dest="bits", help="needs bitsandbytes")


def add_sampling_flags(parser: argparse.ArgumentParser):
    sampling = parser.add_argument_group(
        "how answers are chosen (default: as the checkpoint says, else the likeliest)"
    )
    sampling.add_argument("--do_sample", action="store_true", default=None)
    sampling.add_argument("--no_do_sample", action="store_false", dest="do_sample", help="always the likeliest token")
    sampling.add_argument("--temperature", type=float)
    sampling.add_argument("--top_p", type=float)
    sampling.add_argument("--top_k", type=int)
    sampling.add_argument("--repetition_penalty", type=float)
    sampling.add_argument("--max_new_tokens", type=int, default=1024, help="longest answer (default %(default)s)")
    sampling.add_argument("--seed", type=int, help="makes sampled answers repeatable")


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    add_sampling_flags(parser)
    parser.add_argument(
        "--prompt", metavar="TEXT", help="answer this on standard output and exit; - reads the question"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--tools", type=Path, metavar="FILE", help="JSON list of tools, for models that call tools")

    page = parser.add_argument_group("page")
    page.add_argument("--web", action="store_true", help="serve a page; needs gradio")
    page.add_argument("--host", default="127.0.0.1", help="0.0.0.0: let other computers in (default: this one alone)")
    page.add_argument("--port", type=int, default=7860)
    page.add_argument("--example", metavar="TEXT", action="append", help="a question to offer; may be given again")
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------------- terminal


def printed(bot: Chatbot, messages: list[dict], stream: bool = True) -> dict | None:
    """The answer, printed as it comes; what there is of it after Ctrl-C, None if that is nothing."""
    ids, dropped = bot.prompt(messages)
    if dropped:
        print(f"(The oldest {dropped} turns are left out: the prompt was too long.)", file=sys.stderr)
    message, shown, stopped = None, "", ""
    try:
        for message in bot.answer(ids):
            text = text_of(message)
            if stream and text.startswith(shown):
                print(text[len(shown) :], end="", flush=True)
                shown = text
    except KeyboardInterrupt:
        if not stream:
            raise
        stopped = " (stopped)"
    if message and shown.split() != text.split():  # not streamed, or bytes that turned out to be no character
        print(("\n" if shown else "") + text, end="")
    print(stopped)
    return message


class Conversation:
    def __init__(self, bot: Chatbot, system: str | None):
        self.bot = bot
        self.begin(system)

    def begin(self, system: str | None):
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str):
        self.answer([*self.messages, next_message(self.messages, text)])

    def answer(self, messages: list[dict]):
        """Answer a conversation that ends with a question; where that fails, the conversation stays as it was."""
        try:
            reply = printed(self.bot, messages)
        except ValueError as error:
            print(error)
            return
        if reply:
            self.messages = [*messages, reply]
        if is_call(reply):
            print(f"(A call of {reply['metadata']}. What you write next goes back as its result.)")

    def without_last_answer(self, also_question: bool) -> list[dict] | None:
        """The conversation up to its last answer, or up to the question before it; None if nothing was answered."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return None
        return self.messages[: -2 if also_question else -1]

    def obey(self, command: str) -> bool:
        """Carry out a command; False if it was the last."""
        name, _, rest = command.partition(" ")
        rest = rest.strip()
        if name == "/clear":
            self.begin(self.system)
            print("(A new conversation.)")
        elif name in ("/undo", "/regenerate"):
            shorter = self.without_last_answer(also_question=name == "/undo")
            if shorter is None:
                print("(No answer yet.)")
            elif name == "/regenerate":
                self.answer(shorter)
            else:
                self.messages = shorter
                print("(The last question and its answer are forgotten.)")
        elif name == "/system":
            self.begin(rest or None)
            print(f"(A new conversation {'under: ' + rest if rest else 'without a system message'}.)")
        elif name == "/save":
            self.save(rest)
        elif name in ("/exit", "/quit"):
            return False
        else:
            if name != "/help":
                print(f"(There is no command {name}. A question that begins with a slash: put a blank before it.)")
            print(HELP)
        return True

    def save(self, path: str):
        if not path or not any(message["role"] == "assistant" for message in self.messages):
            print(
                "(/save FILE appends a conversation that has an answer: name the file.)"
                if not path
                else "(No answer yet.)"
            )
            return
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(training_row(self.messages, self.bot.tools))
        except OSError as error:
            print(f"(Not saved: {error})")
        else:
            print(f"(One row appended to {path}.)")


def entered(cue: str) -> str:
    """One question from the terminal: a line, lines that end with a backslash, or a block."""
    text = input(cue)
    if text.lstrip().startswith(BLOCK):
        lines = [text.lstrip().removeprefix(BLOCK)]
        while not lines[-1].rstrip().endswith(BLOCK):
            lines.append(input(cue and "... "))
        return "\n".join(lines).rstrip().removesuffix(BLOCK).strip("\n")
    while text.endswith("\\"):
        text = text[:-1] + "\n" + input(cue and "... ")
    return text


def converse(conversation: Conversation):
    """Questions and answers until /exit or the end of the input."""
    typed = sys.stdin.isatty()  # where questions come from a file or a pipe, the output is the answers alone
    if typed:
        print("A line is a question; /help lists the commands.")
    while True:
        try:
            text = entered("\n> " if typed else "")
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves.)")
            continue
        except EOFError:
            print("\n" * typed, end="")
            return
        if text.startswith("/"):
            if not conversation.obey(text):
                return
        elif text.strip():
            conversation.ask(text)


# ------------------------------------------------------------------------------------------------------------- main


def chosen_device(arguments: argparse.Namespace) -> str:
    if arguments.device:
        return arguments.device
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def chosen_dtype(arguments: argparse.Namespace, device: str) -> str | None:
    """Name of the dtype to load in; None: as stored."""
    if arguments.dtype or device == "cpu":
        return arguments.dtype
    old = device.startswith("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "float16" if old else "bfloat16"


def generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags say about generation; a flag of sampling asks for sampling."""
    names = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if options["max_new_tokens"] < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, not {options['max_new_tokens']}.")
    if {"temperature", "top_p", "top_k"} & set(options):
        if options.get("do_sample") is False:
            raise ValueError(
                "--no_do_sample takes the likeliest token: --temperature, --top_p, --top_k say nothing then."
            )
        options["do_sample"] = True
    return options


def tools_in(path: Path) -> list[dict]:
    """The list of tools in a JSON file. Raises ValueError if it is none."""
    try:
        tools = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--tools {path} is not JSON: {error}") from error
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"--tools {path} must hold a list of objects, one for each tool.")
    return tools


def loaded(arguments: argparse.Namespace):
    """Model and tokenizer of the command line."""
    device = chosen_device(arguments)
    print(f"Loading {arguments.model} on {device} ...", file=sys.stderr, flush=True)
    return opened(
        arguments.model,
        base_model=arguments.base_model,
        dtype=chosen_dtype(arguments, device),
        device=device,
        bits=arguments.bits,
        trust_remote_code=arguments.trust_remote_code,
    )


def chatbot(arguments: argparse.Namespace) -> Chatbot:
    options = generation_options(arguments)
    tools = tools_in(arguments.tools) if arguments.tools else None
    model, tokenizer = loaded(arguments)
    if arguments.seed is not None:
        transformers.set_seed(arguments.seed)
    bot = Chatbot(model, tokenizer, options, tools)
    if arguments.self_check:
        questions = ([{"role": "user", "content": text}] for text in QUESTIONS)
        check_answers(model, [bot.prompt(messages)[0] for messages in questions], padding_id(tokenizer))
    return bot


def main():
    arguments = parsed_arguments()
    if arguments.web and not importlib.util.find_spec("gradio"):
        sys.exit("chat.py: --web needs gradio: pip install 'gradio>=6.10'")
    transformers.utils.logging.set_verbosity_error()
    try:
        bot = chatbot(arguments)
        if arguments.prompt is not None:
            text = sys.stdin.read().strip() if arguments.prompt == "-" else arguments.prompt
            system = [{"role": "system", "content": arguments.system}] if arguments.system else []
            printed(bot, [*system, {"role": "user", "content": text}], stream=sys.stdout.isatty())
        elif arguments.web:
            from chat_page import page, serve  # late: gradio is optional, and takes seconds

            serve(page(bot, arguments.system, arguments.model, arguments.example), arguments.host, arguments.port)
        else:
            converse(Conversation(bot, arguments.system))
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, SelfCheckFailed) as error:
        sys.exit(f"chat.py: {error}")


if __name__ == "__main__":
    main()
