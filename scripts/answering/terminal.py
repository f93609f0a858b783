"""A conversation in the terminal, or from a file or a pipe."""

import contextlib
import os
import sys

from .chatbot import Chatbot, is_call, next_message, text_of, training_row


with contextlib.suppress(ImportError):  # Windows has none, and its terminal edits lines by itself
    import readline  # noqa: F401 - from now on input() edits lines and remembers them


HELP = '''\
/clear         forget the conversation
/undo          take the last question and its answer back
/regenerate    answer the last question again
/system TEXT   begin anew under this system message, or under none
/save FILE     append the conversation to FILE as one row of training data
/exit          leave, as Ctrl-D does; Ctrl-C stops an answer
A line that ends with \\ goes on in the next one; lines between """ and """ are one question.'''
BLOCK = '"""'


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
            append_row(os.path.expanduser(path), training_row(self.messages, self.bot.tools))
        except (OSError, ValueError) as error:
            print(f"(Not saved: {error})")
        else:
            print(f"(One row appended to {path}.)")


def append_row(path: str, row: str):
    """Write a row behind those of a file, of which the last may lack its end of line.

    Raises ValueError for a file that is one JSON list, which a row behind it would break.
    """
    with open(path, "a+b") as file:
        file.seek(0)
        if file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            raise ValueError(f"{path} is a JSON list, not a file with a row a line: name another one")
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        file.write(b"\n" * (file.read() not in (b"", b"\n")) + row.encode())


def entered(cue: str) -> str:
    """One question from the terminal: a line, lines that end with a backslash, or a block.

    The end of the input ends what was begun, too.
    """
    text = input(cue)
    if text.lstrip().startswith(BLOCK):
        lines = [text.lstrip().removeprefix(BLOCK)]
        while not lines[-1].rstrip().endswith(BLOCK):
            try:
                lines.append(input(cue and "... "))
            except EOFError:
                break
        return "\n".join(lines).rstrip().removesuffix(BLOCK).strip("\n")
    while text.endswith("\\"):
        try:
            text = text[:-1] + "\n" + input(cue and "... ")
        except EOFError:
            return text[:-1]
    return text


def converse(conversation: Conversation):
    """Questions and answers until /exit or the end of the input."""
    typed = sys.stdin.isatty()  # where questions come from a file or a pipe, the output is the answers alone
    if typed:
        print("A line is a question; /help lists the commands.")
    while True:
        try:
            text = entered("\n> " if typed else "")
            if text.startswith("/"):
                if not conversation.obey(text):
                    return
            elif text.strip():
                conversation.ask(text)
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves.)")
        except EOFError:
            print("\n" * typed, end="")
            return
