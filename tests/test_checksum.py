"""Checksums of a folder: a large file's pieces are read by several threads, and damage to any of them is named."""

import zlib

import numpy as np

from minisora_jax.io import checksum


def test_a_large_file_is_read_by_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(checksum, "PIECE", 1000)
    monkeypatch.setattr(checksum, "BUFFER", 300)
    content = np.random.default_rng(0).bytes(2500)
    for size in (0, 1, 300, 999, 1000):
        (tmp_path / f"{size}.bin").write_bytes(content[:size])
        assert checksum.crc32(tmp_path / f"{size}.bin") == f"{zlib.crc32(content[:size]):08x}"
    (tmp_path / "large.bin").write_bytes(content)
    pieces = b"".join(zlib.crc32(content[k : k + 1000]).to_bytes(4, "big") for k in (0, 1000, 2000))
    assert checksum.crc32(tmp_path / "large.bin") == f"{zlib.crc32(pieces):08x}"

    checksum.write_checksums(tmp_path)
    assert checksum.damage(tmp_path) == ""
    for at in (0, 999, 1000, 2499):
        (tmp_path / "large.bin").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert "large.bin is damaged: expected crc32" in checksum.damage(tmp_path)
