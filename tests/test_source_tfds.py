"""TensorFlow Datasets as sources: our own set, RLDS, Video, frames; all without TensorFlow."""

import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from needs import needs
from PIL import Image

tfds = needs("tensorflow_datasets")
pytestmark = pytest.mark.slow

from minisora_jax.curation.prepare import prepare  # noqa: E402
from minisora_jax.media.video import VideoError, read_clip_frames  # noqa: E402
from minisora_jax.media.video_writer import write_video  # noqa: E402
from minisora_jax.sources.spec import open_source  # noqa: E402
from minisora_jax.sources.tfds_builder import VideoClips, as_file, build  # noqa: E402

F = tfds.features


def noise(T, H=16, W=24, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (T, H, W, 3), dtype=np.uint8)


def png(frame_HWC):
    file = io.BytesIO()
    Image.fromarray(frame_HWC).save(file, "PNG")
    file.seek(0)
    return file


def written(name, features, examples, top, splits=("train",)):
    """The directory of a data set that TFDS itself writes. examples(): those of each split."""

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(features), disable_shuffling=True)

    body = {"VERSION": tfds.core.Version("1.0.0"), "__module__": __name__, "_info": _info}
    body["_split_generators"] = lambda self, dl_manager: {split: enumerate(examples()) for split in splits}
    body["_generate_examples"] = lambda self: iter(())
    builder = type(name, (tfds.core.GeneratorBasedBuilder,), body, skip_registration=True)
    made = builder(data_dir=str(top), file_format="array_record")
    made.download_and_prepare()
    return made.data_dir


STEP = {
    "observation": {
        "image": F.Image(shape=(16, 24, 3)),
        "wrist": F.Image(shape=(8, 8, 3)),
        "depth": F.Tensor(shape=(2, 2), dtype=np.float32),
    },
    "action": F.Tensor(shape=(7,), dtype=np.float32),
    "language_instruction": F.Text(),
    "is_last": F.Scalar(dtype=np.bool_),
}


@pytest.fixture(scope="module")
def rlds(tmp_path_factory):
    """Four episodes of 5 to 8 steps: the third has no instruction, the last a broken image."""

    def step(e, t, T):
        wrist, depth = png(noise(1, 8, 8)[0]), np.zeros((2, 2), np.float32)
        image = io.BytesIO(b"\x89PNG broken") if e == 3 and t == 1 else png(noise(T, seed=e)[t])
        observation = {"image": image, "wrist": wrist, "depth": depth}
        words = "" if e == 2 else f"pick up block {e}"
        return {
            "observation": observation,
            "action": np.zeros(7, np.float32),
            "language_instruction": words,
            "is_last": t + 1 == T,
        }

    examples = lambda: [
        {"steps": [step(e, t, 5 + e) for t in range(5 + e)], "episode_metadata": {"file_path": f"/{e}"}}
        for e in range(4)
    ]
    features = {"steps": F.Dataset(STEP), "episode_metadata": {"file_path": F.Text()}}
    return written("Robot", features, examples, tmp_path_factory.mktemp("rlds"), ("train", "val"))


def test_episodes_are_clips_and_their_instructions_captions(rlds, tmp_path):
    source = open_source(f"tfds:{rlds}:train?fps=5")
    assert len(source) == 4 and source.report.skipped == []
    for e in (1, 0):
        media = source[e]
        np.testing.assert_array_equal(media.data, noise(5 + e, seed=e))
        assert (media.name, media.caption, media.fps) == (f"train-{e:08d}", f"pick up block {e}", 5)
    assert source[2].data.reason == "empty caption" and source[3].data.reason == "not a video"
    report = prepare(f"tfds:{rlds}:train?fps=5", tmp_path / "out")
    assert report.kept == 2 and report.counts == {"empty caption": 1, "not a video": 1}
    assert len(open_source(f"tfds:{rlds}:val[:50%]?fps=5")) == 2
    assert open_source(f"tfds:{rlds}:val?fps=5", need_caption=False)[2].data.shape == (7, 16, 24, 3)
    wrist = open_source(f"tfds:{rlds}:train?fps=5&media=steps/observation/wrist&caption=episode_metadata/file_path")
    assert wrist[0].data.shape == (5, 8, 8, 3) and wrist[2].caption == "/2"
    again = pickle.loads(pickle.dumps(source))
    assert again.identity == source.identity != wrist.identity and len(pickle.dumps(source)) < 600
    np.testing.assert_array_equal(again[1].data, source[1].data)


def test_what_leaves_a_choice_is_asked_for(rlds, tmp_path):
    with pytest.raises(ValueError, match=r"has no feature with the frames per second: add '\?fps=10'"):
        open_source(f"tfds:{rlds}:train")
    with pytest.raises(ValueError, match="has the splits train, val, not 'test'"):
        open_source(f"tfds:{rlds}:test?fps=5")
    with pytest.raises(
        ValueError, match="has no clips in 'steps/action'; it may have them in .*steps/observation/image"
    ):
        open_source(f"tfds:{rlds}:train?fps=5&media=steps/action")
    with pytest.raises(ValueError, match="fps=fast must be a number above 0"):
        open_source(f"tfds:{rlds}:train?fps=fast")
    with pytest.raises(FileNotFoundError, match="there is no data set robot of version 2.0.0 in .*: it has 1.0.0"):
        open_source(f"tfds:robot:2.0.0:train?data_dir={rlds.rpartition('/robot')[0]}")
    with pytest.raises(ValueError, match="must look like tfds:NAME:SPLIT"):
        open_source("tfds:robot")
    cameras = F.Dataset({"left": F.Image(shape=(8, 8, 3)), "right": F.Image(shape=(8, 8, 3)), "text": F.Text()})
    step = {"left": png(noise(1, 8, 8)[0]), "right": png(noise(1, 8, 8)[0]), "text": "a"}
    written("Two", {"steps": cameras}, lambda: [{"steps": [step]}], tmp_path)
    with pytest.raises(
        ValueError, match=r"which feature is the clip\? Name it by '\?media=PATH': steps/left, steps/right"
    ):
        open_source(f"tfds:two:train?fps=5&data_dir={tmp_path}")


def as_tfrecord(directory, out):
    """The same data set in TFRecord files, whose framing is length, checksum, bytes, checksum."""
    from array_record.python.array_record_module import ArrayRecordReader

    out.mkdir(parents=True)
    info = json.loads((directory / "dataset_info.json").read_text())
    (out / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    (out / "features.json").write_text((directory / "features.json").read_text())
    for path in directory.glob("*.array_record-*"):
        reader = ArrayRecordReader(str(path))
        records = reader.read(range(reader.num_records()))
        framed = [struct.pack("<QI", len(r), 0) + r + bytes(4) for r in records]
        (out / path.name.replace("array_record", "tfrecord")).write_bytes(b"".join(framed))
    return out


def test_tfrecord_files_are_read_by_their_lengths(rlds, tmp_path):
    from pathlib import Path

    out = as_tfrecord(Path(rlds), tmp_path / "robot/1.0.0")
    one, two = (open_source(f"tfds:{where}:train?fps=5") for where in (rlds, out))
    for i in (1, 0):
        np.testing.assert_array_equal(one[i].data, two[i].data)
    assert len(two) == 4 and two[1].caption == one[1].caption
    [shard] = out.glob("*-train.tfrecord-*")
    shard.write_bytes(shard.read_bytes()[:-100])
    cut = open_source(f"tfds:{out}:train?fps=5")
    assert cut[1].caption == one[1].caption
    assert cut[3].data.reason == "corrupt record" and "has 3 whole records of 4" in cut[3].data.detail


def test_a_video_feature_needs_no_tensorflow(tmp_path):
    """TFDS writes `Video` as it writes Sequence(Image); its class needs TensorFlow, so its note is put in place."""
    examples = lambda: [{"video": [png(frame) for frame in noise(5)], "caption": "a video", "fps": 12.5}]
    features = {"video": F.Sequence(F.Image(shape=(16, 24, 3))), "caption": F.Text(), "fps": F.Scalar(dtype=np.float32)}
    where = written("Films", features, examples, tmp_path)
    sequence = open_source(f"tfds:films:train?data_dir={tmp_path}")
    note = json.loads(open(f"{where}/features.json").read())
    video = {"shape": {"dimensions": ["-1", "16", "24", "3"]}, "dtype": "uint8", "encodingFormat": "png"}
    name = "tensorflow_datasets.core.features.video_feature.Video"
    note["featuresDict"]["features"]["video"] = {"pythonClassName": name, "video": video}
    with open(f"{where}/features.json", "w") as file:
        json.dump(note, file)
    for source in (sequence, open_source(f"tfds:films:1.0.0:train?data_dir={tmp_path}")):
        np.testing.assert_array_equal(source[0].data, noise(5))
        assert (source[0].caption, source[0].fps) == ("a video", 12.5)


def test_frames_as_a_tensor_and_single_images(tmp_path):
    features = {"clip": F.Tensor(shape=(None, 16, 24, 3), dtype=np.uint8, encoding="bytes"), "text": F.Text()}
    written("Tensors", features, lambda: [{"clip": noise(5), "text": "frames"}], tmp_path)
    np.testing.assert_array_equal(open_source(f"tfds:tensors:train?data_dir={tmp_path}&fps=8")[0].data, noise(5))
    features = {"image": F.Image(shape=(None, None, 3)), "alt": F.Text(), "source": F.Text()}
    written("Photos", features, lambda: [{"image": png(noise(1)[0]), "alt": "a photo", "source": "x"}], tmp_path)
    with pytest.raises(
        ValueError, match=r"which feature is the caption\? Name it by '\?caption=PATH'; text is in alt, source"
    ):
        open_source(f"tfds:photos:train?data_dir={tmp_path}")
    media = open_source(f"tfds:photos:train?data_dir={tmp_path}&caption=alt")[0]
    assert media.caption == "a photo" and media.data.startswith(b"\x89PNG")
    assert len(open_source(f"tfds:photos:train?data_dir={tmp_path}", need_caption=False)) == 1


def test_a_class_has_its_name(tmp_path):
    """ImageNet's form: an image, a label, and a file name, which is text but no caption."""
    features = {"image": F.Image(shape=(None, None, 3)), "label": F.ClassLabel(names=["tench", "goldfish"])}
    features["file_name"] = F.Text()
    rows = [{"image": png(noise(1)[0]), "label": n, "file_name": f"{n}.JPEG"} for n in (1, 0)]
    written("Pets", features, lambda: rows, tmp_path)
    for option in ("", "&caption=label"):
        source = open_source(f"tfds:pets:train?data_dir={tmp_path}{option}")
        again = pickle.loads(pickle.dumps(source))
        assert [again[i].caption for i in range(2)] == ["goldfish", "tench"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for n, name in enumerate(("a.mp4", "b.webm", "c.gif")):
        write_video(folder / name, noise(5, 16, 16, n), 30000 / 1001 if n else 25)
        (folder / name).with_suffix(".txt").write_text(f"clip {n}")
    (folder / "bad.mp4").write_bytes(b"not a video")
    (folder / "bad.txt").write_text("bad")
    (folder / "mute.mp4").write_bytes((folder / "a.mp4").read_bytes())
    return folder


def test_video_clips_holds_any_source_and_gives_the_same_prepared_bytes(folder, tmp_path):
    report = build(open_source(folder), tmp_path)
    assert report.kept == 3 and report.counts == {"no caption": 1, "not a video": 1}
    data = tfds.data_source("video_clips", split="train", data_dir=tmp_path)
    assert len(data) == 3
    assert (
        data[1]["clip"] == (folder / "b.webm").read_bytes() and data[1]["caption"] == b"clip 1" and data[1]["fps"] == 0
    )
    prepare(folder, tmp_path / "one")
    prepare(f"tfds:video_clips:train?data_dir={tmp_path}", tmp_path / "two")
    shards = lambda out: {path.name: path.read_bytes() for path in (tmp_path / out).glob("*.array_record")}
    assert shards("one") == shards("two") != {}
    with pytest.raises(FileExistsError, match="exists: delete it"):
        build(open_source(folder), tmp_path)


def test_frames_become_lossless_files(tmp_path):
    shapes = open_source("shapes:train:6")
    build(shapes, tmp_path, "heldout")
    source = open_source(f"tfds:video_clips:heldout?data_dir={tmp_path}")
    for i in range(6):
        frames, _ = read_clip_frames(source[i].data)
        np.testing.assert_array_equal(frames, shapes[i].data)
        assert (source[i].name, source[i].caption, source[i].fps) == (shapes[i].name, shapes[i].caption, shapes[i].fps)
    assert as_file(source[0]) == source[0].data


def test_the_program_builds_and_reads_without_tensorflow(folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "minisora_jax.sources.tfds_builder", folder, tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("3 clips kept, 2 skipped: 1 no caption (mute.mp4)")
    code = """
import sys
import tensorflow_datasets as tfds
from minisora_jax.sources.spec import open_source  # noqa: E402
data = tfds.data_source("video_clips", split="train", data_dir=sys.argv[1])
source = open_source(f"tfds:video_clips:train?data_dir={sys.argv[1]}")
print(len(data), data[0]["caption"], source[0].caption)
assert "tensorflow" not in sys.modules, "tensorflow was imported"
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 b'clip 0' clip 0")


def test_all_sources_go_to_another_process_and_none_needs_tensorflow(folder, rlds, tmp_path):
    build(open_source(folder), tmp_path)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(folder.glob("[a-c].*[!t]"))]
    pq.write_table(pa.table({"video": rows, "text": [f"clip {n}" for n in range(3)]}), tmp_path / "x.parquet")
    prepare(folder, tmp_path / "prepared")
    specs = [f"{tmp_path}/{name}" for name in ("x.tar", "x.parquet", "prepared")]
    specs += [f"tfds:video_clips:train?data_dir={tmp_path}", f"{specs[0]} + {specs[1]}", f"tfds:{rlds}:train[:2]?fps=5"]
    sources = [open_source(spec) for spec in specs]
    (tmp_path / "sources").write_bytes(pickle.dumps(sources))
    code = """
import pickle, sys
from pathlib import Path
sources = pickle.loads(Path(sys.argv[1]).read_bytes())
print([[source[i].caption for i in range(len(source))] for source in sources])
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "sources"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = ["clip 0", "clip 1", "clip 2"]
    tar_texts = ["clip 0", "clip 1", "bad", "clip 2"]
    robot = ["pick up block 0", "pick up block 1"]
    assert done.stdout.strip() == str([tar_texts, texts, texts, texts, tar_texts + texts, robot])


def test_a_damaged_record_is_a_drop(folder, tmp_path):
    build(open_source(folder), tmp_path)
    [shard] = (tmp_path / "video_clips/1.0.0").glob("*.array_record-*")
    data = bytearray(shard.read_bytes())
    at = data.find((folder / "b.webm").read_bytes()[100:140])
    data[at : at + 40] = b"\xff" * 40
    if at >= 0:
        shard.write_bytes(data)
        source = open_source(f"tfds:video_clips:train?data_dir={tmp_path}")
        assert isinstance(source[1].data, VideoError) and source[1].data.reason == "corrupt record"


def test_the_builder_says_what_it_is_built_from(tmp_path):
    with pytest.raises(ValueError, match="nothing to build from"):
        VideoClips(data_dir=str(tmp_path)).download_and_prepare()
