"""Talk to a model or to an adapter, in the terminal or as a page in the browser.

    python scripts/chat.py out                     a conversation with the adapter in out, on the base of its training
    python scripts/chat.py out --prompt "Hello"    one answer on standard output; --prompt - reads standard input
    python scripts/chat.py out --web               the same as a page, for this computer: http://127.0.0.1:7860

MODEL is an adapter folder, a model folder or a hub name. The prompt is the one of training: the tokenizer's own.
"""

import argparse
import importlib.util
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from answering import flags


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_model_flags(parser)
    flags.add_sampling_flags(parser)
    parser.add_argument(
        "--prompt", metavar="TEXT", help="answer this on standard output and exit; - reads the question"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--tools", type=Path, metavar="FILE", help="JSON list of tools, for models that call tools")

    page = parser.add_argument_group("page")
    page.add_argument("--web", action="store_true", help="serve a page; needs gradio")
    page.add_argument("--host", default="127.0.0.1", help="0.0.0.0: let other computers in (default: this one alone)")
    page.add_argument("--port", type=flags.port, default=7860)
    page.add_argument("--example", metavar="TEXT", action="append", help="a question to offer; may be given again")
    return parser.parse_args()


def main():
    arguments = parsed_arguments()
    if arguments.web and not importlib.util.find_spec("gradio"):
        sys.exit("chat.py: --web needs gradio: pip install 'gradio>=6.10'")
    try:
        options = flags.generation_options(arguments)
        tools = flags.tools_in(arguments.tools) if arguments.tools else None
        question = sys.stdin.read().strip() if arguments.prompt == "-" else arguments.prompt
        if question is not None and not question.strip():
            raise ValueError("--prompt: there is no question.")
    except (OSError, ValueError) as error:
        sys.exit(f"chat.py: {error}")

    from answering import loading, terminal  # late, as all that imports torch: --help and mistakes need none

    from finetuning.self_checks import SelfCheckFailed

    try:
        bot = loading.chatbot(arguments, options, tools)
        if question is not None:
            system = [{"role": "system", "content": arguments.system}] if arguments.system else []
            terminal.printed(bot, [*system, {"role": "user", "content": question}], stream=sys.stdout.isatty())
        elif arguments.web:
            from answering.chat_page import page, serve  # gradio is optional, and takes seconds

            serve(page(bot, arguments.system, arguments.model, arguments.example), arguments.host, arguments.port)
        else:
            terminal.converse(terminal.Conversation(bot, arguments.system))
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, SelfCheckFailed) as error:
        sys.exit(f"chat.py: {error}")


if __name__ == "__main__":
    main()
