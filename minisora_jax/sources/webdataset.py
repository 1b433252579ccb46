"""Tar files of clips, as webdataset writes them: a folder in a file, whose members are found by their headers.

    train-000.tar:  0001.mp4  0001.txt  0001.json   0002.jpg  0002.json   ...

A member is a clip by its suffix; its caption is a .txt or the "caption" of a .json of the same sample, wherever in the
tar it stands, or a row of a table, as in a folder. Only headers and captions are read here; a clip's bytes are read by
their place when it is asked for. Of a damaged tar the clips before the damage are kept, and the rest is reported.
"""

from __future__ import annotations

import tarfile

from minisora_jax.io.filesystem import File, is_hidden
from minisora_jax.io.video import VideoError
from minisora_jax.sources.base import Media, SkipReport, scan_names
from minisora_jax.sources.sharded import Entry, Sharded

COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"(\xb5": "unzstd"}
MAX_CAPTION = 2**24  # bytes; a longer caption file is no caption


class Tars(Sharded):
    """entry: (name, caption, place of its first byte, bytes)."""

    kind = "tar"

    def index(self, file: File, report: SkipReport) -> list[Entry]:
        with file.open() as opened:
            places = members(opened, file, report)

            def read(name: str) -> bytes:
                start, size = places[name]
                if size > MAX_CAPTION:
                    raise OSError(f"{name} has {size} bytes, too many for a caption")
                opened.seek(start)
                return opened.read(size)

            names = scan_names(list(places), read, self.need_caption, report, samples=True)
        return [(name, caption, *places[name]) for name, caption in names]

    def read(self, file: File, entry: Entry) -> Media:
        name, caption, start, size = entry
        data = file.read(start, start + size)
        if len(data) != size:
            return Media(name, caption, VideoError("truncated", f"{file.url} gave {len(data)} bytes of {size}"))
        return Media(name, caption, data)


def members(opened, file: File, report: SkipReport) -> dict[str, tuple[int, int]]:
    """{name: (place of its first byte, bytes)} of the plain files of a tar, in their order."""
    head = opened.read(2)
    opened.seek(0)
    if tool := COMPRESSED.get(head):
        report.add(
            "", "compressed tar", f"nothing in it can be read without all before: run {tool} on {file.url} first"
        )
        return {}
    places: dict[str, tuple[int, int]] = {}
    end = 0  # of what has been gone through
    try:
        tar = tarfile.open(fileobj=opened, mode="r:", errors="surrogateescape")
        while (member := tar.next()) is not None:
            tar.members = []  # tarfile would keep them all
            if member.size < 0 or member.offset < end or tar.offset <= member.offset:
                raise tarfile.ReadError(f"a member of {member.size} bytes")
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
                report.add(name, "sparse member", "its bytes do not lie together")
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
        said = "no header is there" if mark else "it ends without an end mark, so members may be missing"
        report.add("", "damaged tar", _rest(file, end, said))
    return places


def _rest(file: File, at: int, said: str) -> str:
    return f"{file.url} can be read up to byte {at}, and {max(0, file.size - at)} bytes are left: {said}"


def _is_text(name: str) -> bool:
    return name == _text(name)


def _text(name: str) -> str:
    """A name that can be printed and stored."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
