"""A clip's output and gradients do not depend on what else is in its row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minisora_jax.data.packing import PackConfig
from minisora_jax.data.rows import Segment, pack_segments
from minisora_jax.models.dit import DiT, DiTConfig, drop_variance
from minisora_jax.models.text import encode_bytes
from minisora_jax.training.flops import count_work

CONFIG = DiTConfig(latent_channels=4, patch=(1, 2, 2), width=64, depth=2, heads=2, text_width=64, dtype="float32")
SIZES = [(3, 2, 2), (1, 3, 2), (2, 2, 3), (1, 1, 1)]
CAPTIONS = ["a red circle moves left", "a blue square", "", "weiß ist auch eine Farbe"]


def segment(i: int) -> Segment:
    rng = np.random.default_rng(i)
    n = int(np.prod(SIZES[i]))
    tokens = rng.standard_normal((n, CONFIG.token_width)).astype(np.float32)
    return Segment(tokens, rng.uniform(size=n) < 0.3, SIZES[i], encode_bytes(CAPTIONS[i]), 8.0 + i)


def pack(rows: list[list[int]], tokens: int, text: int, slots: int):
    config = PackConfig(tokens=tokens, text_tokens=text, slots=slots, rows=len(rows))
    return jax.tree.map(jnp.asarray, pack_segments([[segment(i) for i in row] for row in rows], config))


def times(batch) -> jax.Array:
    """A time per token that depends only on the clip (by its frame rate) and the token's place in it."""
    fps = jnp.take_along_axis(batch.fps_BG, jnp.maximum(batch.segment_BS - 1, 0), axis=1)
    time = (0.05 * fps + 0.03 * batch.position_BS3.sum(-1)) % 1.0
    return jnp.where(batch.cond_mask_BS, 0.0, time)


@pytest.fixture(scope="module")
def params():
    batch = pack([[0]], 12, 32, 1)
    params = jax.jit(DiT(CONFIG).init)(jax.random.key(0), batch.tokens_BSP, times(batch), batch)
    # Zero-initialised layers would hide errors.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys)])


def outputs_and_gradients(params, batch, clip: int):
    """Of clip `clip`: its output, and the gradients of a loss on it alone by the parameters and by its tokens."""
    mine = jnp.take_along_axis(batch.fps_BG, jnp.maximum(batch.segment_BS - 1, 0), axis=1) == 8.0 + clip
    mine = mine & (batch.segment_BS > 0)

    def loss(params, tokens):
        y = DiT(CONFIG).apply(params, tokens, times(batch), batch)
        return jnp.sum(jnp.where(mine[..., None], jnp.sin(y), 0.0)), y

    (_, y), (by_params, by_tokens) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, batch.tokens_BSP)
    where = np.asarray(mine)
    return np.asarray(y)[where], by_params, np.asarray(by_tokens)[where]


@pytest.mark.parametrize("rows", [[[1, 0, 2]], [[2, 3], [1, 0, 3]]])
def test_a_clip_packed_among_others_is_as_if_alone(params, rows):
    alone = outputs_and_gradients(params, pack([[0]], 12, 32, 1), 0)
    packed = outputs_and_gradients(params, pack(rows, 40, 96, 5), 0)
    np.testing.assert_allclose(packed[0], alone[0], atol=1e-5)
    np.testing.assert_allclose(packed[2], alone[2], atol=1e-5)
    for a, b in zip(jax.tree.leaves(packed[1]), jax.tree.leaves(alone[1])):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(b).max())))


@pytest.mark.slow
def test_what_is_computed_again_changes_nothing(params):
    batch = pack([[0, 1]], 20, 48, 2)
    values = {}
    for remat in ("none", "matmuls", "attention", "full", "host"):
        model = DiT(dataclasses.replace(CONFIG, remat=remat))
        loss = lambda p: jnp.sum(model.apply(p, batch.tokens_BSP, times(batch), batch) ** 2)  # noqa: B023
        values[remat] = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    for remat in ("matmuls", "attention", "full", "host"):
        for a, b in zip(values[remat], values["none"]):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(b).max())))


def test_the_caption_matters(params):
    batch = pack([[0]], 12, 32, 1)
    other = batch.replace(text_BLE=batch.text_BLE.at[0, 2].add(1))
    apply = jax.jit(lambda x: DiT(CONFIG).apply(params, x.tokens_BSP, times(x), x))
    a, b = apply(batch), apply(other)
    assert float(jnp.abs(a - b).max()) > 1e-3


def test_bfloat16_computes_on_float32_parameters(params):
    batch = pack([[0, 1]], 20, 48, 2)
    half = DiT(dataclasses.replace(CONFIG, dtype="bfloat16"))

    def value_and_grad(model):
        loss = lambda p: jnp.mean(jnp.sin(model.apply(p, batch.tokens_BSP, times(batch), batch)))
        return jax.jit(jax.value_and_grad(loss))(params)

    (value, grads), (reference, exact) = value_and_grad(half), value_and_grad(DiT(CONFIG))
    assert half.apply(params, batch.tokens_BSP, times(batch), batch).dtype == jnp.float32
    np.testing.assert_allclose(value, reference, atol=0.02)
    norm = lambda tree: float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(tree))))
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert norm(jax.tree.map(jnp.subtract, grads, exact)) < 0.1 * norm(exact)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(modulation="block", caption="label", classes=5, micro_conditioning=False, text_depth=0),
        dict(
            modulation="single",
            caption="projected",
            micro_conditioning=False,
            attention_pattern=("spatial", "temporal"),
            positions="fixed",
        ),
    ],
)
def test_counted_operations_are_those_compiled(changes):
    """XLA counts a scanned layer once, so the model here has one. It counts softmax and norms too, so allow 6%."""
    changes = {"text_features": 1, "attention": "reference"} | changes  # its loops, too, XLA counts once
    cfg = dataclasses.replace(CONFIG, depth=1, width=192, **changes)
    text = {} if cfg.caption == "refined" else {"text_LE": np.zeros((8, 1), np.int32 if cfg.classes else np.float32)}
    size = (4, 8, 8)
    clip = Segment(np.zeros((256, cfg.token_width), np.float32), np.zeros(256, bool), size, encode_bytes("x" * 63), 8.0)
    clip = dataclasses.replace(clip, **text)
    pack = PackConfig(tokens=256, text_tokens=len(clip.text_LE), slots=1, rows=2)
    batch = jax.tree.map(jnp.asarray, pack_segments([[clip], [clip]], pack))
    arguments = (batch.tokens_BSP, jnp.zeros((2, 256)), batch)
    params = jax.eval_shape(DiT(cfg).init, jax.random.key(0), *arguments)
    compiled = jax.jit(DiT(cfg).apply).lower(params, *arguments).compile()
    rows = [np.array([[4, 16, 16, len(clip.text_LE)]])] * 2
    counted = count_work(cfg, pack, rows)
    assert counted["useful_tokens"] == counted["tokens"] == 512
    np.testing.assert_allclose(counted["hardware_flops"] / 3, compiled.cost_analysis()["flops"], rtol=0.06)
    if cfg.attention_pattern == ("joint",):
        assert counted["useful_flops"] == counted["hardware_flops"]
    else:
        assert counted["useful_flops"] < counted["hardware_flops"]


def test_the_mean_is_parted_from_the_variance():
    cfg = dataclasses.replace(CONFIG, out_channels=8)
    y = np.arange(2 * 4 * 8).reshape(1, 2, 32)  # a patch of 2 x 2, of 4 means and 4 variances each
    np.testing.assert_array_equal(drop_variance(cfg, y), y.reshape(1, 2, 4, 8)[..., :4].reshape(1, 2, 16))
    assert drop_variance(CONFIG, y) is y
