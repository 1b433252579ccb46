"""Wan from images: from folders of the published layout to latents, against diffusers' WanImageToVideoPipeline.

The fixtures are made by tests/parity/make_image_to_video.py.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "parity"))

from published import export_params  # noqa: E402
from random_weights import draw, draw_ids, draw_input  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from test_parity_dit import published_names  # noqa: E402
from test_parity_trajectories import GivenNoise  # noqa: E402

from minisora_jax.cli import main  # noqa: E402
from minisora_jax.data.given_frames import as_channels, given_video  # noqa: E402
from minisora_jax.data.rows import patchify, unpatchify  # noqa: E402
from minisora_jax.diffusion.guidance import GuidanceConfig  # noqa: E402
from minisora_jax.diffusion.sampler import SamplerConfig  # noqa: E402
from minisora_jax.generate import VideoPipeline, sampling  # noqa: E402
from minisora_jax.generate.packed import PackedRequests  # noqa: E402
from minisora_jax.generate.request import Given, Request  # noqa: E402
from minisora_jax.io.model_dir import load_model  # noqa: E402
from minisora_jax.media.video import read_clip_frames  # noqa: E402
from minisora_jax.media.video_writer import write_video  # noqa: E402
from minisora_jax.models.captions import BYTES, Captions  # noqa: E402
from minisora_jax.models.clip_vision import CLIPVision, CLIPVisionConfig  # noqa: E402
from minisora_jax.models.encoder import TextEncoder  # noqa: E402
from minisora_jax.models.t5 import T5Config  # noqa: E402
from minisora_jax.models.vae import VAE  # noqa: E402
from minisora_jax.parallel.mesh import MeshConfig, make_mesh  # noqa: E402
from minisora_jax.types import GivenFrames  # noqa: E402
from minisora_jax.weights import clip_vision, dit, wan_vae  # noqa: E402
from minisora_jax.weights.dit import CONFIGS  # noqa: E402
from minisora_jax.weights.presets import CODECS, IMAGE_ENCODERS, TRANSFORMERS, ImagePreset  # noqa: E402
from minisora_jax.weights.rules import export_lazily  # noqa: E402

THEIRS = load_file(Path(__file__).parent / "parity/fixtures/image_to_video.safetensors")
BYT5 = T5Config(384, 10, 2, 5, 12, 1, dtype="float32")
CLIP = CLIPVisionConfig(width=32, heads=2, mlp=48, depth=3, side=28)
VAE_CONFIG = dataclasses.replace(wan_vae.WAN_21, base=8, latent_channels=4, residual_blocks=1)
STATISTICS = dict(latent_mean=(0.1, -0.2, 0.3, 0.0), latent_std=(0.9, 1.1, 1.2, 0.8))
SMALL = dict(width=32, depth=2, heads=2, mlp_ratio=40 / 32, text_features=10, dtype="float32")
SMALL |= dict(latent_channels=4, given_channels=8)


def picture(name: str, height: int = 32, width: int = 48) -> np.ndarray:
    """As in make_image_to_video.py."""
    return draw_ids(name, (height // 4, width // 4, 3), 256).astype(np.uint8).repeat(4, axis=0).repeat(4, axis=1)


def publish(path: Path, shapes: dict[str, tuple[int, ...]], share: float = 1.0) -> None:
    """A file of weights drawn by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.float32(share) * draw(name, shape) for name, shape in shapes.items()}, path)


def clip_names(layout: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of CLIP's vision encoder in a layout, with its shape."""
    shapes = jax.eval_shape(CLIPVision(CLIP).init, jax.random.key(0), jnp.zeros((1, CLIP.side, CLIP.side, 3)))
    blank = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    return {name: x.shape for name, x in export_lazily(blank, clip_vision.rules(CLIP, layout)).items()}


def imported(preset: str, path: Path, out: Path) -> Path:
    assert main(["import", preset, str(path), f"--out={out}"]) == 0
    return out


def folders(preset: str, root: Path, patch: pytest.MonkeyPatch) -> dict[str, Path]:
    """What `VideoPipeline.load` takes, imported from a folder in diffusers' layout."""
    small = dataclasses.replace(CONFIGS[preset], **SMALL)
    if small.image_features:
        small = dataclasses.replace(small, image_features=CLIP.width)
    if small.image_positions:
        small = dataclasses.replace(small, image_positions=2 * CLIP.tokens)
    patch.setitem(TRANSFORMERS, preset, dataclasses.replace(TRANSFORMERS[preset], config=small))
    patch.setitem(CODECS, "wan2.1-vae", dataclasses.replace(CODECS["wan2.1-vae"], config=VAE_CONFIG, **STATISTICS))
    experts = TRANSFORMERS[preset].low_noise_below is not None
    for name, share in (("transformer", 1.0), ("transformer_2", 0.8))[: 1 + experts]:
        publish(root / name / "diffusion_pytorch_model.safetensors", published_names(small), share)
    shapes = jax.eval_shape(VAE(VAE_CONFIG).init, jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3)))
    blank = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    names = {name: x.shape for name, x in export_lazily(blank, wan_vae.rules(VAE_CONFIG)).items()}
    publish(root / "vae/diffusion_pytorch_model.safetensors", names)
    ids = np.ones((1, 8), np.int32)
    text = TextEncoder(BYT5, {})
    dataclasses.replace(text, params=text.module.init(jax.random.key(0), ids, ids)).export(root / "byt5", {})
    paths = {
        "model": imported(preset, root if experts else root / "transformer", root / "model"),
        "codec": imported("wan2.1-vae", root / "vae", root / "codec"),
        "text_encoder": root / "byt5",
    }
    if small.image_features:
        patch.setitem(IMAGE_ENCODERS, "clip-vision-h", ImagePreset("small", CLIP, clip_vision))
        publish(root / "image_encoder/model.safetensors", clip_names("bare"))
        paths["image_encoder"] = imported("clip-vision-h", root / "image_encoder", root / "clip")
    return paths


def made_once(tmp_path_factory):
    """of(preset): its folders."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:

        def of(preset: str) -> dict[str, Path]:
            if preset not in made:
                made[preset] = folders(preset, tmp_path_factory.mktemp(preset), patch)
            return made[preset]

        yield of


published = pytest.fixture(scope="module")(made_once)


def of_reference(pipeline: VideoPipeline, patch: pytest.MonkeyPatch) -> tuple[VideoPipeline, list[np.ndarray]]:
    """(the pipeline with the reference's captions and noise, a list that gets the latents after each step)."""
    noise = patchify(np.moveaxis(draw_input("wan noise", (1, 4, 3, 4, 6))[0], 0, -1), (1, 2, 2))
    tokens, steps, states = np.tile(noise.reshape(1, 18, 16), (1, 2, 1)), sampling.sampling_steps, []

    def recording(*arguments):
        state = steps(*arguments)
        states.append(np.moveaxis(unpatchify(np.asarray(state[0])[0, :18].reshape(3, 2, 3, 16), (1, 2, 2)), -1, 0))
        return state

    patch.setattr(sampling, "sampling_steps", recording)
    patch.setattr(PackedRequests, "noise", lambda _: GivenNoise(jnp.asarray(tokens)[None]))
    texts = dict(zip(("prompt", "negative"), draw_input("text 7", (2, 7, 10))))
    captions = Captions({}, 10, lambda texts_: [texts[text or "negative"] for text in texts_])
    return dataclasses.replace(pipeline, captions=captions), states


CASES = {
    "wan2.1-i2v-14b": (5.0, "Wan 2.1 I2V, diffusers WanImageToVideoPipeline, UniPC"),
    "wan2.1-flf2v-14b": (5.0, "Wan 2.1 FLF2V, diffusers WanImageToVideoPipeline, UniPC"),
    "wan2.2-i2v-a14b": (3.5, "Wan 2.2 I2V A14B, diffusers WanImageToVideoPipeline, UniPC"),
    "wan2.2-i2v-a14b, two images": (3.5, "Wan 2.2 I2V A14B, two images, diffusers WanImageToVideoPipeline, UniPC"),
}


@pytest.mark.parametrize("case", CASES)
def test_images_become_the_pipelines_videos(case, published, monkeypatch, parity):
    scale, system = CASES[case]
    pipeline = VideoPipeline.load(**published(case.split(",")[0]), offload="a14b" in case)
    pipeline, states = of_reference(pipeline, monkeypatch)
    options = dict(guidance=GuidanceConfig(scale), sampler=SamplerConfig("unipc", 3, "wan"))
    first, last = picture("first picture"), picture("last picture")
    if "two images" in case or "flf2v" in case:
        video = pipeline.interpolate("prompt", first, last, frames=9, **options)
    else:
        video = pipeline.image_to_video("prompt", first, frames=9, **options)
    assert video.shape == (9, 32, 48, 3) and video.std() > 5
    for i, (state, their) in enumerate(zip(states, THEIRS[case], strict=True)):
        parity(system, "trajectory", state, their, f"step {i + 1} of 3")


@pytest.mark.parametrize("preset", ["wan2.2-i2v-a14b", "wan2.1-flf2v-14b"])
def test_requests_of_several_sizes_share_rows(preset, published):
    """Each video is what it is alone, and each depends on its images."""
    pipeline = VideoPipeline.load(**published(preset))
    sizes = {"a": (32, 48), "b": (48, 32), "c": (32, 48)}
    request = lambda name: Request("a cat", (5, *sizes[name]), seed=3, frames=given(pipeline, name, sizes[name]))
    options = dict(steps=2, progress=False, tokens_at_once=64)
    packed = pipeline.sample([request(name) for name in sizes], **options)
    for name, together in zip(sizes, packed):
        [alone] = pipeline.sample([request(name)], **options)
        np.testing.assert_allclose(together, alone, atol=2e-5)
    assert np.abs(packed[0] - packed[2]).max() > 0.01  # of the same words, seed and size


@pytest.mark.parametrize("mesh", [dict(data=2, ring=2), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_a_mesh_changes_nothing(mesh, published):
    paths = published("wan2.1-flf2v-14b")
    alone, shared = VideoPipeline.load(**paths), [Request("a cat", (5, 32, 48), seed=seed) for seed in range(2)]
    ours = lambda pipeline: [
        dataclasses.replace(request, frames=given(pipeline, str(request.seed), (32, 48))) for request in shared
    ]
    options = dict(steps=2, progress=False)
    expected = alone.sample(ours(alone), **options)
    with jax.set_mesh(make_mesh(MeshConfig(**mesh), jax.devices()[: int(np.prod(list(mesh.values())))])):
        on_mesh = VideoPipeline.load(**paths)
        found = on_mesh.sample(ours(on_mesh), **options)
    for video, other in zip(found, expected):
        np.testing.assert_allclose(video, other, atol=2e-5)


def given(pipeline: VideoPipeline, name: str, size: tuple[int, int]) -> GivenFrames:
    """Two given frames."""
    images = [picture(f"{name} {i}", *size) for i in range(2)]
    [latents] = pipeline.encode([given_video(dict(zip((0, 4), images)), (5, *size))])
    encoder = pipeline.image_encoder
    return GivenFrames(
        as_channels(latents, np.arange(5) % 4 == 0), np.concatenate(encoder.encode(images)) if encoder else None
    )


def test_wans_own_names_hold_the_same(published, tmp_path):
    """Its table of image positions is `img_emb.emb_pos`."""
    model, preset = published("wan2.1-flf2v-14b")["model"], "wan2.1-flf2v-14b"
    params, _ = load_model(model)
    own = export_params(params, dit.rules(TRANSFORMERS[preset].config, "wan-own"))
    assert own["img_emb.emb_pos"].shape == (1, 2 * CLIP.tokens, CLIP.width)
    save_file(own, tmp_path / "own.safetensors")
    again, _ = load_model(imported(preset, tmp_path / "own.safetensors", tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_the_mask_says_which_frames_of_a_latent_frame_are_given():
    latents = np.full((3, 2, 2, 4), 7, np.float32)
    given = as_channels(latents, np.isin(np.arange(9), (0, 6)))
    assert given.shape == (3, 2, 2, 8)
    np.testing.assert_array_equal(given[:, 1, 1, :4], [[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(given[..., 4:], latents)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["wan2.2-i2v-a14b", "wan2.1-i2v-14b", "wan2.1-flf2v-14b"])
def test_the_command_makes_a_video_and_makes_it_again(preset, published, tmp_path, capsys):
    flags = [f"--{name.replace('_', '-')}={path}" for name, path in published(preset).items()]
    for name in ("first", "last"):
        write_video(tmp_path / f"{name}.png", picture(name)[None], fps=1)
    images = [f"--image={tmp_path / 'first.png'}"]
    if preset == "wan2.1-flf2v-14b":
        images = [f"--first={tmp_path / 'first.png'}", f"--last={tmp_path / 'last.png'}"]
    out, common = tmp_path / "made", ["--frames=9", "--steps=2", "--upscale=1"]
    assert main(["generate", "a cat", *images, f"--out={out}", *common, *flags]) == 0
    [file] = out.glob("*.mp4")
    frames, _ = read_clip_frames(file)
    assert frames.shape == (9, 32, 48, 3)
    assert main(["generate", f"--reproduce={file}", f"--out={tmp_path / 'again'}", "--upscale=1"]) == 0
    assert "the same to the bit" in capsys.readouterr().out


OTHERS = {
    "text_to_video": ["--size=32x48"],
    "long_video": ["--size=32x48", "--seconds=3"],
    "video_to_video": ["--video=clip.mp4", "--strength=0.5"],
    "extend": ["--video=clip.mp4", "--extend", "forward", "1"],
    "transition": ["--transition", "clip.mp4", "clip.mp4"],
}


@pytest.mark.parametrize("task", OTHERS)
def test_other_tasks_are_refused_by_name(task, published, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_video("clip.mp4", np.stack([picture("a")] * 9), fps=8)
    flags = [f"--{name.replace('_', '-')}={path}" for name, path in published("wan2.2-i2v-a14b").items()]
    assert main(["generate", "a cat", *OTHERS[task], f"--out={tmp_path}", *flags]) != 0
    error = capsys.readouterr().err
    assert "it can do image_to_video (--image FIRST) and interpolate (--first FIRST --last LAST)" in error
    assert f"not {task}" in error


def test_a_model_of_one_image_or_of_two_says_so(published, tmp_path, capsys):
    """On the command line and in Python."""
    one, two = (VideoPipeline.load(**published(preset)) for preset in ("wan2.1-i2v-14b", "wan2.1-flf2v-14b"))
    first, last = picture("first"), picture("last")
    with pytest.raises(ValueError, match="it can do image_to_video .--image FIRST., and not interpolate"):
        one.interpolate("a cat", first, last, frames=9, steps=1)
    with pytest.raises(ValueError, match="it can do interpolate .--first FIRST --last LAST., and not image_to_video"):
        two.image_to_video("a cat", first, frames=5, steps=1)
    flags = [f"--{name.replace('_', '-')}={path}" for name, path in published("wan2.1-flf2v-14b").items()]
    write_video(tmp_path / "a.png", first[None], fps=1)
    assert main(["generate", "a cat", f"--image={tmp_path / 'a.png'}", f"--out={tmp_path}", *flags]) != 0
    assert "it can do interpolate" in capsys.readouterr().err
    frames = given(one, "a", (32, 48))
    for tokens, words in ((None, "are missing: the model reads any number of width 32"), (9, r"are \(10, 9\)")):
        image_IE = tokens and frames.image_IE[:, :tokens]
        with pytest.raises(ValueError, match=words):
            one.sample([Request("a cat", (5, 32, 48), frames=GivenFrames(frames.channels_thwc, image_IE))], steps=1)


def test_the_api_refuses_them_too(published):
    pipeline = VideoPipeline.load(**published("wan2.2-i2v-a14b"))
    with pytest.raises(ValueError, match="it can do image_to_video .* not a request without frames"):
        pipeline.text_to_video("a cat", frames=5, size=(32, 48), steps=1)
    known = Given(np.zeros((2, 4, 6, 4), np.float32), np.arange(2)[:, None, None] * np.ones((2, 2, 3)) < 1)
    with pytest.raises(ValueError, match="not one with given latents"):
        pipeline.sample([Request("a cat", (5, 32, 48), given=known)], steps=1)
    with pytest.raises(ValueError, match="frames=1: the whole video is given"):
        pipeline.image_to_video("a cat", picture("a"), frames=1, steps=1)
    frames = GivenFrames(np.zeros((3, 4, 6, 8), np.float32))
    with pytest.raises(ValueError, match=r"have \(3, 2, 3\) tokens of 32 numbers; the request has \(2, 2, 3\)"):
        pipeline.sample([Request("a cat", (5, 32, 48), frames=frames)], steps=1)
    ours = VideoPipeline.load()
    with pytest.raises(ValueError, match="Request.frames is for models with given_channels"):
        ours.sample([Request("a red circle", (5, 48, 48), frames=frames)], steps=1)
    assert ours.captions is BYTES
