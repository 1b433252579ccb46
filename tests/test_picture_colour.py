"""The colours of pictures: HDR, wide primaries and profiles, against the standards' own equations."""

import io
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from minisora_jax.media.colour import ByLight, ToRGB
from minisora_jax.media.video import open_video, read_clip_frames

CASES = Path(__file__).parent / "cases"
D65, SRGB = (0.3127, 0.3290), ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
P3, ADOBE = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)), ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
BT2020 = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
COLOURS = [(200, 90, 70), (90, 180, 100), (80, 90, 200), (128, 128, 128), (255, 255, 255), (40, 40, 40)]


# ---- The standards


def to_xyz(primaries, white=D65):
    """Linear RGB to XYZ: each column is a primary, and together they are the white."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    return columns * np.linalg.solve(columns, (white[0] / white[1], 1, (1 - white[0] - white[1]) / white[1]))


def to_bt709(light, primaries):
    return np.clip(np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries) @ np.asarray(light, float), 0, 1)


def srgb(light):
    """IEC 61966-2-1, to 255."""
    light = np.asarray(light)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def linear(code):
    return np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)


def pq(light):
    """The code of light over 100 cd/m2: SMPTE ST 2084."""
    y = (np.asarray(light, float) / 100) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


def pq_light(code):
    root = np.asarray(code, float) ** (32 / 2523)
    return 100 * (np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610)


def hlg(light):
    """ARIB STD-B67 of light over 100 cd/m2, on a display of 1000 cd/m2."""
    scene = (np.asarray(light, float) / 10) ** (1 / 1.2)
    log = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), log)


def bt1886(light):
    return 255 * np.asarray(light) ** (1 / 2.4)


def middle(file):
    """The colour in the middle of the first frame."""
    frame = read_clip_frames(file)[0][0].astype(int)
    return frame[frame.shape[0] // 2, frame.shape[1] // 2]


def off(file, expected):
    return np.abs(middle(file) - np.asarray(expected)).max()


# ---- AVIF


KR_KB = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}


def avif(path, codes, *, transfer, primaries, matrix, frames=1):
    """Flat pictures of non-linear RGB, 0 to 1, in 10 bits, 4:2:0 and video range."""
    kr, kb = KR_KB[matrix]
    r, g, b = codes
    y = kr * r + (1 - kr - kb) * g + kb * b
    planes = [64 + 876 * y, 512 + 448 * (b - y) / (1 - kb), 512 + 448 * (r - y) / (1 - kr)]
    with av.open(str(path), "w", format="avif") as file:
        stream = file.add_stream("libsvtav1", rate=10, options={"crf": "5", "svtav1-params": "lp=1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = (
            transfer,
            primaries,
            matrix,
            1,
        )
        for _ in range(frames):
            frame = av.VideoFrame(96, 64, "yuv420p10le")
            for plane, value in zip(frame.planes, planes):
                plane.update(np.full(plane.buffer_size // 2, round(value), np.uint16).tobytes())
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


@pytest.mark.parametrize(
    "light", [(0.25, 0.25, 0.25), (0.5, 0.2, 0.1), (0.02, 0.4, 0.03), (0.03, 0.05, 0.55), (4, 4, 4)]
)
@pytest.mark.parametrize("transfer, code", [(16, pq), (18, hlg)])
def test_hdr_avif_is_converted_as_hdr_video(tmp_path, light, transfer, code):
    """The light is BT.709's, so that saturated colours are dark in one channel."""
    wide = np.linalg.inv(to_xyz(BT2020)) @ to_xyz(SRGB) @ np.array(light)
    avif(tmp_path / "a.avif", code(wide), transfer=transfer, primaries=9, matrix=9)
    assert off(tmp_path / "a.avif", bt1886(np.clip(light, 0, 1))) <= 6


def test_animated_hdr_avif_is_converted_in_each_frame(tmp_path):
    avif(tmp_path / "a.avif", pq([0.5, 0.2, 0.1]), transfer=16, primaries=9, matrix=9, frames=3)
    frames, fps = read_clip_frames(tmp_path / "a.avif")
    assert frames.shape == (3, 64, 96, 3) and fps == pytest.approx(10)
    assert np.abs(frames.astype(int) - bt1886(to_bt709([0.5, 0.2, 0.1], BT2020))).max() <= 6
    assert read_clip_frames(tmp_path / "a.avif", fit=lambda H, W: (H // 2, W // 2))[0].shape == (3, 32, 48, 3)


@pytest.mark.parametrize("rgb", COLOURS)
def test_avif_of_video_range_is_exact(tmp_path, rgb):
    avif(tmp_path / "a.avif", np.array(rgb) / 255, transfer=1, primaries=1, matrix=1)
    assert off(tmp_path / "a.avif", rgb) <= 3


def as_pq(data):
    """An AVIF whose code points are changed to PQ of BT.2020: the codes that it stores mean another light."""
    assert b"colrnclx" in data
    parts = data.split(b"colrnclx")
    return b"colrnclx".join([parts[0], *(b"\0\x09\0\x10" + part[4:] for part in parts[1:])])


def as_pq_shown(rgb):
    return bt1886(to_bt709(pq_light(np.array(rgb) / 255), BT2020))


def test_a_tiled_hdr_avif_is_whole():
    data = (CASES / "grid.avif").read_bytes()
    stored, shown = read_clip_frames(data)[0][0], read_clip_frames(as_pq(data))[0][0]
    assert shown.shape == (512, 768, 3)
    for row, column in ((30, 30), (30, 740), (256, 384), (480, 30), (480, 740)):
        assert np.abs(shown[row, column] - as_pq_shown(stored[row, column])).max() <= 8, (row, column)


def test_turned_and_transparent_hdr_avif():
    pixels, file = np.full((64, 96, 4), (110, 90, 80, 255), np.uint8), io.BytesIO()
    pixels[:20, :30] = (80, 110, 90, 128)  # a corner
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise: the corner is top right
    Image.fromarray(pixels).save(file, "AVIF", quality=100, subsampling="4:4:4", exif=exif)
    frame = read_clip_frames(as_pq(file.getvalue()))[0][0]
    assert frame.shape == (96, 64, 3)
    assert np.abs(frame[60, 20] - as_pq_shown((110, 90, 80))).max() <= 8
    assert np.abs(frame[8, 56] - as_pq_shown((80, 110, 90)) * 128 / 255).max() <= 8


def test_transparent_hdr_video_is_converted():
    pixels = np.empty((8, 8, 4), np.uint16)
    pixels[:] = [*(65535 * pq([0.5, 0.2, 0.1])), 32768]
    rgb = ToRGB(ByLight.of(16, 9))(av.VideoFrame.from_ndarray(pixels, format="rgba64le"), (8, 8))
    assert np.abs(rgb - bt1886(to_bt709([0.5, 0.2, 0.1], BT2020)) * 128 / 255).max() <= 2


# ---- PNG


def png(pixels, *chunks, palette=None):
    """A PNG of uint8 or uint16 (H, W, 3), with chunks before its pixels."""
    H, W, _ = pixels.shape
    depth, rows = 8 * pixels.itemsize, pixels.astype(pixels.dtype.newbyteorder(">"))
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", W, H, depth, 2, 0, 0, 0)
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def flat(rgb, dtype=np.uint8):
    return np.full((16, 16, 3), np.round(np.asarray(rgb) * np.iinfo(dtype).max), dtype)


def chrm(primaries, white=D65):
    return b"cHRM", struct.pack(">8I", *(round(100_000 * value) for xy in (white, *primaries) for value in xy))


def gama(value):
    return b"gAMA", struct.pack(">I", round(100_000 * value))


def iccp(profile):
    return b"iCCP", b"a\0\0" + zlib.compress(profile)


@pytest.mark.parametrize("light", [(0.25, 0.25, 0.25), (0.5, 0.2, 0.1), (0.02, 0.4, 0.03)])
@pytest.mark.parametrize("transfer, code", [(16, pq), (18, hlg)])
def test_png_of_hdr(light, transfer, code):
    wide = np.linalg.inv(to_xyz(BT2020)) @ to_xyz(SRGB) @ np.array(light)
    assert off(png(flat(code(wide), np.uint16), (b"cICP", bytes([9, transfer, 0, 1]))), bt1886(light)) <= 2
    wide = np.array([0.5, 0.2, 0.1])  # 8 bits suffice if no channel is much darker in BT.709
    shown = bt1886(to_bt709(wide, BT2020))
    assert off(png(flat(code(wide)), (b"cICP", bytes([9, transfer, 0, 1]))), shown) <= 6


@pytest.mark.parametrize("rgb", COLOURS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_of_another_space(rgb, dtype):
    code = np.array(rgb) / 255
    shown = srgb(to_bt709(linear(code), P3))
    assert off(png(flat(code, dtype), (b"cICP", bytes([12, 13, 0, 1]))), shown) <= 2
    assert off(png(flat(code, dtype), chrm(P3)), shown) <= 2
    assert off(png(flat(code, dtype), gama(0.45455), chrm(P3)), srgb(to_bt709(code**2.2, P3))) <= 2
    assert off(png(flat(code, dtype), gama(1 / 1.8)), srgb(code**1.8)) <= 2
    assert off(png(flat(code, dtype), gama(1.0)), srgb(code)) <= 2
    assert off(png(flat(code, dtype), gama(256 / 563), chrm(ADOBE)), srgb(to_bt709(code ** (563 / 256), ADOBE))) <= 2


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"sRGB", b"\0"), gama(1.0)],
        [gama(0.45455), chrm(SRGB)],
        [(b"cICP", bytes([1, 13, 0, 1])), gama(1.0), (b"sRGB", b"\0")],
        [gama(0.0)],
        [(b"cHRM", bytes(32))],
        [(b"cHRM", b"\0\1\2\3" * 3)],
        [(b"cICP", bytes([2, 2, 0, 1]))],
        [(b"cICP", bytes([9]))],
    ],
)
def test_png_of_srgb_or_of_broken_values_stays(chunks):
    np.testing.assert_array_equal(middle(png(flat(np.array([200, 90, 70]) / 255), *chunks)), (200, 90, 70))


# ---- ICC profiles


def icc(primaries=None, gamma=2.2):
    """A matrix profile (ICC.1:2001-04) of primaries adapted to D50; grey without primaries."""
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50, d65 = np.array([0.9642, 1.0, 0.8249]), np.array([0.95046, 1.0, 1.08906])
    fixed = lambda xyz: b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(65536 * value)) for value in xyz)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma)) + b"\0\0"
    tags = {b"wtpt": fixed(d50), b"cprt": b"text\0\0\0\0none\0\0\0\0", b"desc": b"desc\0\0\0\0\0\0\0\2a\0" + bytes(78)}
    if primaries:
        adapt = np.linalg.inv(bradford) @ np.diag(bradford @ d50 / (bradford @ d65)) @ bradford
        tags |= dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(fixed, (adapt @ to_xyz(primaries)).T)))
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    else:
        tags[b"kTRC"] = curve
    place, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    head = b"\0\0\0\0\x02\x40\0\0mntr" + (b"RGB " if primaries else b"GRAY") + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    head += fixed(d50)[8:] + bytes(48)
    return struct.pack(">I", place + len(body)) + head + struct.pack(">I", len(tags)) + table + body


def saved(rgb, suffix, **options):
    file = io.BytesIO()
    exact = {
        "JPEG": {"quality": 98, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 98, "subsampling": "4:4:4"},
    }
    Image.fromarray(np.full((32, 48, len(rgb)), rgb, np.uint8)).save(file, suffix, **exact.get(suffix, {}), **options)
    return file.getvalue()


@pytest.mark.parametrize("rgb", COLOURS)
@pytest.mark.parametrize("primaries", [P3, ADOBE])
@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_icc_profiles_are_converted(rgb, primaries, suffix):
    shown = srgb(to_bt709((np.array(rgb) / 255) ** 2.2, primaries))
    assert off(saved(rgb, suffix, icc_profile=icc(primaries)), shown) <= (2 if suffix in ("PNG", "WEBP") else 6)
    if suffix != "JPEG":
        over_black = shown * 128 / 255
        assert off(saved((*rgb, 128), suffix, icc_profile=icc(primaries)), over_black) <= (2 if suffix == "PNG" else 5)


def test_profiles_of_animations_grey_and_palettes(tmp_path):
    images = [Image.new("RGB", (48, 32), (value, 90, 70)) for value in (200, 150)]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], lossless=True, icc_profile=icc(P3))
    frames, _ = read_clip_frames(tmp_path / "a.webp")
    for frame, value in zip(frames, (200, 150), strict=True):
        assert np.abs(frame[0, 0] - srgb(to_bt709((np.array([value, 90, 70]) / 255) ** 2.2, P3))).max() <= 2
    images[0].save(tmp_path / "a.png", save_all=True, append_images=images[1:])
    data = (tmp_path / "a.png").read_bytes()  # the animation's chunks come after the first, of 25 bytes
    frames, _ = read_clip_frames(data[:33] + png(flat([0, 0, 0]), chrm(P3))[33 : 33 + 44] + data[33:])
    for frame, value in zip(frames, (200, 150), strict=True):
        assert np.abs(frame[0, 0] - srgb(to_bt709(linear(np.array([value, 90, 70]) / 255), P3))).max() <= 2
    images[0].quantize(4).save(tmp_path / "p.png", icc_profile=icc(P3))
    assert off(tmp_path / "p.png", srgb(to_bt709((np.array([200, 90, 70]) / 255) ** 2.2, P3))) <= 2
    Image.new("L", (48, 32), 120).save(tmp_path / "g.png", icc_profile=icc(gamma=1.0))
    assert off(tmp_path / "g.png", srgb([120 / 255] * 3)) <= 2


def test_what_a_profile_says_counts_before_gamma_and_after_cicp():
    code = np.array([200, 90, 70]) / 255
    by_profile = srgb(to_bt709(code**2.2, P3))
    assert off(png(flat(code), gama(1.0), iccp(icc(P3))), by_profile) <= 2
    assert off(png(flat(code), (b"cICP", bytes([1, 13, 0, 1])), iccp(icc(P3))), (200, 90, 70)) == 0


def test_a_profile_that_is_broken_or_does_not_fit_is_passed_over():
    profile, rgb = icc(P3), (200, 90, 70)
    for broken in (b"", b"garbage", profile[:100], profile[:150], bytes(len(profile)), icc()):
        for suffix in ("PNG", "WEBP"):
            np.testing.assert_array_equal(middle(saved(rgb, suffix, icc_profile=broken)), rgb)
    for place in range(0, len(profile), 7):  # whatever it then says, the picture is read
        changed = profile[:place] + bytes([profile[place] ^ 0xFF]) + profile[place + 1 :]
        with open_video(saved(rgb, "PNG", icc_profile=changed)) as video:
            assert video.read().shape == (1, 32, 48, 3)
    file = io.BytesIO()
    Image.new("CMYK", (48, 32), (20, 90, 70, 10)).save(file, "JPEG", icc_profile=profile, quality=98)
    with Image.open(io.BytesIO(file.getvalue())) as image:
        assert off(file.getvalue(), image.convert("RGB").getpixel((24, 16))) == 0


def test_srgb_stays_srgb():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for rgb in COLOURS:
        assert off(saved(rgb, "PNG", icc_profile=profile), rgb) <= 1


def test_a_cameras_mark_of_adobe_rgb():
    exif = Image.Exif()
    exif[0xA001] = 65535
    exif.get_ifd(0x8769)[0xA001] = 65535
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    for rgb in COLOURS:
        data = saved(rgb, "JPEG", exif=exif)
        with Image.open(io.BytesIO(data)) as image:
            assert image.getexif().get_ifd(0xA005)[1] == "R03", "the case is what it is meant to be"
        assert off(data, srgb(to_bt709((np.array(rgb) / 255) ** (563 / 256), ADOBE))) <= 6
