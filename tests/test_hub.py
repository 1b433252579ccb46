"""Models and data sets by hf:// names, from a server on this machine that answers as the Hugging Face Hub does."""

import hashlib
import http.server
import json
import re
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from needs import needs

import minisora_jax as ms
from minisora_jax.bundled import CODEC, MODEL
from minisora_jax.cli import main
from minisora_jax.io import hub

needs("huggingface_hub")
pytestmark = pytest.mark.slow
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's interface that huggingface_hub downloads and lists files by."""

    root = Path()
    served: list[str] = []

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].replace("%2F", "/")
        if match := re.fullmatch(r"/api/(models|datasets)/(\w+/[\w.-]+)(/.*)?", path):
            return self.information(match[1], self.root / match[1] / match[2], match[2], match[3] or "")
        if match := re.fullmatch(r"/(datasets/)?(\w+/[\w.-]+)/resolve/\w+/(.*)", path):
            file = self.root / (match[1] or "models") / match[2] / match[3]
            if file.is_file():
                return self.file(file)
        return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def information(self, kind: str, folder: Path, name: str, rest: str):
        if not folder.is_dir():
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"})
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        if match := re.fullmatch(r"/(tree|paths-info)/\w+/?(.*)", rest):
            inside = folder / match[2]
            under = inside.rglob("*") if "recursive=" in self.path.lower() else inside.glob("*")
            entries = [self.entry(f, folder) for f in sorted(under)]
            return self.answer(200, json.dumps(entries).encode())
        siblings = [{"rfilename": str(f.relative_to(folder))} for f in files]
        about = {
            "_id": "1",
            "id": name,
            "modelId": name,
            "sha": COMMIT,
            "siblings": siblings,
            "tags": [],
            "private": False,
        }
        return self.answer(200, json.dumps(about).encode())

    def entry(self, file: Path, folder: Path) -> dict:
        kind = "file" if file.is_file() else "directory"
        oid = hashlib.sha1(str(file).encode()).hexdigest()
        return {"type": kind, "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": oid}

    def file(self, file: Path):
        data, status, headers = file.read_bytes(), 200, {}
        etag = hashlib.sha1(data).hexdigest()
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(data) - 1)
            headers = {"Content-Range": f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"}
            data, status = data[first : last + 1], 206
        if self.command == "GET":
            self.served.append(file.name)
        return self.answer(status, data, headers | {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, data: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in (
            {"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The folder that the server serves; huggingface_hub finds the server where it looks for the Hub."""
    from huggingface_hub import constants

    Hub.root = tmp_path_factory.mktemp("hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", address)
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Hub.root
    server.shutdown()


def put(folder: Path, source: Path) -> None:
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())


def test_a_model_by_name_is_the_model_in_a_folder(served, tmp_path):
    put(served / "models/someone/shapes", Path(MODEL))
    put(served / "models/someone/both/codec", Path(CODEC))
    (served / "models/someone/both/large.bin").write_bytes(bytes(10**6))
    request = [ms.Request("a red circle moves left on a black background", (5, 48, 48))]
    options = dict(steps=1, progress=False)
    named = ms.VideoPipeline.load("hf://someone/shapes", codec="hf://someone/both/codec")
    [video], [wanted] = named.generate(request, **options), ms.VideoPipeline.load().generate(request, **options)
    np.testing.assert_array_equal(video, wanted)
    assert "large.bin" not in Hub.served  # a folder of a repository is downloaded without the rest
    before = len(Hub.served)
    out = [f"--out={tmp_path}", "--frames=1", "--steps=1"]
    assert main(["generate", "a red circle", "--model=hf://someone/shapes@main", *out]) == 0
    assert len(Hub.served) == before  # from the cache


def test_a_model_card_is_one_that_the_hub_reads(tmp_path):
    from huggingface_hub import ModelCard

    from minisora_jax.io.model_dir import export_model, load_model

    params, config = load_model(MODEL)
    config["training"]["data"]["path"] = "clips | `a`\n# none"  # a config may hold anything
    export_model(tmp_path / "shapes", params, config, dtype="float16")
    card = ModelCard.load(tmp_path / "shapes/README.md")
    assert card.data.to_dict() == {
        "library_name": "minisora_jax",
        "pipeline_tag": "text-to-video",
        "tags": ["jax", "minisora_jax"],
    }
    for words in ("# shapes", "4.3 million", "| optimiser | `muon` |", "`clips / 'a' # none`", "hf://OWNER/NAME"):
        assert words in card.text, card.text
    (tmp_path / "shapes/README.md").write_text("mine")
    export_model(tmp_path / "shapes", params, config, dtype="float16")
    assert (tmp_path / "shapes/README.md").read_text() == "mine"
    ms.VideoPipeline.load(tmp_path / "shapes")  # no checksum covers what its owner may write


def test_what_is_not_there_is_said(served, capsys):
    put(served / "models/someone/empty", Path(CODEC))
    for name, words in (
        ("hf://someone/nothing", "gated model needs"),
        ("hf://someone/empty/transformer", "has no 'transformer'"),
        ("hf://someone", "must look like hf://OWNER/NAME"),
        ("hf://someone/empty/../..", "must look like hf://OWNER/NAME"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=words):
            hub.local_folder(name)
        assert main(["generate", "a red circle", f"--model={name}"]) == 2
        assert words in capsys.readouterr().err
    assert hub.local_folder("models/wan") == "models/wan"


def test_a_data_set_is_read_where_it_lies(served, tmp_path):
    import fsspec
    import PIL.Image

    (served / "datasets/someone/pictures/data").mkdir(parents=True)
    PIL.Image.new("RGB", (48, 48), "red").save(tmp_path / "red.png")
    images = pa.array([{"bytes": (tmp_path / "red.png").read_bytes(), "path": "red.png"}])
    pq.write_table(pa.table({"image": images, "caption": ["red"]}), served / "datasets/someone/pictures/data/a.parquet")
    fsspec.filesystem("hf").clear_instance_cache()
    clips = tmp_path / "clips"
    assert main(["prepare", "hf://datasets/someone/pictures/data/*.parquet", str(clips)]) == 0
    from minisora_jax.sources.clips import open_clips

    [clip] = open_clips(str(clips))
    assert clip.caption == "red" and (clip.frames_THWC[0, 24, 24] == (255, 0, 0)).all()
