"""docs/parity.md, from the parity tests' own numbers and the speeds of speed.py.

    python tests/parity/table.py --torch PYTHON_WITH_TORCH        # about 15 minutes on 2 cores
    python tests/parity/table.py --speed speed.json               # with speeds measured before

`--tpu` adds the full-size compilations for TPU topologies (needs libtpu; some minutes more).
"""

import argparse
import collections
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

from headers import published, write_header

HERE = Path(__file__).parent
REFERENCES = {  # system -> (the class it is compared with, layouts that load, its rows in speed.py)
    "Wan 2.1 VAE": ("diffusers AutoencoderKLWan", "diffusers, Wan's own", ["Wan 2.1 VAE encode", "Wan 2.1 VAE decode"]),
    "Wan 2.1 VAE, own layout": ("diffsynth WanVideoVAE", "Wan's own", []),
    "Wan 2.2 VAE": ("diffusers AutoencoderKLWan", "diffusers, Wan's own", ["Wan 2.2 VAE encode", "Wan 2.2 VAE decode"]),
    "Wan 2.2 VAE, own layout": ("diffsynth WanVideoVAE38", "Wan's own", []),
    "SD VAE": ("diffusers AutoencoderKL", "diffusers new and old, CompVis", ["SD VAE encode", "SD VAE decode"]),
    "Wan 2.1 T2V": (
        "diffusers WanTransformer3DModel",
        "diffusers, Wan's own",
        ["Wan DiT forward", "Wan DiT train step"],
    ),
    "Wan 2.1 I2V": ("diffusers WanTransformer3DModel", "diffusers, Wan's own", []),
    "LoRA on Wan 2.1 T2V": (
        "peft 0.21.2 on diffusers WanTransformer3DModel",
        "PEFT and diffusers, ComfyUI, kohya",
        [],
    ),
    "DiT": ("diffusers DiTTransformer2DModel", "diffusers, DiT's own", ["DiT forward", "DiT train step"]),
    "SiT": ("diffusers DiTTransformer2DModel, time and sign turned", "SiT's own", []),
    "PixArt-alpha": (
        "diffusers PixArtTransformer2DModel",
        "diffusers, PixArt's own",
        ["PixArt forward", "PixArt train step"],
    ),
    "PixArt-alpha 1024": ("diffusers PixArtTransformer2DModel", "diffusers, PixArt's own", []),
    "Latte": ("diffusers LatteTransformer3DModel", "diffusers", ["Latte forward", "Latte train step"]),
    "T5 v1.1, ByT5": ("transformers T5EncoderModel", "transformers, Wan's own", ["T5 forward"]),
    "umT5": ("transformers UMT5EncoderModel", "transformers, Wan's own", []),
    "CLIP text, quick_gelu": ("transformers CLIPTextModelWithProjection", "transformers", ["CLIP forward"]),
    "LPIPS": ("lpips 0.1.4, VGG16", "torchvision's VGG16 with lpips' heads, lpips' own", []),
    "codec losses": ("Open-Sora 2.0's losses.py, written out in torch", "", []),
    "consistency distillation": ("latent-consistency-model's train_lcm_distill_sd_wds.py", "", []),
    "MeanFlow": ("Gsunshine/meanflow's forward and sample_one_step", "", []),
    "DMD2": ("tianweiy/DMD2's SDGuidance: distribution matching and fake loss", "", []),
    "CLIP text, gelu": ("transformers CLIPTextModelWithProjection", "transformers, OpenCLIP", []),
    "CLIP vision": ("transformers CLIPVisionModel", "transformers, Wan's own", []),
}
FULL_SIZE = {"wan2.1-t2v-1.3b": "v5p:2x2x1", "wan2.1-t2v-14b": "v5p:2x2x1", "wan2.1-i2v-14b": "v5p:2x2x1"}


def measured() -> dict[str, list]:
    """Records (kind, case, error) of every parity test, by system; raises where one fails."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        tests = sorted(str(p) for p in HERE.parent.glob("test_parity_*.py"))
        subprocess.run(
            [sys.executable, "-m", "pytest", f"--junitxml={report}", *tests], check=True, cwd=HERE.parents[1]
        )
        records = collections.defaultdict(list)
        for found in ElementTree.parse(report).iter("property"):
            if found.get("name") == "parity":
                system, *record = json.loads(found.get("value"))
                records[system].append(record)
        return records


def row(system: str, records: list, speeds: dict) -> str:
    reference, layouts, timed = REFERENCES.get(system, (f"diffusers {system}", "", []))
    worst = lambda kind: max((error for k, _, error in records if k == kind), default=None)
    shapes = ", ".join(dict.fromkeys(case for kind, case, _ in records if kind == "forward" and case))
    if system not in REFERENCES:
        shapes = f"{len(records)} trajectories"
    numbers = [f"{worst(kind):.1e}" if worst(kind) is not None else "" for kind in ("forward", "gradient")]
    seconds = "; ".join(
        f"{what.removeprefix(timed[0].rsplit(' ', 2 if 'step' in timed[0] else 1)[0]).strip()} "
        f"{speeds[what][0]:.2f} / {speeds[what][1]:.2f}"
        for what in timed
        if what in speeds
    )
    return f"| {system} | {reference} | {layouts} | {shapes} | {numbers[0]} | {numbers[1]} | {seconds} |"


# Whole samplings: what the test compares, as (model, reference, sampler, guidance).
SAMPLINGS = {
    "DiT sampling, authors' DDIM": ("DiT", "the authors' ddim_sample_loop", "DDIM, 10 steps", "1.5, on 3 and 4"),
    "Wan sampling, authors' UniPC": ("a closed form", "Wan's FlowUniPC", "UniPC, shift 5, 10 and 50 steps", "none"),
    "DDPM sampling, learned variance": ("a closed form", "p_sample_loop in float64", "DDPM, 8 to 1000 steps", "none"),
    "DiT, diffusers DiTPipeline, DDIM": ("DiT", "diffusers DiTPipeline", "DDIM, 10 steps", "1.5"),
    "DiT, diffusers DDPM with learned variance": (
        "DiT", "diffusers DDPMScheduler, learned_range", "DDPM, 10 steps", "4, on 3"
    ),
    "SiT, Euler's ODE": ("SiT", "SiT's ODE in torch", "Euler, 10 steps", "1.5, on 3"),
    "PixArt-alpha, diffusers PixArtAlphaPipeline, DPM++": (
        "PixArt-alpha", "diffusers PixArtAlphaPipeline", "DPM-Solver++(2M), 10 steps", "4.5"
    ),
    "Latte, diffusers LattePipeline, DDIM": ("Latte", "diffusers LattePipeline", "DDIM, 10 steps", "7.5"),
    "Wan 2.1, diffusers WanPipeline, UniPC": (
        "Wan 2.1 T2V", "diffusers WanPipeline, its authors' sigmas", "UniPC, shift 5, 10 steps", "5"
    ),
    "Wan 2.2 TI2V, diffusers WanImageToVideoPipeline, UniPC": (
        "Wan 2.2 TI2V, a given first frame", "diffusers WanImageToVideoPipeline, its authors' sigmas",
        "UniPC, shift 5, 10 steps", "5"
    ),
    "Wan 2.2 A14B, diffusers WanPipeline, UniPC": (
        "Wan 2.2 A14B, two experts", "diffusers WanPipeline, its authors' sigmas", "UniPC, shift 12, 10 steps",
        "4, then 3"
    ),
    "Wan 2.1 I2V, diffusers WanImageToVideoPipeline, UniPC": (
        "Wan 2.1 I2V, with CLIP's vision encoder", "diffusers WanImageToVideoPipeline, its authors' sigmas",
        "UniPC, shift 5, 3 steps", "5"
    ),
    "Wan 2.1 FLF2V, diffusers WanImageToVideoPipeline, UniPC": (
        "Wan 2.1 FLF2V, with CLIP's vision encoder", "diffusers WanImageToVideoPipeline, its authors' sigmas",
        "UniPC, shift 16, 3 steps", "5"
    ),
    "Wan 2.2 I2V A14B, diffusers WanImageToVideoPipeline, UniPC": (
        "Wan 2.2 I2V A14B, from an image", "diffusers WanImageToVideoPipeline, its authors' sigmas",
        "UniPC, shift 5, 3 steps", "3.5"
    ),
    "Wan 2.2 I2V A14B, two images, diffusers WanImageToVideoPipeline, UniPC": (
        "Wan 2.2 I2V A14B, between two images", "diffusers WanImageToVideoPipeline, its authors' sigmas",
        "UniPC, shift 5, 3 steps", "3.5"
    ),
}  # fmt: skip


def samplings(records: dict[str, list]) -> list[str]:
    """The section on whole samplings."""
    lines = [
        "",
        "## Whole samplings",
        "",
        "From a published file through `minisora import` to the latents, with the reference's noise. Errors are the",
        "largest difference over the largest value, of all steps (of the result alone for the authors' DDIM).",
        "DiTPipeline's picture, by a small Stable Diffusion VAE, is the same within one level of 255. Small random",
        "weights, float32; `tests/test_parity_trajectories.py`, and from images `test_parity_image_to_video.py`.",
        "",
        "| model | reference | sampler | guidance, channels | difference |",
        "|" + "---|" * 5,
    ]
    for system, cells in SAMPLINGS.items():
        lines.append(f"| {' | '.join(cells)} | {max(error for _, _, error in records[system]):.1e} |")
    return lines


def full_size() -> list[str]:
    """The published sizes, compiled for a TPU topology: nothing is run."""
    lines = ["| model | parameters | topology | tokens a row | on each chip | compiled in |", "|" + "---|" * 6]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, topology in FULL_SIZE.items():
        code = (
            "import dataclasses, json; from minisora_jax.plan.forward import compile_forward as c;"
            "from minisora_jax.parallel.mesh import MeshConfig; from minisora_jax.weights.dit import CONFIGS;"
            "from minisora_jax.weights.checkpoint import Checkpoint; import sys;"
            f"found = c(CONFIGS['{name}'], (5, 60, 104), 512, '{topology}', MeshConfig(data=1, fsdp=-1),"
            "Checkpoint(sys.argv[1])); print(json.dumps(dataclasses.asdict(found)))"
        )
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "full.safetensors"
            write_header(path, published("wan", name))
            command = [sys.executable, "-c", code, str(path)]
            run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found = json.loads(run.stdout.splitlines()[-1])
        memory = f"{found['parameter_bytes'] / 2**30:.1f} + {found['temporary_bytes'] / 2**30:.1f} GiB"
        lines.append(
            f"| {name} | {found['parameters']:,} | {topology} | {found['tokens']:,} "
            f"| {memory} | {found['seconds']:.0f} s |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="a Python with torch, diffusers and transformers: measure speeds against it")
    parser.add_argument("--speed", help="a file that speed.py --json wrote, in place of measuring")
    parser.add_argument("--tpu", action="store_true", help="compile the full sizes for TPU topologies too")
    args = parser.parse_args()
    speeds = {}
    if args.speed:
        speeds = json.loads(Path(args.speed).read_text(encoding="utf-8"))
    elif args.torch:
        from speed import side_by_side

        speeds = side_by_side(args.torch)
    records = measured()
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax"))
    systems = [s for s in REFERENCES if s in records]
    systems += [s for s in records if s not in REFERENCES and s not in SAMPLINGS]
    lines = [
        "# Parity with the published implementations",
        "",
        "Made by `python tests/parity/table.py`; every number is what a test of the suite measured when it was made.",
        "Small random weights, float32, on a CPU. Errors are the largest difference over the largest value of the",
        "reference; tests hold them to 1e-4. Gradients are of a loss by some parameters of each system. Seconds are",
        "ours and torch's, of architectures of some 10 M parameters with random weights, side by side on one machine",
        f"({platform.machine()}, {os.cpu_count()} cores; {versions}): `tests/parity/speed.py`. No published weights",
        "were loaded; names and shapes are checked against the reference class's own full-size state.",
        "",
        "| system | reference | layouts that load | shapes | forward | gradient | seconds, ours / torch |",
        "|" + "---|" * 7,
        *(row(system, records[system], speeds) for system in systems),
        *samplings(records),
    ]
    if args.tpu:
        lines += ["", "## Full size, compiled for TPU", ""]
        lines += [
            "The forward pass with float32 parameters cut over the chips (fsdp), one clip of 17 frames at 480 x 832"
        ]
        lines += [
            "and 512 caption tokens on each chip, dense attention. The parameters are those that a header of the",
            "published names and shapes gives by the name map. Compiled by libtpu on this machine, not run.",
            "",
        ]
        lines += full_size()
    path = HERE.parents[1] / "docs/parity.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path} written: {len(systems)} systems")


if __name__ == "__main__":
    main()
