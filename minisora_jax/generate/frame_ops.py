"""Operations on frames that tasks need: stretching, masks, seams, steps between frames."""

from __future__ import annotations

import numpy as np

FEATHER = 2  # pixels over which new and kept parts of a picture blend
EASE = 4  # frames at a seam over which a given video blends into its reconstruction by the codec
FAITHFUL = 31.0  # dB: lowest PSNR of these frames against the given ones
ELSEWHERE = 26.0  # dB: a reconstruction with less shows its objects in other places, and blending makes ghosts
COLOUR_STEPS = 6  # of red, green and blue, for the colours of a frame
STILL = 0.5  # levels of 255: the least median step, so that ratios of still videos mean something


def stretched(frames_THWC: np.ndarray, length: int) -> np.ndarray:
    """A video at another length; each frame is a blend of its neighbours in time."""
    return _blended(frames_THWC, np.linspace(0, len(frames_THWC) - 1, length))


def eased(given_THWC: np.ndarray, coded_THWC: np.ndarray, *, at_end: bool) -> np.ndarray:
    """A given video that blends into its reconstruction at its end or beginning.

    The codec's softer edges come over `EASE` frames, as far as `FAITHFUL` allows, and not from one frame to the next.
    A frame whose reconstruction differs by more than edges (`ELSEWHERE`) is shown as given.
    """
    n = min(EASE, len(given_THWC), len(coded_THWC))
    share = (np.arange(1, n + 1, dtype=np.float32) / (n + 1))[:, None, None, None]
    where, of = (slice(len(given_THWC) - n, None), slice(len(coded_THWC) - n, None)) if at_end else (slice(n), slice(n))
    share = share if at_end else share[::-1]
    off = np.sqrt(np.mean((given_THWC[where].astype(np.float32) - coded_THWC[of]) ** 2, axis=(1, 2, 3), keepdims=True))
    share = np.minimum(share, _levels(FAITHFUL) / np.maximum(off, 1e-3)) * (off <= _levels(ELSEWHERE))
    mixed = (1.0 - share) * given_THWC[where] + share * coded_THWC[of]
    shown = given_THWC.copy()
    shown[where] = np.round(mixed).astype(np.uint8)
    return shown


def _levels(psnr: float) -> float:
    """The root mean square difference, in levels of 255, at a PSNR in dB."""
    return 255.0 * 10 ** (-psnr / 20)


def last_frames(frames_THWC: np.ndarray, latent_frames: int, factor: int) -> np.ndarray:
    """The last 1 + 4k frames, `latent_frames` latent ones (at least one)."""
    return frames_THWC[-(1 + factor * (max(latent_frames, 1) - 1)) :]


def first_frames(frames_THWC: np.ndarray, latent_frames: int, factor: int) -> np.ndarray:
    """The first 1 + 4k frames, k = latent_frames."""
    return frames_THWC[: 1 + factor * latent_frames]


def filled(frames_THWC: np.ndarray, mask_THW: np.ndarray) -> np.ndarray:
    """The frames with the masked part in the median colour of the rest, so that latents beside it do not encode it."""
    kept = frames_THWC[~mask_THW]
    colour = np.median(kept, axis=0) if len(kept) else np.array([128, 128, 128])
    return np.where(mask_THW[..., None], np.round(colour).astype(np.uint8), frames_THWC)


def feathered(mask_THW: np.ndarray) -> np.ndarray:
    """1 where the mask is, falling to 0 over `FEATHER` pixels outside it; float32."""
    weight, grown = mask_THW.astype(np.float32), mask_THW
    for step in range(1, FEATHER + 1):
        around = np.pad(grown, ((0, 0), (1, 1), (1, 1)))
        wider = grown | around[:, :-2, 1:-1] | around[:, 2:, 1:-1] | around[:, 1:-1, :-2] | around[:, 1:-1, 2:]
        weight[wider & ~grown] = 1.0 - step / (FEATHER + 1)
        grown = wider
    return weight


def steps(frames_THWC: np.ndarray) -> np.ndarray:
    """(T - 1,): the mean absolute difference of each frame and the next, in levels of 255."""
    return np.abs(np.diff(frames_THWC.astype(np.float32), axis=0)).mean((1, 2, 3))


def largest_step(frames_THWC: np.ndarray, at: slice = slice(None)) -> float:
    """The largest step (of those in `at`), in median steps of the whole video."""
    sizes = steps(frames_THWC)
    return float(sizes[at].max() / max(np.median(sizes), STILL))


def jump(frames_THWC: np.ndarray, at: slice) -> float:
    """The largest step of those in `at`, in their usual step or the whole video's, whichever is larger.

    A long way at an even speed is no jump; a cut is.
    """
    sizes = steps(frames_THWC)
    return float(sizes[at].max() / max(np.median(sizes), np.median(sizes[at]), STILL))


def colours_of(frames_THWC: np.ndarray) -> np.ndarray:
    """(T, `COLOUR_STEPS` ^ 3): the share of each frame that has a colour; a pixel counts for the 8 nearest ones."""
    n = COLOUR_STEPS
    x = frames_THWC.reshape(len(frames_THWC), -1, 3) * ((n - 1) / 255.0)
    low = np.minimum(x.astype(int), n - 2)
    shares = np.zeros((len(x), n**3))
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, x - low, 1.0 - (x - low)), axis=-1)
        place = (low + corner) @ np.array([n * n, n, 1])
        shares += [np.bincount(p, w, n**3) for p, w in zip(place, weight)]
    return shares / x.shape[1]


def colour_drift(frames_THWC: np.ndarray) -> float:
    """How far any frame's colours are from those between the first frame's and the last one's, 0 to 1.

    It is the largest squared Hellinger distance. It rises where an object melts away, fades, or appears twice.
    """
    colours = colours_of(frames_THWC)
    share = np.linspace(0.0, 1.0, len(colours))[:, None]
    between = (1.0 - share) * colours[0] + share * colours[-1]
    return float(1.0 - np.sqrt(between * colours).sum(axis=1).min())


def colour_distance(a_HWC: np.ndarray, b_HWC: np.ndarray) -> float:
    """The squared Hellinger distance of two frames' colours: 0 for the same colours, 1 for none in common."""
    a, b = colours_of(np.stack([a_HWC, b_HWC]))
    return float(1.0 - np.sqrt(a * b).sum())


def evened(frames_THWC: np.ndarray) -> np.ndarray:
    """As many frames from the first to the last at equal steps along the same path: a jump becomes a dissolve."""
    way = np.concatenate([[0.0], np.cumsum(np.maximum(steps(frames_THWC), 1e-6), dtype=np.float64)])
    return _blended(frames_THWC, np.interp(np.linspace(0.0, way[-1], len(way)), way, np.arange(len(way))))


def _blended(frames_THWC: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Frames at places between frames, of those before and after each."""
    before = np.minimum(at.astype(int), max(len(frames_THWC) - 2, 0))
    after, share = np.minimum(before + 1, len(frames_THWC) - 1), (at - before)[:, None, None, None]
    return np.round((1 - share) * frames_THWC[before] + share * frames_THWC[after]).astype(np.uint8)
