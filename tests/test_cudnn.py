"""The tables of the cuDNN kernel, with cuDNN itself replaced by its contract: it runs on GPUs only (bench/gpu.py)."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_ring import check, dense, inputs

from minisora_jax.parallel.attention import attend
from minisora_jax.parallel.kernels import EMPTY, cudnn, reference


def contract(which, scale, q, k, v, sequences, *residuals):
    """cuDNN's: sequence by sequence, sequences that exist first; what belongs to none is not a number."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, G = sequences.q_start_BG.shape
    S, N = q.shape[1:3]
    places = [
        (b, *(int(x[b, g]) for x in sequences)) for b in range(B) for g in range(G) if sequences.q_length_BG[b, g] > 0
    ]
    statistics = np.full((B * G, N, S), np.nan)
    outputs = [np.full(x.shape, np.nan) for x in ((q,) if which == "fwd" else (q, k, v))]
    for a, (b, start, length, kv_start, kv_length) in enumerate(places):
        mine, theirs = (b, slice(start, start + length)), (b, slice(kv_start, kv_start + kv_length))
        logits = scale * np.einsum("snk,mnk->nsm", q[mine], k[theirs])
        if which == "fwd":
            lse = np.log(np.exp(logits).sum(-1))
            statistics[a, :, :length] = lse
            outputs[0][mine] = np.einsum("nsm,mnk->snk", np.exp(logits - lse[..., None]), v[theirs])
            continue
        lse, o, d_o = (np.asarray(x, np.float64) for x in residuals)
        p = np.exp(logits - lse[a, :, :length, None])
        d_p = np.einsum("snk,mnk->nsm", d_o[mine], v[theirs])
        mean = (d_o[mine] * o[mine]).sum(-1).T[..., None]
        d_logits = scale * p * (d_p - mean)
        outputs[0][mine] = np.einsum("nsm,mnk->snk", d_logits, k[theirs])
        outputs[1][theirs] = np.einsum("nsm,snk->mnk", d_logits, q[mine])
        outputs[2][theirs] = np.einsum("nsm,snk->mnk", p, d_o[mine])
    results = [jnp.asarray(x, jnp.float32) for x in outputs]
    return (results[0], jnp.asarray(statistics, jnp.float32)) if which == "fwd" else results


@pytest.mark.slow
@pytest.mark.parametrize("T", [None, 11, 1])
def test_tables_give_each_segment_its_own_sequence(monkeypatch, T):
    monkeypatch.setattr(cudnn, "_call", contract)
    arrays, weight = inputs(3, T)
    arrays = tuple(map(jnp.asarray, arrays))
    kernel = cudnn.Cudnn(slots=64)
    o, lse = kernel.forward(*arrays, 0.5)
    gradients = kernel.backward(*arrays, o, lse, jnp.asarray(weight), 0.5)
    check((o, gradients), dense(*arrays, weight), 4e-5)
    theirs = reference.forward(*arrays, 0.5)[1]
    np.testing.assert_allclose(lse, theirs, rtol=1e-5, atol=1e-5)
    assert ((np.asarray(lse) == np.float32(EMPTY)) == (np.asarray(theirs) == np.float32(EMPTY))).all()


def test_what_cudnn_cannot_take_is_refused():
    x, ids = jnp.zeros((1, 8, 2, 16), jnp.float32), jnp.ones((1, 8), jnp.int32)
    with pytest.raises(ValueError, match=r"cannot take float32\[1, 8, 2, 16\] with slots=4: use attention='auto'"):
        attend(x, x, x, ids, ids, impl="cudnn", slots=4)
    assert cudnn.Cudnn(4).fits(x.astype(jnp.bfloat16)) and not cudnn.Cudnn(0).fits(x.astype(jnp.bfloat16))
