"""A step cache: some model calls of a sampling reuse what the transformer's blocks added at the call before.

    computed   y = head(x + r),  r = blocks(x) - x        reused   y = head(x + r_last)

Between neighbouring calls r changes little, and the blocks are nearly all of a call's work. Which calls reuse is known
before sampling starts (`SamplerConfig.reuse`): it follows from the changes of r that `minisora calibrate` measured
over whole samplings. Sources: TeaCache (Liu et al. 2024, arXiv:2411.19108), which predicts the changes from the
model's inputs; MagCache (Ma et al. 2025, arXiv:2506.09045), which measures them once, as we do.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from minisora_jax.diffusion.sampler import SAMPLERS, SamplerConfig
from minisora_jax.models.dit import DiTConfig
from minisora_jax.parallel.mesh import like
from minisora_jax.types import PackedBatch

MOST_SHARE = 0.75
MOST_CHANGE = 1e3  # also that of a call that has nothing to reuse: the first one of each expert of a pair
Output = tuple[jax.Array, jax.Array]  # (the transformer's output (B, S, out_width), r of its blocks (B, S, D))


@struct.dataclass
class StepCache:
    """What goes from step to step."""

    residual_BSD: jax.Array  # r of the last computed call
    change_CG: jax.Array  # |r - r_last| / |r_last| at each call of the last step, with and without caption; 0 if reused


def empty_cache(config: DiTConfig, sampler: str, x_BSP: jax.Array) -> StepCache:
    """The cache before the first step, sharded like x."""
    residual_BSD = jnp.zeros((*x_BSP.shape[:2], config.width), config.dtype)
    return StepCache(like(residual_BSD, x_BSP), jnp.zeros((SAMPLERS[sampler].calls, 2)))


def reuse_by_step(sampler: SamplerConfig, steps: int, handover: int = 0) -> jax.Array:
    """Whether each call of each step reuses, bool (steps, calls of a step), filled up to `steps` with False.

    handover: the first step of a pair's second expert, whose first call has nothing to reuse.
    """
    flags = np.array([letter == "1" for letter in sampler.reuse]).reshape(sampler.steps, -1)
    flags[handover : handover + 1, 0] = False
    return jnp.asarray(np.pad(flags, ((0, steps - sampler.steps), (0, 0))))


class CachedCalls:
    """The model calls of one step, in order; r goes from one to the next.

    A step makes its own when it is traced, so what the fields hold is of that trace.
    """

    def __init__(self, reuse_C: jax.Array, cache: StepCache, branches_GBS: jax.Array):
        """reuse_C: bool for each call. branches_GBS: bool, the tokens of each branch of guidance."""
        self._reuse_C, self._residual_BSD, self._branches_GBS = reuse_C, cache.residual_BSD, branches_GBS
        self._changes: list[jax.Array] = []

    def __call__(self, compute: Callable[[], Output], reuse: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The output of the next call.

        Args:
            compute: () -> (output, r).
            reuse: r of an earlier call -> output.
        """
        last_BSD = self._residual_BSD
        y_BSP, self._residual_BSD = jax.lax.cond(
            self._reuse_C[len(self._changes)], lambda: (reuse(last_BSD), last_BSD), compute
        )
        self._changes.append(self._change(last_BSD))
        return y_BSP

    def _change(self, last_BSD: jax.Array) -> jax.Array:
        """(G,)"""
        square = lambda x_BSD: jnp.sum(jnp.square(x_BSD.astype(jnp.float32)), axis=-1)
        of_branches = lambda x_BS: jnp.sum(jnp.where(self._branches_GBS, x_BS, 0.0), axis=(1, 2))
        change_G, size_G = of_branches(square(self._residual_BSD - last_BSD)), of_branches(square(last_BSD))
        return jnp.minimum(jnp.sqrt(change_G / jnp.maximum(size_G, 1e-30)), MOST_CHANGE)

    @property
    def cache(self) -> StepCache:
        """What goes to the next step."""
        return StepCache(self._residual_BSD, jnp.stack(self._changes))


def branches(batch: PackedBatch, with_caption_BS: jax.Array, without_BS: jax.Array) -> jax.Array:
    """Bool (2, B, S): the tokens that are to be made with their caption, and those without."""
    index_BS = like(jnp.broadcast_to(jnp.arange(with_caption_BS.shape[1]), with_caption_BS.shape), with_caption_BS)
    made_BS = (batch.segment_BS > 0) & ~batch.cond_mask_BS
    first_BS = with_caption_BS == index_BS
    return jnp.stack([made_BS & first_BS, made_BS & ~first_BS & (without_BS == index_BS)])


def solve(change_C: np.ndarray, share: float) -> str:
    """`SamplerConfig.reuse` for a share of the calls: those whose r has changed least since the last computed call.

    The change over several calls is taken as the sum of theirs, an upper bound. The sum over all reused calls is
    minimal among the schedules with as many (dynamic programming over the computed calls). The first fifth of the calls
    is computed, as in MagCache: there errors decide what the video becomes.

    Args:
        change_C: Change of r from the call before, see `StepCache`.
        share: Share of the calls that reuse, above 0 and up to `MOST_SHARE`.

    Raises:
        ValueError: The share is out of range.

    Example:
        >>> solve(np.array([0.0, 0.9, 0.1, 0.8, 0.1, 0.1]), 0.5)
        '001011'
    """
    if not 0 < share <= MOST_SHARE:
        raise ValueError(f"a share of {share:g} of the model calls must be above 0 and at most {MOST_SHARE:g}")
    kept = -(-len(change_C) // 5) - 1  # calls before the first whose r may be reused
    calls = len(change_C) - kept
    computed = max(calls - round(share * len(change_C)), 1)
    since_C = np.concatenate([[0.0], np.cumsum(np.asarray(change_C, np.float64)[kept + 1 :])])
    total_C = np.concatenate([[0.0], np.cumsum(since_C)])  # total_C[j]: of since_C below j
    first, end = np.arange(calls)[:, None], np.arange(1, calls + 1)[None]
    # The error of reusing r of call `first` at all calls after it and before `end`.
    cost = np.where(end > first, total_C[end] - total_C[first] - (end - first) * since_C[first], np.inf)
    best_C = np.where(np.arange(calls) == 0, 0.0, np.inf)  # of schedules whose last computed call is C
    before = []
    for _ in range(computed - 1):
        through = best_C[:, None] + cost[:, :-1]  # from call C to the next computed one, 1, 2, ...
        before.append(np.concatenate([[0], through.argmin(0)]))
        best_C = np.concatenate([[np.inf], through.min(0)])
    at = int((best_C + cost[:, -1]).argmin())
    letters = ["1"] * calls
    letters[at] = "0"
    for came_from in reversed(before):
        at = int(came_from[at])
        letters[at] = "0"
    return "0" * kept + "".join(letters)
