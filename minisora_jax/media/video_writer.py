"""Write frames to video and image files, all at once or piece by piece."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.filter import Graph
from av.video.stream import VideoStream
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minisora_jax.io.atomic import replacing, replacing_folder
from minisora_jax.media.sound import Sound, add_sound_stream, encode_sound, mixed
from minisora_jax.media.timeline import FASTEST, SLOWEST

WRITTEN = (".mp4", ".webm", ".gif", ".png")
# Frames per second. A gif counts 16 bits of 1/100 s, and players show frames of 1/100 s ten times as long.
SLOWEST_GIF, GIF_FPS = 0.002, 50
MOST_UPSCALE = 64  # times that a pixel may be repeated in each direction
# Paths are made absolute for FFmpeg, which takes `x:` at the beginning of a relative one for a protocol.
BT709 = 1  # FFmpeg's number of the colour matrix in use
X264 = {"crf": "14", "x264-params": "mbtree=0"}  # mbtree makes the bytes of small videos vary from run to run
VP9 = {"crf": "16", "b": "0", "cpu-used": "4"}


def write_video(
    path: str | os.PathLike, frames_THWC: np.ndarray, fps: float, *, upscale: int = 1, note: str = ""
) -> None:
    """Write frames to a video file, atomically.

    An odd side of an mp4 or webm gains a copy of its last row or column, since chroma is stored at half size.

    Args:
        path: the suffix is the format: .mp4 (H.264), .webm (VP9), .gif, or .png for a single frame. No suffix: a folder
            of numbered .png files.
        frames_THWC: uint8 (T, H, W, 3).
        fps: frames per second.
        upscale: each pixel becomes upscale x upscale pixels, for clips that are too small to look at.
        note: text that is stored in the file; `read_note` reads it.

    Raises:
        ValueError: an unknown suffix, a bad value, or several frames for a .png.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> import minisora_jax as ms
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "black.gif"
        >>> ms.write_video(path, np.zeros((5, 32, 32, 3), np.uint8), fps=8, upscale=2)
        >>> path.exists()
        True
    """
    frames_THWC = np.asarray(frames_THWC)
    if Path(path).suffix.lower() == ".png" and len(frames_THWC) > 1:
        raise ValueError(f"{path} gets {len(frames_THWC)} frames; a .png holds one: use .mp4, or contact_sheet")
    with VideoWriter(path, fps, upscale=upscale, note=note) as writer:
        writer.write(frames_THWC)


def check_rate(path: Path, fps: float) -> None:
    """Raise ValueError if the format of a path cannot show so many frames per second."""
    if path.suffix.lower() == ".gif" and not SLOWEST_GIF <= fps <= GIF_FPS:
        raise ValueError(f"{fps:g} frames per second: a gif shows {SLOWEST_GIF} to {GIF_FPS}: use .mp4, or another fps")
    if not SLOWEST <= fps <= FASTEST:
        raise ValueError(f"fps={fps} must be from {SLOWEST:g} to {FASTEST:g}")


def mp4_bytes(frames_THWC: np.ndarray, fps: float, crf: int) -> bytes:
    """The bytes of an mp4 (H.264, 4:2:0) of uint8 frames with even sides. They are the same on every run.

    Args:
        crf: x264's rate factor, 0 (nearly lossless) to 51; 18 looks as the original, 6 more halve the size.
    """
    file = io.BytesIO()
    options = {**X264, "crf": str(crf), "threads": "1"}
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        _, H, W, _ = frames_THWC.shape
        stream = _add_stream(container, "libx264", fps, H, W, options)
        for frame in frames_THWC:
            container.mux(stream.encode(_yuv(frame)))
        container.mux(stream.encode())
    return file.getvalue()


class VideoWriter:
    """A context that writes frames piece by piece; the arguments are those of `write_video`.

    `sounds` are heard in an mp4 or a webm; other formats have no sound.

    The file appears when the context ends without an error. An mp4 or webm needs the memory of one frame. A gif has one
    palette for all frames, so it needs the memory of all frames.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: float,
        *,
        upscale: int = 1,
        note: str = "",
        sounds: Sequence[Sound] = (),
    ):
        self.path, self.fps, self.upscale, self.note, self.sounds = Path(path), fps, upscale, note, sounds
        check_rate(self.path, fps)
        if not 1 <= upscale <= MOST_UPSCALE:
            raise ValueError(f"upscale={upscale} must be from 1 to {MOST_UPSCALE}")
        self.suffix = self.path.suffix.lower()
        if self.suffix not in (*WRITTEN, ""):
            raise ValueError(
                f"{path} ends in {self.suffix!r}; write_video knows {', '.join(WRITTEN)}, and folders of png"
            )
        self.count = 0
        self._gif: list[np.ndarray] = []
        self._container = None

    def __enter__(self) -> VideoWriter:
        self._stack = contextlib.ExitStack()
        if self.suffix:
            self._temporary = self._stack.enter_context(replacing(self.path))
        else:
            self._temporary = self._stack.enter_context(replacing_folder(self.path))
        return self

    def write(self, frames_THWC: np.ndarray) -> None:
        """Append uint8 frames (T, H, W, 3)."""
        x = np.asarray(frames_THWC)
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or not x.size:
            raise ValueError(f"frames are {x.dtype} {x.shape}; write_video takes uint8 (T, H, W, 3)")
        if self.suffix in (".mp4", ".webm"):
            self._encode(x)
        elif self.suffix == ".gif":
            self._gif.append(x)
        elif self.suffix == ".png":
            if self.count:
                raise ValueError(f"{self.path}: a .png holds one frame")
            _save_png(self._temporary, _enlarge(x[0], self.upscale), self.note)
        else:
            for i, frame in enumerate(x, self.count):
                _save_png(self._temporary / f"{i:05d}.png", _enlarge(frame, self.upscale), self.note)
        self.count += len(x)

    def __exit__(self, kind, error, trace):
        with self._stack:
            if kind is None:
                if not self.count:
                    raise ValueError(f"{self.path}: no frames were written")
                if self._container:
                    self._container.mux(self._stream.encode())
                    if self.sounds:
                        encode_sound(self._container, self._sound_stream, mixed(self.sounds, self.count / self.fps))
                if self._gif:
                    _write_gif(self._temporary, np.concatenate(self._gif), self.fps, self.upscale, self.note)
            if self._container:
                self._container.close()
            return self._stack.__exit__(kind, error, trace)

    def _encode(self, frames_THWC: np.ndarray) -> None:
        height, width = (n * self.upscale for n in frames_THWC.shape[1:3])
        if self._container is None:
            mp4 = self.suffix == ".mp4"
            codec, options = ("libx264", X264) if mp4 else ("libvpx-vp9", VP9)
            flags = {"movflags": "+faststart"} if mp4 else {"fflags": "+bitexact"}  # bitexact: no random id in a webm
            self._container = av.open(os.path.abspath(self._temporary), "w", options=flags)
            self._container.metadata["comment"] = self.note
            even = height + height % 2, width + width % 2
            self._stream = _add_stream(self._container, codec, self.fps, *even, options)
            if self.sounds:
                self._sound_stream = add_sound_stream(self._container, self.suffix)
        for frame in frames_THWC:
            padded = np.pad(_enlarge(frame, self.upscale), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            self._container.mux(self._stream.encode(_yuv(padded)))


def _add_stream(
    container: OutputContainer, codec: str, fps: float, height: int, width: int, options: dict[str, str]
) -> VideoStream:
    stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
    assert isinstance(stream, VideoStream)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    stream.codec_context.colorspace, stream.codec_context.color_range = BT709, 1  # 1: limited range
    return stream


def _yuv(frame_HWC: np.ndarray) -> av.VideoFrame:
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
    return rgb.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=1)


def _save_png(path: Path, frame_HWC: np.ndarray, note: str) -> None:
    info = PngInfo()
    if note:
        info.add_itxt("comment", note)
    Image.fromarray(frame_HWC).save(path, format="png", pnginfo=info)


def _write_gif(path: Path, frames_THWC, fps: float, upscale: int, note: str) -> None:
    """Write a gif with one palette, which FFmpeg's palettegen makes from all frames. A gif counts time in 1/100 s."""
    height, width = (n * upscale for n in frames_THWC.shape[1:3])
    with av.open(os.path.abspath(path), "w", options={"final_delay": str(round(100 / fps))}) as container:
        stream = container.add_stream("gif", rate=100)
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        graph = Graph()
        source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=Fraction(1, 100))
        split, palette = graph.add("split"), graph.add("palettegen", "reserve_transparent=0")
        use, sink = graph.add("paletteuse", "dither=none"), graph.add("buffersink")
        source.link_to(split)
        split.link_to(palette, 0, 0)
        split.link_to(use, 1, 0)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()
        for t, frame in enumerate(frames_THWC):
            rgb = av.VideoFrame.from_ndarray(_enlarge(frame, upscale), format="rgb24")
            rgb.pts, rgb.time_base = round(t * 100 / fps), Fraction(1, 100)
            source.push(rgb)
        source.push(None)
        for _ in frames_THWC:
            paletted = sink.pull()
            assert isinstance(paletted, av.VideoFrame)
            container.mux(stream.encode(paletted))
        container.mux(stream.encode())
    if note:
        data = note.encode("utf-8")
        blocks = b"".join(bytes([len(data[i : i + 255])]) + data[i : i + 255] for i in range(0, len(data), 255))
        gif = path.read_bytes()
        at = 13 + (3 * 2 ** ((gif[10] & 7) + 1) if gif[10] & 128 else 0)  # after the header and its palette
        path.write_bytes(gif[:at] + b"\x21\xfe" + blocks + b"\0" + gif[at:])


def _enlarge(frame_HWC: np.ndarray, upscale: int) -> np.ndarray:
    return frame_HWC.repeat(upscale, axis=0).repeat(upscale, axis=1)
