"""What the makers of reference results share: weights into a module, gradients and names out of it, fixtures to disk.

Weights and inputs are drawn by name (random_weights.py), so a fixture holds outputs and gradients only, and the names
and shapes of the published model at its full size.
"""

import json
from pathlib import Path

import numpy as np
import torch
from random_weights import draw, draw_input
from safetensors.numpy import save_file

OUT = Path(__file__).with_name("fixtures")  # where `save` writes; make.py may change it


def fill(model: torch.nn.Module) -> torch.nn.Module:
    drawn = set()  # a tied tensor has several names, of which the first counts
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.data_ptr() in drawn:
                continue
            drawn.add(tensor.data_ptr())
            tensor.copy_(torch.from_numpy(draw(name, tuple(tensor.shape))))
    return model.eval()


def names_and_shapes(make) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {k: list(v.shape) for k, v in make().state_dict().items()}


def gradients(model: torch.nn.Module, loss: torch.Tensor, names: list[str]) -> dict[str, np.ndarray]:
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, [parameters[n] for n in names])
    return {f"grad/{n}": g.numpy() for n, g in zip(names, grads)}


def save(family: str, results: dict[str, np.ndarray], **facts) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    arrays = {k: np.asarray(v, np.float32, order="C") for k, v in results.items()}
    save_file(arrays, OUT / f"{family}.safetensors", {k: json.dumps(v) for k, v in facts.items()})
    print(family, {k: v.shape for k, v in arrays.items()})


def weigh(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(draw_input("weights of the loss", shape))
