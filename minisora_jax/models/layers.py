"""The few layers everything is built of. A parameter's shape, initialiser and sharding stand in one statement."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from minisora_jax.models.rope import rotate
from minisora_jax.parallel.attention import attend
from minisora_jax.parallel.mesh import parameter_spec, shard


def sharded(init, axis: int, tensor: int | None = None):
    """An initialiser whose result is cut up along `axis` (parallel/mesh.py), and along `tensor` over that mesh axis."""
    return lambda key, shape, dtype=jnp.float32: shard(init(key, shape, dtype), parameter_spec(shape, axis, tensor))


class Einsum(nn.Module):
    """einsum(equation, x, w) + b. Weights are gathered just before use and computed in x's dtype.

    `inputs` counts the leading axes of `shape` that are contracted; the others are the output's. `scale`
    multiplies the initial standard deviation 1 / sqrt(fan in); 0 starts the layer at zero. `tensor` is the axis of
    `shape` that stays cut over the mesh's tensor axis (Shoeybi et al. 2019, arXiv:1909.08053): of the output, whose
    parts then stay where they are, or of the input, whose products are summed over the devices.
    """

    equation: str
    shape: tuple[int, ...]
    inputs: int = 1
    scale: float = 1.0
    bias: bool = True
    tensor: int | None = None

    @nn.compact
    def __call__(self, x):
        std = self.scale / math.sqrt(math.prod(self.shape[: self.inputs]))
        axis = 0 if self.tensor != 0 else len(self.shape) - 1
        w = self.param("kernel", sharded(nn.initializers.normal(std), axis, self.tensor), self.shape)
        kept = ["tensor" if axes == "tensor" else None for axes in parameter_spec(self.shape, axis, self.tensor)]
        w = shard(w.astype(x.dtype), P(*kept))
        lead = jax.typeof(x).sharding.spec[: x.ndim - self.inputs]
        out = P(*lead, *kept[self.inputs :]) if "tensor" in kept[: self.inputs] else None
        y = jnp.einsum(self.equation, x, w, out_sharding=out)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, self.shape[self.inputs :]).astype(x.dtype)
        return y


class Norm(nn.Module):
    """x / rms(x) over the last `axes` axes, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    axes: int = 1
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        over = tuple(range(-self.axes, 0))
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=over, keepdims=True) + self.epsilon)
        return (y * self.param("scale", nn.initializers.ones, x.shape[-self.axes :])).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std over the last axis, in float32 (Ba et al. 2016, arXiv:1607.06450)."""

    learned: bool = True
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        if self.learned:
            y = y * self.param("scale", nn.initializers.ones, (x.shape[-1],))
            y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return y.astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention of x to itself, or to the tokens of `caption` and `image`, within segments.

    q and k pass an RMS norm (QK-norm: Dehghani et al. 2023, arXiv:2302.05442), then the rotation. Contexts are
    (tokens_BLE, segment_BL); the results for caption and image are summed, as in IP-Adapter (Ye et al. 2023,
    arXiv:2308.06721).
    """

    heads: int
    qk_norm: str = "head"  # over each head, over "all" of them, or "none"
    out_scale: float = 1.0
    impl: str = "auto"  # the kernel (parallel/kernels)

    @nn.compact
    def __call__(self, x_BSD, segment_BS, angles_BSk=None, caption=None, image=None, max_segment_len: int = 0):
        D = x_BSD.shape[-1]
        N, K = self.heads, D // self.heads
        project = lambda name, x: Einsum("bsd,dnk->bsnk", (x.shape[-1], N, K), tensor=1, name=name)(x)
        norm = lambda name, x: Norm({"head": 1, "all": 2}[self.qk_norm], name=name)(x)
        if self.qk_norm == "none":
            norm = lambda name, x: x
        context, context_segment = caption or (x_BSD, segment_BS)
        q = norm("q_norm", project("q", x_BSD))
        k, v = norm("k_norm", project("k", context)), project("v", context)
        if angles_BSk is not None:
            q, k = rotate(q, angles_BSk), rotate(k, angles_BSk)
        out = attend(q, k, v, segment_BS, context_segment, impl=self.impl, max_segment_len=max_segment_len)
        if image:
            k, v = norm("image_k_norm", project("image_k", image[0])), project("image_v", image[0])
            out = out + attend(q, k, v, segment_BS, image[1], impl=self.impl)
        return Einsum("bsnk,nkd->bsd", (N, K, D), inputs=2, scale=self.out_scale, tensor=0, name="out")(out)


class MLP(nn.Module):
    """gelu(x W1) W2."""

    ratio: float = 4.0
    out_scale: float = 1.0

    @nn.compact
    def __call__(self, x_BSD):
        D, F = x_BSD.shape[-1], round(x_BSD.shape[-1] * self.ratio)
        h = nn.gelu(Einsum("bsd,df->bsf", (D, F), tensor=1, name="up")(x_BSD), approximate=True)
        return Einsum("bsf,fd->bsd", (F, D), scale=self.out_scale, tensor=0, name="down")(h)


def per_token(table_BGx: jax.Array, segment_BS: jax.Array) -> jax.Array:
    """Row segment - 1 of a per-slot table for each token, zeros for padding. (B, G, x), (B, S) -> (B, S, x)."""
    slots = jnp.arange(1, table_BGx.shape[1] + 1)
    one_hot_BSG = (segment_BS[:, :, None] == slots).astype(table_BGx.dtype)
    return jnp.einsum("bsg,bgx->bsx", one_hot_BSG, table_BGx, precision="highest")


def per_slot_mean(x_BSx: jax.Array, segment_BS: jax.Array, slots: int) -> jax.Array:
    """Mean over each segment's tokens. (B, S, x), (B, S) -> (B, G, x), zeros for empty slots."""
    one_hot_BSG = (segment_BS[:, :, None] == jnp.arange(1, slots + 1)).astype(x_BSx.dtype)
    count_BG = jnp.sum(one_hot_BSG, axis=1)
    total = jnp.einsum("bsg,bsx->bgx", one_hot_BSG, x_BSx, precision="highest")
    return total / jnp.maximum(count_BG, 1.0)[..., None]


def places_in_run(ids_BS: jax.Array) -> jax.Array:
    """How many places each token is behind the first of its run of equal ids along the row; int32 (B, S)."""
    index_BS = jnp.zeros_like(ids_BS) + jnp.arange(ids_BS.shape[1], dtype=ids_BS.dtype)
    begins_BS = ids_BS != jnp.pad(ids_BS, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return index_BS - jax.lax.cummax(jnp.where(begins_BS, index_BS, 0), axis=1)
