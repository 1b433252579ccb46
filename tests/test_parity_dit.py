"""DiT, SiT, PixArt, Latte and Wan against diffusers: values, gradients, names, packing (parity/make_dit.py)."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from headers import models, published  # noqa: E402
from published import export_params, import_params  # noqa: E402
from random_weights import draw, draw_ids, draw_input  # noqa: E402

from minisora_jax.cli import main  # noqa: E402
from minisora_jax.data.packing import PackConfig  # noqa: E402
from minisora_jax.data.rows import Segment, pack_segments  # noqa: E402
from minisora_jax.models.dit import DiT, DiTConfig, abstract_params  # noqa: E402
from minisora_jax.parallel.mesh import BATCH, MeshConfig, make_mesh, to_global  # noqa: E402
from minisora_jax.types import PackedBatch  # noqa: E402
from minisora_jax.weights.checkpoint import Checkpoint  # noqa: E402
from minisora_jax.weights.dit import CONFIGS, IGNORED, name_map_of, published_name_map, rules  # noqa: E402
from minisora_jax.weights.presets import TRANSFORMERS  # noqa: E402
from minisora_jax.weights.rules import export_lazily  # noqa: E402

FIXTURES = Path(__file__).parent / "parity/fixtures"
_IMAGE = dict(width=24, depth=2, heads=2, dtype="float32", base_grid=8)
_I2V = dict(given_channels=5, image_features=6)
_WAN = dict(latent_channels=4, width=32, depth=2, heads=2, mlp_ratio=40 / 32, text_features=10, dtype="float32")
SMALL = {
    "wan": dataclasses.replace(CONFIGS["wan2.1-t2v-1.3b"], **_WAN),
    "i2v": dataclasses.replace(CONFIGS["wan2.1-i2v-14b"], **_WAN | _I2V),
    "dit": dataclasses.replace(CONFIGS["dit-xl-2-256"], **_IMAGE, classes=11),
    "sit": dataclasses.replace(CONFIGS["sit-xl-2-256"], **_IMAGE, classes=11),
    "plain": dataclasses.replace(CONFIGS["pixart-alpha-512"], **_IMAGE, text_features=10),
    "sized": dataclasses.replace(CONFIGS["pixart-alpha-1024"], **_IMAGE, text_features=10),
    "latte": dataclasses.replace(CONFIGS["latte-1"], **_IMAGE, text_features=10),
}  # fmt: skip


def relative(ours, theirs):
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def published_names(config: DiTConfig, layout: str | None = None) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this layout, with its shape."""
    blank = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), abstract_params(config))
    return {name: tensor.shape for name, tensor in export_lazily(blank, rules(config, layout)).items()}


def write(config: DiTConfig, layout: str, path: Path) -> Path:
    """A checkpoint of that layout. Copies of a tensor are drawn once."""
    copied = {name: rule.names[0] for rule in rules(config, layout) if rule.copies for name in rule.names}
    names = published_names(config, layout)
    save_file({k: draw(copied.get(k, k), shape) for k, shape in names.items()}, path)
    return path


def loaded(config: DiTConfig, layout: str, directory: Path):
    file = write(config, layout, directory / f"{layout}.safetensors")
    return import_params(Checkpoint(file), rules(config, layout), abstract_params(config), ignored=IGNORED)


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    """The parameters of each small model, loaded from a file in diffusers' layout."""
    directory = tmp_path_factory.mktemp("dit")
    found = {name: loaded(SMALL[name], published_name_map(SMALL[name]), directory) for name in SMALL if name != "sit"}
    # SiT's numbers are made by DiT, which is what it is but for the sense of time and of the velocity.
    save_file(export_params(found["dit"], rules(SMALL["dit"], "dit-own")), directory / "sit.safetensors")
    own = Checkpoint(directory / "sit.safetensors")
    found["sit"] = import_params(own, rules(SMALL["sit"], "dit-own"), abstract_params(SMALL["sit"]))
    return found


# ---- Clips in, predictions out


@dataclasses.dataclass
class Clip:
    x_cthw: np.ndarray
    text_LE: np.ndarray  # features, or the class
    time: np.ndarray | float  # in [0, 1], one for each token or for all


def packed(config, rows: list[list[Clip]]) -> tuple[PackedBatch, np.ndarray]:
    """The clips of each row as a batch, and their times (B, S)."""
    _, p, q = config.patch
    to_tokens = lambda x: rearrange(x, "c t (h p) (w q) -> t h w (p q c)", p=p, q=q).astype(np.float32)
    segments, times = [], []
    for row in rows:
        grids = [to_tokens(clip.x_cthw[: config.latent_channels if config.given_channels else None]) for clip in row]
        count = [grid[..., 0].size for grid in grids]
        times.append(np.concatenate([np.broadcast_to(clip.time, n) for clip, n in zip(row, count)]))
        segments.append(
            [
                Segment(grid.reshape(n, -1), np.zeros(n, bool), grid.shape[:3], clip.text_LE, 8.0)
                for clip, grid, n in zip(row, grids, count)
            ]
        )
    tokens = max(map(len, times)) + 3
    text = max(sum(len(clip.text_LE) for clip in row) for row in rows) // 4 * 4 + 4
    slots = max(map(len, rows))
    batch = pack_segments(segments, PackConfig(tokens=tokens, text_tokens=text, slots=slots, rows=len(rows)))
    if config.given_channels:
        given_BSx = np.zeros((len(rows), tokens, config.given_width), np.float32)
        for given_Sx, row in zip(given_BSx, rows):
            channels = [to_tokens(clip.x_cthw[config.latent_channels :]) for clip in row]
            joined = np.concatenate([x.reshape(-1, config.given_width) for x in channels])
            given_Sx[: len(joined)] = joined
        batch = batch.replace(given_BSx=given_BSx)
    if config.image_features:
        image = draw_input("image", (1, 5, config.image_features))
        of_row = np.repeat(np.arange(1, slots + 1, dtype=np.int32), 5)
        batch = batch.replace(
            image_BIE=np.tile(image, (len(rows), slots, 1)), image_segment_BI=np.tile(of_row, (len(rows), 1))
        )
    time_BS = np.stack([np.pad(t, (0, tokens - len(t))) for t in times]).astype(np.float32)
    return batch, time_BS


def to_latents(config, y_SP, size_thw) -> np.ndarray:
    (t, h, w), (_, p, q) = size_thw, config.patch
    h, w = h // p, w // q
    return rearrange(y_SP[: t * h * w], "(t h w) (p q c) -> c t (h p) (w q)", t=t, h=h, w=w, p=p, q=q)


def predict(config, params, rows: list[list[Clip]]) -> list[np.ndarray]:
    """The prediction for each clip, (C, t, h, w), row by row."""
    batch, time_BS = packed(config, rows)
    y_BSP = np.asarray(jax.jit(DiT(config).apply)(params, batch.tokens_BSP, time_BS, batch))
    found = []
    for row, y_SP in zip(rows, y_BSP):
        for clip in row:
            size = clip.x_cthw.shape[1:]
            found.append(to_latents(config, y_SP, size))
            y_SP = y_SP[found[-1].size // config.out_width :]
    return found


def text_of(length: int, index: int) -> np.ndarray:
    return draw_input(f"text {length}", (2, length, 10))[index]


def video_clips(size, length: int, time) -> list[Clip]:
    """The two clips of a fixture of Wan or Latte."""
    x = draw_input(f"latents {'x'.join(map(str, size))}", (2, 4, *size))
    return [Clip(x[i], text_of(length, i), np.broadcast_to(time, (2,) + np.shape(time)[1:])[i]) for i in range(2)]


def image_clips(name: str, count: int, size_hw, texts, time) -> list[Clip]:
    x = draw_input(f"latents {name}", (count, 4, *size_hw))
    return [Clip(x[i][:, None], texts[i], time) for i in range(count)]


def cases() -> dict[str, tuple[str, list[Clip], str]]:
    """By name: the small model, the clips, and the fixture's entry, (clips, C, [t,] h, w)."""
    found = {}
    for (t, h, w), length, time in (((3, 4, 6), 7, 437.0), ((1, 2, 10), 12, 3.0), ((5, 6, 2), 1, 1000.0)):
        size = f"{t}x{h}x{w} {length}"
        found[f"wan {size}"] = "wan", video_clips((t, h, w), length, time / 1000), f"t2v {size} {time}"
        each = np.linspace(0, 1, 2 * t * h * w // 4).reshape(2, -1)
        found[f"wan each {size}"] = "wan", video_clips((t, h, w), length, each), f"each {size}"
    x, text = draw_input("i2v 3x4x6", (1, 9, 3, 4, 6))[0], draw_input("text 512", (1, 512, 10))[0]
    found["i2v"] = "i2v", [Clip(x, text, 0.437)], "i2v 3x4x6"
    labels = draw_ids("labels", (3,), 11).astype(np.int32)[:, None, None]
    for side, time in ((16, 437.0), (12, 3.0)):
        found[f"dit {side}"] = "dit", image_clips(str(side), 3, (side, side), labels, time / 1000), f"{side} {time}"
    found["sit 16"] = "sit", image_clips("16", 3, (16, 16), labels, 1 - 0.3), "16 0.3"
    for family in ("plain", "sized"):
        for (h, w), length, time in (((16, 16), 7, 437.0), ((12, 20), 3, 3.0)):
            texts = [text_of(length, i) for i in range(2)]
            clips = image_clips(f"{h}x{w}", 2, (h, w), texts, time / 1000)
            found[f"{family} {h}x{w}"] = family, clips, f"{family} {h}x{w} {length} {time}"
    for (t, h, w), length, time in (((3, 16, 16), 7, 437.0), ((1, 12, 20), 3, 3.0), ((5, 4, 8), 2, 999.0)):
        clips = video_clips((t, h, w), length, time / 1000)
        found[f"latte {t}x{h}x{w}"] = "latte", clips, f"{t}x{h}x{w} {length} {time}"
    return found


SYSTEMS = {"wan": "Wan 2.1 T2V", "i2v": "Wan 2.1 I2V", "dit": "DiT", "sit": "SiT", "latte": "Latte"}
SYSTEMS |= {"plain": "PixArt-alpha", "sized": "PixArt-alpha 1024"}
FILE = {"i2v": "wan", "sit": "dit", "plain": "pixart", "sized": "pixart"}  # of a small model, else its own name


def reference(model: str) -> dict[str, np.ndarray]:
    return load_file(FIXTURES / f"{FILE.get(model, model)}.safetensors")


@pytest.mark.parametrize("case", cases())
def test_values_are_the_references(params, case, parity):
    model, clips, entry = cases()[case]
    sign = -1 if model == "sit" else 1  # SiT's velocity points from noise to data
    theirs = reference(model)[entry]
    for ours, their in zip(predict(SMALL[model], params[model], [[clip] for clip in clips]), theirs):
        size = "x".join(map(str, clips[0].x_cthw.shape[1:]))
        parity(SYSTEMS[model], "forward", sign * ours.reshape(their.shape), their, size)


@pytest.mark.parametrize("model", ["wan", "dit", "plain", "sized", "latte"])
def test_gradients_are_the_references(params, model, parity):
    cfg = SMALL[model]
    of = {"wan": "wan 3x4x6 7", "dit": "dit 16", "plain": "plain 12x20", "sized": "sized 12x20", "latte": "latte 5x4x8"}
    clips = cases()[of[model]][1]
    if model == "dit":
        clips = [dataclasses.replace(clip, time=0.437) for clip in clips]
    batch, time_BS = packed(cfg, [[clip] for clip in clips])
    size = clips[0].x_cthw.shape[1:]
    shape = (len(clips), cfg.out_channels or 4, *(size if model in ("wan", "latte") else size[1:]))
    weights = draw_input("weights of the loss", shape).reshape(len(clips), shape[1], *size)
    weights_BSP = np.stack([packed(cfg, [[Clip(w, clips[0].text_LE, 0.0)]])[0].tokens_BSP[0] for w in weights])

    def loss(params):
        y = DiT(cfg).apply(params, batch.tokens_BSP, time_BS, batch)
        return jnp.sum(y * weights_BSP) / weights.size

    grads = export_params(jax.jit(jax.grad(loss))(params[model]), rules(cfg))
    prefix = f"{model} grad/" if model in ("plain", "sized") else "grad/"
    checked = {k.removeprefix(prefix): v for k, v in reference(model).items() if k.startswith(prefix)}
    assert len(checked) >= 3
    for name, their in checked.items():
        parity(SYSTEMS[model], "gradient", grads[name], their, name)


@pytest.mark.parametrize("model", SMALL)
def test_packed_is_clip_by_clip(params, model):
    """Clips of several sizes in one row give what each gives alone."""
    clips = [clip for of, clips, _ in cases().values() if of == model for clip in clips][:5]
    alone = predict(SMALL[model], params[model], [[clip] for clip in clips])
    for a, b in zip(predict(SMALL[model], params[model], [clips]), alone):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("model", ["wan", "latte", "dit"])
def test_it_runs_on_a_mesh(params, model):
    clips = [clip for of, clips, _ in cases().values() if of == model for clip in clips][:2] * 4
    batch, time_BS = packed(SMALL[model], [[clip] for clip in clips])
    alone = jax.jit(DiT(SMALL[model]).apply)(params[model], batch.tokens_BSP, time_BS, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        put_batch, times = to_global(batch, mesh, BATCH), to_global(time_BS, mesh, BATCH)
        y = jax.jit(DiT(SMALL[model]).apply)(params[model], put_batch.tokens_BSP, times, put_batch)
    assert relative(np.asarray(y), np.asarray(alone)) < 1e-5


# ---- Files


PUBLISHED = [(file, name) for file in ("wan", "dit", "pixart", "latte") for name in models(file)]


@pytest.mark.parametrize("file, name", PUBLISHED)
def test_every_published_tensor_has_its_place(file, name):
    config = CONFIGS[name]
    theirs = published(file, name)
    assert name_map_of(list(theirs)) == published_name_map(config)
    assert published_names(config) == theirs
    parameters = {"wan2.1-t2v-1.3b": 1_418_996_800, "wan2.1-t2v-14b": 14_288_491_584}
    if name in parameters:
        assert sum(int(np.prod(shape)) for shape in theirs.values()) == parameters[name]


@pytest.mark.parametrize(
    "model, layout", [("wan", "wan-own"), ("i2v", "wan-own"), ("dit", "dit-own"), ("sit", "dit-own")]
)
def test_the_authors_own_files_hold_the_same(params, model, layout, tmp_path):
    cfg = SMALL[model]
    own = export_params(params[model], rules(cfg, layout))
    table = {"pos_embed": np.zeros((1, 64, 24), np.float32)} if layout == "dit-own" else {}  # stored, and not needed
    save_file(own | table, tmp_path / "own.safetensors")
    checkpoint = Checkpoint(tmp_path / "own.safetensors")
    assert name_map_of(checkpoint.names) == layout
    again = import_params(checkpoint, rules(cfg, layout), abstract_params(cfg), ignored=IGNORED)
    jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, params[model]))


@pytest.mark.parametrize("model", SMALL)
def test_import_and_export_from_the_command_line(params, model, tmp_path, monkeypatch, capsys):
    preset = {"i2v": "wan2.1-i2v-14b", "sized": "pixart-alpha-1024", "plain": "pixart-alpha-512", "latte": "latte-1"}
    preset |= {"wan": "wan2.1-t2v-1.3b", "dit": "dit-xl-2-256", "sit": "sit-xl-2-256"}
    small = dataclasses.replace(TRANSFORMERS[preset[model]], config=SMALL[model])
    monkeypatch.setitem(TRANSFORMERS, preset[model], small)
    before = {k: v.astype("bfloat16") for k, v in export_params(params[model], rules(SMALL[model])).items()}
    save_file(before, tmp_path / "theirs.safetensors")
    assert main(["import", preset[model], str(tmp_path / "theirs.safetensors"), f"--out={tmp_path / 'ours'}"]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "again")]) == 0
    after = Checkpoint(tmp_path / "again")
    assert set(after.names) == set(before)
    assert all(after.read(k).tobytes() == v.tobytes() for k, v in before.items())
    written = json.loads((tmp_path / "again/config.json").read_text())
    known = {"wan": {"ffn_dim": 40}, "i2v": {"image_dim": 6, "in_channels": 9}, "dit": {"num_embeds_ada_norm": 10}}
    known |= {"sit": {"num_classes": 10}, "sized": {"use_additional_conditions": True}, "latte": {"video_length": 16}}
    assert known.get(model, {"interpolation_scale": 1}).items() <= written.items()
    broken = dict(before)
    broken.pop(next(k for k in before if "attn1.to_q.bias" in k or "attn.qkv.bias" in k))
    save_file(broken | {"lora.weight": np.zeros(3, np.float32)}, tmp_path / "broken.safetensors")
    assert main(["import", preset[model], str(tmp_path / "broken.safetensors"), f"--out={tmp_path / 'no'}"]) == 2
    said = capsys.readouterr().err
    assert "1 missing" in said and "1 extra (lora.weight)" in said and not (tmp_path / "no").exists()
