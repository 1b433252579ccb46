"""Tar files of clips, as webdataset writes them. Members are found by their headers.

    train-000.tar:  0001.mp4  0001.txt  0001.json   0002.jpg  0002.json   ...

The suffix makes a member a clip. Its caption is a .txt or the "caption" of a .json of the same sample, anywhere in the
tar, or a row of a table, as in a folder. Indexing reads headers and captions only; a clip's bytes are read on demand.
Of a damaged tar, the clips before the damage are kept and the rest is reported.
"""

from __future__ import annotations

import tarfile
from typing import BinaryIO

from minisora_jax.io.filesystem import File, is_hidden
from minisora_jax.media.video import VideoError
from minisora_jax.sources.base import Media
from minisora_jax.sources.captions import MAX_CAPTION, caption_option, scan_names
from minisora_jax.sources.sharded import Entry, Sharded
from minisora_jax.sources.skips import SkipReport

COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"(\xb5": "unzstd"}


class Tars(Sharded):
    """The clips of tar files. An entry is (name, caption, offset of the first byte, length in bytes).

    Args:
        caption: "folder": the caption of a clip is the name of its folder within the tar, its class.
    """

    kind, caption = "tar", ""

    def __init__(self, files: list[File], *, caption: str = "", need_caption: bool = True, strict: bool = False):
        self.caption = caption_option("a tar", caption)
        super().__init__(files, need_caption=need_caption, strict=strict)

    def index(self, file: File, report: SkipReport) -> list[Entry]:
        """The entries of a file; see `Sharded.index`."""
        with file.open() as opened:
            places = members(opened, file, report)

            def read(name: str) -> bytes:
                start, size = places[name]
                if size > MAX_CAPTION:
                    raise OSError(f"{name} has {size} bytes, too many for a caption")
                opened.seek(start)
                return opened.read(size)

            options = {"caption": self.caption, "samples": True}
            names = scan_names(list(places), read, self.need_caption, report, **options)
        return [(name, caption, *places[name]) for name, caption in names]

    def read(self, file: File, entry: Entry) -> Media:
        """The clip of an entry; see `Sharded.read`."""
        name, caption, start, size = entry
        data = file.read(start, start + size)
        if len(data) != size:
            return Media(name, caption, VideoError("truncated", f"{file.url} gave {len(data)} bytes of {size}"))
        return Media(name, caption, data)


def members(opened: BinaryIO, file: File, report: SkipReport) -> dict[str, tuple[int, int]]:
    """{name: (offset of the first byte, length in bytes)} of the plain files of a tar, in its order."""
    head = opened.read(2)
    opened.seek(0)
    if tool := COMPRESSED.get(head):
        report.add("", "compressed tar", f"it has no random access: run {tool} on {file.url} first")
        return {}
    places: dict[str, tuple[int, int]] = {}
    end = 0  # the bytes before it are read
    try:
        tar = tarfile.open(fileobj=opened, mode="r:", errors="surrogateescape")
        while (member := tar.next()) is not None:
            setattr(tar, "members", [])  # noqa: B010 -- frees the list that tarfile keeps; its type stubs lack it
            if member.size < 0 or member.offset < end or tar.offset <= member.offset:
                raise tarfile.ReadError(f"a member states {member.size} bytes")
            start, end = member.offset_data, tar.offset
            name = member.name.removeprefix("./")
            if member.isdir() or is_hidden(name):
                continue
            if not member.isreg():
                report.add(_text(name), "not a plain file", f"a link or device, of type {member.type!r}")
                continue
            if start + member.size > file.size:
                report.add(
                    _text(name), "truncated", f"{file.url} ends {start + member.size - file.size} bytes too early"
                )
                return places
            if not _is_text(name):
                report.add(_text(name), "name not UTF-8")
            elif member.issparse():
                report.add(name, "sparse member", "its bytes are not contiguous: store it as a plain file")
            elif name in places:
                report.add(name, "duplicate name", f"at {places[name][0]} and at {start} in {file.url}")
            else:
                places[name] = (start, member.size)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        report.add("", "damaged tar", _rest(file, end, str(error)))
        return places
    opened.seek(end)
    mark = opened.read(512)
    if len(mark) < 512 or mark.strip(b"\0"):
        reason = "there is no header" if mark else "the end mark is missing, so members may be missing"
        report.add("", "damaged tar", _rest(file, end, reason))
    return places


def _rest(file: File, at: int, reason: str) -> str:
    return f"{file.url} is readable up to byte {at}; {max(0, file.size - at)} bytes are left: {reason}"


def _is_text(name: str) -> bool:
    return name == _text(name)


def _text(name: str) -> str:
    """The name with undecodable bytes as escapes, for printing and storing."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
