"""Attention kernels for one device, masked by segment ids. The ring of parallel/ring.py calls one for each hop.

A kernel is a module with the two functions of `Kernel`. A query attends to the keys of its own segment. Segment 0 is
padding: it attends to nothing, and nothing attends to it. Where a query has no key, o is 0 and lse is EMPTY.

`causal` is attention in the order of frames (block-causal), see `attention.attend`. Ids then rise along a row, and the
keys that a query sees are those with ids from frame 0 of its segment to its own id.
"""

from __future__ import annotations

from typing import Protocol

import jax

from minisora_jax.parallel.kernels import blockwise, reference, splash, triton

EMPTY, FRAMES = reference.EMPTY, reference.FRAMES


class Kernel(Protocol):
    """The interface of a kernel.

    Shapes: q, o, d_o (B, S, N, K); k, v (B, M, N, K); ids (B, S) and (B, M); lse (B, N, S) float32.
    """

    def forward(
        self,
        q_BSNK: jax.Array,
        k_BMNK: jax.Array,
        v_BMNK: jax.Array,
        q_segment_BS: jax.Array,
        kv_segment_BM: jax.Array,
        scale: float,
        causal: bool = False,
        /,
    ) -> tuple[jax.Array, jax.Array]:
        """(o, lse): softmax(scale q k^T) v, and the logarithm of the softmax's denominator."""
        ...

    def backward(
        self,
        q_BSNK: jax.Array,
        k_BMNK: jax.Array,
        v_BMNK: jax.Array,
        q_segment_BS: jax.Array,
        kv_segment_BM: jax.Array,
        o_BSNK: jax.Array,
        lse_BNS: jax.Array,
        d_o_BSNK: jax.Array,
        scale: float,
        causal: bool = False,
        /,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(d_q, d_k, d_v): the part of the gradients that comes from these keys.

        o and lse are over all keys, including the keys on other devices. With p = exp(scale q k - lse), the parts of
        all blocks of keys sum to the whole gradient (Dao et al. 2022, arXiv:2205.14135, appendix B.4).
        """
        ...


KERNELS: dict[str, Kernel] = {
    "reference": reference,
    "blockwise": blockwise,
    "splash": splash,
    "triton": triton,
}
NAMES = (*KERNELS, "cudnn")  # kernels/cudnn.py needs the number of segments, so it is made for each call
