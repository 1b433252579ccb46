"""The sound of given videos in the videos that are made of them."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import OutputContainer

from minisora_jax.media.opening import MediaFile, VideoError, container_of, faults_of, label, opened

log = logging.getLogger("minisora")

RATE = 48_000  # samples per second
ENCODERS = {".mp4": "aac", ".webm": "libopus"}
BLOCK = 960  # samples of a frame that is encoded


@dataclasses.dataclass(frozen=True)
class Sound:
    """A file's sound in a result.

    Args:
        file: the video.
        start: the second of the result at which the file's first second is heard; None: so that both end together.
        seconds: how long the file's frames are shown; its sound ends with them.
    """

    file: MediaFile
    start: float | None = 0.0
    seconds: float = float("inf")


def samples_of(file: MediaFile, seconds: float) -> np.ndarray:
    """The first seconds of a file's sound as float32 stereo samples (2, n); n = 0 without sound.

    Raises:
        VideoError: the sound is damaged.
    """
    most = int(seconds * RATE)
    blocks: list[np.ndarray] = [np.zeros((2, 0), np.float32)]
    with opened(file) as (stream, file_format):
        if not file_format.demuxer:
            return blocks[0]
        with container_of(file, stream, file_format) as container, faults_of(file, "damaged sound"):
            if not container.streams.audio:
                return blocks[0]
            audio = container.streams.audio[0]
            mono = audio.codec_context.channels == 1  # its level stays: FFmpeg's own stereo of it is 3 dB lower
            resampler, count = AudioResampler("fltp", "mono" if mono else "stereo", RATE), 0
            for frame in itertools.chain(container.decode(audio), [None]):
                if not count and frame is not None and (late := float(frame.time or 0.0)) > 0:
                    blocks.append(np.zeros((2, min(round(late * RATE), most)), np.float32))
                    count += blocks[-1].shape[1]
                for block in resampler.resample(frame):
                    blocks.append(np.broadcast_to(block.to_ndarray(), (2, block.samples)))
                    count += block.samples
                if count >= most:
                    break
    return np.concatenate(blocks, axis=1)[:, :most]


def mixed(sounds: Sequence[Sound], seconds: float) -> np.ndarray:
    """The sounds in their places, float32 (2, seconds * RATE)."""
    mix = np.zeros((2, round(seconds * RATE)), np.float32)
    for sound in sounds:
        try:
            samples = samples_of(sound.file, min(sound.seconds, seconds))
        except VideoError as error:
            log.warning("the result is silent where %s has sound: %s", label(sound.file), error)
            continue
        shown = min(sound.seconds, samples.shape[1] / RATE)
        at = round(max(0.0, seconds - shown if sound.start is None else sound.start) * RATE)
        length = max(0, min(samples.shape[1], mix.shape[1] - at))
        mix[:, at : at + length] += samples[:, :length]
    return mix


def add_sound_stream(container: OutputContainer, suffix: str) -> AudioStream:
    """A sound stream of a container that is being written, before its first frame."""
    stream = container.add_stream(ENCODERS[suffix], rate=RATE)
    assert isinstance(stream, AudioStream)
    stream.codec_context.layout = "stereo"
    return stream


def encode_sound(container: OutputContainer, stream: AudioStream, samples: np.ndarray) -> None:
    """Write samples (2, n) to the stream."""
    for frame in _frames(samples, stream.codec_context.format.name):
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _frames(samples: np.ndarray, sample_format: str) -> Iterator[av.AudioFrame]:
    resampler = AudioResampler(sample_format, "stereo", RATE, BLOCK if sample_format != "fltp" else 1024)
    for at in range(0, samples.shape[1], RATE):
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, at : at + RATE]), "fltp", "stereo")
        frame.sample_rate, frame.pts, frame.time_base = RATE, at, Fraction(1, RATE)
        yield from resampler.resample(frame)
    yield from resampler.resample(None)
