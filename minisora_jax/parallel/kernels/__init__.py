"""Attention on one device, by segment: what the ring of parallel/ring.py is made of.

Each kernel is a module with two functions, for arrays of one device:

    forward(q, k, v, q_segment, kv_segment, scale) -> (o, lse)
    backward(q, k, v, q_segment, kv_segment, o, lse, d_o, scale) -> (d_q, d_k, d_v)

    q, o, d_o (B, S, N, K);  k, v (B, T, N, K);  ids (B, S), (B, T);  lse (B, N, S) float32

A query attends to the keys of its own segment; 0 is padding, which neither sees nor is seen. Where a query has no key,
o is 0 and lse is EMPTY. backward takes the o and lse of *all* keys, also of those that other devices hold, and gives
this block's part of the gradients: with p = exp(scale q k - lse), they sum to the whole (Dao et al. 2022,
arXiv:2205.14135, appendix B.4).
"""

from minisora_jax.parallel.kernels import blockwise, reference, splash, triton

EMPTY = reference.EMPTY
KERNELS = {"reference": reference, "blockwise": blockwise, "splash": splash, "triton": triton}
