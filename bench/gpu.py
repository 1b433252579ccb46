"""Benchmark one GPU in about nine minutes: correct kernels, their speed, and train steps against the ceiling.

    PYTHONPATH=. python bench/gpu.py --out DIR            # on the GPU; needs jax, flax, optax, einops, tqdm
    JAX_PLATFORMS=cpu PYTHONPATH=. python bench/gpu.py --out DIR --tiny      # the rehearsal on a CPU

Each line of DIR/gpu.jsonl is one finding, written as soon as it is made. A finding that fails is reported with its
error, and the script goes on. Sections run in the order of their worth and stop at --seconds. Torch's attention and
matmul on the same card come last, in a process of their own. tokamax is measured where it is installed.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
BEGAN = time.monotonic()
WAYS = ("",)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--only", default="", help="sections, such as parity,attention")
    parser.add_argument("--ways", default="", help="ways to attend whose names begin so, such as triton,cudnn")
    parser.add_argument("--torch", action="store_true", help="torch's side (the script calls itself)")
    args = parser.parse_args()
    global WAYS
    WAYS = tuple(args.ways.split(",")) if args.ways else ("",)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    report = functools.partial(write, out / "gpu.jsonl")
    if args.torch:
        return torch_side(args.tiny, report)
    for section in (card, parity, attention, train_steps, tiles, decode):
        if args.only and section.__name__ not in args.only.split(","):
            continue
        left = args.seconds - (time.monotonic() - BEGAN)
        if left < 20:
            report(section=section.__name__, skipped="no time left")
            continue
        guarded(
            report,
            section.__name__,
            lambda s=section: s(args.tiny, report, lambda: args.seconds - (time.monotonic() - BEGAN)),
        )
    if not args.only or "torch" in args.only:
        flags = ["--tiny"] if args.tiny else []
        left = max(args.seconds + 60 - (time.monotonic() - BEGAN), 30)
        try:
            subprocess.run([sys.executable, __file__, "--torch", "--out", str(out), *flags], timeout=left, check=False)
        except subprocess.TimeoutExpired:
            report(section="torch", skipped="no time left")


def write(path: Path, **finding) -> None:
    finding = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in finding.items()} | {
        "at_s": round(time.monotonic() - BEGAN, 1)
    }
    print(json.dumps(finding), flush=True)
    with path.open("a") as file:
        file.write(json.dumps(finding) + "\n")


def guarded(report, what: str, call, **more):
    try:
        return call()
    except Exception as error:  # the next finding may still be had
        report(what=what, **more, failed=f"{type(error).__name__}: {str(error)[:400]}")
        print(traceback.format_exc()[-1500:], file=sys.stderr)


def seconds(call, repeats: int = 5) -> float:
    """Median of device time with the work queued behind one wait."""
    import jax

    jax.block_until_ready(call())
    once = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        once.append(time.perf_counter() - start)
    return sorted(once)[len(once) // 2]


# ---- The card


def card(tiny, report, left):
    import jax
    import jax.numpy as jnp

    report(section="card", devices=str(jax.devices()), jax=jax.__version__, backend=jax.default_backend())
    n = 512 if tiny else 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    report(section="card", matmul_tflops=2 * n**3 / seconds(lambda: product(a, b), 20) / 1e12)


# ---- Ways to attend within segments: f(q, k, v, segment) of (B, S, N, K) and (B, S)


def ways():
    """Name -> (function, packed rows too, float32 too)."""
    import jax

    from minisora_jax.parallel.attention import attend

    def ours(impl, slots=0):
        return lambda q, k, v, s: attend(q, k, v, s, s, impl=impl, slots=slots)

    def cudnn(q, k, v, s):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    def pallas_mha(q, k, v, s):
        from jax.experimental.pallas.ops.gpu import attention as mha

        return mha.mha(q, k, v, s, sm_scale=q.shape[-1] ** -0.5)

    found = {
        "triton": (ours("triton"), True, True),
        "cudnn dense": (cudnn, False, False),
        "cudnn, 8 slots": (ours("cudnn", 8), True, False),
        "cudnn, 64 slots": (ours("cudnn", 64), True, False),
        "tokamax mosaic": (functools.partial(tokamax, "PallasMosaicFlashAttention"), True, False),
        "tokamax triton": (functools.partial(tokamax, "PallasTritonFlashAttention"), True, False),
        "pallas mha": (pallas_mha, True, False),
        "blockwise": (ours("blockwise"), True, True),
    }
    return {name: way for name, way in found.items() if name.startswith(WAYS)}


def tokamax(name: str, q, k, v, segment_BS):
    """tokamax's kernels, told for each query where its segment's keys begin and end."""
    import jax
    import jax.numpy as jnp
    from tokamax._src.ops.attention.base import Mask
    from tokamax.ops import gpu

    same_before = jnp.concatenate([jnp.zeros_like(segment_BS[:, :1], bool), segment_BS[:, 1:] == segment_BS[:, :-1]], 1)
    index = jnp.arange(segment_BS.shape[1], dtype=jnp.int32)
    start = jnp.asarray(jax.lax.cummax(jnp.where(same_before, 0, index), axis=1), jnp.int32)
    same_after = jnp.concatenate([same_before[:, 1:], jnp.zeros_like(same_before[:, :1])], 1)
    end = -jax.lax.cummax(jnp.where(same_after, -(2**30), -(index + 1))[:, ::-1], axis=1)[:, ::-1]
    return getattr(gpu, name)()(q, k, v, mask=Mask(k_start=start[:, None], k_end=end[:, None].astype(jnp.int32)))


# ---- Right?


def parity(tiny, report, left):
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    for name, (S, N, K, cuts) in {
        "packed": (512, 4, 64, (60, 61, 200, 333)),
        "odd, padded": (1000 if not tiny else 300, 2, 128, (70, 211)),
        "one clip": (640 if not tiny else 256, 2, 72, ()),
    }.items():
        segment = np.zeros((2, S), np.int32)
        for row in range(2):
            ends = [*cuts, S - 13 * row - (11 if "padded" in name else 0)]
            start = 0
            for i, end in enumerate(ends):
                segment[row, start:end], start = i + 1, end
        q, k, v, w = (rng.standard_normal((2, S, N, K)) for _ in range(4))
        w *= (segment > 0)[:, :, None, None]
        right = numpy_attention(q, k, v, w, segment)
        seen = (segment > 0)[:, :, None, None]
        for impl, (way, packed, single) in ways().items():
            for dtype in (jnp.float32, jnp.bfloat16):
                if (name != "one clip" and not packed) or (dtype == jnp.float32 and not single) or "64" in impl:
                    continue
                if not packed and not (segment[1] > 0).all():
                    continue

                def check(way=way, impl=impl, dtype=dtype):
                    x = [jnp.asarray(y, dtype) for y in (q, k, v)]
                    s = jnp.asarray(segment)
                    weight = jnp.asarray(w, jnp.float32)

                    def loss(q, k, v):
                        o = way(q, k, v, s).astype(jnp.float32)
                        return jnp.sum(jnp.where(seen, o, 0) * weight), o

                    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
                        g, o = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*x)
                    errors = [
                        float(np.abs(np.where(seen, np.asarray(a, np.float64) - b, 0)).max() / np.abs(b).max())
                        for a, b in zip((o, *g), right)
                    ]
                    report(
                        section="parity",
                        case=name,
                        impl=impl,
                        dtype=jnp.dtype(dtype).name,
                        forward=errors[0],
                        gradient=max(errors[1:]),
                    )

                guarded(report, "parity", check, case=name, impl=impl, dtype=str(jnp.dtype(dtype)))


def numpy_attention(q, k, v, w, segment):
    """(o, d_q, d_k, d_v) in float64 of sum(o * w)."""
    import numpy as np

    scale = q.shape[-1] ** -0.5
    seen = (segment[:, None, :, None] == segment[:, None, None, :]) & (segment > 0)[:, None, :, None]
    logits = np.where(seen, scale * np.einsum("bsnk,btnk->bnst", q, k), -np.inf)
    top = np.nan_to_num(logits.max(-1, keepdims=True), neginf=0)
    e = np.exp(logits - top)
    p = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
    d_p = np.einsum("bsnk,btnk->bnst", w, v)
    d_l = scale * p * (d_p - (d_p * p).sum(-1, keepdims=True))
    return (
        np.einsum("bnst,btnk->bsnk", p, v),
        np.einsum("bnst,btnk->bsnk", d_l, k),
        np.einsum("bnst,bsnk->btnk", d_l, q),
        np.einsum("bnst,bsnk->btnk", p, w),
    )


# ---- How quick is attention


def attention(tiny, report, left):
    import jax.numpy as jnp
    import numpy as np

    N, K = (2, 64) if tiny else (12, 128)
    for S, clips in ((512, 1), (512, 4)) if tiny else ((16384, 1), (16384, 8), (32768, 1), (65536, 16), (4096, 8)):
        segment = jnp.asarray(np.repeat(np.arange(1, clips + 1), S // clips)[None], jnp.int32)
        for name, (way, packed, _) in ways().items():
            slow = name in ("blockwise", "pallas mha", "tokamax triton")
            if (clips > 1 and not packed) or (slow and S > 16384) or ("8 slots" in name and clips > 8) or left() < 200:
                continue
            guarded(
                report,
                "attention",
                lambda: timed(report, way, segment, N, K, clips, section="attention", name=name),
                way=name,
                tokens=S,
                clips=clips,
            )


def timed(report, way, segment, N, K, clips, **finding):
    import jax
    import jax.numpy as jnp

    S = segment.shape[1]
    q, k, v, w = (jax.random.normal(jax.random.key(i), (1, S, N, K), jnp.bfloat16) for i in range(4))
    work = 4 * S * S / clips * N * K
    forward = jax.jit(way)
    both = jax.jit(lambda q, k, v, s, w: jax.vjp(lambda q, k, v: way(q, k, v, s), q, k, v)[1](w))
    f = seconds(lambda: forward(q, k, v, segment))
    g = seconds(lambda: both(q, k, v, segment, w))
    report(
        **finding,
        tokens=S,
        clips=clips,
        forward_ms=f * 1e3,
        both_ms=g * 1e3,
        forward_tflops=work / f / 1e12,
        both_tflops=3.5 * work / g / 1e12,
    )


def tiles(tiny, report, left):
    """Our Triton kernel by the sides of its tiles, for one clip and for eight."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from minisora_jax.parallel.attention import attend
    from minisora_jax.parallel.kernels import triton

    S, N, K = (256, 2, 64) if tiny else (16384, 12, 128)
    way = lambda q, k, v, s: attend(q, k, v, s, s, impl="triton")
    choices = {
        "FORWARD": [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 32, 4, 3)],
        "QUERY_GRADIENT": [(64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 4, 3), (128, 64, 4, 2), (64, 128, 4, 2)],
        "KEY_GRADIENT": [(64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 3), (128, 32, 8, 3), (128, 32, 4, 2)],
    }
    segments = {n: jnp.asarray(np.repeat(np.arange(1, n + 1), S // n)[None], jnp.int32) for n in (1, 8)}
    q, k, v, w = (jax.random.normal(jax.random.key(i), (1, S, N, K), jnp.bfloat16) for i in range(4))
    for kernel, tilings in choices.items():
        shipped = getattr(triton, kernel)
        for tiling in tilings[:2] if tiny else tilings:
            if left() < 120:
                break

            def measure(tiling=tiling, kernel=kernel):
                jax.clear_caches()
                setattr(triton, kernel, triton.Tiling(*tiling))
                if kernel == "FORWARD":
                    call = jax.jit(way)
                    took = [seconds(lambda s=s: call(q, k, v, s)) for s in segments.values()]
                else:
                    call = jax.jit(lambda q, k, v, s, w: jax.vjp(lambda q, k, v: way(q, k, v, s), q, k, v)[1](w))
                    took = [seconds(lambda s=s: call(q, k, v, s, w)) for s in segments.values()]
                report(
                    section="tiles",
                    kernel=kernel,
                    tiling=str(tiling),
                    one_clip_ms=took[0] * 1e3,
                    eight_clips_ms=took[1] * 1e3,
                )

            guarded(report, "tiles", measure, kernel=kernel, tiling=str(tiling))
        setattr(triton, kernel, shipped)


# ---- How far is a train step from the ceiling


def train_steps(tiny, report, left):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from minisora_jax.data.packing import PackConfig
    from minisora_jax.data.rows import Segment, pack_segments
    from minisora_jax.diffusion.loss import diffusion_loss
    from minisora_jax.diffusion.time import TimeConfig
    from minisora_jax.models.dit import DiT, DiTConfig
    from minisora_jax.training.flops import count_work
    from minisora_jax.training.optim import OptimConfig, make_optimizer
    from minisora_jax.training.step import init_state, train_step

    image, clip = (1, 16, 16), (21, 30, 52)
    cases = {  # name: (model, grids of each row)
        "DiT-XL/2, 16 images of 256 px a row, 4 rows": (
            dict(width=1152, depth=28, heads=16, remat="attention"),
            [[image] * 16] * 4,
        ),
        "1.3B, mixed: 1 clip of 21x15x26 and 32 images a row": (
            dict(width=1536, depth=30, heads=12, mlp_ratio=8960 / 1536, remat="full"),
            [[(21, 15, 26)] + [image] * 32],
        ),
        "1.3B, one clip of 81 frames of 480x832": (
            dict(width=1536, depth=30, heads=12, mlp_ratio=8960 / 1536, remat="full"),
            [[clip]],
        ),
    }
    if tiny:
        cases = {"tiny": (dict(width=64, depth=2, heads=2, remat="none"), [[(1, 4, 4)] * 4, [(2, 4, 4)]])}
    for name, (model, rows) in cases.items():
        for impl in ("cudnn", "triton", "blockwise"):
            if impl == "blockwise" and "1.3B" in name or left() < 90:
                continue

            def measure(name=name, model=model, rows=rows, impl=impl):
                config = DiTConfig(
                    attention=impl, text_features=64, caption="projected", micro_conditioning=False, **model
                )
                rng = np.random.default_rng(0)
                text = rng.standard_normal((16, 64)).astype(np.float32)
                make = lambda grid: Segment(
                    rng.standard_normal((int(np.prod(grid)), config.token_width)).astype(np.float32),
                    np.zeros(int(np.prod(grid)), bool),
                    grid,
                    text,
                    16.0,
                )
                S = max(sum(int(np.prod(g)) for g in row) for row in rows)
                pack = PackConfig(
                    tokens=-(-S // 128) * 128,
                    text_tokens=16 * max(map(len, rows)),
                    slots=max(map(len, rows)),
                    rows=len(rows),
                    frames=max(sum(grid[0] for grid in row) for row in rows),
                )
                batch = pack_segments(
                    [[make(g) for g in row] for row in rows],
                    pack,
                    max_segment_len=max(int(np.prod(g)) for row in rows for g in row),
                )
                dit, optim = DiT(config), OptimConfig()
                optimizer = make_optimizer(optim, 100)
                small = jax.tree.map(
                    jnp.asarray,
                    pack_segments([[make((1, 1, 1))]], PackConfig(tokens=1, text_tokens=16, slots=1, rows=1)),
                )
                state = jax.jit(
                    lambda key: init_state(DiT(config).init(key, small.tokens_BSP, jnp.zeros((1, 1)), small), optimizer)
                )(jax.random.key(0))
                count = sum(p.size for p in jax.tree.leaves(state.params))
                loss = lambda params, batch, key, step: diffusion_loss(dit, TimeConfig(), params, batch, key)
                step = jax.jit(
                    functools.partial(train_step, loss_fn=loss, optimizer=optimizer, config=optim), donate_argnums=0
                )
                batch = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
                start = time.perf_counter()
                state, values = step(state, batch, jax.random.key(1))
                first = float(values["loss"])
                compiled = time.perf_counter() - start
                times = []
                for _ in range(6):
                    start = time.perf_counter()
                    state, values = step(state, batch, jax.random.key(1))
                    last = float(values["loss"])
                    times.append(time.perf_counter() - start)
                sizes = [np.array([[t, 2 * h, 2 * w, 16] for t, h, w in row]) for row in rows]
                work = count_work(config, pack, sizes)
                took = sorted(times)[len(times) // 2]
                memory = jax.devices()[0].memory_stats() or {}
                report(
                    section="train",
                    case=name,
                    impl=impl,
                    millions=count / 1e6,
                    step_ms=took * 1e3,
                    compile_s=compiled,
                    loss_first=first,
                    loss_last=last,
                    useful_tflops=work["useful_flops"] / took / 1e12,
                    tokens_per_s=work["useful_tokens"] / took,
                    peak_gib=memory.get("peak_bytes_in_use", 0) / 2**30,
                )

            guarded(report, "train", measure, case=name, impl=impl)


def decode(tiny, report, left):
    import jax
    import jax.numpy as jnp

    from minisora_jax.models.vae import VAE
    from minisora_jax.weights.presets import CODECS

    config = CODECS["wan2.1-vae"].config
    vae = VAE(config)
    params = jax.jit(lambda key: vae.init(key, jnp.zeros((1, 5, 16, 16, 3))))(jax.random.key(0))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    h, w = (2, 2) if tiny else (60, 104)
    z = jax.random.normal(jax.random.key(1), (1, 3, h, w, config.latent_channels), jnp.bfloat16)
    call = jax.jit(lambda p, z: vae.apply(p, z, method="decode")[0])
    took = seconds(lambda: call(params, z), 3)
    report(section="decode", case="Wan 2.1 VAE, 9 frames of 480x832, bf16", ms=took * 1e3, frames_per_s=9 / took)


# ---- Torch on the same card


def torch_side(tiny, report):
    try:
        import torch
        import torch.nn.functional as F
    except ImportError as error:
        return report(section="torch", skipped=str(error))
    if not torch.cuda.is_available():
        return report(section="torch", skipped="no cuda")

    def median(call, repeats=5):
        call()
        torch.cuda.synchronize()
        once = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            once.append(time.perf_counter() - start)
        return sorted(once)[len(once) // 2]

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    report(section="torch", matmul_tflops=2 * 8192**3 / median(lambda: a @ b, 20) / 1e12)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for S in (4096, 16384, 32768):
        q, k, v = (
            torch.randn(1, 12, S, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        work = 4 * S * S * 12 * 128
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with sdpa_kernel([backend]):

                def both():
                    q.grad = k.grad = v.grad = None
                    F.scaled_dot_product_attention(q, k, v).float().sum().backward()

                def forward():
                    with torch.no_grad():
                        F.scaled_dot_product_attention(q, k, v)

                f, g = median(forward), median(both)
            report(
                section="torch",
                way=str(backend),
                tokens=S,
                forward_ms=f * 1e3,
                both_ms=g * 1e3,
                forward_tflops=work / f / 1e12,
                both_tflops=3.5 * work / g / 1e12,
            )

    block = torch.nn.TransformerEncoderLayer(
        1152,
        16,
        4608,
        dropout=0.0,
        activation=F.gelu,
        batch_first=True,
        norm_first=True,
        device="cuda",
        dtype=torch.bfloat16,
    )
    stack = torch.compile(torch.nn.TransformerEncoder(block, 28, enable_nested_tensor=False))
    optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-4, fused=True)
    x = torch.randn(64, 256, 1152, device="cuda", dtype=torch.bfloat16)

    def step():
        optimizer.zero_grad(set_to_none=True)
        stack(x).float().square().mean().backward()
        optimizer.step()

    took = median(step, 4)
    work = 3 * (2 * 64 * 256 * 28 * 12 * 1152**2 + 4 * 64 * 256 * 256 * 1152 * 28)
    report(
        section="torch",
        case="28 plain encoder layers of DiT-XL/2's width, 64 x 256 tokens, torch.compile, bf16 weights, no adaLN",
        step_ms=took * 1e3,
        useful_tflops=work / took / 1e12,
    )


if __name__ == "__main__":
    main()
