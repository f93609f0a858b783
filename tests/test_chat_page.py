"""The page of scripts/chat.py in a real browser, headless Chromium. Skipped only where there is none."""

import json
import logging
import shutil
import time

import pytest
from answering import chatbot
from answering.opening import opened
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from trained import write_adapter

from finetuning.chat_rows import columns_of_rows, conversation, row_format
from finetuning.file_rows import read_rows
from run_chatglm_lora import ChatArguments


BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver on the PATH")

QUIET = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync --window-size=1100,700"
PHONE = {"deviceMetrics": {"width": 390, "height": 844, "pixelRatio": 1}}
TOOLS = [{"name": "weather", "description": "", "parameters": {}}]


class Told(chatbot.Chatbot):
    """A chatbot that says what a test tells it, or what the model says, slowly; and remembers what it was asked."""

    def __init__(self, *args):
        super().__init__(*args)
        self.script, self.asked, self.said, self.options_used, self.pause = None, [], [], {}, {True: 0.02, False: 0.02}

    def prompt(self, messages, *args):
        self.asked.append([(message["role"], message["content"]) for message in messages])
        return super().prompt(messages, *args)

    def answer(self, ids, from_base=False, **options):
        self.options_used, self.said = options, []
        for message in super().answer(ids, from_base, **options) if self.script is None else self.script:
            if isinstance(message, Exception):
                raise message
            self.said.append(message["content"])
            time.sleep(self.pause[from_base])
            yield message


def say(text, **message):
    return {"role": "assistant", "content": text, **message}


@pytest.fixture(scope="module")
def served(chatglm3, tmp_path_factory):
    """The chatbot and the address of its page."""
    from answering import chat_page  # late: Gradio takes seconds to import

    adapter = write_adapter(chatglm3, tmp_path_factory.mktemp("runs") / "tea", target_modules=["query_key_value"])
    bot = Told(*opened(adapter), {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}, TOOLS)
    interface = chat_page.page(bot, "be brief", adapter, ["an example"])
    chat_page.launched(interface, "127.0.0.1", None)
    yield bot, interface.local_url
    interface.close()


def started(folder, language, **options_of_chrome):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*QUIET.split(), f"--user-data-dir={folder / 'profile'}", f"--lang={language}"]:
        options.add_argument(flag)
    options.add_experimental_option(
        "prefs", {"intl.accept_languages": language, "download.default_directory": str(folder)}
    )
    for name, value in options_of_chrome.items():
        options.add_experimental_option(name, value)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(DRIVER))


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def browser(downloads):
    driver = started(downloads, "en-US")
    yield driver
    driver.quit()


@pytest.fixture
def page(served, browser):
    """The page with an empty conversation, in a browser that all tests share."""
    bot, url = served
    bot.script, bot.asked = None, []
    show(browser, url)
    if find(browser, "article"):
        press(browser, "button.primary")
        until(lambda: find(browser, ".welcome"))
    return browser


def show(browser, url):
    browser.get(url)
    until(lambda: find(browser, "#conversation h1") and find(browser, "#box button.submit-button"))
    until(lambda: find(browser, ".welcome, article"))


def until(condition, seconds=60):
    """The first true value of a condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the page did not come to it"
        time.sleep(0.05)
    return value


def find(browser, selector):
    return browser.find_elements(By.CSS_SELECTOR, selector)


def press(browser, selector):
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def shown(browser, selector):
    query = "return [...document.querySelectorAll(arguments[0])].map(part => part.innerText.trim())"
    return browser.execute_script(query, selector)  # in one go: the page changes all the time


def complete(browser, count):
    """The page's answers, when there are so many and the last has come to its end."""
    until(lambda: len(find(browser, ".assistant")) == count and not find(browser, "main.busy"))
    until(lambda: find(browser, "#box button.submit-button"))
    return shown(browser, ".assistant .prose")


def ask(browser, text, count=None):
    new_line = Keys.SHIFT + Keys.ENTER + Keys.NULL
    find(browser, "#box textarea")[0].send_keys(text.replace("\n", new_line), Keys.ENTER)
    return complete(browser, count) if count else None


def set_slider(browser, label, value):
    find(browser, f"input[aria-label*='{label}'][type=number]")[0].send_keys(Keys.CONTROL, "a")
    find(browser, f"input[aria-label*='{label}'][type=number]")[0].send_keys(value, Keys.TAB)


def said_by(bot, messages, from_base=False):
    """What the model says to a conversation."""
    ids, _ = bot.prompt([{"role": "system", "content": "be brief"}, *messages])
    return [message["content"] for message in chatbot.Chatbot.answer(bot, ids, from_base)][-1]


def test_answer_streams_stops_and_the_next_turn_knows_it(served, page, monkeypatch):
    bot, _ = served
    set_slider(page, "Longest answer", "400")
    monkeypatch.setitem(bot.options, "min_new_tokens", 400)
    ask(page, "first question")
    early = until(lambda: [text for text in shown(page, ".assistant .prose") if text])
    until(lambda: len(shown(page, ".assistant .prose")[0]) > len(early[0]))
    press(page, "#box .stop-button")
    (answer,) = complete(page, 1)
    assert "stopped" in shown(page, ".assistant small")[0]
    count = len(bot.said)
    monkeypatch.setitem(bot.options, "min_new_tokens", 12)
    set_slider(page, "Longest answer", "12")
    ask(page, "second question", 2)
    assert count < 390
    *before, last = bot.asked[-1]
    assert before == [("system", "be brief"), ("user", "first question"), ("assistant", answer)]
    assert last == ("user", "second question")


def test_failure_is_a_message_and_the_page_goes_on_also_after_a_reload(served, page, caplog, monkeypatch):
    bot, url = served
    ask(page, "你好", 1)
    bot.script = [say("half"), RuntimeError("the device is gone")]
    with caplog.at_level(logging.ERROR):
        ask(page, "now", 2)
    assert shown(page, ".error") == ["RuntimeError: the device is gone"] and "Traceback" in caplog.text
    bot.script = None
    with monkeypatch.context() as context:
        context.setattr(bot, "positions", 50)
        ask(page, "long " * 60, 3)
    reason = shown(page, ".error")[1]
    assert reason.startswith("The question makes a prompt of") and "shorten it" in reason
    show(page, url)
    assert shown(page, ".user")[:2] == ["你好", "now"] and shown(page, ".error")[0].startswith("RuntimeError")
    ask(page, "and now?", 4)
    assert [text for role, text in bot.asked[-1] if role == "user"] == ["你好", "and now?"]


def test_text_is_shown_as_written_and_code_as_code(served, page):
    bot, _ = served
    text = "<img src=http://localhost:9/x> ![](http://localhost:9/y)\n  a<b &lt; ${1+1} `x` **_y_** <div>z</div>"
    code = '#include <vector>\nif (a<b && c) { s = "<div>"; }'
    bot.script = [say(f"{text}\n```cpp\n{code}\n```\nlast <!-- line -->")]
    (answer,) = ask(page, text, 1)
    assert shown(page, ".assistant .prose > p") == [text, "last <!-- line -->"]
    assert shown(page, ".user .prose > p") == [text]
    assert shown(page, ".assistant figure.code code") == [code]
    assert shown(page, ".assistant figcaption > span") == ["cpp"]
    assert not find(page, "#conversation img, #conversation main p *")


def test_browser_loads_nothing_from_elsewhere_not_even_when_a_page_asks_for_it(served, page):
    _, url = served
    image = (
        "const image = new Image(); image.onerror = () => arguments[0](true); image.src = 'http://localhost:9/x.png'"
    )
    assert page.execute_async_script(image)
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    blocked = {
        event["params"]["requestId"]
        for event in events
        if event["method"] == "Network.loadingFailed" and event["params"].get("blockedReason") == "csp"
    }
    left = [request["request"]["url"] for request in sent if request["requestId"] not in blocked]
    left = [address for address in left if address.startswith(("http", "ws"))]  # the rest is the browser's own
    assert blocked and len(left) > 20 and not [address for address in left if not address.startswith(url)]


def test_edit_retry_and_undo_change_what_the_model_is_asked(served, page):
    bot, _ = served
    bot.script = [say("one")]
    ask(page, "first", 1)
    ask(page, "second", 2)
    bot.script = [say("two")]
    press(page, ".assistant:last-child .retry")
    until(lambda: complete(page, 2) == ["one", "two"])
    assert bot.asked[-1] == bot.asked[-2]
    press(page, ".user .edit")
    area = find(page, ".user textarea")[0]
    assert area.get_attribute("value") == "first"
    area.clear()
    area.send_keys("other <b>")
    press(page, ".user .send")
    until(lambda: complete(page, 1) == ["two"])
    assert bot.asked[-1] == [("system", "be brief"), ("user", "other <b>")]
    press(page, ".assistant .undo")
    until(lambda: find(page, ".welcome"))
    assert find(page, "#box textarea")[0].get_attribute("value") == "other <b>"


def test_settings_reach_the_model_and_the_base_answers_beside_the_adapter(served, page):
    bot, _ = served
    press(page, "input[type=checkbox]")
    ask(page, "你好", 1)
    question = [{"role": "user", "content": "你好"}]
    expected = [said_by(bot, question), said_by(bot, question, from_base=True)]
    assert shown(page, ".sides .prose") == [text.strip() for text in expected] and expected[0] != expected[1]
    assert bot.options_used == {"do_sample": False, "max_new_tokens": 12}
    press(page, "input[type=checkbox]")
    set_slider(page, "Temperature", "0.7")
    set_slider(page, "Top-p", "0.9")
    ask(page, "again", 2)
    assert bot.options_used == {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 12}
    assert shown(page, "header h1")[0].endswith("/tea")
    assert "adapter · base" in shown(page, "header p")[0] and "chatglm3 · float32 · cpu" in shown(page, "header p")[0]
    assert "tokens/s" in shown(page, ".assistant small")[0]


def test_stop_while_the_base_answers_gives_the_adapter_back(served, page, monkeypatch):
    bot, _ = served
    monkeypatch.setitem(bot.pause, True, 0.4)
    press(page, "input[type=checkbox]")
    ask(page, "first")
    until(lambda: shown(page, ".base .prose") not in ([], [""]))
    assert not bot.model.get_model_status().enabled
    press(page, "#box .stop-button")
    complete(page, 1)
    until(lambda: bot.model.get_model_status().enabled is True)
    assert len(shown(page, ".assistant small")) == 2


def test_calls_and_thoughts_are_told_from_text_and_the_download_is_a_row_that_training_reads(served, page, downloads):
    bot, _ = served
    call = '{"city": "杭州"}'
    bot.script = [say(call, metadata="weather")]
    press(page, ".examples button")
    until(lambda: find(page, ".call b"))
    complete(page, 1)
    assert shown(page, ".assistant .call b") == ["weather"] and shown(page, ".assistant .call code") == [call]
    bot.script = [say("<think>It rains\nthere.</think>Take an umbrella.")]
    assert ask(page, "rain", 2) == ["Take an umbrella."]
    assert shown(page, ".observation code") == ["rain"]
    assert shown(page, "details.thought:not([open])") == ["Thought"]
    press(page, "#download")
    path = until(lambda: list(downloads.glob("*.jsonl")))[0]
    rows = list(read_rows([str(path)]))
    messages = conversation(rows[0], row_format(columns_of_rows(rows), ChatArguments()), "row 1")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "observation", "assistant"]
    assert [message["content"] for message in messages][2:] == [call, "rain", bot.script[0]["content"]]


@pytest.mark.slow
def test_phone_in_chinese_is_as_wide_as_its_screen_and_keeps_a_conversation_of_its_own(served, page, tmp_path):
    bot, url = served
    bot.script = [say("x" * 300 + "\n```\n" + "y " * 300 + "\n```" + "\nline" * 60)]
    ask(page, "mine", 1)
    phone = started(tmp_path, "zh-CN", mobileEmulation=PHONE)
    try:
        show(phone, url)
        assert find(phone, "#box textarea")[0].get_attribute("placeholder") == "输入问题，Shift+Enter 换行"
        ask(phone, "yours", 1)
        assert shown(phone, ".user") == ["yours"] and shown(page, ".user") == ["mine"]
        assert bot.asked[-1] == [("system", "be brief"), ("user", "yours")]
        assert phone.execute_script("return document.documentElement.scrollWidth") == 390
        box, main = find(phone, "#box")[0].rect, "const main = document.querySelector('#conversation main'); return "
        assert box["y"] + box["height"] < 844 and phone.execute_script(main + "main.scrollHeight > 1000")
        assert phone.execute_script(main + "main.scrollWidth <= main.clientWidth")
    finally:
        phone.quit()
