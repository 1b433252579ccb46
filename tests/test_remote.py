"""Object storage: sources from a real S3 server on this machine, and data sets read through a local folder."""

import json
import pickle
import subprocess
import sys
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from needs import needs

from minisora_jax.curation.prepare import prepare
from minisora_jax.data.latents import Latents, write_latents
from minisora_jax.io.object_store import Mirror
from minisora_jax.io.retry import DataError
from minisora_jax.media.video_writer import write_video
from minisora_jax.sources.clips import Records, open_clips
from minisora_jax.sources.spec import open_source
from minisora_jax.types import LatentClip

moto_server = needs("moto.server")
needs("s3fs")
pytestmark = pytest.mark.slow
BUCKET = "s3://clips"


def noise(T, H, W, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (T, H, W, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def s3():
    """An S3 server on a free port, which s3fs finds by the environment, as it would find Amazon's, MinIO or Ceph."""
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        fs = fsspec.filesystem("s3")
        fs.mkdir("clips")
        yield fs
        fs.clear_instance_cache()
    server.stop()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINISORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for n, name in enumerate(("a.mp4", "b.webm", "c.gif")):
        write_video(folder / name, noise(5, 16, 24, n), 8)
        (folder / name).with_suffix(".txt").write_text(f"clip {n}")
    return folder


def upload(fs, folder, url):
    fs.put(f"{folder}/", f"{url}/", recursive=True)
    fs.invalidate_cache()
    return url


def outcome(source, out):
    """(names, bytes of the data set)."""
    prepare(source, out)
    return [clip.name for clip in Records(out)], [path.read_bytes() for path in sorted(out.glob("*.array_record"))]


def test_sources_on_s3_are_those_on_disk(s3, folder, tmp_path):
    wanted = outcome(folder, tmp_path / "0")
    (tmp_path / "up").mkdir()
    with tarfile.open(tmp_path / "up/x.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    rows = [{"bytes": (folder / name).read_bytes(), "path": name} for name in wanted[0]]
    pq.write_table(pa.table({"video": rows, "text": [f"clip {n}" for n in range(3)]}), tmp_path / "up/x.parquet")
    upload(s3, folder, f"{BUCKET}/folder")
    upload(s3, tmp_path / "up", f"{BUCKET}/files")
    for n, spec in enumerate(("folder", "files/x.tar", "files/*.parquet", "files/{x,x}.tar"), 1):
        assert outcome(f"{BUCKET}/{spec}", tmp_path / str(n)) == wanted
    both = open_source(f"{BUCKET}/folder + {BUCKET}/files/x.tar")
    (tmp_path / "pickled").write_bytes(pickle.dumps(both))
    code = """
import pickle, sys
source = pickle.loads(open(sys.argv[1], "rb").read())
print(*(source[i].caption for i in range(len(source))), sep=",")
"""
    [said] = run(code, [[tmp_path / "pickled"]])
    assert said.strip() == ",".join(["clip 0", "clip 1", "clip 2"] * 2)
    with pytest.raises(FileNotFoundError, match="there is no file s3://clips/files/y.tar"):
        open_source(f"{BUCKET}/files/y.tar")
    with pytest.raises(FileNotFoundError, match="s3://clips/nowhere is not a folder of clips"):
        open_source(f"{BUCKET}/nowhere")
    pickled = pickle.dumps(open_source(f"{BUCKET}/folder"))
    s3.pipe_file("clips/folder/a.txt", b"another")
    s3.invalidate_cache()
    with pytest.raises(RuntimeError, match="s3://clips/folder has changed since this run began"):
        pickle.loads(pickled)


def run(code, arguments):
    """What the program prints, of one process for each of `arguments`, all at once."""
    start = lambda argument: subprocess.Popen(
        [sys.executable, "-c", code, *argument], stdout=subprocess.PIPE, text=True
    )
    processes = [start(argument) for argument in arguments]
    said = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return said


@pytest.fixture
def latents(tmp_path):
    """A cache of 6 clips in 3 shards."""
    draw = np.random.default_rng(0)
    values = lambda *shape: draw.normal(size=shape).astype(np.float32)
    clips = [LatentClip(values(1, 2, 2, 4), values(1, 2, 2, 4), values(3, 8), f"c{i}", 8.0, f"n{i}") for i in range(6)]
    write_latents(
        tmp_path / "latents", clips, codec_hash="x", text={"encoder": "t"}, empty_text_LE=values(1, 8), shard_bytes=500
    )
    return tmp_path / "latents"


def test_a_cache_on_s3_is_fetched_shard_by_shard(s3, latents, cache, caplog):
    url = upload(s3, latents, f"{BUCKET}/latents")
    local, remote = Latents(latents), Latents(url, codec_hash="x")
    here = lambda: sorted(path.name for path in cache.rglob("*.array_record"))
    shards = [shard["file"] for shard in local.shards.manifest["shards"]]
    assert len(shards) == 3 and here() == []
    np.testing.assert_array_equal(remote.sizes, local.sizes)
    np.testing.assert_array_equal(remote.empty_text_LE, local.empty_text_LE)
    np.testing.assert_array_equal(remote[5].mean_thwc, local[5].mean_thwc)
    assert here() == shards[2:]
    for i in range(6):
        assert pickle.loads(pickle.dumps(remote))[i].caption == local[i].caption
    assert here() == shards
    s3.rm(f"clips/latents/{shards[0]}")  # it is here
    assert Latents(url)[0].caption == "c0"
    remote.shards.verify()


def test_what_comes_damaged_is_refused_and_not_kept(s3, latents, cache):
    manifest = json.loads((latents / "manifest.json").read_text())
    first, second, third = (latents / shard["file"] for shard in manifest["shards"])
    first.write_bytes(first.read_bytes()[:-1] + b"?")
    second.write_bytes(second.read_bytes()[:-10])
    remote = Latents(upload(s3, latents, f"{BUCKET}/damaged"))
    for i in (0, 2):
        with pytest.raises(
            DataError, match="s3://clips/damaged/latents-0000[01].* is damaged: expected sha256 .*, found"
        ):
            remote[i]
    assert remote[5].caption == "c5"
    assert [path.name for path in cache.rglob("*.array_record")] == [third.name], "nothing else, and no temporary file"
    s3.rm("clips/damaged/empty_text.npy")
    with pytest.raises(FileNotFoundError):
        Mirror(f"{BUCKET}/damaged").fetch("gone.npy", "0")


def test_another_data_set_at_the_same_place_is_fetched_anew(s3, folder, tmp_path, cache):
    for n, cell in enumerate((8, 16)):
        prepare(folder, tmp_path / str(n), cell=cell)
        url = upload(s3, tmp_path / str(n), f"{BUCKET}/prepared")
        clips = open_clips(url)
        assert [clip.frames_THWC.shape for clip in clips] == [
            clip.frames_THWC.shape for clip in Records(tmp_path / str(n))
        ]
        assert clips.identity == Records(tmp_path / str(n)).identity
    assert len(list(cache.iterdir())) == 2
    source = open_source(url)
    assert len(source) == 3 and source[0].data.shape == (5, 16, 16, 3)
    assert pickle.loads(pickle.dumps(source))[2].caption == "clip 2"


def test_what_is_no_data_set_says_so(s3):
    with pytest.raises(DataError, match="s3://clips/none/manifest.json is missing"):
        Latents(f"{BUCKET}/none")
    s3.pipe_file("clips/broken/manifest.json", b"{half")
    with pytest.raises(DataError, match="s3://clips/broken/manifest.json is damaged: expected JSON"):
        Latents(f"{BUCKET}/broken")


def test_several_processes_fetch_a_shard_once(latents, cache):
    url = f"file://{latents}"
    code = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from minisora_jax.io.records import Shards
print(Shards(sys.argv[1], "latents", {}).read(0)[1]["caption"])
"""
    said = run(code, [[url]] * 3)
    assert all(text.endswith("c0\n") for text in said)
    assert "".join(said).count(f"fetching {url}/latents-00000-of-00003.array_record") == 1
    assert len(list(cache.rglob("*.array_record"))) == 1 and not list(cache.rglob("*.tmp*"))
