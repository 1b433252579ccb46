"""Compiles a step of a codec's streaming decoder for TPUs: memory of a chip, and what is sent (docs/benchmarks.md).

It needs no TPU, but its compiler: `pip install libtpu`. A step is one latent frame, 4 frames of video.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 uv run --with libtpu python docs/codec_on_a_pod.py --chip=v5e:4x4 --ring=16
"""

import argparse
import collections
import dataclasses
import math
import re
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from minisora_jax.models import codec
from minisora_jax.models.vae import VAE
from minisora_jax.parallel.halo import height_shards
from minisora_jax.parallel.mesh import FRAMES, REPLICATED, MeshConfig, make_mesh
from minisora_jax.weights.presets import CODECS

KINDS = ("collective-permute", "all-gather", "all-reduce", "all-to-all", "reduce-scatter")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--chip", default="v5e:4x4", help="a topology that libtpu knows")
parser.add_argument("--ring", type=int, default=16, help="chips that divide the height")
parser.add_argument("--codec", default="wan2.1-vae", choices=CODECS)
parser.add_argument("--size", default="1088x1920", help="HEIGHTxWIDTH")
parser.add_argument("--seconds", type=int, default=60, help="of video at 24 frames a second, for the number of steps")
parser.add_argument("--dtype", default="bfloat16")
args = parser.parse_args()

config = dataclasses.replace(CODECS[args.codec].config, dtype=args.dtype)
height, width = (int(n) for n in args.size.split("x"))
_, h, w = config.latent_size((1, height, width))
latents = 1 + args.seconds * 24 // config.time_factor

devices = topologies.get_topology_desc(platform="tpu", topology_name=args.chip).devices
mesh = make_mesh(MeshConfig(data=1, ring=args.ring), devices[: args.ring])
with jax.set_mesh(mesh):
    cut = height_shards(h)
    on = lambda tree, spec: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(VAE(config).init, key, jax.ShapeDtypeStruct((1, 5, 64, 64, 3), jnp.float32))
    params = on({"params": {"decoder": params["params"]["decoder"]}}, REPLICATED)
    z = on(jax.ShapeDtypeStruct((1, 1, cut.padded, w, config.latent_channels), jnp.float32), FRAMES)
    past = on(jax.eval_shape(lambda p, z: codec._decode(config, h, p, z, None)[1], params, z), FRAMES)
    begin = time.perf_counter()
    compiled = codec._decode.lower(config, h, params, z, past).compile()
    seconds = time.perf_counter() - begin

held = lambda tree: sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
memory = compiled.memory_analysis()
peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
peak += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
GiB = lambda n: f"{n / 2**30:.2f} GiB"
print(
    f"{args.codec} {args.dtype} {height}x{width}, {args.ring} chips of {args.chip}, {cut.padded // args.ring} rows each"
)
print(f"a chip: {GiB(peak)} = parameters {GiB(held(params))}, states {GiB(held(past))}, ", end="")
print(f"temporary {GiB(memory.temp_size_in_bytes)}, program {GiB(memory.generated_code_size_in_bytes)}, and the rest")
print(f"compiled in {seconds:.0f} s; {latents} steps for {args.seconds} s of video at 24 frames a second")
text = compiled.as_text()
sent = collections.Counter(
    f"{kind}{started or ''}" for kind, started in re.findall(rf" ({'|'.join(KINDS)})(-start)?\(", text)
)
print("collectives:", dict(sent) or "none")
