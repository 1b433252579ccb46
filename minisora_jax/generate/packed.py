"""Requests in packed rows: their tokens, captions, noise and twins; and requests by their number of steps."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from minisora_jax.data.packing import PackConfig
from minisora_jax.data.rows import Segment, pack_segments, patchify, unpatchify
from minisora_jax.diffusion.sampler import SamplerConfig
from minisora_jax.generate.given_frames import frame_tokens
from minisora_jax.generate.known import Held, clean_tokens
from minisora_jax.generate.noise import Noise
from minisora_jax.generate.request import Request
from minisora_jax.models.dit import DiTConfig
from minisora_jax.parallel.mesh import TOKENS, put_batch
from minisora_jax.types import PackedBatch


@dataclasses.dataclass(frozen=True)
class PackedRequests:
    """Requests in rows. The `copies` segments (twins) of a request lie one after another."""

    requests: Sequence[Request]
    grids: Sequence[tuple[int, int, int]]
    rows: list[list[int]]  # requests by number
    copies: int  # segments of a request: with and without its caption; one without guidance, and with a guide model
    length: int  # tokens of a row
    config: DiTConfig
    trained: frozenset[str] | None = None  # kinds of conditioning mask that the model knows, see `clean_tokens`

    @functools.cached_property
    def places(self) -> list[tuple[int, int, int]]:
        """(number of the request, row, its first token) of each request in the rows."""
        places = []
        for b, row in enumerate(self.rows):
            at = 0
            for i in row:
                places.append((i, b, at))
                at += self.copies * self.tokens(i)
        return places

    def tokens(self, i: int) -> int:
        """Tokens of one segment of request i."""
        return int(np.prod(self.grids[i]))

    def batch(self, captions: Sequence[Sequence[np.ndarray]]) -> PackedBatch:
        """The batch of the rows. captions: for each request the caption features of each of its copies."""
        text = max(sum(len(c) for i in row for c in captions[i]) for row in self.rows)
        slots = self.copies * max(len(row) for row in self.rows)
        frames = self.length // min(h * w for _, h, w in self.grids)  # the same for all batches
        pack = PackConfig(self.length, -(-text // 64) * 64, slots, len(self.rows), frames=frames)
        segments = [[s for i in row for s in self._segments(i, captions[i])] for row in self.rows]
        return pack_segments(segments, pack, action_width=self.config.action_width)

    def _segments(self, i: int, captions: Sequence[np.ndarray]) -> list[Segment]:
        request, n = self.requests[i], self.tokens(i)
        tokens, cond_mask = np.zeros((n, self.config.token_width), np.float32), np.zeros(n, bool)
        if given := request.given:
            patches = patchify(np.asarray(given.latents_thwc, np.float32), self.config.patch)
            if patches.shape[:3] != self.grids[i] or given.cond_mask_thw.shape != self.grids[i]:
                raise ValueError(
                    f"the given latents have {patches.shape[:3]} tokens and the conditioning mask "
                    f"{given.cond_mask_thw.shape}; the request has {self.grids[i]}"
                )
            kept = given.cond_mask_thw.reshape(-1) | (given.strength < 1)
            cond_mask = self._clean(i).reshape(-1)
            tokens = np.where(kept[:, None], patches.reshape(n, -1), 0.0).astype(np.float32)
        where = request.first, request.spacing, *frame_tokens(self.config, request, self.grids[i])
        return [Segment(tokens, cond_mask, self.grids[i], text, request.fps, *where) for text in captions]

    def _clean(self, i: int) -> np.ndarray:
        request = self.requests[i]
        assert request.given
        return clean_tokens(self.trained, request.given.cond_mask_thw, request.first)

    def held(self) -> Held | None:
        """The known tokens that are held, on the mesh in use; None if there are none."""

        def held_tokens(i: int) -> np.ndarray | float:
            given = self.requests[i].given
            return np.tile((given.cond_mask_thw & ~self._clean(i)).reshape(-1), self.copies) if given else 0.0

        mask_BS = self.per_token(held_tokens) > 0
        return Held(put_batch(mask_BS, TOKENS), self.noise()) if mask_BS.any() else None

    def per_token(self, value) -> np.ndarray:
        """value(i) for each token of request i, (B, S) float32; 0 for padding."""
        filled = np.zeros((len(self.rows), self.length), np.float32)
        for i, b, at in self.places:
            filled[b, at : at + self.copies * self.tokens(i)] = value(i)
        return filled

    def twins(self) -> tuple[np.ndarray, np.ndarray]:
        """For each token the index, in its row, of its twin with the caption and of its twin without; int32 (B, S)."""
        index = np.tile(np.arange(self.length, dtype=np.int32), (len(self.rows), 1))
        with_caption_BS, without_BS = index.copy(), index.copy()
        for i, b, at in self.places:
            n, end = self.tokens(i), at + self.copies * self.tokens(i)
            with_caption_BS[b, at:end] = np.tile(np.arange(at, at + n), self.copies)
            without_BS[b, at:end] = np.tile(np.arange(end - n, end), self.copies)
        return with_caption_BS, without_BS

    def alone(self, captions: Sequence[Sequence[np.ndarray]], cut: int) -> tuple[PackedBatch, np.ndarray, np.ndarray]:
        """The requests without their twins, in rows of half the length.

        Args:
            captions: As of `batch`.
            cut: The new length is a multiple of it.

        Returns:
            (the batch, the index in this row of each token of the shorter one (B, R), and the other way (B, S), where
            twins have the same), int32.
        """
        half = -(-self.length // self.copies)
        short = dataclasses.replace(self, copies=1, length=half + -half % cut)
        from_BR, to_BS = (np.zeros((len(self.rows), n), np.int32) for n in (short.length, self.length))
        for (i, b, at), (_, _, place) in zip(self.places, short.places):
            n = self.tokens(i)
            from_BR[b, place : place + n] = np.arange(at, at + n)
            to_BS[b, at : at + self.copies * n] = np.tile(np.arange(place, place + n), self.copies)
        return short.batch([texts[:1] for texts in captions]), from_BR, to_BS

    def noise(self) -> Noise:
        """Standard normal noise by each request's seed, equal for its twins, on the mesh in use."""
        place_BS, seed_BS = (np.full((len(self.rows), self.length), n, np.int32) for n in (0, -1))
        for i, b, at in self.places:
            n, end = self.tokens(i), at + self.copies * self.tokens(i)
            seed_BS[b, at:end], place_BS[b, at:end] = i, np.tile(np.arange(n, dtype=np.int32), self.copies)
        return Noise.of([request.seed for request in self.requests], seed_BS, place_BS)

    def latents(self, x_BSP: np.ndarray) -> dict[int, np.ndarray]:
        """latents_thwc of each request."""
        latents: dict[int, np.ndarray] = {}
        for i, b, at in self.places:
            patches = x_BSP[b, at : at + self.tokens(i)].reshape(*self.grids[i], -1)
            latents.setdefault(i, unpatchify(patches, self.config.patch))
        return latents


def fill_rows(grids: Sequence[tuple[int, int, int]], length: int, copies: int) -> list[list[int]]:
    """Rows of request numbers by first-fit decreasing; each request takes `copies` times its tokens."""
    rows, room = [], []
    for i in sorted(range(len(grids)), key=lambda i: -int(np.prod(grids[i]))):
        need = copies * int(np.prod(grids[i]))
        for r, left in enumerate(room):
            if left >= need:
                rows[r].append(i)
                room[r] -= need
                break
        else:
            rows.append([i])
            room.append(length - need)
    return rows


def by_steps(requests: Sequence[Request], sampler: SamplerConfig) -> list[tuple[SamplerConfig, list[int]]]:
    """Requests grouped by their number of steps: a request with strength s takes the share s of the steps."""
    members: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        strength = request.given.strength if request.given else 1.0
        members.setdefault(math.ceil(strength * sampler.steps), []).append(i)
    return [(sampler.last(steps), numbers) for steps, numbers in members.items()]
