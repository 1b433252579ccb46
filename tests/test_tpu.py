"""Against the real TPU compiler, which needs no TPU: `uv run --group tpu pytest tests/test_tpu.py` (CI does)."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.slow
needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler (--group tpu)")
needs_tokamax = pytest.mark.skipif(find_spec("tokamax") is None, reason="needs tokamax (--group tpu)")

SPLASH = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import tpu as pltpu
from minisora_jax.parallel.kernels import reference, splash
rng = np.random.default_rng(0)
splash.TILE, splash.MOST_TILES = 128, 3  # so that the queries go in parts
S, T, N, K = 200, 300, 2, 32
q, k, v, w = (jnp.asarray(rng.standard_normal((2, n, N, K)), jnp.float32) for n in (S, T, T, S))
q_ids = np.stack([np.minimum(1 + np.arange(S) // 40, 4) * (np.arange(S) < 180), np.full(S, 1)]).astype(np.int32)
kv_ids = np.stack([np.minimum(1 + np.arange(T) // 90, 3) * (np.arange(T) < 280), np.full(T, 1)]).astype(np.int32)
with pltpu.force_tpu_interpret_mode():
    o, lse = jax.jit(splash.forward, static_argnums=5)(q, k, v, q_ids, kv_ids, 0.3)
    grads = jax.jit(splash.backward, static_argnums=8)(q, k, v, q_ids, kv_ids, o, lse, w, 0.3)
wanted, lse2 = reference.forward(q, k, v, q_ids, kv_ids, 0.3)
for ours, theirs in zip((o, *grads), (wanted, *reference.backward(q, k, v, q_ids, kv_ids, wanted, lse2, w, 0.3))):
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(np.abs(theirs).max()))
np.testing.assert_allclose(lse, lse2, rtol=1e-5)
"""

CAUSAL = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import tpu as pltpu
from minisora_jax.parallel.kernels import reference, splash
rng = np.random.default_rng(0)
splash.TILE = 128
S, N, K = 300, 2, 32
q, k, v, w = (jnp.asarray(rng.standard_normal((2, S, N, K)), jnp.float32) for _ in range(4))
clip, place = np.minimum(1 + np.arange(S) // 140, 2), np.arange(S) % 140
ids = np.stack([clip * 65536 + place // 9, np.where(clip == 1, clip * 65536 + place // 50, clip * 65536 + 65535)])
ids = (ids * (np.arange(S) < 270)).astype(np.int32)
for q_at, kv_at in ((slice(0, S), slice(0, S)), (slice(0, 150), slice(150, S)), (slice(150, S), slice(0, S))):
    arrays = q[:, q_at], k[:, kv_at], v[:, kv_at], ids[:, q_at], ids[:, kv_at]
    with pltpu.force_tpu_interpret_mode():
        o, lse = jax.jit(splash.forward, static_argnums=(5, 6))(*arrays, 0.3, True)
        grads = jax.jit(splash.backward, static_argnums=(8, 9))(*arrays, o, lse, w[:, q_at], 0.3, True)
    wanted, lse2 = reference.forward(*arrays, 0.3, True)
    theirs = reference.backward(*arrays, wanted, lse2, w[:, q_at], 0.3, True)
    for ours, other in zip((o, *grads), (wanted, *theirs)):
        np.testing.assert_allclose(ours, other, atol=2e-5 * max(float(np.abs(other).max()), 0.1))
"""

PLAN = """
import json
from minisora_jax.models.dit import DiTConfig
from minisora_jax.parallel.mesh import MeshConfig
from minisora_jax.plan.compiled import Workload, compile_for
from minisora_jax.plan.hardware import Topology
from minisora_jax.training.diffusion_task import DiffusionTask
text = {"text_features": 64, "text_width": 64, "text_depth": 0}
dit = DiTConfig(width=512, depth=2, heads=4, remat="full", attention="splash", **text)
work = Workload(DiffusionTask(dit), tokens=16_384, text_tokens=128)
mesh = MeshConfig(data=1, ring=4)
out = compile_for(work, mesh, Topology.parse("v5p:2x2x1"))
ring = [[t.asynchronous, t.hidden, t.sent] for t in out.traffic if t.kind == "collective-permute"]
print(json.dumps([out.fits, out.temporary_bytes, ring]))
"""


def run(program: str) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_tokamax
def test_splash_in_interpret_mode():
    run(SPLASH)


@needs_tokamax
def test_splash_in_the_order_of_frames():
    """Over all keys, over later ones alone, and over earlier ones with the queries' own."""
    run(CAUSAL)


@needs_libtpu
@needs_tokamax
def test_a_causal_train_step_is_compiled_for_a_pod():
    """With actions, on a ring of four chips; the kernels of both parts are splash's."""
    causal = PLAN.replace('remat="full"', 'remat="full", causal=True, action_width=7')
    fits, temporary, ring = json.loads(run(causal).splitlines()[-1])
    assert fits and 1e7 < temporary < 2e9 and ring


@needs_libtpu
@needs_tokamax
def test_a_train_step_is_compiled_for_a_pod():
    fits, temporary, ring = json.loads(run(PLAN).splitlines()[-1])
    assert fits and 1e7 < temporary < 2e9
    assert ring and all(asynchronous for asynchronous, _, _ in ring)
    assert sum(sent for _, hidden, sent in ring if hidden) > 0.8 * sum(sent for _, _, sent in ring)


POD = """
from minisora_jax.cli import main
pod = ["--topology=v6e:2x2", "--config=dit_256:size=S,data=data,rows=32", "--clip=1280", "--remat=host"]
assert main(["plan", *pod]) == 0
"""


@needs_libtpu
@needs_tokamax
def test_the_small_config_for_pods_is_compiled_for_one():
    """Its mesh takes the four chips. The blocks' inputs go to the host's memory and come back."""
    plan = run(POD)
    assert "mesh fsdp=4, remat host" in plan and "of 29.8: fits" in plan
    assert "copy to the host" in plan and "copy from the host" in plan


CODEC = """
from minisora_jax.cli import main
shape = ["base=8", "multipliers=(1,2)", "time_down=(True,)", "residual_blocks=1"]
small = ["--config=vae_tiny", *[f"--config.vae.{entry}" for entry in shape], "--config.crop_THW=(5,32,32)"]
assert main(["plan", "--topology=v5p:2x2x1", *small]) == 0
"""


@needs_libtpu
@needs_tokamax
def test_a_codec_is_compiled_for_a_pod():
    """Crops are divided over the chips, each of which has all parameters: their gradients are summed."""
    plan = run(CODEC)
    assert "train step of 8 crops of 5x32x32 (2 a chip at a time)" in plan and "of 88.5: fits" in plan
    assert "mesh data=4" in plan and "data             all-reduce" in plan
