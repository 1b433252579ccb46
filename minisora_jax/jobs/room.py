"""Whether a frame fits in memory, known before anything is sampled. A process that takes too much is killed, unsaid."""

from __future__ import annotations

import os

import jax

from minisora_jax.models.codec import Codec

SURE = 2**21  # pixels of a frame that is not asked about: 1080p takes 3.1 GiB with the bundled codec
GIB = 2**30


def require_room(codec: Codec, size_HW: tuple[int, int], *, video: bool) -> None:
    """ValueError if decoding one frame of that size takes more memory than a device has; without a mesh in use."""
    H, W = (-(-n // codec.config.space_factor) * codec.config.space_factor for n in size_HW)
    if H * W <= SURE or not jax.sharding.get_mesh().empty:
        return
    needed, memory = codec.decode_bytes((H, W), video=video), device_memory()
    if needed > memory:
        raise ValueError(
            f"a frame of {size_HW[0]}x{size_HW[1]} takes {needed / GIB:.1f} GiB in the codec, and this machine has "
            f"{memory / GIB:.1f}: use a smaller --size, or more devices (--mesh ring=4 divides the height)"
        )


def device_memory() -> int:
    """The bytes of memory of the first device; of a CPU, those of the machine or of its container."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                limits.append(int(file.read()))
        except (OSError, ValueError):  # none, or "max"
            continue
    return min(limits)
