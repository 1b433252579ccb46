"""Write any source as a TensorFlow Datasets data set, `video_clips`. Neither writing nor reading needs TensorFlow.

    python -m minisora_jax.sources.tfds_builder my_clips/ /data/tfds --split train
    tfds.data_source("video_clips", split="train", data_dir="/data/tfds")[0]
    {"clip": bytes of an mp4 (or another video or image file), "caption": bytes, "fps": float64, "name": bytes}

A clip's file is stored unchanged. Frames without a file are stored as lossless FFV1. `fps` is 0 where the file states
its own rate.
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from minisora_jax.config import how_to_install
from minisora_jax.io.filesystem import open_regular
from minisora_jax.media.video import STILL_FPS, VideoError
from minisora_jax.sources.base import Media, Source, header
from minisora_jax.sources.skips import SkipReport
from minisora_jax.sources.spec import open_source

try:
    import tensorflow_datasets as tfds
except ImportError as error:
    raise ImportError(f"this needs tensorflow-datasets: {how_to_install('tfds')} ({error})") from error


class VideoClips(tfds.core.GeneratorBasedBuilder):
    """The builder. `reports` has the skipped clips of each split.

    Args:
        sources: {split: source} to write; None for reading only.
    """

    VERSION = tfds.core.Version("1.0.0")
    __module__ = "minisora_jax.sources.tfds_builder"  # the same name when this file runs as a program

    def __init__(self, *, sources: dict[str, Source] | None = None, file_format: str = "array_record", **options: Any):
        self.sources, self.reports = sources or {}, {}
        super().__init__(file_format=file_format, **options)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {"clip": text, "caption": text, "fps": tfds.features.Scalar(dtype=np.float64), "name": text}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Video clips as files, with captions.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # keeps the order of the source; readers shuffle by index
        )

    def _split_generators(self, dl_manager):
        if not self.sources:
            raise ValueError("there is nothing to build from: pass VideoClips(sources={'train': open_source(...)})")
        return {split: self._generate_examples(split) for split in self.sources}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        source = self.sources[split]
        self.reports[split] = report = source.report
        for i in range(len(source)):
            media = source[i].played()
            try:
                header(media)
            except VideoError as error:
                report.add(media.name, error.reason, error.detail, "probe")
                continue
            report.kept += 1
            example = {"clip": as_file(media), "caption": media.caption, "fps": media.fps or 0.0, "name": media.name}
            yield i, example


def build(source: Source, data_dir: str | os.PathLike, split: str = "train") -> SkipReport:
    """Write a source as DATA_DIR/video_clips/1.0.0, and return the report of skipped clips.

    Raises:
        FileExistsError: the data set exists.
    """
    builder = VideoClips(sources={split: source}, data_dir=os.fspath(data_dir))
    if os.path.exists(builder.data_dir):
        raise FileExistsError(f"{builder.data_dir} exists: delete it, or write to another DATA_DIR")
    builder.download_and_prepare()
    return builder.reports[split]


def as_file(media: Media) -> bytes:
    """The bytes of a clip's file; for frames a lossless file: FFV1 in Matroska, or PNG for a single frame."""
    content = media.content
    if isinstance(content, Path):
        with open_regular(content) as plain:
            return plain.read()
    if isinstance(content, bytes):
        return content
    file = io.BytesIO()
    if len(content) == 1:
        Image.fromarray(content[0]).save(file, "PNG")
        return file.getvalue()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=Fraction(media.fps or STILL_FPS).limit_denominator(1001))
        _, stream.height, stream.width, _ = content.shape
        stream.pix_fmt = "bgr0"
        for frame in content:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder of clips, or another source of docs/sources.md")
    parser.add_argument("data_dir", help="the folder of TFDS data sets")
    parser.add_argument("--split", default="train")
    parser.add_argument("--no-captions", action="store_true", help="keep clips without captions")
    args = parser.parse_args()
    report = build(open_source(args.source, need_caption=not args.no_captions), args.data_dir, args.split)
    print(report.summary())


if __name__ == "__main__":
    main()
