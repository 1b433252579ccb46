"""The page's server, spoken to over HTTP as somebody would who means harm."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="the page needs gradio: uv sync --group ui")

from PIL import Image  # noqa: E402
from serving import served  # noqa: E402

from minisora_jax.io.lock import Busy, only_writer  # noqa: E402
from minisora_jax.media.video_writer import write_video  # noqa: E402
from minisora_jax.ui import incoming  # noqa: E402
from minisora_jax.ui.guard import Names  # noqa: E402
from minisora_jax.ui.server import serve  # noqa: E402


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("ui") / "out"


@pytest.fixture(scope="module")
def port(out):
    """The port of a real server, which looks for old uploads every 0.2 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incoming, "SWEEP_EVERY", 0.2)
        with served(out) as port:
            yield port


def ask(port, method, path, body=None, **headers):
    """(status, text) of a request; a header of None is left out, and Host too."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            if value is not None:
                connection.putheader(name.replace("_", "-"), value)
        if body is not None and "Transfer_Encoding" not in headers and "Content_Length" not in headers:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send(body or b"")
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")


def multipart(content, name="a.png"):
    head = f'--edge\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    return head + content + b"\r\n--edge--\r\n"


def upload(port, content, **headers):
    return ask(
        port,
        "POST",
        "/gradio_api/upload",
        multipart(content),
        Content_Type="multipart/form-data; boundary=edge",
        **headers,
    )


def test_a_page_elsewhere_cannot_use_this_one(port):
    """DNS rebinding comes with a host of its own, a request across sites with another origin."""
    at = f"127.0.0.1:{port}"
    for host in (
        at,
        f"localhost:{port}",
        f"LOCALHOST:{port}",
        f"visitor.localhost:{port}",
        f"[::1]:{port}",
        "localhost.",
    ):
        assert ask(port, "GET", "/", Host=host)[0] == 200, host
        assert ask(port, "GET", "/", Host=host, Origin=f"http://{host}")[0] == 200, host
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "evil@localhost", "192.168.1.7", "",
                 "127.0.0.1.evil.example", "localhost/", "[::1", "10.0.0.1:80:80", "evil.example#a"):  # fmt: skip
        status, text = ask(port, "GET", "/", Host=host)
        assert status == 403 and "does not answer to" in text and "--allow-host" in text, (host, text)
    for origin in ("http://evil.example", "null", "http://localhost:1", f"http://{at}.evil.example", "", f"http://{at}/",
                   f"http://evil.example/{at}", f"http://{at}@evil.example"):  # fmt: skip
        for path in ("/gradio_api/queue/join", "/gradio_api/call/generate", "/gradio_api/upload"):
            status, text = ask(port, "POST", path, b"{}", Host=at, Origin=origin, Content_Type="text/plain")
            assert status == 403 and "may not use this one" in text, (origin, text)


def test_a_folder_has_one_page(tmp_path):
    with only_writer(tmp_path, "minisora generate --batch"), pytest.raises(Busy, match="`minisora generate --batch`"):
        serve(None, tmp_path, {}, "127.0.0.1", 0)


def test_further_names_are_allowed_by_name():
    local, network = Names(), Names("0.0.0.0", ["videos.example.org"])
    assert local.refusal("192.168.1.7:7860", None) and not network.refusal("192.168.1.7:7860", None)
    assert not network.refusal("[fe80::1]:7860", "http://[fe80::1]:7860")
    assert not network.refusal(f"{socket.gethostname()}:7860", None) and not network.refusal("localhost:7860", None)
    assert network.refusal("evil.example:7860", None) and local.refusal("videos.example.org", None)
    assert not network.refusal("Videos.Example.Org", "https://videos.example.org")
    assert not network.refusal("127.0.0.1:7860", "https://videos.example.org"), "a proxy may change the host"
    assert network.refusal("videos.example.org", "https://other.example.org")
    assert not Names("box.lan").refusal("box.lan:7860", "http://box.lan:7860")


def test_uploads_have_limits(out, port, monkeypatch):
    picture = b"\x89PNG\r\n\x1a\n" + bytes(1000)
    status, text = upload(port, picture)
    assert status == 200 and json.loads(text)[0].startswith(str(out / "incoming"))
    for path, size in (("upload", 64 * 2**20 + 2**17), ("queue/join", 2**20 + 1), ("call/generate", 2**40)):
        status, text = ask(port, "POST", f"/gradio_api/{path}", b"", Content_Length=str(size))
        assert (status, text) == (413, f"the request is too large: the limit is {64 if path == 'upload' else 1} MiB")
    chunk = b"100000\r\n" + bytes(2**20) + b"\r\n"  # a size that is not said before
    body = chunk * 2 + b"0\r\n\r\n"
    json_kind = {"Content_Type": "application/json", "Transfer_Encoding": "chunked"}
    status, _ = ask(port, "POST", "/gradio_api/call/generate", body, **json_kind)
    assert status == 413
    monkeypatch.setattr(incoming, "MOST_STORED", 3000)
    statuses = []
    for i in range(4):
        statuses.append(upload(port, picture + bytes([i]))[0])
    assert statuses[-1] == 507 and statuses[0] == 200
    assert "keeps at most 1000 uploads" in upload(port, picture + b"x")[1]
    monkeypatch.setattr(incoming, "MOST_STORED", 2**30)
    monkeypatch.setattr(incoming, "MOST_FILES", 0)
    assert upload(port, picture)[0] == 507


def generate(port, **fields):
    """The events that Gradio's interface sends for a job."""
    inputs = json.loads(ask(port, "GET", "/gradio_api/info")[1])["named_endpoints"]["/generate"]["parameters"]
    values = {p["label"]: p.get("parameter_default") for p in inputs} | fields
    values[inputs[0]["label"]] = "image_to_video"
    status, text = ask(
        port, "POST", "/gradio_api/call/generate", json.dumps({"data": list(values.values())}).encode(),
        Content_Type="application/json",
    )  # fmt: skip
    assert status == 200, text
    return ask(port, "GET", f"/gradio_api/call/generate/{json.loads(text)['event_id']}")[1]


def test_naming_the_folder_of_uploads_harms_nothing(port, out):
    """Gradio's own cleaner ended for good when it could not delete what a visitor had named."""
    sent = out / "incoming"
    for where in ("Picture", "Prompt", "Video", "Mask"):
        for path in ("", ".", "..", str(sent), f"{sent}/", f"{sent}/.", f"{sent}/examples", f"{sent}/gone.png"):
            fields = {"Prompt": "a red circle", where: {"path": path, "meta": {"_type": "gradio.FileData"}}}
            events = generate(port, **fields)
            assert "event: error" in events or "was not uploaded here" in events or "Choose a picture" in events, events
    path = json.loads(upload(port, b"\x89PNG\r\n\x1a\n" + bytes(100))[1])[0]
    assert os.path.isfile(path)
    os.utime(path, (0, 0))
    until = time.monotonic() + 20
    while os.path.exists(path) and time.monotonic() < until:
        time.sleep(0.1)
    assert not os.path.exists(path) and sent.is_dir() and (sent / "examples" / "circle.mp4").is_file()


def test_many_conversions_leave_the_page_free(port, out):
    name = "20260102-030405-0a1b2c3d"
    noise = np.random.default_rng(0).integers(0, 255, (60, 192, 192, 3), dtype=np.uint8)
    write_video(out / f"{name}.mp4", noise, 8)
    (out / f"{name}.mp4.json").write_text(json.dumps({"job": {"prompt": "noise"}}))
    with concurrent.futures.ThreadPoolExecutor(45) as pool:
        began = time.monotonic()
        fetch = lambda _: urllib.request.urlopen(f"http://127.0.0.1:{port}/results/{name}.webm", timeout=120).read()
        answers = [pool.submit(fetch, i) for i in range(45)]
        time.sleep(0.3)
        waits = []
        while not all(answer.done() for answer in answers):
            before = time.monotonic()
            assert ask(port, "GET", "/")[0] == 200
            assert ask(port, "GET", f"/results/{name}.mp4.json")[0] == 200
            waits.append(time.monotonic() - before)
        taken = time.monotonic() - began
    contents = {answer.result() for answer in answers}
    assert len(contents) == 1 and contents.pop()[:4] == b"\x1a\x45\xdf\xa3"
    assert waits and max(waits) < max(1.0, taken / 3), (max(waits), taken)
    (out / f"{name}.mp4").write_bytes(b"damaged")
    assert ask(port, "GET", f"/results/{name}.gif") == (404, '{"detail":"this result is damaged or deleted"}')


def test_what_a_visitor_sends_reaches_the_log_without_control_codes(tmp_path):
    """A traceback of Gradio's quotes the path that a request named."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "minisora_jax.cli", "ui", "--port", str(port), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                ask(port, "GET", "/")
                break
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.2)
        for path in ("/etc/\x1b[2J\x1b]0;title\x07", "\x9b31m.png", "a\u202eb"):
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            assert "event: error" in generate(port, **{"Prompt": "a red circle", "Picture": file})
    finally:
        process.terminate()
        said, _ = process.communicate(timeout=30)
    text = said.decode()
    assert "title" in text, "it was said at all"
    assert not [c for c in text if c in "\x1b\x07\x9b\u202e"], text


def test_whatever_one_upload_makes_a_library_raise_is_said_of_it(port, out, monkeypatch):
    from minisora_jax.ui import uploads

    def fail(*_, **__):
        raise SyntaxError("a broken chunk")

    monkeypatch.setattr(uploads, "open_video", fail)
    Image.new("RGB", (32, 32)).save(out / "fine.png")
    path = json.loads(upload(port, (out / "fine.png").read_bytes())[1])[0]
    events = generate(port, Prompt="a red circle", Picture={"path": path, "meta": {"_type": "gradio.FileData"}})
    assert "a.png cannot be read" in events
