"""The staged loss of a codec (training/codec_losses.py): against plain formulas, on a mesh, and over a stopped run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minisora_jax.models.perceptual import LPIPS, LPIPSConfig, LPIPSNet, frame_distances
from minisora_jax.models.vae import VAE, VAEConfig
from minisora_jax.parallel.mesh import BATCH, MeshConfig, make_mesh, to_global
from minisora_jax.toy.shapes import Shapes
from minisora_jax.training.codec_losses import AdversarialConfig, PerceptualConfig, two_optimizers
from minisora_jax.training.codec_task import CodecTask, loss_terms, train_codec
from minisora_jax.training.loop import RunConfig
from minisora_jax.training.optim import OptimConfig, make_optimizer

TINY = VAEConfig(base=4, multipliers=(1, 2), residual_blocks=1, time_down=(True,), latent_channels=2, patch=2)
GAN = AdversarialConfig(weight=0.5, base=4, layers=2, learning_rate=1e-3)
SMALL = LPIPSConfig(widths=(4, 8), depths=(1, 2))
KEY = jax.random.key(1)


def small_lpips() -> LPIPS:
    x = jnp.zeros((1, 8, 8, 3))
    return LPIPS(SMALL, jax.device_get(LPIPSNet(SMALL).init(jax.random.key(5), x, x)))


def task_of(**changes) -> CodecTask:
    return dataclasses.replace(CodecTask(vae=TINY, crop_THW=(3, 8, 8), batch=8, kl=0.01, gan=GAN), **changes)


@functools.cache
def parameters():
    frames = jnp.zeros((1, 3, 8, 8, 3))
    # Random everywhere: layers that begin at zero would give the decoder's first layers no gradient.
    noise = lambda p, key: p + 0.1 * jax.random.normal(key, p.shape)
    codec, critic = VAE(TINY).init(jax.random.key(2), frames), GAN.discriminator.init(jax.random.key(3), frames)
    leaves, tree = jax.tree.flatten({"codec": codec, "discriminator": critic})
    keys = jax.random.split(jax.random.key(4), len(leaves))
    return jax.device_get(jax.tree.unflatten(tree, map(noise, leaves, keys)))


def pictures(count=8):
    return np.random.default_rng(0).integers(0, 256, (count, 3, 8, 8, 3)).astype(np.uint8)


def terms_of(task, params, frames, step=0, lpips=None):
    """{name: values (B,)}, by one program."""
    f = lambda params, step: loss_terms(task, params, frames, KEY, step, lpips)
    return {name: np.asarray(values) for name, (values, _) in jax.jit(f)(params, step).items()}


def gradients(task, params, frames, step=0, lpips=None):
    f = lambda params, step: jax.grad(total, 1)(task, params, frames, step, lpips)
    return jax.device_get(jax.jit(f)(params, step))


def total(task, params, frames, step=0, lpips=None):
    values, _ = loss_terms(task, params, frames, KEY, step, lpips)["loss"]
    return jnp.sum(values)


def same(ours, theirs):
    largest = max(np.abs(x).max() for x in jax.tree.leaves(theirs))
    close = functools.partial(np.testing.assert_allclose, rtol=0)
    jax.tree.map(lambda a, b: close(a, b, atol=1e-4 * (np.abs(b).max() + 1e-2 * largest)), ours, theirs)


def forward(task, params, frames):
    """The codec's pictures and posterior by the VAE alone, with the sample that the loss draws."""
    x = jnp.asarray(frames, jnp.float32) / 127.5 - 1
    mean, logvar, _ = VAE(TINY).apply(params, x, method="encode")
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(KEY, mean.shape)
    return x, VAE(TINY).apply(params, z, method="decode")[0], mean, logvar


@pytest.mark.slow
def test_both_players_get_the_gradients_of_their_own_loss():
    """The loss written out plainly, each player's by itself, and the adaptive weight by two gradients of its own."""
    lpips, frames = small_lpips(), pictures()
    task = task_of(lpips=PerceptualConfig(weight=0.7))
    params, critic = parameters()["codec"], parameters()["discriminator"]
    judge = lambda critic, y: jax.vmap(lambda y: GAN.discriminator.apply(critic, y[None])[0])(y)

    def rebuilt(params):
        x, y, mean, logvar = forward(task, params, frames)
        distance = frame_distances(SMALL, lpips.params, x, y)
        return jnp.mean(jnp.abs(x - y)) + 2 * jnp.mean((x - y) ** 2) + 0.7 * jnp.mean(distance), mean, logvar

    def fooled(params):
        return -jnp.mean(judge(critic, forward(task, params, frames)[1]))

    def at_last(f, params):
        g = jax.jit(jax.grad(f))(params)["params"]["decoder"]["conv_out"]["conv"]["kernel"]
        return np.linalg.norm(np.asarray(g).reshape(-1))

    weight = 0.5 * at_last(lambda p: rebuilt(p)[0], params) / (at_last(fooled, params) + 1e-4)

    def of_codec(params):
        loss, mean, logvar = rebuilt(params)
        return loss + 0.01 * 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar) + weight * fooled(params)

    def of_critic(critic):
        x, y, *_ = forward(task, params, frames)
        hinge = lambda sign, x: jnp.mean(jnp.maximum(0, 1 - sign * judge(critic, x)))
        return 0.5 * (hinge(1, x) + hinge(-1, y))

    ours = terms_of(task, parameters(), frames, 0, lpips)
    grads = jax.tree.map(lambda g: g / 8, gradients(task, parameters(), frames, 0, lpips))
    np.testing.assert_allclose(ours["adaptive_weight"], np.full(8, weight), rtol=1e-4)
    (codecs, of_codec), (critics, of_critic) = (
        jax.jit(jax.value_and_grad(f))(p) for f, p in ((of_codec, params), (of_critic, critic))
    )
    np.testing.assert_allclose(np.mean(ours["loss"]), codecs + critics, rtol=1e-5)
    same(grads["codec"], of_codec)
    same(grads["discriminator"], of_critic)


def test_the_weight_is_limited_and_a_critic_that_sees_nothing_weighs_nothing():
    """A discriminator of constant scores has no gradient. The weight is |g| / 1e-4 then, and at most 10,000."""
    blind = jax.tree.map(np.zeros_like, parameters()["discriminator"])
    terms = terms_of(task_of(l2=400.0), parameters() | {"discriminator": blind}, pictures(2))
    np.testing.assert_allclose(terms["adaptive_weight"], 0.5 * 1e4)
    np.testing.assert_array_equal(terms["discriminator"], 1.0)  # of scores of 0: (1 + 1) / 2


@pytest.mark.slow
def test_each_stage_begins_at_its_step():
    lpips, frames = small_lpips(), pictures(2)
    task = task_of(lpips=PerceptualConfig(weight=0.7, start=10), gan=dataclasses.replace(GAN, start=20))
    plain = task_of(gan=AdversarialConfig())
    params = parameters()
    f = jax.jit(lambda step: jax.grad(total, 1)(task, params, frames, step, lpips))
    grads = {step: jax.device_get(f(step)) for step in (9, 10, 19, 20)}
    zero = lambda tree: all(not np.any(x) for x in jax.tree.leaves(tree))
    assert [zero(grads[step]["discriminator"]) for step in grads] == [True, True, True, False]
    codec = params["codec"]
    same(grads[9]["codec"], gradients(plain, codec, frames))
    with_lpips = dataclasses.replace(plain, lpips=PerceptualConfig(weight=0.7))
    same(grads[19]["codec"], gradients(with_lpips, codec, frames, 0, lpips))
    f = jax.jit(lambda step: loss_terms(task, params, frames, KEY, step, lpips))
    lpips, generator = ([float(f(step)[name][0][0]) for step in (9, 10, 20)] for name in ("lpips", "generator"))
    assert lpips[0] == 0 < lpips[1] == lpips[2] and generator[:2] == [0, 0] != generator[2]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(data=8), dict(data=2, fsdp=2, ring=2)], ids=["data", "ring"])
def test_eight_devices_are_one(mesh):
    """Value and gradient with every term. A mesh that divides the height gathers it for LPIPS and the discriminator."""
    lpips, frames = small_lpips(), pictures()
    task = task_of(lpips=PerceptualConfig(weight=0.7, start=1), gan=dataclasses.replace(GAN, start=1))

    def value_and_grad(mesh):
        with jax.set_mesh(mesh):
            placed = jax.tree.map(jnp.asarray, parameters()), to_global(frames, mesh, BATCH)
            loss = lambda params, frames, step: total(task, params, frames, step, lpips)
            return jax.device_get(jax.jit(jax.value_and_grad(loss))(*placed, jnp.asarray(1)))

    one = value_and_grad(make_mesh(MeshConfig(), jax.devices()[:1]))
    many = value_and_grad(make_mesh(MeshConfig(**mesh)))
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    same(many[1], one[1])


@pytest.mark.slow
def test_each_player_has_its_own_optimiser():
    """A step of both is a step of each by itself: no gradient of one limits or moves the other."""
    optim = OptimConfig(name="muon", learning_rate=1e-2, warmup=1, weight_decay=0.1)
    params = parameters()
    grads = jax.tree.map(lambda p: 100 * np.cos(p), params)
    first = lambda optimizer: jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])
    updates = first(two_optimizers(optim, GAN, 10))(grads, params)
    critic = OptimConfig(learning_rate=GAN.learning_rate, warmup=1)
    for name, config in (("codec", optim), ("discriminator", critic)):
        expected = first(make_optimizer(config, 10))(grads[name], params[name])
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-9), updates[name], expected)


@pytest.mark.slow
def test_a_stopped_run_with_a_discriminator_goes_on_bit_for_bit(tmp_path):
    clips = Shapes("train", 16)
    run = lambda steps: RunConfig(
        steps=steps, log_every=2, save_every=2, sample_every=0, optim=OptimConfig(warmup=1, final=1.0)
    )
    small_lpips().export(tmp_path / "lpips", {})
    task = lambda steps: task_of(
        batch=2,
        crop_THW=(3, 16, 16),
        run=dataclasses.replace(run(steps), mesh=MeshConfig(data=1, fsdp=2, ring=4)),
        lpips=PerceptualConfig(str(tmp_path / "lpips"), start=1),
        gan=dataclasses.replace(GAN, start=3),
    )
    settings = lambda steps: {"run": {"mesh": {}, "of": "a test"}}
    train = lambda steps, where: train_codec(task(steps), tmp_path / where, clips, clips, settings(steps))
    whole = train(6, "whole")
    train(4, "parts")
    parts = train(6, "parts")
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    assert set(whole.params) == {"params"}  # the discriminator is no part of the codec
    lines = (tmp_path / "parts/metrics.jsonl").read_text()
    assert '"generator": 0.0' in lines.splitlines()[0] and '"adaptive_weight"' in lines.splitlines()[-1]


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="gan.weight=-1 must be at least 0"):
        AdversarialConfig(weight=-1)
    with pytest.raises(ValueError, match="lpips.start=-5 must be at least 0"):
        PerceptualConfig(start=-5)
    with pytest.raises(ValueError, match="gan.layers=0 must be at least 1"):
        AdversarialConfig(layers=0)
    big = LPIPSConfig()
    with pytest.raises(ValueError, match="at least 16 x 16 pixels, not 8 x 24"):
        frame_distances(big, {}, jnp.zeros((1, 1, 8, 24, 3)), jnp.zeros((1, 1, 8, 24, 3)))
