"""The page in a real browser: chromium, headless, driven as a visitor would."""

import json
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="the page needs gradio: uv sync --group ui")
pytest.importorskip("selenium", reason="the browser's driver: uv sync --group ui")
if not (CHROMIUM := shutil.which("chromium")) or not (DRIVER := shutil.which("chromedriver")):
    pytest.skip("chromium or chromedriver is not here: apt-get install chromium-driver", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402
from serving import served  # noqa: E402

from minisora_jax.media.video import read_clip_frames  # noqa: E402

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,1000"
PATIENCE = 120  # seconds, for a machine that has other work too
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "demo.png"
PICTURES = Path(os.environ.get("MINISORA_SCREENSHOTS", "/nowhere"))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("ui") / "out"


@pytest.fixture(scope="module")
def address(out):
    with served(out) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(PATIENCE)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address):
    return Page(browser, address)


class Page:
    """A tab, and what a visitor does in it."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        self.find("#generate")

    def wait(self, what):
        wait = WebDriverWait(self.browser, PATIENCE, 0.1, [StaleElementReferenceException])
        return wait.until(lambda _: what())

    def find(self, css):
        return self.wait(lambda: next(iter(self.browser.find_elements(By.CSS_SELECTOR, css)), None))

    def choose(self, title):
        self.wait(lambda: [e for e in self.browser.find_elements(By.CSS_SELECTOR, "#task label") if e.text == title])
        next(e for e in self.browser.find_elements(By.CSS_SELECTOR, "#task label") if e.text == title).click()

    def write(self, where, text):
        """Into a field, as its value; Gradio hears of it by the event."""
        field = self.find(f"#{where} textarea, #{where} input")
        script = """
        const kind = arguments[0].tagName === 'TEXTAREA' ? HTMLTextAreaElement : HTMLInputElement;
        Object.getOwnPropertyDescriptor(kind.prototype, 'value').set.call(arguments[0], arguments[1]);
        for (const name of ['input', 'change', 'blur'])
          arguments[0].dispatchEvent(new Event(name, {bubbles: true}));"""
        self.browser.execute_script(script, field, text)

    def size(self, text):
        """A drop-down that one may write into."""
        field = self.find("#size input")
        field.click()
        field.send_keys("\ue009a\ue000" + text + "\ue007")

    def upload(self, where, path):
        self.wait(lambda: self.browser.find_elements(By.CSS_SELECTOR, f"#{where} input[type=file]"))
        self.find(f"#{where} input[type=file]").send_keys(str(path))

    def little(self):
        """As little work as shows that it works."""
        self.write("length", "5 frames")
        self.size("32x32")
        if not self.browser.find_elements(By.CSS_SELECTOR, "#steps input"):
            self.find("#more button").click()
        self.write("steps", "2")

    def make(self):
        self.find("#generate").click()

    def state(self):
        panel = self.browser.find_elements(By.CSS_SELECTOR, "#result .panel")
        return panel[0].get_attribute("data-state") if panel else ""

    def sentence(self, css="#result .error"):
        return self.wait(lambda: (messages := self.browser.find_elements(By.CSS_SELECTOR, css)) and messages[0].text)

    def video(self):
        """(the file's name, its width in pixels), once the browser has its data."""
        video = self.find("#result video")
        size = lambda: self.browser.execute_script("return [arguments[0].readyState, arguments[0].videoWidth]", video)
        self.wait(lambda: size()[0] >= 2)
        return video.get_attribute("src").rpartition("/")[2], size()[1]

    def picture(self, name):
        if PICTURES.is_dir():
            self.browser.save_screenshot(str(PICTURES / f"{name}.png"))


def test_a_clip_is_made_of_words_and_shown(page, out):
    page.picture("1-empty")
    page.little()
    page.make()
    seen = set()
    page.wait(lambda: seen.add(page.state()) or page.state() == "finished")
    page.wait(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#gallery .tile video"))
    name, width = page.video()
    page.picture("2-made")
    assert width == 128 and seen & {"waiting", "running"}
    frames, _ = read_clip_frames(out / name)
    record = json.loads((out / f"{name}.json").read_text())
    assert frames.shape == (5, 128, 128, 3) and frames.std() > 3 and record["sampling"]["sampler"]["steps"] == 2
    links = [a.get_attribute("href") for a in page.browser.find_elements(By.CSS_SELECTOR, "#result .links a")]
    kinds = {}
    for link in links:
        with urllib.request.urlopen(link) as answer:
            kinds[link.rpartition(".")[2]] = answer.read(12)
    assert kinds["mp4"][4:8] == b"ftyp" and kinds["webm"][:4] == b"\x1a\x45\xdf\xa3" and kinds["gif"][:4] == b"GIF8"
    assert kinds["zip"][:2] == b"PK" and kinds["json"][:1] == b"{"
    bad = [e for e in page.browser.get_log("browser") if e["level"] == "SEVERE" and "favicon" not in e["message"]]
    assert not [e for e in bad if page.browser.current_url in e["message"] and "manifest" not in e["message"]], bad


def test_a_picture_that_is_uploaded_is_animated(page, out, tmp_path):
    picture = np.zeros((48, 48, 3), np.uint8)
    picture[12:36, 12:36] = (215, 40, 40)
    Image.fromarray(picture).save(tmp_path / "square.png")
    page.choose("Image to video")
    page.upload("image", tmp_path / "square.png")
    assert "48 x 48 pixels" in page.sentence("#image-check .file")
    page.little()
    page.write("prompt", "a large red square moves left on a black background")
    page.make()
    name, _ = page.video()
    page.picture("3-animated")
    first = read_clip_frames(out / name)[0][0]  # 128x128: of the picture, scaled to 32x32
    middle, corner = first[56:72, 56:72].mean((0, 1)), first[:16, :16].mean((0, 1))
    assert middle[0] > 150 and middle[2] < 100 and corner.max() < 60


def test_a_bad_upload_gets_its_sentence_and_so_does_making_it(page, tmp_path):
    (tmp_path / "cat.png").write_text("I am not a picture")
    page.choose("Image to video")
    page.upload("image", tmp_path / "cat.png")
    assert page.sentence("#image-check .error").startswith("cat.png is text; choose a picture")
    page.make()
    assert page.sentence().startswith("cat.png is text; choose a picture")
    page.picture("4-refused")
    assert "Traceback" not in page.browser.page_source


def test_examples_and_an_impossible_length(page):
    page.choose("Outpaint")
    page.find("#examples button").click()  # its clip comes with it
    assert "17 frames, 64 x 48 pixels" in page.sentence("#video-check .file")
    page.choose("Long video")
    page.wait(lambda: "[4s]" in page.find("#prompt textarea").get_attribute("value"))
    page.write("length", "2 minutes")
    page.make()
    assert page.sentence() == '"2 minutes" is no length: write 2 s, or 17 frames.'
    page.picture("5-long")


def test_eight_visitors_each_get_their_own(browser, address, out):
    """Each at another name of the same server: so they share no cookies, and no limit on connections."""
    colours = ("red", "green", "blue", "yellow", "cyan", "magenta", "orange", "white")
    prompts = [f"a photo of a large {colour} square on a black background" for colour in colours]
    tabs = {}
    for i, prompt in enumerate(prompts):
        browser.switch_to.new_window("tab")
        tabs[prompt] = browser.current_window_handle
        page = Page(browser, address.replace("127.0.0.1", f"visitor-{i}.localhost"))
        page.little()
        page.write("prompt", prompt)
        page.write("seed", str(i))
    for tab in tabs.values():
        browser.switch_to.window(tab)
        page.make()
    records = {}
    for prompt, tab in tabs.items():
        browser.switch_to.window(tab)
        name, _ = page.video()
        record = json.loads((out / f"{name}.json").read_text())
        caption = page.find("#result .caption").text
        assert record["job"]["prompt"] == caption == prompt and record["job"].get("seed", 0) == prompts.index(prompt)
        records[name] = record
    page.picture("6-eight")
    assert len(records) == 8 and len({r["pixels"] for r in records.values()}) == 8


def test_no_file_but_what_was_made_is_handed_out(address, out):
    secret, ours = out / "secret.txt", Path(__file__).resolve()
    secret.write_text("secret")
    files = ("/etc/passwd", ours, secret, out / "uploads", f"{out}/incoming/../secret.txt")
    paths = [f"gradio_api/file={path}" for path in files] + ["file=/etc/passwd", "results/../secret.txt"]
    paths += ["results/..%2Fsecret.txt", "results/secret.txt", "results/%2e%2e/secret.txt"]
    for path in paths:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}{path}")
        assert refused.value.code in (403, 404, 405), path


def test_a_request_that_names_a_file_of_the_machine_is_refused(address, out):
    """Past the page, at Gradio's own interface: as somebody would who means harm."""
    with urllib.request.urlopen(f"{address}gradio_api/info") as answer:
        inputs = json.load(answer)["named_endpoints"]["/generate"]["parameters"]
    values = {p["parameter_name"]: p.get("parameter_default") for p in inputs}
    named = {p["label"]: p["parameter_name"] for p in inputs}
    values |= {inputs[0]["parameter_name"]: "image_to_video", named["Prompt"]: "a red circle"}
    example = str(out / "incoming" / "examples" / "circle-right.png")  # such a request is otherwise in order
    others = (
        "/etc/passwd",
        "../../etc/passwd",
        str(PICTURE),
        f"{out}/incoming/../../a.png",
        "http://127.0.0.1:1/a.png",
    )
    for field, path in [("Picture", example), *(("Picture", p) for p in others), ("Prompt", str(PICTURE))]:
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        job = values | {named["Size"]: "8x50", named[field]: file}
        data = json.dumps({"data": list(job.values())}).encode()
        request = urllib.request.Request(
            f"{address}gradio_api/call/generate", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{address}gradio_api/call/generate/{event}") as answer:
            events = answer.read().decode()
        if path == example:
            assert "16 pixels a side and more" in events, events
        else:
            assert "event: error" in events, events
    copied = {p.name for p in (out / "incoming").rglob("*") if p.is_file()} | {p.name for p in out.glob("uploads/*")}
    assert "circle-right.png" in copied and not copied & {"passwd", PICTURE.name, "a.png"}
