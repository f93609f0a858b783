"""The page of scripts/chat.py in a real browser. Skipped where Gradio, Selenium or Chromium is missing."""

import shutil
import time

import chat_page
import chatbot
import pytest
from opening import opened


pytest.importorskip("gradio", minversion="6", reason="the page needs gradio: pip install 'gradio>=6'")
webdriver = pytest.importorskip("selenium.webdriver", reason="the browser is driven by selenium: pip install selenium")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402


BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver on the PATH")

QUIET = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync --window-size=900,640"


class SlowChatbot(chatbot.Chatbot):
    """A chatbot that takes its time and remembers the conversations it was asked to answer."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked, self.said = [], []

    def prompt(self, messages):
        self.asked.append([(message["role"], message["content"]) for message in messages])
        return super().prompt(messages)

    def answer(self, ids):
        for message in super().answer(ids):
            self.said.append(message["content"])
            time.sleep(0.05)
            yield message


@pytest.fixture(scope="module")
def served(chatglm3):
    """The chatbot and the address of its page."""
    model, tokenizer = opened(chatglm3)
    bot = SlowChatbot(model, tokenizer, {"max_new_tokens": 400, "min_new_tokens": 400, "do_sample": False})
    interface = chat_page.page(bot, "be brief", "tiny")
    chat_page.launched(interface, "127.0.0.1", None)
    yield bot, interface.local_url
    interface.close()


@pytest.fixture
def browser(tmp_path):
    """Opens the page in a browser of its own, each time."""
    drivers = []

    def opened(url):
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for flag in [*QUIET.split(), f"--user-data-dir={tmp_path / str(len(drivers))}"]:
            options.add_argument(flag)
        drivers.append(webdriver.Chrome(options=options, service=Service(DRIVER)))
        drivers[-1].get(url)
        until(lambda: drivers[-1].find_elements(By.CSS_SELECTOR, "textarea"))
        return drivers[-1]

    yield opened
    for driver in drivers:
        driver.quit()


def until(condition, seconds=60):
    """The first true value of a condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the page did not come to it"
        time.sleep(0.05)
    return value


def send(browser, text):
    browser.find_element(By.CSS_SELECTOR, "textarea").send_keys(text, Keys.ENTER)


def shown(browser, who):
    """Texts of the messages on the page by "user" or "bot"."""
    query = f"return [...document.querySelectorAll('.{who}.message')].map(message => message.innerText)"
    texts = browser.execute_script(query)  # in one go: the page changes all the time
    return [text for text in texts if text and not text.startswith("Loading")]


def stop(browser, bot):
    """Click the stop button, and wait until no more is generated."""
    click = "const button = document.querySelector('.stop-button'); button?.click(); return Boolean(button)"
    until(lambda: browser.execute_script(click))

    def resting():
        before = len(bot.said)
        time.sleep(0.5)
        return len(bot.said) == before

    until(resting)


def test_answer_streams_stops_and_the_next_turn_knows_it(served, browser):
    bot, url = served
    page = browser(url)
    send(page, "first question")
    (early,) = until(lambda: shown(page, "bot"))
    (later,) = until(lambda: (texts := shown(page, "bot")) != [early] and texts)
    assert len(later) > len(early)
    stop(page, bot)
    assert 0 < len(bot.said) < 390  # of 400 tokens
    said = bot.said.copy()
    send(page, "second question")
    until(lambda: len(shown(page, "bot")) == 2)
    stop(page, bot)
    *before, last = bot.asked[-1]
    assert before[:2] == [("system", "be brief"), ("user", "first question")]
    assert before[2][0] == "assistant" and before[2][1] in said[len(said) // 2 :]
    assert last == ("user", "second question")


def test_two_browsers_do_not_share_a_history(served, browser):
    bot, url = served
    one, other = browser(url), browser(url)
    for page, text in ((one, "mine"), (other, "yours"), (one, "mine again")):
        count = len(shown(page, "bot"))
        send(page, text)
        until(lambda page=page, count=count: len(shown(page, "bot")) > count)
        stop(page, bot)
    asked = [[text for role, text in conversation if role == "user"] for conversation in bot.asked[-3:]]
    assert asked == [["mine"], ["yours"], ["mine", "mine again"]]
    assert shown(other, "user") == ["yours"]


def test_page_loads_nothing_from_other_computers(served, browser):
    _, url = served
    page = browser(url)
    names = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    loaded = page.execute_script(names)
    assert loaded and all(name.startswith((url.rstrip("/"), "data:", "blob:")) for name in loaded)
