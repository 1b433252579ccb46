"""Videos that FFmpeg decodes, as players show them: in time, upright, with square pixels, deinterlaced."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from av.video.stream import VideoStream

from minisora_jax.media.colour import ByLight, ToRGB
from minisora_jax.media.opening import MAX_PIXELS, MediaFile, VideoError, container_of, faults_of, label
from minisora_jax.media.sniff import Format
from minisora_jax.media.timeline import Timeline

REORDER = 16  # a seek goes back by this many frames, since codecs decode frames in another order than they show them
SEEKABLE = ("mov", "matroska")
WIDEST = 8  # pixels that are more than so many times as wide as high, or as high as wide, are taken for square

PICTURE_CODECS = (
    "mjpeg",
    "png",
    "apng",
    "gif",
    "webp",
    "bmp",
    "tiff",
    "jpeg2000",
    "jpegls",
    "ljpeg",
    "jpegxl",
    "targa",
)

Fit = Callable[[int, int], tuple[int, int]]  # from height and width as shown to those that are wanted


@dataclasses.dataclass(frozen=True)
class Orientation:
    """How the stored picture is turned: it is transposed first and mirrored then."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Orientation:
        """The orientation that a frame's display matrix asks for, snapped to quarter turns."""
        side_data = frame.side_data.get("DISPLAYMATRIX")
        if side_data is None:
            return cls()
        # The point (x, y) of the stored picture is shown at (a x + c y, b x + d y): libavutil/display.h.
        (a, b, _), (c, d, _), _ = np.frombuffer(bytes(side_data), np.int32).reshape(3, 3).tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, c < 0, b < 0)
        return cls(False, a < 0, d < 0)

    def shown(self, frame_HWC: np.ndarray) -> np.ndarray:
        """A view of the stored frame as it is shown."""
        upright = frame_HWC.transpose(1, 0, 2) if self.transpose else frame_HWC
        return upright[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]

    def size(self, H: int, W: int) -> tuple[int, int]:
        """The height and width of the shown picture from those of the stored one, and the other way round."""
        return (W, H) if self.transpose else (H, W)


class ContainerVideo:
    """The best video stream of a container file. `remarks` says in sentences what a user should know of it.

    Raises:
        VideoError: 'not a video', 'audio only', 'truncated', 'too large', or 'corrupt frames'.
    """

    def __init__(self, file: MediaFile, stream: BinaryIO, file_format: Format):
        self.file, self._open = file, functools.partial(container_of, file, stream, file_format)
        self.remarks: list[str] = []
        self.bytes = _check_ends(file, stream, file_format)
        with self._open() as container, faults_of(file):
            video = self._choose(container)
            self.index, self.square = video.index, _pixel_aspect(video, file_format)
            self.header_frames, header_fps = video.frames, _header_fps(video)
            self.sound = bool(container.streams.audio)
            self.comment = {k.lower(): v for k, v in container.metadata.items()}.get("comment", "")
            _check_index(file, video, self.bytes)
            base, pictures = video.time_base or Fraction(1), []
            for packet in container.demux(video):
                at = packet.pts if packet.pts is not None else packet.dts
                if packet.size and at is not None and not packet.is_discard:
                    pictures.append((at, packet.duration or 0))
            self.start = float(min(pictures)[0] * base) if pictures else 0.0
            stamps = [float(at * base) for at, _ in pictures]
            # The entries of an AVI have no durations.
            last = float(max(pictures)[1] * base) if pictures and file_format.demuxer != "avi" else None
            _check_duration(file, video, max(stamps, default=0.0) + (last or 0.0), header_fps)
        if not stamps:
            raise VideoError("zero frames", f"{label(file)} has no frame; its header states {self.header_frames}")
        try:
            gif_of_one = file_format.demuxer == "gif" and len(stamps) == 1
            self.timeline = Timeline.of_still() if gif_of_one else Timeline.of(stamps, last, header_fps)
        except ValueError as error:
            raise VideoError("not a video", f"{label(file)}: {error}") from error
        self.height, self.width = self._shown_size()

    def frames(self, start: float, fit: Fit | None) -> Iterator[tuple[float, Callable[[], np.ndarray]]]:
        """(stamp in seconds, function that returns the frame) from a moment, in seconds, or shortly before it.

        Args:
            fit: chooses the height and width of the frames; None keeps the size that is shown.
        """
        with self._open() as container, faults_of(self.file):
            video = self._stream(container)
            convert = ToRGB(ByLight.of(video.codec_context.color_trc, video.codec_context.color_primaries))
            frames = _deinterlaced(self._decoded(container, video, start), video)
            stored, turn, size = None, Orientation(), (0, 0)
            for number, (stamp, frame) in enumerate(frames):
                if stored is None:
                    stored, turn = (frame.height, frame.width), self.orientation
                    shown = turn.size(*self._square_size(*stored))
                    size = turn.size(*(fit(*shown) if fit else shown))
                elif (frame.height, frame.width) != stored:
                    sizes = sorted([stored, (frame.height, frame.width)])
                    raise VideoError("corrupt frames", f"{label(self.file)} changes its frame size midway: {sizes}")
                yield stamp, functools.partial(self._pixels, frame, convert, size, turn, number)

    def _pixels(self, frame: av.VideoFrame, convert: ToRGB, size, turn: Orientation, number: int) -> np.ndarray:
        if frame.is_corrupt:
            raise VideoError("corrupt frames", f"{label(self.file)} is damaged at frame {number}")
        return np.ascontiguousarray(turn.shown(convert(frame, size)))

    def _decoded(
        self, container: InputContainer, video: VideoStream, start: float
    ) -> Iterator[tuple[float, av.VideoFrame]]:
        """(stamp, frame) from a key frame before `start` on, and at least one frame before it."""
        stamps, base = self.timeline.stamps, video.time_base or Fraction(1)
        first = int(np.searchsorted(stamps, start, side="right")) - 1 - REORDER
        if first > REORDER and container.format.name.split(",")[0] in SEEKABLE:
            container.seek(int((self.start + stamps[first]) / base), stream=video, backward=True)
        number = itertools.count()
        for frame in container.decode(video):
            k = next(number)
            at = float(frame.pts * frame.time_base) - self.start if frame.pts is not None and frame.time_base else None
            yield (stamps[min(k, len(stamps) - 1)] if at is None else at), frame

    @functools.cached_property
    def orientation(self) -> Orientation:
        """The orientation of the first frame, which is decoded for it."""
        return Orientation.of(self._first)

    @functools.cached_property
    def _first(self) -> av.VideoFrame:
        with self._open() as container, faults_of(self.file):
            video = self._stream(container)
            frame = next(container.decode(video), None)
            if frame is None:
                raise VideoError(
                    "zero frames", f"{label(self.file)} has no frame; its header states {self.header_frames}"
                )
            if frame.interlaced_frame:
                self.remarks.append("it is interlaced and is deinterlaced (bwdif)")
            return frame

    def _shown_size(self) -> tuple[int, int]:
        stored = self._square_size(self._first.height, self._first.width)
        return self.orientation.size(*stored)

    def _square_size(self, H: int, W: int) -> tuple[int, int]:
        return H, max(1, round(W * self.square))

    def _stream(self, container: InputContainer) -> VideoStream:
        video = container.streams[self.index]
        assert isinstance(video, VideoStream)
        video.thread_type = "AUTO"
        return video

    def _choose(self, container: InputContainer) -> VideoStream:
        """The video stream to read: the default one, and of several the largest. Cover pictures do not count.

        A stream of one picture is a cover too, beside sound or a film, if its codec is one of pictures. Other streams
        of one frame come after films.
        """
        covers = [v for v in container.streams.video if _is_cover(v)]
        videos = [v for v in container.streams.video if v not in covers]
        moves = dict.fromkeys(videos, True)
        if len(videos) > 1 or (container.streams.audio and any(_codec(v) in PICTURE_CODECS for v in videos)):
            moves = self._moving(videos)
            pictures = [v for v in videos if not moves[v] and _codec(v) in PICTURE_CODECS]
            if container.streams.audio or len(pictures) < len(videos):
                covers, videos = covers + pictures, [v for v in videos if v not in pictures]
        if not videos:
            kinds = ", ".join("a cover picture" if s in covers else s.type for s in container.streams)
            reason = "audio only" if container.streams.audio else "not a video"
            raise VideoError(reason, f"{label(self.file)} has streams: {kinds or 'none'}")
        sizes = [(0, 0) if v.codec_context is None else (v.height, v.width) for v in videos]
        area = [H * W for H, W in sizes]
        rank = lambda k: (area[k] > 0, moves[videos[k]], _disposed(videos[k], "default"), area[k], -k)
        best = max(range(len(videos)), key=rank)
        H, W = sizes[best]
        if not (H and W):
            raise VideoError("not a video", f"{label(self.file)} has a video stream of size {H}x{W}")
        if H * W > MAX_PIXELS:
            raise VideoError("too large", f"{label(self.file)} has frames of {H}x{W}; the limit is {MAX_PIXELS} pixels")
        if len(videos) > 1:
            self.remarks.append(f"it has {len(videos)} video streams: number {best + 1}, of {H}x{W}, is read")
        return videos[best]

    def _moving(self, videos: list[VideoStream]) -> dict[VideoStream, bool]:
        """Whether each stream has more than one frame."""
        counts = dict.fromkeys((v.index for v in videos), 0)
        with self._open() as container:
            for packet in container.demux(*(container.streams[index] for index in counts)):
                counts[packet.stream.index] += packet.size > 0
                if min(counts.values()) > 1:
                    break
        return {v: counts[v.index] > 1 for v in videos}


def _codec(video: VideoStream) -> str:
    return video.codec_context.codec.canonical_name if video.codec_context else ""


def _is_cover(video: VideoStream) -> bool:
    return _disposed(video, "attached_pic") or _disposed(video, "timed_thumbnails")


def _disposed(video: VideoStream, name: str) -> bool:
    return bool(video.disposition & getattr(type(video.disposition), name))


def _pixel_aspect(video: VideoStream, file_format: Format) -> float:
    """The width of a pixel over its height. GIFs have a field for it that lies."""
    aspect = float(video.sample_aspect_ratio or 0) if file_format.demuxer != "gif" else 0.0
    return aspect if 1 / WIDEST <= aspect <= WIDEST else 1.0


def _header_fps(video: VideoStream) -> float | None:
    rate = video.average_rate or video.guessed_rate
    return float(rate) if rate and rate > 0 else None


def _deinterlaced(
    frames: Iterator[tuple[float, av.VideoFrame]], video: VideoStream
) -> Iterator[tuple[float, av.VideoFrame]]:
    """The frames; from the first interlaced one on they pass FFmpeg's bwdif, which makes whole pictures of fields."""
    graph, stamps = None, []

    def pulled(graph: Graph) -> Iterator[tuple[float, av.VideoFrame]]:
        with contextlib.suppress(BlockingIOError, EOFError):
            while True:
                frame = graph.pull()
                assert isinstance(frame, av.VideoFrame)
                yield stamps.pop(0), frame

    for stamp, frame in frames:
        if graph is None and frame.interlaced_frame:
            graph = _bwdif(video)
        if graph is None:
            yield stamp, frame
            continue
        stamps.append(stamp)
        graph.push(frame)
        yield from pulled(graph)
    if graph is not None:
        graph.push(None)
        yield from pulled(graph)


def _bwdif(video: VideoStream) -> Graph:
    graph = Graph()
    source = graph.add_buffer(template=video, time_base=video.time_base)
    bwdif, sink = graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
    source.link_to(bwdif)
    bwdif.link_to(sink)
    graph.configure()
    return graph


# ---- Whether the file goes on as long as it says


def _check_ends(file: MediaFile, stream: BinaryIO, file_format: Format) -> int:
    """The size of the file in bytes; VideoError if an AVI states more, or a GIF lacks its end mark."""
    size = stream.seek(0, 2)
    stream.seek(0)
    head = stream.read(8)
    if head.startswith(b"RIFF") and (stated := int.from_bytes(head[4:8], "little") + 8) > size:
        raise VideoError("truncated", f"{label(file)} has {size} bytes, and its header states {stated}")
    if file_format.demuxer == "gif":
        stream.seek(max(0, size - 4096))
        if not stream.read().rstrip(b"\0").endswith(b";"):
            raise VideoError("truncated", f"{label(file)} has {size} bytes and lacks a gif's end mark")
    return size


def _check_index(file: MediaFile, video: VideoStream, size: int) -> None:
    end = max((e.pos + e.size for e in video.index_entries), default=0)
    if end > size:
        raise VideoError("truncated", f"{label(file)} has {size} bytes, and its index states {end}")


def _check_duration(file: MediaFile, video: VideoStream, end: float, header_fps: float | None) -> None:
    """VideoError if the frames, which end at `end` seconds, are much shorter than the header of a webm or mkv says."""
    declared = _seconds(video.metadata.get("DURATION", ""))
    if declared is not None and end < 0.9 * declared - 2 / (header_fps or 25):  # headers round up
        raise VideoError("truncated", f"{label(file)} ends at {end:.3f} s, and its header states {declared:.3f} s")


def _seconds(text: str) -> float | None:
    """The seconds of "01:02:03.5"; None for another text."""
    try:
        hours, minutes, seconds = text.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return None
