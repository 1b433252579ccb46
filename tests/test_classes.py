"""Models of classes: from folders of images and clips to pictures of a class, and what is refused on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import minisora_jax as ms
from minisora_jax.data.classes import classes_of, read_classes
from minisora_jax.io.retry import DataError
from minisora_jax.models.captions import class_captions
from minisora_jax.models.class_names import ClassNames
from minisora_jax.toy.grammar import Object, Scene
from minisora_jax.toy.shapes import render
from minisora_jax.types import Clip

SYNSETS = ["n01440764 tench, Tinca tinca", "n02099601 golden retriever", "n02012849 crane", "n03126707 crane"]
CLASSES = {"blue_square": ("blue", "square"), "green_cross": ("green", "cross"), "red_circle": ("red", "circle")}


def sort_into_folders(top: Path, images: int, videos: int) -> Path:
    """FOLDER/CLASS/NUMBER.png and .mp4: a large shape near the middle of 32x32 pixels, for images and 5 frames."""
    rng = np.random.default_rng(0)
    for name, (colour, shape) in CLASSES.items():
        (top / name).mkdir(parents=True)
        for i in range(images + videos):
            T = 1 if i < images else 5
            x, y = rng.uniform(13, 19, 2)
            path = {"x_T": np.full(T, x), "y_T": np.full(T, y), "radius_T": np.full(T, 9.0)}
            frames = render(Scene((T, 32, 32), (Object(colour, shape, "still", "large", **path),), "black"))
            if T == 1:
                Image.fromarray(frames[0]).save(top / name / f"{i}.png")
            else:
                ms.write_video(str(top / name / f"{i}.mp4"), frames, fps=8)
    return top


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A prepared data set, and its caches: of classes, of captions, and of the classes of a longer list."""
    at = tmp_path_factory.mktemp("classes")
    folder = sort_into_folders(at / "folder", images=2, videos=1)
    Image.new("RGB", (32, 32)).save(folder / "stray.png")
    (folder / "red_circle/0.txt").write_text("a caption that is not the class")
    report = ms.prepare(f"{folder}?caption=folder", at / "clips")
    assert report.kept == 9 and report.counts == {"no class": 1}
    (at / "names.txt").write_text("red_circle\nyellow_square\n\nblue_square\ngreen_cross\n")
    for name, classes in (("own", True), ("captions", False), ("listed", at / "names.txt")):
        ms.encode(at / "clips", at / name, classes=classes, progress=False)
    return at


def test_a_cache_has_the_number_of_each_clips_class(caches):
    own, listed = ms.open_latents(caches / "own"), ms.open_latents(caches / "listed")
    assert own.text == {"encoder": "classes", "names": sorted(CLASSES)}
    assert listed.text["names"] == ["red_circle", "yellow_square", "blue_square", "green_cross"]
    for cache in (own, listed):
        assert len(cache) == 9 and cache.sizes[:, 3].tolist() == [1] * 9
        assert cache.empty_text_LE.tolist() == [[len(cache.text["names"])]]  # no class: the row after all others
        for clip in (cache[i] for i in range(9)):
            assert clip.text_LE.tolist() == [[cache.text["names"].index(clip.caption)]]
            assert clip.name.split("/")[0] == clip.caption
    again = caches / "again"
    ms.encode(caches / "clips", again, classes=caches / "listed", progress=False)
    assert ms.open_latents(again).text == listed.text and read_classes(again) == listed.text["names"]
    mixture = ms.open_latents(f"{again} + {caches / 'listed'}")
    assert len(mixture) == 18
    with pytest.raises(DataError, match=r"made with 4 classes: 'red_circle'.* with 3 classes: .*--classes="):
        ms.open_latents(f"{caches / 'own'} + {caches / 'listed'}")


def test_clips_of_other_classes_are_left_out_and_named(caches, tmp_path):
    (tmp_path / "names.txt").write_text("red_circle\ngreen_cross\n")
    out = ms.encode(caches / "clips", tmp_path / "some", classes=tmp_path / "names.txt", progress=False)
    assert len(ms.open_latents(out)) == 6
    left_out = json.loads((out / "manifest.json").read_text())["left_out"]
    assert len(left_out) == 3 and all("'blue_square' is none of the 2 classes" in line for line in left_out)


@pytest.mark.parametrize("text, problem", [("a\nb\na\n", "has the class 'a' twice"), ("\n", "is empty")])
def test_a_list_of_classes_is_checked(text, problem, tmp_path):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_classes(tmp_path / "names.txt")


def test_clips_without_captions_have_no_classes(caches):
    with pytest.raises(ValueError, match="has no classes: it was encoded with the text encoder .'encoder': 'bytes'"):
        read_classes(caches / "captions")
    with pytest.raises(ValueError, match="--classes.*--text-encoder"):
        ms.encode(caches / "clips", caches / "no", classes=True, text_encoder="models/umt5")

    class Nameless:
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return Clip(np.zeros((1, 32, 32, 3), np.uint8), "", 8.0, str(i))

    with pytest.raises(DataError, match="no clip has a caption, so there are no classes"):
        classes_of(Nameless(), progress=False)


def test_a_class_is_meant_by_name_by_synonym_or_by_number():
    names = ClassNames(4, SYNSETS)
    assert [names.of_caption(c) for c in ("n02099601", SYNSETS[0], "golden retriever", "1")] == [1, 0, None, None]
    for number, prompts in enumerate((("tench", "Tinca_Tinca", "n01440764", "0"), ("Golden  Retriever", "1"))):
        assert [names.of_prompt(prompt) for prompt in prompts] == [number] * len(prompts)
    with pytest.raises(
        ValueError, match=r"'crane' is the name of several classes: give the number 2 \(n02012849 crane"
    ):
        names.of_prompt("crane")
    with pytest.raises(ValueError, match="'golden retreiver' .* 0 to 3, or its name.* 'golden retriever'"):
        names.of_prompt("golden retreiver")
    digits = class_captions(4, ["0", "10", "2"])  # names come before numbers
    assert [int(ids[0, 0]) for ids in digits.encode(["10", "2", "1", ""])] == [1, 2, 1, 3]


def small(data: Path, **dit):
    config = ms.configs.load("dit_tiny", data=data, steps=1, prompts=False)
    config.dit.update(width=64, depth=1, heads=1, **dit)
    return config


LABELS = dict(caption="label", micro_conditioning=False)


@pytest.mark.parametrize(
    "cache, dit, problem",
    [
        ("captions", {**LABELS, "classes": 4}, "learns from 3 classes, .* the text encoder .*: encode .* --classes"),
        ("own", {}, "learns from captions, and the latent cache has 3 classes: 'blue_square'.*: set classes=N"),
        ("own", {**LABELS, "classes": 3}, "learns from 2 classes, .* 3 classes: .*: set dit.classes=4: the last row"),
        ("listed", {**LABELS, "classes": 4}, "learns from 3 classes, .* 4 classes: .*: set dit.classes=5"),
    ],
)
def test_a_model_and_a_cache_that_do_not_fit_are_refused(cache, dit, problem, caches, tmp_path):
    with pytest.raises(ValueError, match=problem):
        ms.train(small(caches / cache, **dit), tmp_path)


def test_a_record_of_a_class_that_is_not_there_is_damaged(caches):
    cache = ms.open_latents(caches / "own")
    red = next(i for i in range(9) if cache[i].caption == "red_circle")
    cache.caches[0].classes = 1  # as if the manifest named one class only
    with pytest.raises(DataError, match=r"corrupt: array\(\[\[2\]\]"):
        cache[red]


def test_dropped_captions_are_no_class_in_rows_of_images_and_clips(caches):
    from minisora_jax.config import build, complete
    from minisora_jax.data.loader import packed_batches
    from minisora_jax.training import diffusion_task as tasks

    entries = small(caches / "own", **LABELS, classes=4).to_dict()
    entries.pop("prompts")
    task = build(tasks.DiffusionTask, complete(entries, tasks.DiffusionTask))
    latents = ms.open_latents(caches / "own")
    task = tasks.with_row_size(task, latents)
    options = {"patch": task.dit.patch, "conditioning": task.conditioning}
    for share, labels in ((0.0, {0, 1, 2}), (1.0, {3})):
        plan = tasks.pack_plan(task, latents)
        batch, sizes = next(packed_batches(latents, plan, range(1), caption_dropout=share, **options))
        assert {1, 2} <= {int(size[0]) for row in sizes for size in row}  # both kinds share the rows
        assert set(batch.text_BLE[batch.text_segment_BL > 0].ravel().tolist()) == labels


JOURNEY = """
import json, sys
from minisora_jax.cli import main
at = sys.argv[1]
quick = ["--config.dit.width=96", "--config.dit.depth=2", "--config.dit.heads=3", "--config.run.optim.ema=0.99"]
for line in (
    ["prepare", f"{at}/folder?caption=folder", f"{at}/clips", "--workers=0"],
    ["encode", f"{at}/clips", f"{at}/latents", "--classes"],
    ["train", f"--config=dit_tiny:data={at}/latents,classes=3,steps=400,prompts=no", *quick, f"--workdir={at}/run"],
):
    assert main(line) == 0, line
import minisora_jax as ms
pipeline = ms.VideoPipeline.load(f"{at}/run/export")
from minisora_jax.toy.checker import observe
prompts = "blue square", "1", "red_circle", ""
requests = [ms.Request(prompt, (T, 32, 32), seed=s) for prompt in prompts for T in (1, 5) for s in range(4)]
videos = pipeline.generate(requests, progress=False)
seen = {prompt: [] for prompt in prompts}
for request, video in zip(requests, videos):
    seen[request.prompt].append([[o.colour, o.shape] for o in observe(video)])
print(json.dumps(seen))
"""


@pytest.mark.slow
def test_a_model_learns_the_classes_of_its_folders(tmp_path):
    """400 steps on 36 images and clips of three classes, in packed rows: then each class is made as asked for."""
    sort_into_folders(tmp_path / "folder", images=8, videos=4)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", JOURNEY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 classes: 'blue_square', 'green_cross', 'red_circle'" in done.stdout
    seen = json.loads(done.stdout.splitlines()[-1])
    for prompt, wanted in {
        "blue square": ["blue", "square"],
        "1": ["green", "cross"],
        "red_circle": ["red", "circle"],
    }.items():
        assert np.mean([objects == [wanted] for objects in seen[prompt]]) >= 0.75, (prompt, seen[prompt])
    assert len({colour for objects in seen[""] for colour, _ in objects}) > 1  # no class: any of them
    config = json.loads((tmp_path / "run/export/config.json").read_text())
    assert config["text"] == {"encoder": "classes", "names": sorted(CLASSES)} and config["dit"]["classes"] == 4
