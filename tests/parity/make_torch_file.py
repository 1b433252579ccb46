"""A file as torch saves it, for tests/test_checkpoint.py; made by make.py."""

import reference
import torch


def nested() -> None:
    """A file of torch's own format, with what occurs in published ones: half precision, views, a nested dict."""
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "whole": base,
        "transposed": base.T,
        "rows": base[1:],
        "half": (base / 7).half(),
        "brain": (base / 7).bfloat16(),
        "parameter": torch.nn.Parameter(base + 0.5),
        "long": torch.tensor(3),
    }
    reference.save("nested", {k: v.detach().float().numpy() for k, v in tensors.items()})
    torch.save({"epoch": 3, "state_dict": tensors}, reference.OUT / "nested.pth")
