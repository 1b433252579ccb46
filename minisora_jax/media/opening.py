"""The one place where media files are opened.

FFmpeg gets the bytes of a plain file that Python opened, and the one demuxer that the first bytes call for. So it never
sees a path that could be a protocol (`take:1.mp4`), never guesses that a text is a playlist, and opens no other file
and no socket. Sizes are bounded before anything is decoded.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import BinaryIO

import av
from av.container import InputContainer

from minisora_jax.io.filesystem import NotAFile, open_regular, printable
from minisora_jax.media.sniff import HEAD, SOUND, Format, sniff

MediaFile = str | os.PathLike | bytes  # a path, or the bytes of a file

MAX_PIXELS = 2**26  # of one frame, 8192x8192: a larger one is refused by its header
MAX_BYTES = 3 * 2**28  # of the frames of a clip as they are read, uint8 RGB: 121 frames of 1080x1920 fit


class VideoError(ValueError):
    """A file without readable frames. `reason` is one of a few fixed phrases; the message adds the numbers."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self):
        return VideoError, (self.reason, self.detail)


@contextlib.contextmanager
def faults_of(file: MediaFile, reason: str = "corrupt frames") -> Iterator[None]:
    """Whatever a library raises here is the fault of the file: a VideoError with this reason.

    Libraries raise nearly anything at damaged bytes: Pillow a SyntaxError, zlib.error or struct.error, FFmpeg's
    bindings an OSError, ValueError or UnicodeDecodeError.
    """
    try:
        yield
    except (VideoError, ImportError):
        raise
    except Exception as error:
        raise VideoError(reason, f"{label(file)}: {type(error).__name__}: {_words(error)}") from error


def _words(error: Exception) -> str:
    """What an error says, without FFmpeg's number and function."""
    return str(getattr(error, "strerror", None) or error)


def label(file: MediaFile) -> str:
    """The name of a file in error messages, with control characters escaped."""
    return f"the file of {len(file)} bytes" if isinstance(file, bytes) else printable(os.fspath(file))


@contextlib.contextmanager
def opened(file: MediaFile) -> Iterator[tuple[BinaryIO, Format]]:
    """(the open file, its format).

    Raises:
        VideoError: 'unreadable file' (also a folder, pipe, device or socket) or 'empty file'.
    """
    try:
        stream = io.BytesIO(file) if isinstance(file, bytes) else open_regular(file)
    except NotAFile as error:
        raise VideoError("unreadable file", f"{label(file)} is {error.kind}, not a plain file") from error
    except (OSError, ValueError) as error:  # a ValueError for a NUL in the name
        raise VideoError("unreadable file", f"{label(file)}: {getattr(error, 'strerror', None) or error}") from error
    with stream:
        try:
            head = stream.read(HEAD)
            stream.seek(0)
        except OSError as error:
            raise VideoError("unreadable file", f"{label(file)}: {error.strerror}") from error
        if not head:
            raise VideoError("empty file", f"{label(file)} has 0 bytes")
        yield stream, sniff(head)


@contextlib.contextmanager
def container_of(file: MediaFile, stream: BinaryIO, file_format: Format) -> Iterator[InputContainer]:
    """FFmpeg's container of an open file.

    Raises:
        VideoError: 'not a video', 'audio only' or 'truncated'.
    """
    if not file_format.demuxer:
        reason = "audio only" if file_format is SOUND else "not a video"
        raise VideoError(reason, f"{label(file)} is {file_format.name}")
    stream.seek(0)
    options = {
        "protocol_whitelist": "none",
        "format_whitelist": FORMAT_NAMES.get(file_format.demuxer, file_format.demuxer),
        "max_pixels": str(2 * MAX_PIXELS),  # codecs pad their frames
    }
    try:
        container = av.open(stream, "r", format=file_format.demuxer, options=options, buffer_size=2**18)
    except Exception as error:
        detail = f"{label(file)} begins as {file_format.name} and then stops: {_words(error)}"
        raise VideoError("truncated", detail) from error
    with container:
        yield container


FORMAT_NAMES = {"mov": "mov,mp4,m4a,3gp,3g2,mj2", "matroska": "matroska,webm"}  # FFmpeg's own for its demuxers
