"""The conversation as a page in the browser, with Gradio."""

import os
import sys

from chatbot import Chatbot, is_call, next_message


def page(bot: Chatbot, system: str | None, title: str):
    """Gradio's chat page. Each browser session has a history of its own; answers are made one after the other."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    def replies(text, history):
        messages = [{"role": "system", "content": system}] if system else []
        for message in history:
            content = message["content"]
            if not isinstance(content, str):  # Gradio's list of parts
                content = "".join(part.get("text", "") for part in content)
            name = (message.get("metadata") or {}).get("title")
            role = next_message(messages, "")["role"] if message["role"] == "user" else "assistant"
            messages.append({"role": role, "content": content, **({"metadata": name} if name else {})})
        messages.append(next_message(messages, text))
        try:
            ids, dropped = bot.prompt(messages)
        except ValueError as error:
            raise gradio.Error(str(error)) from error
        if dropped:
            gradio.Info(f"The oldest {dropped} turns are left out: the prompt was too long.")
        for message in bot.answer(ids):
            if is_call(message):
                yield gradio.ChatMessage(message["content"], metadata={"title": message["metadata"]})
            else:
                yield message["content"]

    # Without the button that sends a conversation to the hub's forum.
    messages = gradio.Chatbot(show_label=False, buttons=["copy", "copy_all"], scale=1)
    return gradio.ChatInterface(replies, chatbot=messages, title=title, concurrency_limit=1, analytics_enabled=False)


def launched(interface, host: str, port: int | None):
    """Start to serve the page; with port None at the first free one from 7860 on."""
    import gradio

    # The default theme asks a font service; these are on every computer.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    place = {"server_name": host, "server_port": port, "share": False, "prevent_thread_lock": True}
    interface.launch(**place, theme=theme, footer_links=[], ssr_mode=False, quiet=True)


def serve(interface, host: str, port: int):
    """Show the page until Ctrl-C."""
    launched(interface, host, port)
    if host not in ("127.0.0.1", "localhost"):
        print(f"Everybody who reaches port {port} of this computer can use the page.", file=sys.stderr)
    print(f"http://{host}:{port}   (Ctrl-C ends)", flush=True)
    interface.block_thread()
