"""The conversation as a page in the browser, with Gradio.

chat_page.js draws the messages (Gradio's own chat component takes them for Markdown and HTML), chat_page.css says how
they look, and chat_page.json is what the page says in English and Chinese.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .chatbot import Chatbot, next_message, training_row


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
import gradio  # noqa: E402


logger = logging.getLogger("run_chatglm_lora.chat_page")

# What the page says, in each language: the browser's own is shown.
WORDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
TRANSLATIONS = gradio.I18n(**{place: WORDS[place[:2]] for place in ("en", "zh", "zh-CN", "zh-TW", "zh-HK")})
# Whatever a message holds and whatever Gradio comes to ask for: the browser loads nothing from another computer.
NOTHING_FROM_ELSEWHERE = """<meta http-equiv="Content-Security-Policy"
    content="default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'">"""
OPEN_WHERE_WIDE = "() => ({__type__: 'update', open: innerWidth > 900})"
DOWNLOAD = """text => Object.assign(document.createElement("a"), {
    href: URL.createObjectURL(new Blob([text])), download: "conversation.jsonl"}).click()"""


def said(shown: list[dict], system: str | None) -> list[dict]:
    """The messages as training reads them: without questions that were not answered and what only the page shows."""
    messages = [{"role": "system", "content": system}] if system else []
    for message in shown:
        if message["role"] == "assistant" and ("error" in message or not message["content"]):
            messages.pop()  # the question
        else:
            messages.append({key: message[key] for key in ("role", "content", "metadata") if key in message})
    return messages


def asked(shown: list[dict], text: str) -> list[dict]:
    """A conversation with one more question, to which the answer is still to come."""
    return [*shown, next_message(said(shown, None), text), {"role": "assistant", "content": "", "pending": True}]


def rested(shown: list[dict]) -> list[dict]:
    """A conversation in which nothing is answered any more: an answer that had not come to its end was stopped."""
    if not shown or not shown[-1].get("pending"):
        return shown
    return [*shown[:-1], {**shown[-1], "pending": False, "stopped": True}]


def reason(error: Exception) -> str:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return f"Out of memory: a new conversation, or a shorter answer, needs less. ({error})"
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def timed_answer(bot: Chatbot, messages: list[dict], from_base: bool, length: int, **sampling) -> Iterator[dict]:
    """The answer as far as it has come, with its tokens and seconds; where it fails, with the reason. Never raises."""
    answer, begin, drawn = {"role": "assistant", "content": ""}, time.perf_counter(), 0
    try:
        ids, dropped = bot.prompt(messages, length)
        for message in bot.answer(ids, from_base, max_new_tokens=length, **sampling):
            seconds = time.perf_counter() - begin
            answer = {**message, "tokens": len(bot.reply), "seconds": seconds, "dropped": dropped}
            if seconds - drawn > 0.1:  # a browser that has to draw every token comes behind
                drawn = seconds
                yield answer
    except Exception as error:  # whatever it is, the page goes on
        logger.exception("There is no answer.")
        answer = {**answer, "error": reason(error)}
    yield answer


def answered(bot: Chatbot, shown: list[dict], system, temperature, top_p, length, compare) -> Iterator[list[dict]]:
    """The conversation with its last answer as far as that has come, and in that the base's answer, to `compare`."""
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    *before, answer = shown
    messages = said(before, system)
    for answer in timed_answer(bot, messages, False, length, **sampling):
        yield [*before, {**answer, "pending": True}]
    if compare:
        for base in timed_answer(bot, messages, True, length, **sampling):
            answer["base"] = base
            yield [*before, {**answer, "pending": True}]
    yield [*before, {**answer, "pending": False}]


def about(bot: Chatbot, name: str) -> dict[str, str]:
    """What the head of the page says: the names of model or adapter and base, without the folders they lie in."""
    parameter = next(bot.model.parameters())
    name, base = ("/".join(Path(path).parts[-2:]) for path in (name, bot.model.name_or_path))
    how = f"{str(parameter.dtype).removeprefix('torch.')} · {parameter.device.type}"
    return {"name": name, "base": base if bot.has_adapter else "", "how": how}


def settings(bot: Chatbot, system: str | None) -> list:
    """The inputs beside the conversation, in the order in which `answered` takes them."""
    say, defaults = TRANSLATIONS, {**bot.model.generation_config.to_dict(), **bot.options}
    temperature = (defaults["temperature"] or 1) if defaults["do_sample"] else 0
    length = defaults["max_new_tokens"]
    longest = max(length, min((bot.positions or 4096) // 2, 8192))
    return [
        gradio.Textbox(system or "", label=say("system"), placeholder=say("system_hint"), lines=3),
        gradio.Slider(0, 2, temperature, step=0.05, label=say("temperature"), info=say("temperature_info")),
        gradio.Slider(0.05, 1, defaults["top_p"] or 1, step=0.05, label=say("top_p")),
        gradio.Slider(1, longest, length, step=1, precision=0, label=say("length")),
        gradio.Checkbox(label=say("compare"), info=say("compare_info"), visible=bot.has_adapter),
    ]


def page(bot: Chatbot, system: str | None, name: str, examples: list[str] | None = None) -> gradio.Blocks:
    """Gradio's page. The browser keeps the conversation; answers are made one after the other."""
    say, head = TRANSLATIONS, about(bot, name)
    script = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
    resting, answering = {"submit_btn": True, "stop_btn": False}, {"submit_btn": False, "stop_btn": True}
    quick = {"queue": False, "show_progress": "hidden"}

    with gradio.Blocks(title=head["name"], fill_height=True, analytics_enabled=False) as interface:
        # The secret is none, so that the conversation outlives this process.
        kept = gradio.BrowserState([], storage_key=f"chat with {name}", secret="none")
        frame = {"html_template": "<header></header><main aria-live='polite'></main>", "apply_default_css": False}
        told = {"words": WORDS, "about": head, "examples": examples}
        view = gradio.HTML(js_on_load=script, elem_id="conversation", **frame, **told)
        hint = {"placeholder": say("hint"), "show_label": False, "elem_id": "box"}
        box = gradio.Textbox(autofocus=True, max_lines=8, **hint, **resting)
        with gradio.Sidebar(position="right", open=False) as panel:
            new = gradio.Button(say("new"), variant="primary", size="md")
            inputs = settings(bot, system)
            save = gradio.Button(say("save"), size="md", elem_id="download")
            shade = gradio.Button(say("shade"), size="md")
            row = gradio.Textbox(visible=False)

        def begin(shown, text):
            if not text.strip() or (shown and shown[-1].get("pending")):  # Enter, before the last answer is complete
                raise gradio.Error(visible=False, print_exception=False)
            return asked(shown, text), gradio.Textbox("", **answering)

        def begin_again(shown, event: gradio.EventData):
            return asked(shown[: event.index], event.text), gradio.Textbox(**answering)

        def answer(*values):
            yield from answered(bot, *values)

        def end(shown):
            return rested(shown), gradio.Textbox(**resting)

        def clear():
            return [], gradio.Textbox(**resting)

        def written(shown, system):
            return training_row(said(shown, system), bot.tools)

        questions = [
            box.submit(begin, [view, box], [view, box], **quick),
            view.ask(begin_again, view, [view, box], **quick),
        ]
        one_by_one = {"concurrency_id": "model", "show_progress": "hidden"}
        answers = [event.success(answer, [view, *inputs], view, **one_by_one) for event in questions]
        for event in answers:
            event.then(end, view, [view, box], **quick)
        box.stop(end, view, [view, box], cancels=answers, **quick)
        new.click(clear, None, [view, box], cancels=answers, **quick)
        view.undo(lambda shown: (shown[:-2], shown[-2]["content"]), view, [view, box], **quick)
        view.change(None, view, kept, js="shown => [shown]")
        interface.load(end, kept, [view, box], **quick)
        save.click(written, [view, inputs[0]], row).then(None, row, None, js=DOWNLOAD)
        interface.load(None, None, panel, js=OPEN_WHERE_WIDE)
        shade.click(None, js="() => document.body.classList.toggle('dark')")
    return interface


def launched(interface, host: str, port: int | None):
    """Start to serve the page; with port None at the first free one from 7860 on."""
    # The default theme asks a font service; these are on every computer.
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gradio.themes.Default(primary_hue="teal", neutral_hue="slate", **fonts)
    look = {"theme": theme, "css_paths": Path(__file__).with_suffix(".css"), "head": NOTHING_FROM_ELSEWHERE}
    place = {"server_name": host, "server_port": port, "share": False, "prevent_thread_lock": True}
    interface.launch(**place, **look, i18n=TRANSLATIONS, footer_links=[], ssr_mode=False, quiet=True)


def serve(interface, host: str, port: int):
    """Show the page until Ctrl-C."""
    launched(interface, host, port)
    if host not in ("127.0.0.1", "localhost"):
        print(f"Everybody who reaches port {port} of this computer can use the page.", file=sys.stderr)
    print(f"http://{host}:{port}   (Ctrl-C ends)", flush=True)
    interface.block_thread()
