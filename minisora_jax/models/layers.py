"""Layers that all models share. One statement gives a parameter's shape, initialiser and sharding."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax.sharding import PartitionSpec as P

from minisora_jax.models import nf4
from minisora_jax.models.past import Past
from minisora_jax.models.rope import rotate
from minisora_jax.parallel.attention import attend
from minisora_jax.parallel.mesh import parameter_spec, shard


def sharded(init: Initializer, axis: int, tensor: int | None = None) -> Initializer:
    """An initialiser whose result is sharded along `axis`, and along `tensor` over the tensor axis of the mesh.

    See `parallel.mesh.parameter_spec`.
    """
    return lambda key, shape, dtype=jnp.float32: shard(init(key, shape, dtype), parameter_spec(shape, axis, tensor))


def scan_layers(block: type[nn.Module], depth: int, in_axes: Any) -> Any:
    """`block` scanned over `depth` layers. Each parameter gets a leading axis of layers.

    Args:
        block: A module whose call takes and returns (carry, ...).
        depth: Number of layers.
        in_axes: For each further input, `nn.broadcast` or the axis that is scanned over.
    """
    axes: Any = dict.fromkeys(("params", "lora", "int8", "nf4", "cache"), 0)
    return nn.scan(block, variable_axes=axes, split_rngs={"params": True}, in_axes=in_axes, length=depth)


class Einsum(nn.Module):
    """einsum(equation, x, w) + b, computed in x's dtype. Sharded weights are gathered just before use.

    Collections beside "params" change the kernel, where they have leaves at this module's path (models/lora.py,
    models/quantized.py):

        lora   "a" (inputs, r) and "b" (r, outputs): x w + (x a) b. Nothing has the kernel's shape but the kernel.
        int8   "scale" (outputs): the kernel holds whole numbers, and its products are multiplied by the scale.
        nf4    "scale" (blocks): the kernel holds codes, which are decoded just before use.

    Attributes:
        equation: einsum equation of x and the kernel.
        shape: Shape of the kernel.
        inputs: Leading axes of `shape` that are contracted. The other axes are the output's.
        scale: Factor on the initial standard deviation 1 / sqrt(fan in). 0 initialises the layer to zero.
        bias: Whether a bias is added.
        tensor: Axis of `shape` that stays sharded over the mesh's tensor axis (Shoeybi et al. 2019, arXiv:1909.08053).
            Outputs along an output axis stay sharded. Products along an input axis are summed over the devices.
    """

    equation: str
    shape: tuple[int, ...]
    inputs: int = 1
    scale: float = 1.0
    bias: bool = True
    tensor: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        std = self.scale / math.sqrt(math.prod(self.shape[: self.inputs]))
        axis = 0 if self.tensor != 0 else len(self.shape) - 1
        w = self.param("kernel", sharded(nn.initializers.normal(std), axis, self.tensor), self.shape)
        kept = ["tensor" if axes == "tensor" else None for axes in parameter_spec(self.shape, axis, self.tensor)]
        w = self._decoded(w, P(*kept), x.dtype)
        b = self.param("bias", nn.initializers.zeros, self.shape[self.inputs :]).astype(x.dtype) if self.bias else None
        adapter = self._adapter(kept, x.dtype)
        # Backward, the barrier holds the gradient of x until those of w and b are there. Without it XLA's scheduler may
        # put them off, and all that they read stays in memory: 5 GiB of a chip in Wan 14B.
        x, w, b, adapter = jax.lax.optimization_barrier((x, w, b, adapter))
        lead = jax.typeof(x).sharding.spec[: x.ndim - self.inputs]
        summed = "tensor" in kept[: self.inputs]
        out = P(*lead, *kept[self.inputs :]) if summed else None
        y = jnp.einsum(self.equation, x, w, out_sharding=out)
        if self.has_variable("int8", "scale"):
            y = y * self.get_variable("int8", "scale").astype(x.dtype)
        if adapter:
            inwards, outwards = self._thin_equations()
            h = jnp.einsum(inwards, x, adapter[0], out_sharding=P(*lead, None) if summed else None)
            y = y + jnp.einsum(outwards, h, adapter[1])
        return y if b is None else y + b

    def _decoded(self, w: jax.Array, spec: P, dtype: Any) -> jax.Array:
        """The kernel in the type of the product, gathered."""
        if not self.has_variable("nf4", "scale"):
            return shard(w.astype(dtype), spec)
        codes, scale = w.astype(jnp.uint8), self.get_variable("nf4", "scale")  # not all backends gather 4 bits
        scale = shard(scale, nf4.scale_spec(spec, self.inputs - 1, scale.shape[self.inputs - 1]))
        return nf4.decode(shard(codes, spec), scale, dtype)

    def _adapter(self, kept: list[str | None], dtype: Any) -> tuple[jax.Array, jax.Array] | None:
        """(a, b) of the collection "lora", gathered like the kernel; None where it has none."""
        if not self.has_variable("lora", "a"):
            return None
        a, b = (self.get_variable("lora", name).astype(dtype) for name in ("a", "b"))
        return shard(a, P(*kept[: self.inputs], None)), shard(b, P(None, *kept[self.inputs :]))

    def _thin_equations(self) -> tuple[str, str]:
        """The equations of x a and (x a) b, such as "bsd,dZ->bsZ" and "bsZ,Znk->bsnk"."""
        operands, out = self.equation.split("->")
        x, kernel = operands.split(",")
        lead, inputs, outputs = x[: len(x) - self.inputs], kernel[: self.inputs], kernel[self.inputs :]
        return f"{x},{inputs}Z->{lead}Z", f"{lead}Z,Z{outputs}->{out}"


def matrix_axes(path: tuple, ndim: int) -> tuple[int, int]:
    """(leading axes that count the layers, axes after them that are a kernel's inputs). The other axes are outputs."""
    names = [k.key for k in path]
    layers = 1 if "blocks" in names else 0  # the first axis of a scanned stack counts its layers
    if ndim - layers == 5:  # (t, h, w, in, out)
        return layers, 4
    return layers, 2 if names[-2] == "out" and ndim - layers == 3 else 1


class Norm(nn.Module):
    """x / rms(x) * scale over the last `axes` axes, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    axes: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        over = tuple(range(-self.axes, 0))
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=over, keepdims=True) + 1e-6)
        return (y * self.param("scale", nn.initializers.ones, x.shape[-self.axes :])).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std over the last axis, in float32 (Ba et al. 2016, arXiv:1607.06450).

    Attributes:
        learned: Whether a learned scale and bias follow.
        epsilon: Added to the variance.
    """

    learned: bool = True
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        if self.learned:
            y = y * self.param("scale", nn.initializers.ones, (x.shape[-1],))
            y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return y.astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention of x to itself, or to the tokens of a caption and an image, within segments.

    Queries and keys pass an RMS norm (QK-norm: Dehghani et al. 2023, arXiv:2302.05442), then the rotation. The results
    for caption and image are summed, as in IP-Adapter (Ye et al. 2023, arXiv:2308.06721).

    Attributes:
        heads: N.
        qk_norm: RMS norm over each "head", over "all" heads together, or "none".
        out_scale: Factor on the initial standard deviation of the output layer.
        impl: The kernel, see parallel/kernels.
        sharpness: Factor on the logits, see `RopeScaling.sharpness`.
    """

    heads: int
    qk_norm: str = "head"
    out_scale: float = 1.0
    impl: str = "auto"
    sharpness: float = 1.0

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        segment_BS: jax.Array,
        angles_BSk: jax.Array | None = None,
        caption: tuple[jax.Array, jax.Array] | None = None,
        image: tuple[jax.Array, jax.Array] | None = None,
        max_segment_len: int = 0,
        slots: int = 0,
        causal: bool = False,
        past: Past | None = None,
    ) -> jax.Array:
        """The attention's output (B, S, D).

        Args:
            x_BSD: Tokens that ask.
            segment_BS: Their segment ids.
            angles_BSk: Rotation of queries and keys, or None. For self-attention only.
            caption: (tokens_BLE, segment_BL) to attend to in place of x.
            image: (tokens_BIE, segment_BI) to attend to as well.
            max_segment_len: See `PackedBatch.max_segment_len`.
            slots: Segment ids are 1 to `slots`, see `attend`; 0: unknown.
            causal: `segment_BS` has causal ids, see `attend`.
            past: Tokens before x to attend to as well, whose keys and values are in the collection "cache".
        """
        D = x_BSD.shape[-1]
        N, K = self.heads, D // self.heads
        project = lambda name, x: Einsum("bsd,dnk->bsnk", (x.shape[-1], N, K), tensor=1, name=name)(x)
        norm = lambda name, x: Norm({"head": 1, "all": 2}[self.qk_norm], name=name)(x)
        if self.qk_norm == "none":
            norm = lambda name, x: x
        context, context_segment = caption or (x_BSD, segment_BS)
        q = norm("q_norm", project("q", x_BSD))
        k, v = norm("k_norm", project("k", context)), project("v", context)
        new_k, new_v = k, v
        if angles_BSk is not None:
            q, k = rotate(q, angles_BSk), rotate(k, angles_BSk)
        if self.sharpness != 1:
            q = q * self.sharpness
        if past:
            past_k, past_v = (self.get_variable("cache", name).astype(k.dtype) for name in ("k", "v"))
            past_k = past_k if past.angles_BMk is None else rotate(past_k, past.angles_BMk)
            join = lambda before, x: jnp.concatenate([before, x], axis=1)
            k, v, context_segment = join(past_k, k), join(past_v, v), join(past.segment_BM, context_segment)
            if past.write_at is not None:
                for name, x in (("k", new_k), ("v", new_v)):
                    kept = self.get_variable("cache", name)
                    kept = jax.lax.dynamic_update_slice_in_dim(kept, x.astype(kept.dtype), past.write_at, axis=1)
                    self.put_variable("cache", name, kept)
        limits = {"max_segment_len": max_segment_len, "slots": slots, "causal": causal}
        out = attend(q, k, v, segment_BS, context_segment, impl=self.impl, **limits)
        if image:
            k, v = norm("image_k_norm", project("image_k", image[0])), project("image_v", image[0])
            out = out + attend(q, k, v, segment_BS, image[1], impl=self.impl)
        return Einsum("bsnk,nkd->bsd", (N, K, D), inputs=2, scale=self.out_scale, tensor=0, name="out")(out)


class MLP(nn.Module):
    """gelu(x W1) W2, of width F = ratio * D in between."""

    ratio: float = 4.0

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        D, F = x_BSD.shape[-1], round(x_BSD.shape[-1] * self.ratio)
        h = nn.gelu(Einsum("bsd,df->bsf", (D, F), tensor=1, name="up")(x_BSD), approximate=True)
        return Einsum("bsf,fd->bsd", (F, D), tensor=0, name="down")(h)


def per_token(table_BGx: jax.Array, segment_BS: jax.Array) -> jax.Array:
    """Entry segment - 1 of a table over slots for each token, zeros for padding. (B, G, x), (B, S) -> (B, S, x)."""
    slots = jnp.arange(1, table_BGx.shape[1] + 1)
    one_hot_BSG = (segment_BS[:, :, None] == slots).astype(table_BGx.dtype)
    return jnp.einsum("bsg,bgx->bsx", one_hot_BSG, table_BGx, precision="highest")


def per_slot_mean(x_BSx: jax.Array, segment_BS: jax.Array, slots: int) -> jax.Array:
    """Mean over the tokens of each segment, zeros for empty slots. (B, S, x), (B, S) -> (B, G, x)."""
    one_hot_BSG = (segment_BS[:, :, None] == jnp.arange(1, slots + 1)).astype(x_BSx.dtype)
    count_BG = jnp.sum(one_hot_BSG, axis=1)
    # Of a row that is cut over devices, each device has a part of the sum.
    of_rows = None if jax.sharding.get_abstract_mesh().empty else P(jax.typeof(x_BSx).sharding.spec[0], None, None)
    total = jnp.einsum("bsg,bsx->bgx", one_hot_BSG, x_BSx, precision="highest", out_sharding=of_rows)
    return total / jnp.maximum(count_BG, 1.0)[..., None]


def places_in_run(ids_BS: jax.Array) -> jax.Array:
    """Place of each token within its run of equal ids, counted from 0; int32 (B, S)."""
    index_BS = jnp.zeros_like(ids_BS) + jnp.arange(ids_BS.shape[1], dtype=ids_BS.dtype)
    begins_BS = ids_BS != jnp.pad(ids_BS, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return index_BS - jax.lax.cummax(jnp.where(begins_BS, index_BS, 0), axis=1)
