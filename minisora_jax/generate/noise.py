"""Noise of a sampling. It is drawn on the devices, each token's by itself: nothing is sent to them or between them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P

from minisora_jax.parallel.mesh import TOKENS, put_batch


@struct.dataclass
class Noise:
    """Standard normal noise by (seed, step, place of the token in its clip), the same in any row and on any mesh."""

    key_BS2: jax.Array  # uint32, the Threefry key of the token's seed
    place_BS: jax.Array  # int32
    real_BS: jax.Array  # bool; the noise of padding is 0

    @classmethod
    def of(cls, seeds: Sequence[int], seed_BS: np.ndarray, place_BS: np.ndarray) -> Noise:
        """Noise on the mesh in use.

        Args:
            seeds: Any whole numbers from 0.
            seed_BS: For each token the number of its seed in `seeds`, -1 for padding; int32.
            place_BS: For each token its place in its clip; int32.
        """
        keys = np.stack([np.random.SeedSequence(seed).generate_state(2, np.uint32) for seed in map(int, seeds)])
        on_tokens = lambda x: put_batch(x, TOKENS)
        return cls(put_batch(keys[seed_BS], P(*TOKENS, None)), on_tokens(place_BS), on_tokens(seed_BS >= 0))

    def draw(self, step: jax.Array | int, width: int) -> jax.Array:
        """The noise (B, S, width) of a sampler's step, float32; step 0 is that of the start."""

        def of_token(key_2, place):
            key = jax.random.wrap_key_data(key_2, impl="threefry2x32")
            return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, step), place), (width,))

        return jnp.where(self.real_BS[..., None], jax.vmap(jax.vmap(of_token))(self.key_BS2, self.place_BS), 0.0)
