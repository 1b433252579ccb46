"""What a file is, by its first bytes. Names and suffixes are not asked: they may lie."""

from __future__ import annotations

import dataclasses

HEAD = 1024  # bytes that `sniff` needs


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format. Pillow reads one with a `pillow` name, FFmpeg one with a `demuxer`; nothing reads the others."""

    name: str  # as in a sentence, such as "a WebP picture"
    pillow: str = ""
    demuxer: str = ""
    suffix: str = ""  # the usual one
    picture: bool = False
    animates: bool = False  # its further pictures are the frames of an animation

    @property
    def readable(self) -> bool:
        """Whether this package reads the format."""
        return bool(self.pillow or self.demuxer)


PNG = Format("a PNG picture", pillow="PNG", suffix=".png", picture=True, animates=True)
JPEG = Format("a JPEG picture", pillow="JPEG", suffix=".jpg", picture=True)
WEBP = Format("a WebP picture", pillow="WEBP", suffix=".webp", picture=True, animates=True)
BMP = Format("a BMP picture", pillow="BMP", suffix=".bmp", picture=True)
AVIF = Format("an AVIF picture", pillow="AVIF", suffix=".avif", picture=True, animates=True)
HEIC = Format("a HEIC picture", picture=True)
TIFF = Format("a TIFF or a camera's raw picture", picture=True)
JPEG_2000 = Format("a JPEG 2000 picture", picture=True)
JPEG_XL = Format("a JPEG XL picture", picture=True)
NETPBM = Format("a Netpbm picture", picture=True)
MP4 = Format("an MP4 video", demuxer="mov", suffix=".mp4")
MOV = Format("a QuickTime video", demuxer="mov", suffix=".mov")
MATROSKA = Format("a WebM or Matroska video", demuxer="matroska", suffix=".webm")
AVI = Format("an AVI video", demuxer="avi", suffix=".avi")
GIF = Format("a GIF", demuxer="gif", suffix=".gif")
OTHER_VIDEOS = {
    "mpegts": Format("an MPEG transport stream", demuxer="mpegts", suffix=".ts"),
    "mpeg": Format("an MPEG program stream", demuxer="mpeg", suffix=".mpg"),
    "flv": Format("a Flash video", demuxer="flv", suffix=".flv"),
    "asf": Format("a Windows Media video", demuxer="asf", suffix=".wmv"),
    "ogg": Format("an Ogg file", demuxer="ogg", suffix=".ogv"),
}
SOUND = Format("a sound file")

_MPEG_AUDIO = (0xFB, 0xFA, 0xF3, 0xF2, 0xE3, 0xE2, 0xFD, 0xFC, 0xF5, 0xF4, 0xF1, 0xF0, 0xF9, 0xF8)  # second bytes
_SOUNDS = (
    *(b"ID3", b"fLaC", b".snd", b"dns.", b"caff", b"#!AMR", b"MThd", b"wvpk", b"TTA1", b"MPCK", b"MP+\7"),
    *(b"MAC \x96\x0f", b"riff\x2e\x91\xcf\x11", b"DSD ", b"FRM8", b"\x0b\x77", b"\x7f\xfe\x80\x01"),
    *(bytes([0xFF, second]) for second in _MPEG_AUDIO),
)
_SIGNATURES = (  # (offset, bytes, format), the first that fits
    (0, b"\x89PNG\r\n", PNG),
    (0, b"\xff\xd8\xff", JPEG),
    (8, b"WEBP", WEBP),
    (8, b"AVI ", AVI),
    *((8, signature, SOUND) for signature in (b"WAVE", b"AIFF", b"AIFC", b"8SVX")),
    (0, b"GIF8", GIF),
    (0, b"\x1a\x45\xdf\xa3", MATROSKA),
    *((4, b"ftyp" + brand, AVIF) for brand in (b"avif", b"avis")),
    *((4, b"ftyp" + brand, HEIC) for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"msf1")),
    *((4, b"ftyp" + brand, SOUND) for brand in (b"M4A", b"M4B", b"M4P", b"F4A", b"F4B", b"aax")),
    *((4, b"ftyp" + brand, JPEG_2000) for brand in (b"jp2", b"jpx", b"jpm")),
    *((0, signature, TIFF) for signature in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"FUJIFILMCCD-RAW")),
    *((0, signature, JPEG_2000) for signature in (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")),
    *((0, signature, JPEG_XL) for signature in (b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a")),
    *((0, b"P%d\n" % kind, NETPBM) for kind in range(1, 8)),
    (0, b"\0\0\1\0", Format("an icon", picture=True)),
    (0, b"8BPS\0", Format("a Photoshop picture", picture=True)),
    (0, b"\x76\x2f\x31\x01", Format("an OpenEXR picture", picture=True)),
    *((0, signature, Format("a Radiance picture", picture=True)) for signature in (b"#?RADIANCE", b"#?RGBE")),
    (0, b"qoif", Format("a QOI picture", picture=True)),
    (0, b"DDS ", Format("a DirectDraw texture", picture=True)),
    (4, b"ftypqt", MOV),
    *((4, atom, MP4) for atom in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")),
    (0, b"FLV", OTHER_VIDEOS["flv"]),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", OTHER_VIDEOS["asf"]),
    (0, b"OggS", OTHER_VIDEOS["ogg"]),
    (0, b"\0\0\1\xba", OTHER_VIDEOS["mpeg"]),
    *((0, signature, SOUND) for signature in _SOUNDS),
    (0, b"PK", Format("a zip archive, or a document")),
    (0, b"%PDF", Format("a PDF")),
    (0, b"\x7fELF", Format("a program")),
    (0, b"#EXTM3U", Format("a playlist")),
    (0, b"BM", BMP),
)


def sniff(head: bytes) -> Format:
    """The format of a file whose first bytes, about `HEAD` of them, are these."""
    if head[4:12] == b"ftypmif1":  # a picture of either kind: its other brands tell
        return AVIF if b"avif" in head[16:64] else HEIC
    for at, signature, file_format in _SIGNATURES:
        if head[at : at + len(signature)] == signature:
            return file_format
    if len(head) > 376 and head[0] == head[188] == head[376] == 0x47:
        return OTHER_VIDEOS["mpegts"]
    begins = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if begins.startswith(b"<"):
        return Format("an SVG drawing" if b"<svg" in begins else "a web page")
    return Format("text" if b"\0" not in head and _is_text(head) else "of an unknown type")


def _is_text(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # the last character is cut
    return True
