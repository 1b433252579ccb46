"""Peak rates of one chip, from the makers' data sheets. None is measured.

TPUs: cloud.google.com/tpu/docs/v5p, /v5e, /v6e and /tpu7x. GPUs: NVIDIA's data sheets of L4, RTX 4090, A100
80GB SXM, H100 SXM, H200 SXM and B200, without sparsity. L4 and RTX 4090 reach each other over PCIe.
The network rate is that of a host, divided by its chips.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip."""

    flops: float  # dense bfloat16 FLOPs per second
    memory: float  # bytes
    link: float  # bytes per second to one neighbour, one direction (GPUs: to all others of the node together)
    network: float  # bytes per second between slices (GPUs: between nodes)


CHIPS = {
    "v5p": Chip(459e12, 95e9, 100e9, 6.25e9),
    "v5e": Chip(197e12, 16e9, 50e9, 3.125e9),
    "v6e": Chip(918e12, 32e9, 112e9, 12.5e9),
    "tpu7x": Chip(2307e12, 192e9, 200e9, 12.5e9),
    "l4": Chip(121e12, 24e9, 32e9, 12.5e9),
    "rtx4090": Chip(165e12, 24e9, 32e9, 12.5e9),
    "a100": Chip(312e12, 80e9, 300e9, 25e9),
    "h100": Chip(989e12, 80e9, 450e9, 50e9),
    "h200": Chip(989e12, 141e9, 450e9, 50e9),
    "b200": Chip(2250e12, 180e9, 900e9, 50e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`v5p:4x4x4` (one slice of TPUs), `v5e:16x16*2` (two slices), `h100:64` (64 GPUs)."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str) -> Topology:
        """The topology of a text.

        Raises:
            ValueError: The text has another form, or the chip is unknown.
        """
        match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", text)
        if not match or match[1] not in CHIPS:
            known = ", ".join(CHIPS)
            raise ValueError(f"topology {text!r} must look like v5p:4x4x4, v5e:16x16*2 or h100:64; chips: {known}")
        shape = tuple(int(n) for n in match[2].split("x"))
        topology = cls(match[1], shape, int(match[3] or 1))
        if topology.is_tpu and len(shape) == 1:
            raise ValueError(f"topology {text!r}: TPUs come as a grid, such as {match[1]}:4x4")
        return topology

    @property
    def chip(self) -> Chip:
        """The rates of each chip."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def is_tpu(self) -> bool:
        """Whether the chips are TPUs."""
        return self.kind.startswith(("v", "tpu"))

    def devices(self) -> Sequence[Any]:
        """The described devices of a TPU topology. A mesh over them can be compiled for.

        Raises:
            ImportError: libtpu is not installed.
        """
        from jax.experimental import topologies

        try:
            import libtpu  # noqa: F401
        except ImportError as error:
            raise ImportError("plans for TPUs need the TPU compiler: pip install libtpu (it needs no TPU)") from error
        name = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        options = {"num_slices": self.slices} if self.slices > 1 else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
