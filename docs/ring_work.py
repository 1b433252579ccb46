"""What a ring of 8 devices computes for one long clip, for packed clips, and without leaving anything out.

Value and gradient of self-attention, (1, S, 4, 64) in float32, on 8 devices made of this machine's CPU. They share its
cores, so the process's CPU time counts, which other programs do not disturb as they do the clock. Cases take turns.

    uv run python docs/ring_work.py --tokens 8192 --rounds 5
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np


def main(tokens: int, rounds: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from minisora_jax.parallel import ring
    from minisora_jax.parallel.attention import attend
    from minisora_jax.parallel.kernels import blockwise
    from minisora_jax.parallel.mesh import MeshConfig, make_mesh

    jax.set_mesh(mesh := make_mesh(MeshConfig(data=1, ring=8)))
    on = lambda x: jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"), ("ring", "ulysses"))))
    rng = np.random.default_rng(0)
    qkv = [on(rng.standard_normal((1, tokens, 4, 64), np.float32)) for _ in range(3)]
    clips = lambda count: on((np.arange(tokens) * count // tokens + 1).astype(np.int32)[None])

    def compiled(ids, max_segment_len):
        def loss(q, k, v, ids):
            return jnp.sum(jnp.sin(attend(q, k, v, ids, ids, impl="blockwise", max_segment_len=max_segment_len)))

        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*qkv, ids).compile()
        return lambda: jax.block_until_ready(step(*qkv, ids))

    cases = {
        "one clip": compiled(clips(1), tokens),
        "16 packed clips": compiled(clips(16), tokens // 16),
        "16 packed clips, their length not known": compiled(clips(16), 0),
    }
    neighbours, near = ring._neighbours, blockwise._near
    ring._neighbours = lambda *_: lambda away: True
    blockwise._near = lambda ids, others: (jnp.zeros(len(ids), int), jnp.full(len(ids), len(others)))
    cases["one clip, nothing left out"] = compiled(clips(1), tokens)
    ring._neighbours, blockwise._near = neighbours, near

    taken = {name: [] for name in cases}
    for step in cases.values():
        step()
    for _ in range(rounds):
        for name, step in cases.items():
            begin = time.process_time()
            step()
            taken[name].append(time.process_time() - begin)
    whole = np.median(taken["one clip, nothing left out"])
    for name, seconds in taken.items():
        print(f"{name:<42} {np.median(seconds):8.3f} CPU s {np.median(seconds) / whole:8.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    main(**vars(parser.parse_args()))
