"""Adapters by the names that others give them: PEFT and diffusers, kohya, ComfyUI. Read, and written.

    PEFT, diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight            lora_B.weight   lora_B.bias
    ComfyUI           diffusion_model.blocks.0.self_attn.q.lora_down.weight    lora_up.weight  alpha  diff  diff_b
    kohya             lora_unet_blocks_0_self_attn_q.lora_down.weight          lora_up.weight  alpha

What stands before the last part is a module of the published model, in diffusers' layout or in its authors' own. The
rules of weights/dit.py say which of our kernels it is, and how its axes lie; A has the kernel's inputs, B its outputs.
"diff" and "diff_b" are whole changes of a weight and of a bias. The product of A and B is scaled by alpha / rank.
"""

from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from flax import traverse_util

from minisora_jax.io.model_dir import is_finite
from minisora_jax.io.safetensors import LazyArray
from minisora_jax.models.dit import DiTConfig, abstract_params
from minisora_jax.models.lora import MOST_RANK, Kernel, kernels
from minisora_jax.weights import dit as family
from minisora_jax.weights.checkpoint import Checkpoint
from minisora_jax.weights.errors import WeightsFileError, shown
from minisora_jax.weights.rules import Rule

STYLES = ("peft", "comfyui", "kohya")
PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "model.")
KOHYA = ("lora_unet__", "lora_unet_", "lora_transformer_")
AXIS = r"\([^)]*\)|\S+"  # an axis of an einops pattern, or several in parentheses
_PART = re.compile(
    r"(?P<module>.+)\.(?:"
    r"(?P<down>lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight|(?P<up>lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight|"
    r"(?P<up_bias>lora_B)(?:\.\w+)?\.bias|(?P<alpha>alpha)|(?P<diff>diff)|(?P<diff_b>diff_b))"
)
Places = dict[str, list[tuple[Rule, int]]]  # by a tensor's name: the rules that read it, and the layer


def read_published(path: str | Path, dit: DiTConfig) -> Any:
    """{"lora": A and B by our paths, "diff": whole changes by the paths of our parameters} of a file, float32.

    The scale is in B. Modules may have different ranks; zeros fill the smaller ones of a stack of layers.

    Args:
        path: The file, or a directory with one.
        dit: The model that it adapts.

    Raises:
        WeightsFileError: It is no adapter, or one of another model, or damaged.
    """
    checkpoint = Checkpoint(path)
    parts = _parts(checkpoint)
    places = _places(checkpoint, parts, dit)
    abstract = abstract_params(dit)
    every = kernels(abstract)
    shapes: dict[str, Any] = traverse_util.flatten_dict(abstract, sep="/")
    thin: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = collections.defaultdict(dict)
    whole: dict[str, np.ndarray] = {}
    for module, names in parts.items():
        scale = 1.0
        if "down" in names and "up" in names:
            down, up = (_read(checkpoint, names[part]) for part in ("down", "up"))
            if "alpha" in names:
                alpha = _read(checkpoint, names["alpha"])
                if alpha.size != 1:
                    raise WeightsFileError(f"{checkpoint.path}: {shown(names['alpha'])} must be one number")
                scale = float(alpha.reshape(())) / max(down.shape[0] if down.ndim else 1, 1)
            for rule, layer in places[f"{module}.weight"]:
                kernel_path = rule.ours.removeprefix("params/").removesuffix("/kernel")
                kernel = every.get(kernel_path)
                what = f"{checkpoint.path}: {shown(names['down'])} {down.shape} and {shown(names['up'])} {up.shape}"
                thin[kernel_path][layer] = _thin(rule, kernel, down, up, scale, what)
        elif {"down", "up"} & names.keys():
            raise WeightsFileError(f"{checkpoint.path} has one of A and B for {shown(module)}, and needs both")
        for part, suffixes in (("diff", (".weight", "")), ("diff_b", (".bias",)), ("up_bias", (".bias",))):
            if part not in names:
                continue
            change = _read(checkpoint, names[part]) * (scale if part == "up_bias" else 1.0)
            for rule, layer in next(p for s in suffixes if (p := places.get(module + s))):
                _add_whole(whole, rule, layer, change, shapes[rule.ours].shape, f"{path}: {shown(names[part])}")
    flat = {f"diff/{name}": change for name, change in whole.items() if change.any()}
    for kernel_path, layers in thin.items():
        flat |= {f"lora/{kernel_path}/{name}": x for name, x in _stacked(every[kernel_path], layers).items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def _parts(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """{module: {part: the tensor's name}} of a file, with the modules' prefixes removed."""
    parts: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for name in checkpoint.names:
        match = _PART.fullmatch(name)
        if not match:
            raise WeightsFileError(
                f"{checkpoint.path} has {shown(name)}, which is no part of a LoRA that is read here: lora_A, lora_B, "
                f"lora_down, lora_up, alpha, diff or diff_b (not LoKr, LoHa, DoRA or a text encoder's)"
            )
        module = match["module"]
        while prefix := next((p for p in (*PREFIXES, *KOHYA) if module.startswith(p)), ""):
            module = module.removeprefix(prefix)
        part = next(kind for kind, text in match.groupdict().items() if kind != "module" and text)
        if part in parts[module]:
            raise WeightsFileError(
                f"{checkpoint.path} has {shown(name)} and {shown(parts[module][part])}: one too many"
            )
        parts[module][part] = name
    if not parts:
        raise WeightsFileError(f"{checkpoint.path} holds no tensors")
    return parts


def _places(checkpoint: Checkpoint, parts: dict[str, dict[str, str]], dit: DiTConfig) -> Places:
    """The places of the layout that has all modules of a file.

    Raises:
        WeightsFileError: No layout has all of them; the message names those that the nearest one lacks.
    """
    best: tuple[list[str], Places] | None = None
    try:
        layouts = [layout for layout in family.NAME_MAPS if _rules(dit, layout)]
    except ValueError as error:
        raise WeightsFileError(f"{checkpoint.path} cannot be an adapter of this model: {error}") from error
    for layout in layouts:
        places: Places = collections.defaultdict(list)
        for rule in _rules(dit, layout):
            for layer, [name] in enumerate(rule.names_by_layer):
                places[name].append((rule, layer))
                flat = name.removesuffix(".weight").removesuffix(".bias")
                places[flat.replace(".", "_") + name[len(flat) :]].append((rule, layer))
        for name in list(places):
            places[name] = list(dict.fromkeys(places[name]))
        needs = {
            "down": (".weight",),
            "up": (".weight",),
            "diff": (".weight", ""),
            "diff_b": (".bias",),
            "up_bias": (".bias",),
        }
        unknown = [
            module
            for module, names in parts.items()
            if any(part in names and not any(module + s in places for s in needs[part]) for part in needs)
            or not needs.keys() & names.keys()
        ]
        if best is None or len(unknown) < len(best[0]):
            best = unknown, places
    assert best is not None
    if best[0]:
        unknown = best[0]
        raise WeightsFileError(
            f"{checkpoint.path} is an adapter of another model: of its {len(parts)} modules, this one lacks "
            f"{len(unknown)} ({', '.join(map(shown, unknown[:3]))}{', ...' if len(unknown) > 3 else ''})"
        )
    return best[1]


def _rules(dit: DiTConfig, layout: str) -> list[Rule]:
    """The rules of a layout; [] if it has no names for parts of this model, or stores one tensor in many copies."""
    try:
        rules = family.rules(dit, layout)
    except KeyError:
        return []
    return [] if any(rule.copies for rule in rules) else rules


def _read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    array = checkpoint.read(name)
    if not is_finite(array):
        raise WeightsFileError(f"{checkpoint.path}: {shown(name)} holds NaN or infinite numbers: it is damaged")
    return np.asarray(array, np.float32)


def _sides(rule: Rule) -> tuple[str, str, str, str]:
    """(their output axis, their input axes, our input axes, our output axes) of a kernel's pattern."""
    theirs, ours = (re.findall(AXIS, side) for side in rule.pattern.split("->"))
    of_inputs = set(re.findall(r"[a-z]+", " ".join(theirs[1:])))
    inwards = [axis for axis in ours if set(re.findall(r"[a-z]+", axis)) <= of_inputs]
    outwards = [axis for axis in ours if axis not in inwards]
    return theirs[0], " ".join(theirs[1:]), " ".join(inwards), " ".join(outwards)


def _moved(array: np.ndarray, before: str, after: str, rule: Rule) -> np.ndarray:
    sizes = {axis: n for axis, n in rule.sizes if re.search(rf"\b{axis}\b", before)}
    return rearrange(array, f"{before} -> {after}", **sizes)


def _thin(
    rule: Rule, kernel: Kernel | None, down: np.ndarray, up: np.ndarray, scale: float, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) of one layer of a kernel, with the scale in b."""
    output, inputs, ours_in, ours_out = _sides(rule)
    try:
        rank = down.shape[0]
        if not 0 < rank <= MOST_RANK or up.shape[1] != rank or kernel is None:
            raise ValueError(f"their ranks are {rank} and {up.shape[1]}, at most {MOST_RANK} each")
        i, n = rule.part
        up = np.split(up.reshape(len(up), rank), n)[i]
        a = _moved(down, f"z {inputs}", f"{ours_in} z", rule)
        b = _moved(up, f"{output} z", f"z {ours_out}", rule)
        if a.shape[:-1] != kernel.inputs or b.shape[1:] != kernel.outputs:
            raise ValueError(f"the kernel goes from {kernel.inputs} to {kernel.outputs}")
    except Exception as error:
        at = rule.ours.removeprefix("params/")
        why = str(error).partition("\n")[0]  # einops explains itself at length
        raise WeightsFileError(f"{what} do not fit {at}, so it is an adapter of another model: {why}") from error
    return a, b * np.float32(-scale if rule.negate else scale)


def _add_whole(
    whole: dict[str, np.ndarray], rule: Rule, layer: int, change: np.ndarray, shape: tuple[int, ...], what: str
) -> None:
    """Put a whole change of one layer into that of the parameter."""
    ours = whole.setdefault(rule.ours.removeprefix("params/"), np.zeros(shape, np.float32))
    target = ours[layer] if rule.layers else ours
    try:
        target += rule.to_ours(change).reshape(target.shape) if change.size == target.size else rule.to_ours(change)
    except Exception as error:
        raise WeightsFileError(f"{what} {change.shape} does not fit {rule.ours} {target.shape}") from error


def _stacked(kernel: Kernel, layers: dict[int, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """a and b of all layers; those that have none, and the smaller ranks, are filled with zeros."""
    rank = max(a.shape[-1] for a, _ in layers.values())
    result = {name: np.zeros(shape, np.float32) for name, shape in kernel.shapes(rank).items()}
    for layer, (a, b) in layers.items():
        at_a, at_b = (result[name][layer] if kernel.layers else result[name] for name in ("a", "b"))
        at_a[..., : a.shape[-1]], at_b[: b.shape[0]] = a, b
    return result


def published_adapter(tree: Any, dit: DiTConfig, style: str, scale: float) -> dict[str, LazyArray]:
    """An adapter's tensors by published names, the inverse of `read_published`.

    Args:
        tree: {"lora": ..., "diff": ...} with B as stored, without the scale.
        dit: The model that it adapts.
        style: One of STYLES. "peft" has diffusers' module names, the others the authors' own.
        scale: alpha / rank. "peft" has no alpha: there it goes into B.

    Raises:
        ValueError: The style has no names for a part of the adapter.
    """
    own = {"wan": "wan-own", "pixart": "pixart-own", "dit": "dit-own"}
    usual = family.published_name_map(dit)
    rules = family.rules(dit, usual if style == "peft" else own.get(usual, usual))
    flat: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
    named = {
        "peft": lambda module: f"transformer.{module}",
        "comfyui": lambda module: f"diffusion_model.{module}",
        "kohya": lambda module: f"lora_unet_{module.replace('.', '_')}",
    }[style]
    down_name, up_name = ("lora_A", "lora_B") if style == "peft" else ("lora_down", "lora_up")
    tensors: dict[str, Any] = {}
    for rule in rules:
        path = rule.ours.removeprefix("params/")
        kernel_path = path.removesuffix("/kernel")
        a, b = (flat.get(f"lora/{kernel_path}/{name}") if path != kernel_path else None for name in ("a", "b"))
        change = flat.get(f"diff/{path}")
        if a is not None and b is not None and rule.part != (0, 1):
            raise ValueError(f"--as {style} has one name for q, k and v, and adapters of each: use --as peft")
        if change is not None and style == "peft":
            raise ValueError(f"--as peft has no name for a whole change, as of {path}: use --as comfyui")
        for layer, [name] in enumerate(rule.names_by_layer):
            module = named(name.removesuffix(".weight").removesuffix(".bias"))
            pick = lambda x, layer=layer, rule=rule: x[layer] if rule.layers else x[...]
            if a is not None and b is not None:
                output, inputs, ours_in, ours_out = _sides(rule)
                factor = np.float32((-1 if rule.negate else 1) * (scale if style == "peft" else 1))
                tensors[f"{module}.{down_name}.weight"] = _moved(pick(a), f"{ours_in} z", f"z {inputs}", rule)
                up = _moved(pick(b), f"z {ours_out}", f"{output} z", rule) * factor
                tensors[f"{module}.{up_name}.weight"] = up.reshape(
                    *up.shape, *[1] * (len(re.findall(AXIS, inputs)) - 1)
                )  # of a convolution
                if style != "peft":
                    tensors[f"{module}.alpha"] = np.float32(scale * pick(a).shape[-1])
            if change is not None:
                suffix = "diff_b" if name.endswith(".bias") else "diff"
                tensors[f"{module}.{suffix}"] = rule.to_theirs(pick(change))
    return {name: _lazy(array) for name, array in tensors.items()}


def _lazy(array: Any) -> LazyArray:
    array = np.asarray(array)
    return LazyArray(array.shape, array.dtype, lambda: [array])
