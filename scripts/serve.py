"""Serve a model or an adapter with the interface of OpenAI's chat completions and the prompt of the training.

    python scripts/serve.py out                        for this computer alone: http://127.0.0.1:8000/v1
    python scripts/serve.py out --host 0.0.0.0 --api_key SECRET

MODEL is an adapter folder, a model folder or a hub name. Answers are made one after the other. For many users at once
there are vLLM and SGLang, which take the native export of merge_lora.py.
"""

import argparse
import importlib.util
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from answering import flags


NEEDED = ("pydantic", "starlette", "uvicorn")
LOOPBACK = ("127.0.0.1", "localhost")


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_model_flags(parser)
    flags.add_sampling_flags(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="0.0.0.0: let other computers in (default: this one alone)")
    group.add_argument("--port", type=flags.port, default=8000)
    group.add_argument("--api_key", metavar="KEY", help="answer only requests that bring this key")
    group.add_argument("--name", help="the model's name for clients (default: the last part of MODEL)")
    group.add_argument(
        "--max_prompt_tokens",
        type=flags.at_least_1,
        help="longest prompt (default: what the model has room for)",
    )
    group.add_argument(
        "--max_waiting", type=flags.at_least_0, default=16, help="requests that may wait (default %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.api_key == "":  # of a variable that is not set
        parser.error("--api_key is empty, and everybody could ask: give a key, or leave the flag out")
    return arguments


def main():
    arguments = parsed_arguments()
    if missing := [name for name in NEEDED if not importlib.util.find_spec(name)]:
        sys.exit(f"serve.py needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    try:
        options = flags.generation_options(arguments)
    except ValueError as error:
        sys.exit(f"serve.py: {error}")

    import uvicorn  # late: optional, as is Starlette; and torch takes seconds, which --help and mistakes need not wait
    from answering.completions import Server
    from answering.loading import chatbot

    from finetuning.self_checks import SelfCheckFailed

    try:
        bot = chatbot(arguments, options)
    except (OSError, ValueError, SelfCheckFailed) as error:
        sys.exit(f"serve.py: {error}")
    name = arguments.name or Path(arguments.model).resolve().name
    server = Server(bot, name, arguments.api_key, arguments.max_waiting, arguments.max_prompt_tokens)
    if arguments.host not in LOOPBACK and not arguments.api_key:
        print(f"Everybody who reaches port {arguments.port} of this computer can use the model.", file=sys.stderr)
    print(f"{name}: http://{arguments.host}:{arguments.port}/v1   (Ctrl-C ends)", flush=True)
    app = server.app(hosts=LOOPBACK if arguments.host in LOOPBACK else None)
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning", timeout_graceful_shutdown=3)


if __name__ == "__main__":
    main()
