"""Motion modules: an image model stays as it is, frame by frame, and attention over time is trained beside it."""

import dataclasses
import json
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from minisora_jax.cli import main
from minisora_jax.data.packing import PackConfig
from minisora_jax.data.rows import Segment, pack_segments
from minisora_jax.io.model_dir import load_model
from minisora_jax.media.video import read_clip_frames
from minisora_jax.models.attention_ids import attention_segments
from minisora_jax.models.dit import DiT, DiTConfig, abstract_params
from minisora_jax.models.lora import kernels
from minisora_jax.models.motion import PATTERN, MotionModule
from minisora_jax.models.rope import rope_angles
from minisora_jax.models.text import encode_bytes
from minisora_jax.parallel.mesh import MeshConfig, batch_specs, make_mesh, to_global
from minisora_jax.toy.shapes import Shapes
from minisora_jax.training.flops import count_work
from minisora_jax.weights.dit import CONFIGS, rules

SMALL = dict(latent_channels=4, width=48, depth=1, heads=2, dtype="float32", attention="reference")
MODELS = {
    "ours": DiTConfig(**SMALL, text_width=64, text_depth=0),
    "dit": dataclasses.replace(CONFIGS["dit-xl-2-256"], **SMALL, classes=5),
    "pixart": dataclasses.replace(CONFIGS["pixart-alpha-1024"], **SMALL, text_features=6),
}
SIZES = ((3, 2, 2), (2, 1, 3))


def packed(cfg: DiTConfig, sizes, tokens_SP: np.ndarray, of_clip, rows: int = 1):
    """A batch of clips; clip i has the caption of number of_clip[i]."""
    captions = {
        "refined": [encode_bytes("a dog"), encode_bytes("two cats")],
        "label": [np.array([[3]]), np.array([[1]])],
    }
    features = np.random.default_rng(1).standard_normal((2, 3, 6)).astype(np.float32)
    texts, segments, at = captions.get(cfg.caption, features), [], 0
    for size, number in zip(sizes, of_clip):
        n = int(np.prod(size))
        segments.append(Segment(tokens_SP[at : at + n], np.zeros(n, bool), size, texts[number], 8.0))
        at += n
    pack = PackConfig(tokens=20, text_tokens=128, slots=len(sizes), rows=rows)
    return jax.tree.map(jnp.asarray, pack_segments([segments] * rows, pack))


def random_params(cfg: DiTConfig, scale: float = 0.2):
    draw = lambda path, x: scale * jax.random.normal(jax.random.key(zlib.crc32(str(path).encode())), x.shape)
    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg))


def without(params, names: str):
    """Parameters whose paths have one of these words are zero."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict({n: x * (names not in n) for n, x in flat.items()}, sep="/")


@pytest.mark.parametrize("name", ["dit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ours", "pixart"))])
def test_a_new_motion_module_leaves_the_image_model(name):
    """With W_out = 0 each frame of a clip comes out as the image model makes it of that frame alone."""
    image_cfg = MODELS[name]
    cfg = dataclasses.replace(image_cfg, motion_modules=True)
    assert image_cfg.makes_images == (name != "ours") and not cfg.makes_images
    tokens = np.random.default_rng(0).standard_normal((18, cfg.token_width)).astype(np.float32)
    clips = packed(cfg, SIZES, tokens, (0, 1))
    images = packed(cfg, [(1, h, w) for t, h, w in SIZES for _ in range(t)], tokens, (0, 0, 0, 1, 1))
    time_BS = jnp.where(jnp.arange(20) < 12, 0.3, 0.8)[None]
    of_images, params = random_params(image_cfg), random_params(cfg)
    forward = lambda cfg: jax.jit(lambda p, b: DiT(cfg).apply(p, b.tokens_BSP, time_BS, b)[0, :18])
    wanted, made = forward(image_cfg)(of_images, images), forward(cfg)
    new = made(without(params, "motion/proj_out"), clips)
    np.testing.assert_allclose(new, wanted, atol=2e-6 * np.abs(wanted).max(), rtol=0)
    assert np.abs(made(params, clips) - wanted).max() > 1e-2 * np.abs(wanted).max()


@pytest.mark.slow
def test_a_motion_module_is_attention_over_frames_at_each_place():
    """Its value, against float64 NumPy, clip by clip and place by place."""
    cfg = dataclasses.replace(MODELS["ours"], motion_modules=True)
    x = np.random.default_rng(0).standard_normal((20, 48)).astype(np.float32)
    batch = packed(cfg, SIZES, np.zeros((18, cfg.token_width), np.float32), (0, 1))
    ids = attention_segments(cfg.attention_kinds, batch)["temporal"]
    angles = rope_angles(batch.position_BS3[..., :1], 24)
    every = traverse_util.flatten_dict(random_params(cfg)["params"]["blocks"]["motion"], sep="/")
    params = {name: leaf[0] for name, leaf in every.items()}  # of the first layer
    tree = {"params": traverse_util.unflatten_dict(params, sep="/")}
    result = np.asarray(jax.jit(MotionModule(cfg).apply)(tree, jnp.asarray(x)[None], ids, angles))[0]
    new = jax.jit(lambda: MotionModule(cfg).init(jax.random.key(0), x[None], ids, angles)["params"]["proj_out"])()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(new))

    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}

    def norm(h, name):
        h = h - h.mean(-1, keepdims=True)
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}/scale"] + p[f"{name}/bias"]

    def turned(h, name):  # (frames, heads, 24), with RMS norm and rotation
        h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}/scale"]
        angle = np.arange(len(h))[:, None] * 10_000.0 ** (-np.arange(12) / 12)
        pairs = (h[..., 0::2] + 1j * h[..., 1::2]) * np.exp(1j * angle)[:, None]
        return np.stack([pairs.real, pairs.imag], -1).reshape(h.shape)

    def attention(h, name):
        q, k, v = (np.einsum("td,dnk->tnk", h, p[f"{name}/{s}/kernel"]) + p[f"{name}/{s}/bias"] for s in "qkv")
        q, k = turned(q, f"{name}/q_norm"), turned(k, f"{name}/k_norm")
        weights = np.exp(np.einsum("tnk,mnk->ntm", q, k) / np.sqrt(24))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("ntm,mnk,nkd->td", weights, v, p[f"{name}/out/kernel"]) + p[f"{name}/out/bias"]

    def module(x):
        linear = lambda h, name: h @ p[f"{name}/kernel"] + p[f"{name}/bias"]
        h = linear(norm(x, "norm"), "proj_in")
        for name in ("first", "second"):
            h = h + attention(norm(h, f"{name}_norm"), f"{name}_attention")
        up = linear(norm(h, "mlp_norm"), "mlp/up")
        up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        return x + linear(h + linear(up, "mlp/down"), "proj_out")

    start = 0
    for t, h, w in SIZES:
        clip = x[start : start + t * h * w].astype(np.float64).reshape(t, h * w, 48)
        wanted = np.stack([module(clip[:, place]) for place in range(h * w)], axis=1)
        np.testing.assert_allclose(result[start : start + t * h * w], wanted.reshape(-1, 48), rtol=2e-4, atol=2e-4)
        start += t * h * w


@pytest.mark.slow
def test_motion_modules_on_a_mesh():
    cfg = dataclasses.replace(MODELS["ours"], motion_modules=True)
    batch = packed(cfg, SIZES, np.random.default_rng(0).standard_normal((18, 16)).astype(np.float32), (0, 1), rows=2)
    params = random_params(cfg)
    forward = jax.jit(lambda params, batch: DiT(cfg).apply(params, batch.tokens_BSP, 0.0 * batch.segment_BS, batch))
    alone, mesh = forward(params, batch), make_mesh(MeshConfig(data=2, ring=4))
    with jax.set_mesh(mesh):
        on_mesh = forward(params, to_global(jax.tree.map(np.asarray, batch), mesh, batch_specs(batch)))
    np.testing.assert_allclose(np.asarray(on_mesh)[:, :18], alone[:, :18], atol=1e-5 * np.abs(alone).max())


def test_the_work_of_motion_modules_is_counted():
    cfg = dataclasses.replace(MODELS["ours"], motion_modules=True)
    sizes, pack = [np.array([[3, 4, 4, 4], [2, 2, 6, 4]])], PackConfig(tokens=18, text_tokens=8, slots=2, rows=1)
    weights = sum(
        np.prod(kernel.inputs) * np.prod(kernel.outputs) for kernel in kernels(abstract_params(cfg), PATTERN).values()
    )
    spatial, temporal, joint = 3 * 4 * 4 + 2 * 3 * 3, 4 * 3 * 3 + 3 * 2 * 2, 12 * 12 + 6 * 6  # pairs of tokens
    more = count_work(cfg, pack, sizes)["useful_flops"] - count_work(MODELS["ours"], pack, sizes)["useful_flops"]
    assert more == 3 * (2 * 18 * weights + 4 * 48 * (spatial + 2 * temporal - joint))


def test_what_has_no_motion_modules_is_said():
    with pytest.raises(ValueError, match="motion_modules=True with attention_pattern="):
        dataclasses.replace(CONFIGS["latte-1"], motion_modules=True)
    with pytest.raises(ValueError, match="no published layout has motion modules"):
        rules(dataclasses.replace(MODELS["dit"], motion_modules=True))


# ---- From the command line


def minisora(*argv):
    assert main([str(a) for a in argv]) == 0


TINY = ["width=64", "depth=2", "heads=2", "text_width=64", "text_depth=0"]
OPTIM = ["learning_rate=0.02", "warmup=1", "ema=0", "name=adamw"]


def train(at, name, data, *more):
    keys = [*(f"dit.{x}" for x in TINY), *(f"run.optim.{x}" for x in OPTIM), "run.save_every=2", "run.log_every=1"]
    keys += ["run.mesh.data=1", "run.mesh.ring=8"]  # of the 8 devices of tests
    keys += ["export_dtype=float32"]  # a merge in float16 is rounded
    config = f"--config=dit_tiny:data={at / data},steps=3,rows=1,prompts=0"
    minisora("train", config, *(f"--config.{x}" for x in keys), f"--workdir={at / name}", *more)
    return at / name / "export"


def made(capsys, at, name, model, *loras, frames=9, prompt="a red circle moves left on a black background"):
    capsys.readouterr()
    adapters = [part for lora in loras for part in ("--lora", lora)]
    flags = [
        "--size=32x32",
        f"--frames={frames}",
        "--steps=2",
        "--upscale=1",
        f"--model={model}",
        f"--out={at / 'made' / name}",
    ]
    minisora("generate", prompt, *flags, *adapters)
    path = next(line for line in capsys.readouterr().out.splitlines() if line.endswith((".mp4", ".png")))
    return read_clip_frames(path)[0].astype(int) if path.endswith(".mp4") else np.asarray(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with latents of clips and of their frames as images, and a small model."""
    at = tmp_path_factory.mktemp("motion")
    (at / "frames").mkdir()
    clips = Shapes("train", 12)
    for i in range(12):
        Image.fromarray(clips[i].frames_THWC[-1]).save(at / f"frames/{i:02}.png")
        (at / f"frames/{i:02}.txt").write_text(clips[i].caption)
    minisora("prepare", at / "frames", at / "images")
    minisora("encode", at / "images", at / "image-latents")
    minisora("encode", "shapes:train:12", at / "latents")
    train(at, "base", "latents")
    return at


@pytest.mark.slow
def test_adapters_of_look_and_motion(base, capsys, caplog):
    """The motion learns over the look, folded in; used together they are what the motion learned over."""
    at, model = base, base / "base/export"
    lora = "rank=2,targets=all,base=float32"
    look = train(at, "look", "image-latents", f"--init={model}", "--lora", lora)
    minisora("merge", model, look, f"--out={at / 'looked'}")
    motion = train(at, "motion", "latents", f"--init={at / 'looked'}", "--lora", f"{lora},debias=1")
    train(at, "plain", "latents", f"--init={at / 'looked'}", "--lora", lora)
    loss = lambda name: json.loads((at / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert loss("motion") > 1.2 * loss("plain") and load_model(motion)[1]["lora"]["debias"] == 1

    with caplog.at_level("WARNING", "minisora"):
        both = made(capsys, at, "both", model, look, motion)
    assert "was trained over the model" in caplog.text
    alone = made(capsys, at, "alone", model, motion)
    difference = lambda a, b: np.abs(a - b).mean()
    changed = difference(both, alone)
    assert changed > 1 and difference(alone, made(capsys, at, "none", model)) > 1
    assert difference(made(capsys, at, "merged", at / "looked", motion), both) < 0.1 * changed


@pytest.mark.slow
def test_motion_modules_are_trained_over_a_frozen_model(base, capsys):
    at, model = base, base / "base/export"
    settings = ["--config.dit.motion_modules=True", f"--config.train_only={PATTERN}"]
    animated = train(at, "animated", "latents", f"--init={model}", *settings)
    before, after = (traverse_util.flatten_dict(load_model(path)[0], sep="/") for path in (model, animated))
    assert {n for n in after if n not in before} == {n for n in after if n.startswith("params/blocks/motion/")}
    assert all(np.array_equal(after[name], leaf) for name, leaf in before.items())
    assert np.any(after["params/blocks/motion/proj_out/kernel"])
    assert load_model(animated)[1]["dit"]["motion_modules"]

    whole = (animated / "model.safetensors").read_bytes()  # a run that is cut off goes on exactly
    shutil.rmtree(animated)
    shutil.rmtree(at / "animated/checkpoints/3")
    train(at, "animated", "latents", f"--init={model}", *settings)
    assert (animated / "model.safetensors").read_bytes() == whole

    assert made(capsys, at, "video", animated).shape == (9, 32, 32, 3)
    photo = "a photo of a red circle on a black background"
    assert made(capsys, at, "image", animated, frames=1, prompt=photo).shape == (32, 32, 3)
    again = train(at, "again", "latents", f"--init={animated}", "--lora", "rank=2,targets=temporal")
    paths = traverse_util.flatten_dict(load_model(again)[0]["lora"], sep="/")
    assert paths and all(path.startswith("blocks/motion/") for path in paths)
    config = [f"--config=dit_tiny:data={at / 'latents'}", *(f"--config.dit.{x}" for x in TINY)]
    assert main(["train", *config, f"--init={model}", settings[0], f"--workdir={at / 'no'}"])
    assert "it has nothing, the config wants" in capsys.readouterr().err
