"""Training of models that read given frames as channels (Wan image to video): the cache, and what is learned."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "parity"))

from safetensors.numpy import load_file  # noqa: E402
from test_parity_image_to_video import CLIP, made_once, picture  # noqa: E402
from train_tiny import task  # noqa: E402

from minisora_jax.api.samples import sample_requests  # noqa: E402
from minisora_jax.cli import main  # noqa: E402
from minisora_jax.data.encode import encode_clips  # noqa: E402
from minisora_jax.data.given_frames import FrameEncoder  # noqa: E402
from minisora_jax.data.latents import Latents, write_latents  # noqa: E402
from minisora_jax.data.packing import PackConfig  # noqa: E402
from minisora_jax.data.rows import pack_segments, training_segment  # noqa: E402
from minisora_jax.diffusion.loss import loss_at  # noqa: E402
from minisora_jax.diffusion.objective import ObjectiveConfig  # noqa: E402
from minisora_jax.generate import VideoPipeline  # noqa: E402
from minisora_jax.generate.from_images import from_images  # noqa: E402
from minisora_jax.generate.request import Request  # noqa: E402
from minisora_jax.io.model_dir import load_model  # noqa: E402
from minisora_jax.io.retry import DataError  # noqa: E402
from minisora_jax.media.video_writer import write_video  # noqa: E402
from minisora_jax.models.captions import BYTES  # noqa: E402
from minisora_jax.models.dit import DiT  # noqa: E402
from minisora_jax.models.text import encode_bytes  # noqa: E402
from minisora_jax.parallel.mesh import MeshConfig  # noqa: E402
from minisora_jax.training.diffusion_task import train_diffusion  # noqa: E402
from minisora_jax.training.held_out import UNMASKED  # noqa: E402
from minisora_jax.types import Clip, GivenFrames, LatentClip  # noqa: E402


def film(name: str, frames: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    return np.stack([picture(f"{name} {i}", height, width) for i in range(frames)])


published = pytest.fixture(scope="module")(made_once)


@pytest.mark.slow
@pytest.mark.parametrize("preset, kind", [("wan2.1-i2v-14b", "first"), ("wan2.1-flf2v-14b", "ends")])
def test_training_reads_what_sampling_gives(preset, kind, published, tmp_path):
    """A clip's given frames through the cache, beside those of a request for a video from its own frames."""
    pipeline = VideoPipeline.load(**published(preset))
    frames = film("a")
    given = FrameEncoder(kind, pipeline.codec, pipeline.image_encoder)
    clips = [Clip(frames, "a cat", 8.0, "a"), Clip(frames[:1], "a cat", 8.0, "still"), Clip(frames, "b", 8.0, "b")]
    made = list(encode_clips(pipeline.codec, BYTES, clips, range(3), given))
    assert isinstance(made[1], DataError) and "still has 1 frames, and --given=" in str(made[1])
    cache = dict(codec_hash=pipeline.codec.latents, text=BYTES.record, empty_text_LE=encode_bytes(""))
    write_latents(tmp_path / "cache", [made[0], made[2]], given=given.record, **cache)
    latents = Latents(tmp_path / "cache")
    assert latents.given == given.record and latents.given["image"] == [
        (1 + (kind == "ends")) * CLIP.tokens,
        CLIP.width,
    ]

    asked = from_images(pipeline, Request("a cat", (9, 32, 48)), frames[0], *([frames[-1]] if kind == "ends" else []))
    [of_given] = pipeline.encode([next(asked).frames_THWC])
    expected = asked.send(of_given).frames
    for clip in (latents[0], latents[1]):
        np.testing.assert_allclose(clip.frames.channels_thwc, expected.channels_thwc, atol=2e-3)  # stored as float16
        np.testing.assert_allclose(clip.frames.image_IE, expected.image_IE, rtol=1e-3, atol=1e-2)

    asked = sample_requests(1, given_task(1), pipeline.codec, latents)  # what is sampled while a model trains
    np.testing.assert_array_equal(asked[0].frames.channels_thwc, latents[0].frames.channels_thwc)
    with pytest.raises(ValueError, match="have no given frames: let prompts be a number"):
        sample_requests([{"prompt": "a cat", "size_THW": (9, 32, 48)}], given_task(1), pipeline.codec, latents)


def clip_of(colour: np.ndarray, size: tuple[int, int, int], name: str) -> LatentClip:
    """A clip that shows one colour, whose first frame is given."""
    mean = np.broadcast_to(colour, (*size, 4)).astype(np.float32)
    mask, grey = np.zeros((*size, 4), np.float32), np.zeros((*size, 4), np.float32)
    mask[0], grey[0] = 1, colour
    frames = GivenFrames(np.concatenate([mask, grey], -1))
    return LatentClip(mean, np.full_like(mean, 0.01), encode_bytes("a"), "a", 8.0, name, frames)


def write_colours(directory: Path, count: int = 64) -> Path:
    rng = np.random.default_rng(5)
    clips = [clip_of(rng.normal(size=4), (3, 2, 2 + 2 * (i % 2)), f"{i}") for i in range(count)]
    record = {"frames": "first", "channels": 8, "image": None}
    write_latents(directory, clips, codec_hash="c", text=BYTES.record, empty_text_LE=encode_bytes(""), given=record)
    return directory


def given_task(steps: int, **optim):
    small = task(steps)
    run = dataclasses.replace(
        small.run, save_every=1000, optim=dataclasses.replace(small.run.optim, accumulate=1, **optim)
    )
    dit = dataclasses.replace(small.dit, given_channels=8, dtype="float32")
    return dataclasses.replace(small, dit=dit, run=run, conditioning=UNMASKED)


@pytest.mark.slow
def test_a_model_learns_to_go_on_from_the_given_frame(tmp_path):
    """Each clip has one colour, which only the given frame tells: with another clip's frame the model is misled."""
    cache = Latents(write_colours(tmp_path / "colours"))
    small = given_task(300, learning_rate=1e-2, ema=0.0)
    export = train_diffusion(small, tmp_path / "run", cache, {}, {})
    params, config = load_model(export)
    assert config["dit"]["given_channels"] == 8
    rng = np.random.default_rng(1)
    clips = [clip_of(rng.normal(size=4), (3, 2, 2), str(i)) for i in range(16)]

    def loss(clips: list[LatentClip]) -> float:
        empty = encode_bytes("")
        rows = [
            [training_segment(c, small.dit.patch, UNMASKED, (0.0, 0.0), empty, 0, np.random.default_rng(0), (0, 3))]
            for c in clips
        ]
        batch = jax.tree.map(jnp.asarray, pack_segments(rows, PackConfig(16, 16, 1, len(rows))))
        noise = jax.random.normal(jax.random.key(0), batch.tokens_BSP.shape)
        error, weights = loss_at(
            DiT(small.dit), params, batch, noise, jnp.full(batch.segment_BS.shape, 0.9), ObjectiveConfig()
        )
        return float(jnp.sum(error * weights) / jnp.sum(weights))

    misled = [dataclasses.replace(c, frames=other.frames) for c, other in zip(clips, clips[1:] + clips[:1])]
    right, wrong = loss(clips), loss(misled)
    assert right < 0.5 * wrong


@pytest.mark.slow
def test_a_mesh_changes_nothing(tmp_path):
    cache = Latents(write_colours(tmp_path / "colours"))
    losses = []
    for mesh in (dict(data=8), dict(data=2, fsdp=2, ring=2)):
        small = given_task(3)
        small = dataclasses.replace(small, run=dataclasses.replace(small.run, mesh=MeshConfig(**mesh)))
        work = tmp_path / "-".join(mesh)
        train_diffusion(small, work, cache, {}, {})
        lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 3
    np.testing.assert_allclose(*losses, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["wan2.1-flf2v-14b", "wan2.2-i2v-a14b"])
def test_an_adapter_from_clips_to_a_published_file(preset, published, tmp_path, capsys):
    """prepare, encode, train, go on, generate and export, by the commands of docs/fine-tune.md."""
    paths, at = published(preset), tmp_path
    for i in range(6):
        write_video(at / f"clips/{i}.mp4", film(f"clip {i}"), fps=8)
        (at / f"clips/{i}.txt").write_text("a cat jumps")
    assert main(["prepare", f"{at}/clips", f"{at}/data", "--max-frames=9", "--cell=16"]) == 0
    kind = "ends" if "flf2v" in preset else "first"
    encoder = [f"--image-encoder={paths['image_encoder']}"] if "image_encoder" in paths else []
    known = [f"--codec={paths['codec']}", f"--text-encoder={paths['text_encoder']}"]
    assert main(["encode", f"{at}/data", f"{at}/latents", f"--given={kind}", *encoder, *known]) == 0
    train = ["train", f"--config=dit_finetune:data={at}/latents,steps=2,rows=1", f"--init={paths['model']}"]
    train += [f"--codec={paths['codec']}", "--lora", "rank=2,targets=all,base=float32", f"--workdir={at}/run"]
    assert main([*train, "--config.run.mesh.fsdp=1", "--config.run.mesh.ring=4", "--config.run.mesh.tensor=2"]) == 0
    flags = [f"--{name.replace('_', '-')}={path}" for name, path in paths.items()]
    for name in ("first", "last"):
        write_video(at / f"{name}.png", picture(name)[None], fps=1)
    images = [f"--image={at / 'first.png'}"]
    if kind == "ends":
        images = [f"--first={at / 'first.png'}", f"--last={at / 'last.png'}"]
    lora = f"--lora={at}/run/export"
    common = [f"--out={at}/out", "--frames=9", "--steps=2", "--upscale=1", lora, *flags]
    assert main(["generate", "a cat jumps", *images, *common]) == 0
    assert list((at / "out").glob("*.mp4"))
    assert main(["export", f"{at}/run/export", f"{at}/cat.safetensors", "--as=peft"]) == 0
    names = load_file(at / "cat.safetensors")
    if "image_encoder" in paths:
        assert any("attn2.add_k_proj.lora_A" in name for name in names)
    capsys.readouterr()


def test_what_does_not_fit_is_said_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr("minisora_jax.training.diffusion_task.train", None)
    given, plain = Latents(write_colours(tmp_path / "given", 8)), tmp_path / "plain"
    clips = [dataclasses.replace(given[i], frames=None) for i in range(8)]
    write_latents(plain, clips, codec_hash="c", text=BYTES.record, empty_text_LE=encode_bytes(""))
    small = given_task(1)
    reads = lambda **changes: dataclasses.replace(small, dit=dataclasses.replace(small.dit, **changes))
    for settings, latents, words in (
        (
            small,
            Latents(plain),
            "given_channels=8 reads given frames, and the latent cache has none: .* --given=first$",
        ),
        (reads(given_channels=0), given, "reads no given frames as channels: encode the clips without --given"),
        (
            reads(given_channels=20),
            given,
            "reads 20 channels of given frames, .* the latent cache has 8, and 0 of width 0",
        ),
        (reads(image_features=32, image_positions=10), Latents(plain), "--given=ends --image-encoder=DIR"),
        (reads(image_features=32), given, "any number of image tokens of width 32; the latent cache has 8, and 0"),
    ):
        with pytest.raises(ValueError, match=words):
            train_diffusion(settings, tmp_path / "no", latents, {}, {})
    assert not (tmp_path / "no").exists()


def test_a_damaged_cache_is_said(tmp_path):
    record = {"frames": "first", "channels": 8, "image": None}
    clip = clip_of(np.ones(4), (3, 2, 2), "a")
    of_other = dataclasses.replace(clip, frames=GivenFrames(np.zeros((3, 2, 2, 7), np.float32)))
    common = dict(codec_hash="c", text=BYTES.record, empty_text_LE=encode_bytes(""))
    write_latents(tmp_path / "other", [of_other, dataclasses.replace(clip, frames=None)], given=record, **common)
    for i, words in ((0, r"given frames are \[\[3, 2, 2, 7\], None\]"), (1, r"given frames are \[None, None\]")):
        with pytest.raises(DataError, match=words):
            Latents(tmp_path / "other")[i]
    write_latents(tmp_path / "wrong", [clip], given={"frames": 3}, **common)
    with pytest.raises(DataError, match="manifest.json is damaged: its given frames are {'frames': 3}"):
        Latents(tmp_path / "wrong")


def test_flags_that_do_not_go_together_are_refused(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["encode", "shapes:train:2", out, "--given=middle"]) != 0
    assert "--given=middle: the given frames of a clip are first or ends" in capsys.readouterr().err
    assert main(["encode", "shapes:train:2", out, "--image-encoder=x"]) != 0
    assert "--image-encoder=x sees given frames: say which by --given=first or --given=ends" in capsys.readouterr().err
