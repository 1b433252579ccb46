"""The page of a world: its server, spoken to as a stranger would, and the page in a real browser."""

import base64
import contextlib
import http.client
import io
import json
import os
import shutil
import socket
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="the page needs gradio: uv sync --group ui")

from serving import running  # noqa: E402
from small_world import ACTIONS, SIZE, write_world  # noqa: E402

from minisora_jax.generate.streaming import StreamConfig  # noqa: E402
from minisora_jax.generate.world import World  # noqa: E402
from minisora_jax.ui.play import application  # noqa: E402

PICTURES = Path(os.environ.get("MINISORA_SCREENSHOTS", "/nowhere"))
MOST = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    names = write_world(tmp_path_factory.mktemp("world"))
    return World.load(*(name.partition("=")[2] for name in names), StreamConfig(steps=1, window=3))


@pytest.fixture(scope="module")
def server(world):
    """(port, visitors) of a real server."""
    app, visitors = application(world, most=MOST)
    with running(app) as port:
        yield port, visitors
    assert not visitors._thread.is_alive(), "the world ends with its server"


@pytest.fixture
def port(server):
    port, visitors = server
    wait(lambda: len(visitors) == 0)
    return port


def wait(what, seconds=60):
    until = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < until, "it did not come to it"
        time.sleep(0.02)
    return value


class Walk:
    """A visitor without a browser."""

    def __init__(self, port, **headers):
        self.port, self.number = port, 0
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.connection.request("POST", "/walk", headers=headers)
        self.answer = self.connection.getresponse()
        self.about = self.part()[0] if self.answer.status == 200 else self.answer.read().decode()

    def part(self):
        note, picture = struct.unpack(">II", self.answer.read(8))
        return json.loads(self.answer.read(note)), self.answer.read(picture)

    def say(self, message=None, token=None, **wish):
        if message is None:
            self.number += 1
            message = json.dumps({"number": self.number} | wish)
        return ask(self.port, "POST", f"/walk/{token or self.about['token']}", message)

    def picture(self):
        """(note, pixels) of the next picture, which is said to be seen."""
        note, data = self.part()
        self.say(seen=note["frame"])
        return note, np.asarray(Image.open(io.BytesIO(data)))

    def leave(self):
        self.answer.close()
        self.connection.close()


def ask(port, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")


def test_a_walk_over_the_wire(port):
    walk = Walk(port)
    assert walk.about["size"] == list(SIZE) and walk.about["fps"] == 20 and walk.about["caption"] == "a small world"
    assert [action["name"] for action in walk.about["actions"]] == list(ACTIONS)
    pictures = [walk.picture() for _ in range(3)]
    assert [note["frame"] for note, _ in pictures] == [1, 2, 3]
    assert all(pixels.shape == (*SIZE, 3) and pixels.std() > 1 for _, pixels in pictures)
    since = time.monotonic()
    for _ in range(10):
        walk.picture()
    assert time.monotonic() - since > 8 / 20, "no faster than the world's rate"
    assert walk.say(actions=["turn left"], seen=13) == (204, "")
    walk.leave()


def test_a_walk_is_freed_when_its_connection_ends(server, port):
    _, visitors = server
    walks = [Walk(port) for _ in range(MOST)]
    full = Walk(port)
    assert full.answer.status == 503 and f"all {MOST} places of this world are taken" in full.about
    walks[0].leave()
    wait(lambda: len(visitors) == MOST - 1, 10)
    again = Walk(port)
    assert again.answer.status == 200 and again.picture()[0]["frame"] == 1
    for walk in (*walks[1:], again):
        walk.leave()
    wait(lambda: len(visitors) == 0, 10)


def test_hostile_messages_get_a_sentence_and_stop_nothing(server, port):
    walk = Walk(port)
    for message, status, words in [
        (b"\x00\xff" * 100, 400, "a JSON object"),
        (b"[" * 4000, 400, "a JSON object"),
        (b'{"actions": ["fly"]}', 400, "'fly' is no action of this world"),
        (b"x" * 5000, 413, "at most 4096 bytes"),
        (b"x" * 2**21, 413, "too large"),
    ]:
        got, text = walk.say(message)
        assert got == status and words in text, (message[:20], got, text)
    assert walk.say("{}", token="nobody")[0] == 404
    assert ask(port, "GET", "/walk")[0] == 405 and ask(port, "GET", "/../visitors.py")[0] == 404
    with socket.create_connection(("127.0.0.1", port)) as stranger:  # the page has no web sockets
        stranger.sendall(
            b"GET /walk HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert stranger.recv(100).split()[1] in (b"400", b"403", b"405")
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"\x16\x03\x01" + os.urandom(200))
        stranger.recv(100)
    assert walk.picture()[0]["frame"] >= 1
    walk.leave()


def test_a_page_elsewhere_cannot_walk_here(port):
    at = f"127.0.0.1:{port}"
    assert Walk(port, Origin=f"http://{at}").answer.status == 200
    for headers in ({"Origin": "http://evil.example"}, {"Host": f"evil.example:{port}"}, {"Origin": "null"}):
        walk = Walk(port, **headers)
        assert walk.answer.status == 403 and "minisora play --allow-host" in walk.about
    assert ask(port, "POST", "/walk/x", "{}", Origin="http://evil.example")[0] == 403


def test_a_visitor_who_reads_nothing_costs_a_few_frames(server, port):
    _, visitors = server
    walk = Walk(port)
    [visitor] = visitors._here.values()
    wait(lambda: visitor.made >= 4)
    time.sleep(0.5)
    assert visitor.made == 4
    walk.leave()


# ---- In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("selenium", reason="the browser's driver: uv sync --group ui")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium or chromedriver is not here: apt-get install chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --disable-dev-shm-usage --window-size=800,1000"
    for flag in (*flags.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def tab(browser):
    """The browser, which leaves the page after the test."""
    yield browser
    browser.get("about:blank")


def test_keys_and_buttons_walk(tab, server, port):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    _, visitors = server
    tab.get(f"http://127.0.0.1:{port}/")
    find = lambda css: tab.find_element(By.CSS_SELECTOR, css)
    frame = lambda: int(find("#world").get_attribute("data-frame") or 0)
    pixels = lambda: tab.execute_script("return document.getElementById('world').toDataURL('image/png')")
    wait(lambda: frame() > 3)
    [visitor] = visitors._here.values()
    assert find("#status").text == "" and len(tab.find_elements(By.CSS_SELECTOR, "button[data-action]")) == 6

    before = pixels()
    ActionChains(tab).key_down(Keys.ARROW_UP).perform()
    wait(lambda: visitor.wish.actions == ("move forward",))
    assert "held" in find("[data-action='move forward']").get_attribute("class")
    ActionChains(tab).key_down("a").perform()
    wait(lambda: visitor.wish.actions == ("move forward", "turn left"))
    ActionChains(tab).key_up("a").key_up(Keys.ARROW_UP).perform()
    wait(lambda: visitor.wish.actions == ())
    assert pixels() != before
    decoded = Image.open(io.BytesIO(base64.b64decode(pixels().partition(",")[2])))
    assert decoded.size == (480, 320) and np.asarray(decoded.convert("RGB")).std() > 1
    wait(lambda: find("#latency").text.isdigit())
    wait(lambda: frame() > 70)  # the last two seconds are at the world's rate, 20
    assert 0 < int(find("#latency").text) < 5000 and float(find("#fps").text) <= 22 and find("#step").text.isdigit()

    told = []
    hear, visitor.hear = visitor.hear, lambda wish: (told.append(wish.actions), hear(wish))
    tab.execute_script(  # a press that is shorter than a frame counts for one
        "for (const type of ['keydown', 'keyup']) dispatchEvent(new KeyboardEvent(type, {key: 'ArrowRight'}))"
    )
    wait(lambda: ("turn right",) in told and visitor.wish.actions == ())
    button = find("[data-action='move left']")
    ActionChains(tab).click_and_hold(button).perform()
    wait(lambda: visitor.wish.actions == ("move left",))
    if PICTURES.is_dir():
        tab.save_screenshot(str(PICTURES / "play.png"))
    ActionChains(tab).release().perform()
    wait(lambda: visitor.wish.actions == ())
    place = button.rect
    finger = {"type": "touchStart", "touchPoints": [{"x": place["x"] + 9, "y": place["y"] + 9}]}
    tab.execute_cdp_cmd("Input.dispatchTouchEvent", finger)
    wait(lambda: visitor.wish.actions == ("move left",))
    tab.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    wait(lambda: visitor.wish.actions == ())

    find("#caption").clear()
    find("#caption").send_keys("a large world", Keys.ENTER)  # its letters are no steps
    wait(lambda: visitor.player.caption == "a large world")
    assert visitor.wish.actions == ()
    seed = visitor.seed
    find("#reset").click()
    wait(lambda: visitor.seed != seed)

    tab.execute_script(
        "const make = URL.createObjectURL;"
        "URL.createObjectURL = (file) => { window.saved = [file.type, file.size]; return make.call(URL, file); }"
    )
    find("#record").click()
    frames = frame()
    wait(lambda: frame() > frames + 10)
    find("#record").click()
    kind, size = wait(lambda: tab.execute_script("return window.saved"))
    assert kind in ("video/webm", "video/mp4") and size > 1000
    bad = [entry for entry in tab.get_log("browser") if entry["level"] == "SEVERE"]
    assert not bad, bad
    tab.get("about:blank")
    wait(lambda: len(visitors) == 0, 10)


def test_the_page_says_when_it_is_full_and_when_a_walk_is_over(tab, server, port):
    _, visitors = server
    walks = [Walk(port) for _ in range(MOST)]
    tab.get(f"http://127.0.0.1:{port}/")
    status = lambda: tab.execute_script("return document.getElementById('status').textContent")
    wait(lambda: "places of this world are taken" in status())
    walks[0].leave()
    wait(lambda: len(visitors) == MOST - 1, 10)
    tab.refresh()
    wait(lambda: len(visitors) == MOST and status() == "")
    for visitor in list(visitors._here.values()):
        visitors.leave(visitor, "the world has closed")
    wait(lambda: status() == "the world has closed: load the page again.")
    walks[1].leave()
