"""Captions over HTTP from a real server, from a tiny vision-language model, from a function; and the choice of them."""

import base64
import contextlib
import io
import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minisora_jax.cli import main
from minisora_jax.curation import endpoint
from minisora_jax.curation.captioners import EXPAND, LONG, SHORT, CaptionRefused, describe, expand, open_captioner
from minisora_jax.curation.endpoint import Endpoint
from minisora_jax.curation.prepare import prepare
from minisora_jax.io.retry import DataError
from minisora_jax.media.video_writer import write_video
from minisora_jax.sources.clips import Records, choose_caption, open_clips

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def plain(colour, T=5):
    return np.full((T, 32, 48, 3), COLOURS[colour], np.uint8)


class Server:
    """An OpenAI-compatible server that looks at the pictures. `script`: what it does before it answers, a request each:
    a status, (status, headers), "hang", "drop", "half", or a body to answer with, as JSON or in bytes."""

    def __init__(self, *script):
        self.script, self.requests, self.headers, self.gets = list(script), [], [], []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.gets.append(dict(self.headers))
                self.send_error(404)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, body))
                server.headers.append(dict(self.headers))
                step = server.script.pop(0) if server.script else None
                if step == "hang":
                    time.sleep(1.0)
                if step in ("hang", "drop"):
                    self.close_connection = True
                    return
                status, extra = step if isinstance(step, tuple) else (step if isinstance(step, int) else 200, {})
                answer = step if isinstance(step, (dict, list)) else server.answer(body)
                data = json.dumps({"error": "busy"} if status != 200 else answer).encode()
                data = step if isinstance(step, bytes) else data
                self.send_response(status)
                for name, value in {**extra, "Content-Length": len(data)}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if step == "half" else data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, body):
        *images, text = body["messages"][0]["content"]
        words = {SHORT: "A {} video.", LONG: "The whole picture is {}.\n\nIt stays {}  throughout."}
        form = words.get(text["text"], "Answer: {}")
        seen = []
        for image in images:
            head, data = image["image_url"]["url"].split(",")
            assert head == "data:image/jpeg;base64" and image["type"] == "image_url"
            mean = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean((0, 1))
            seen.append(min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum()))
        words = form.replace("{}", seen[0] if len(set(seen)) == 1 else text["text"][-20:])
        return {"choices": [{"message": {"role": "assistant", "content": words}, "finish_reason": "stop"}]}


@contextlib.contextmanager
def serving(*script):
    server = Server(*script)
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


def fast(server, **options):
    return Endpoint(f"{server.url}#eyes", timeout=0.5, waits=(0.01, 0.02), **options)


def test_an_endpoint_is_shown_the_frames_and_asked_twice(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving() as server:
        captions = describe(fast(server), np.concatenate([plain("green", 20)]))
    assert captions == {"short": "A green video.", "long": "The whole picture is green. It stays green throughout."}
    (path, body), (_, other) = server.requests
    assert path == "/v1/chat/completions" and body["model"] == "eyes" and body["temperature"] == 0
    assert len(body["messages"][0]["content"]) == 8 + 1 and other["messages"][0]["content"][-1]["text"] == LONG
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_large_frames_are_shrunk_and_one_image_is_sent_once():
    with serving() as server:
        fast(server).ask(SHORT, np.zeros((1, 1080, 1920, 3), np.uint8))
    [picture, _] = server.requests[0][1]["messages"][0]["content"]
    data = base64.b64decode(picture["image_url"]["url"].split(",")[1])
    assert Image.open(io.BytesIO(data)).size == (768, 432)


@pytest.mark.parametrize("trouble", [503, 500, 429, 408, "hang", "drop", "half"])
def test_what_passes_is_tried_again(trouble):
    with serving(trouble, trouble) as server:
        assert fast(server).ask(SHORT, plain("red")) == "A red video."
    assert len(server.requests) == 3


def test_the_server_says_how_long_to_wait(monkeypatch):
    waited = []
    monkeypatch.setattr(endpoint.time, "sleep", waited.append)
    no_number = (503, {"Retry-After": "nan"})
    date = (429, {"Retry-After": "Thu, 01 Jan 2099 00:00:00 GMT"})
    with serving((429, {"Retry-After": "7"}), date, (503, {"Retry-After": "soon"}), no_number) as server:
        Endpoint(f"{server.url}#eyes", waits=(1.0, 2.0, 4.0, 5.0)).ask(SHORT, plain("red"))
    assert waited == [7.0, 300.0, 4.0, 5.0], "as it says, at most 300 s, and ours where it makes no sense"


def test_what_does_not_pass_stops_with_the_reason():
    with (
        serving(503, 503, 503) as server,
        pytest.raises(RuntimeError, match="no answer in 3 tries .* HTTP 503 Service"),
    ):
        fast(server).ask(SHORT)
    for status, words in {401: "Set OPENAI_API_KEY", 404: "is eyes a model that it serves"}.items():
        with serving(status) as server, pytest.raises(RuntimeError, match=f"HTTP {status} .*busy.*{words}"):
            fast(server).ask(SHORT)
        assert len(server.requests) == 1, "it is asked once"
    with serving({"detail": "hello"}) as server, pytest.raises(RuntimeError, match="which is no chat completion"):
        fast(server).ask(SHORT)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1#eyes"
        with pytest.raises(RuntimeError, match="in 2 tries over .*refused"):
            Endpoint(url, waits=(0.01,)).ask(SHORT)
    with pytest.raises(ValueError, match="names no model: write URL#MODEL"):
        Endpoint("http://localhost:8000/v1")


def test_a_clip_that_is_refused_is_no_reason_to_stop():
    for answer in (
        400,
        422,
        {"choices": [{"message": {"content": None}}]},
        {"choices": [{"message": {"content": " "}}]},
    ):
        with serving(answer) as server, pytest.raises(CaptionRefused):
            describe(fast(server), plain("red"))
    with serving(400) as server, pytest.raises(RuntimeError, match="does eyes take pictures"):
        fast(server).check()


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_does_not_get_the_key(monkeypatch, code):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving() as other, serving((code, {"Location": f"{other.url}/chat/completions"})) as server:
        with pytest.raises(RuntimeError, match=f"HTTP {code} .*{other.url}.* not followed.*give that URL"):
            fast(server).ask(SHORT)
    assert len(server.requests) == 1 and not other.requests and not other.gets


@contextlib.contextmanager
def dripping(beginning):
    """A server that answers with `beginning`, and then with a byte every 20 ms, without an end."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        over = threading.Event()

        def drip():
            with contextlib.suppress(OSError):
                while not over.is_set():
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(2**16)
                        connection.sendall(beginning)
                        while not over.wait(0.02):
                            connection.sendall(b"a")

        threading.Thread(target=drip, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1#eyes"
        finally:
            over.set()


@pytest.mark.parametrize(
    "beginning", [b"", b"HTTP/1.1 200 OK\r\nx-name: ", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 400 No\r\n\r\n"]
)
def test_an_answer_that_drips_ends_at_the_deadline(beginning):
    with dripping(beginning) as spec:
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="no answer in 1 tries .* no whole answer within 0.3 s"):
            Endpoint(spec, timeout=0.3, waits=()).ask(SHORT)
        assert time.monotonic() - began < 2.0
        time.sleep(0.1)
    names = [thread.name for thread in threading.enumerate()]
    assert beginning[-4:] != b"\r\n\r\n" or "captioner" not in names, "what reads a body ends too"


def _saying(words):
    return {"choices": [{"message": {"content": words}}]}


def test_an_answer_has_a_limit_in_bytes_and_a_caption_one_in_characters():
    with serving(_saying("x" * 2**21)) as server, pytest.raises(CaptionRefused, match="more than 1048576 bytes"):
        describe(fast(server), plain("red"))
    with serving(_saying("x" * 10_001)) as server, pytest.raises(CaptionRefused, match="10001 characters.*is 10000"):
        describe(fast(server), plain("red"))
    with serving(_saying("x" * 10_000)) as server:
        assert len(describe(fast(server), plain("red"))["short"]) == 10_000


def test_an_answer_that_is_no_plain_text_is_cleaned_or_refused():
    with serving(_saying("a\x1b[31m red\x00\u2028square\r\n\x85moves\x07 ")) as server:
        assert describe(fast(server), plain("red"))["short"] == "a[31m red square moves"
    for strange in ("a \ud800 b", 7, {"a": 1}, ["a"], "\x00\x1b"):
        with serving(_saying(strange)) as server, pytest.raises(CaptionRefused):
            describe(fast(server), plain("red"))
    for strange in ("\x1b[2J" * 99, 7, {}, {"choices": {}}, {"choices": [7]}, {"choices": [{"message": "\x1b"}]}):
        with serving(json.dumps(strange).encode()) as server, pytest.raises(RuntimeError) as refused:
            fast(server).ask(SHORT)
        assert "which is no chat completion" in str(refused.value) and "\x1b" not in str(refused.value)
    for nested in (b"[" * 2**19, b"9" * 5000, b"\xff\xfe", b"", b"<html>"):
        with serving(*[nested] * 3) as server, pytest.raises(RuntimeError, match="no answer in 3 tries"):
            fast(server).ask(SHORT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name in COLOURS:
        write_video(folder / f"{name}.mp4", plain(name), 8)
    (folder / "red.txt").write_text("my title")
    return folder


def test_a_data_set_keeps_all_captions_and_gives_one(folder, tmp_path):
    with serving() as server:
        spec = f"{server.url}#eyes"
        prepare(folder, tmp_path / "a", captioner=spec, workers=2, files_per_part=2)
        prepare(folder, tmp_path / "b", captioner=spec, files_per_part=2)
        asked = len(server.requests)
        assert asked == 2 * (3 * 2 + 1), "two captions a clip, and one test"
        prepare(folder, tmp_path / "a", captioner=spec, files_per_part=2)
        assert len(server.requests) == asked
    files = lambda out: {path.name: path.read_bytes() for path in out.iterdir()}
    assert files(tmp_path / "a") == files(tmp_path / "b")
    _, metadata = Records(tmp_path / "a").shards.read(2)
    assert (metadata["name"], metadata["caption"], metadata["captions"]["short"]) == (
        "red.mp4",
        "my title",
        "A red video.",
    )
    long = {c.name: c.caption for c in open_clips(str(tmp_path / "a"), long_captions=1.0)}
    assert long["blue.mp4"] == "The whole picture is blue. It stays blue throughout."
    rest = {clip.name: clip.caption for clip in Records(tmp_path / "a", long_captions=0.0)}
    assert rest["blue.mp4"] == "A blue video." and rest["red.mp4"] in ("my title", "A red video.")
    assert list(Records(tmp_path / "a").sizes[:, 3]) == [
        len(long["blue.mp4"]),
        len(long["green.mp4"]),
        len(long["red.mp4"]),
    ]
    identities = {Records(tmp_path / "a", long_captions=share).identity for share in (0.95, 0.5)}
    assert len(identities) == 2, "a latent cache of other captions is another cache"
    page = (tmp_path / "a/report.html").read_text()
    assert "<i>short:</i> A green video." in page
    with (
        serving() as server,
        pytest.raises(DataError, match="captioner='eyes of an endpoint .*this one has .*'ears of"),
    ):
        prepare(folder, tmp_path / "a", captioner=f"{server.url}#ears", files_per_part=2)


def test_an_endpoint_that_fails_midway_loses_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "WAITS", ())
    monkeypatch.setattr(Endpoint.__init__, "__kwdefaults__", {"timeout": 5.0, "waits": ()})
    open_captioner.cache_clear()
    grey = {"choices": [{"message": {"content": "grey"}}]}
    with serving(grey, grey, grey, 503) as server:
        spec = f"{server.url}#eyes"
        with pytest.raises(RuntimeError, match="no answer in 1 tries .*503.* Run the same command again"):
            prepare(folder, tmp_path / "out", captioner=spec, files_per_part=1)
        assert len(server.requests) == 4
        prepare(folder, tmp_path / "out", captioner=spec, files_per_part=1)
        assert len(server.requests) == 4 + 1 + 4, "a test, and the clips that had no captions yet"
    assert Records(tmp_path / "out", long_captions=1.0)[0].caption == "grey", "the first clip kept what it had"
    open_captioner.cache_clear()


def test_a_refused_clip_is_named_in_the_report(folder, tmp_path):
    (tmp_path / "eyes.py").write_text(
        "def look(instruction, frames):\n    return '' if frames[..., 0].mean() > 100 else 'not red'\n"
    )
    report = prepare(folder, tmp_path / "out", captioner=f"{tmp_path}/eyes.py:look")
    assert report.kept == 2 and report.skipped == [
        {"name": "red.mp4", "stage": "caption", "reason": "no caption", "detail": "the captioner answered ''"}
    ]


def test_the_choice_of_captions_is_a_function_of_the_name_and_follows_the_share():
    names = [f"clip{i}.mp4" for i in range(4000)]
    both = {"short": "short", "long": "long"}
    picked = [choose_caption("original", both, name) for name in names]
    assert picked == [choose_caption("original", both, name) for name in names]
    shares = {kind: picked.count(kind) / len(names) for kind in ("long", "short", "original")}
    assert shares["long"] == pytest.approx(0.95, abs=0.015)
    assert shares["short"] == pytest.approx(0.025, abs=0.01) and shares["original"] == pytest.approx(0.025, abs=0.01)
    assert {choose_caption("", both, name, 0.5) for name in names} == {"short", "long"}
    assert {choose_caption("original", {}, name) for name in names} == {"original"}
    longer = [name for name in names if choose_caption("o", both, name, 0.9) == "long"]
    assert all(choose_caption("o", both, name, 0.95) == "long" for name in longer), (
        "a larger share keeps the choices made"
    )
    with pytest.raises(ValueError, match="is 1.5 and must be 0 to 1"):
        choose_caption("o", both, "a", 1.5)


def test_a_prompt_is_expanded_by_the_same_models(capsys, tmp_path):
    with serving() as server:
        assert expand("a cat on a skateboard", fast(server)) == "Answer: cat on a skateboard"
        [text] = server.requests[0][1]["messages"][0]["content"]
        assert text["text"] == EXPAND + "a cat on a skateboard"
    with pytest.raises(ValueError, match="the prompt is empty"):
        expand("  ", None)
    (tmp_path / "words.py").write_text(
        "def more(instruction, frames):\n"
        "    return 'a red circle grows on a black background' if instruction.endswith('Request: circle') else ''\n"
    )
    argv = ["generate", "circle", "--expand", f"{tmp_path}/words.py:more", "--model", "/nowhere"]
    assert main(argv) == 2, "the prompts come before the model"
    captured = capsys.readouterr()
    assert "circle -> a red circle grows on a black background" in captured.out and "/nowhere is not" in captured.err
    assert main(["generate", "square", *argv[2:]]) == 2 and "no caption" in capsys.readouterr().err


def test_a_vision_language_model_of_transformers(tmp_path):
    """The same check runs in CI's environment that has PyTorch (.ci/remake)."""
    pytest.importorskip("torch")
    sys.path.insert(0, str(Path(__file__).parent / "parity"))
    import captioner

    captioner.check(tmp_path)


def test_the_spelling_tells_the_captioner(tmp_path):
    with pytest.raises(ValueError, match="there is no file nowhere.py"):
        open_captioner("nowhere.py:f")
    assert type(open_captioner("http://localhost:1/v1#m")).__name__ == "Endpoint"
    assert type(open_captioner("json:dumps")).__name__ == "Function"
    model = open_captioner(str(tmp_path))
    assert type(model).__name__ == "VisionLanguageModel"
    with pytest.raises(
        (ImportError, RuntimeError), match="needs PyTorch: pip install torch|is no vision-language model"
    ):
        model.check()
