"""A data set through the codec and the text encoder into a latent cache, as one call."""

from __future__ import annotations

import contextlib
from pathlib import Path

from minisora_jax.api.samples import held_out_examples
from minisora_jax.bundled import CODEC
from minisora_jax.data.classes import OfClasses, classes_of, read_classes
from minisora_jax.data.encode import encode_clips
from minisora_jax.data.given_frames import FrameEncoder
from minisora_jax.data.latents import my_parts, write_latents
from minisora_jax.io.lock import only_writer
from minisora_jax.io.progress import Progress
from minisora_jax.io.retry import DataError
from minisora_jax.models.captions import BYTES, class_captions, encoder_captions
from minisora_jax.models.clip_vision import ImageEncoder
from minisora_jax.models.codec import Codec
from minisora_jax.parallel.programs import keep_compiled_programs
from minisora_jax.sources.clips import open_clips


def encode(
    data: str | Path,
    out: str | Path,
    *,
    codec: str | Path | None = None,
    text_encoder: str | Path | None = None,
    classes: bool | str | Path = False,
    given: str = "",
    image_encoder: str | Path | None = None,
    long_captions: float = 0.95,
    strict: bool = False,
    shard_mb: int = 256,
    clips_per_part: int = 1024,
    progress: bool = True,
) -> Path:
    """Encode a data set into a latent cache, which `ms.train` reads.

    An interrupted call goes on after the last finished part when it is made again. Several processes each write their
    share; the bytes are the same.

    Args:
        data: a directory that `ms.prepare` wrote, or "shapes[:SPLIT[:COUNT]]" for the procedural clips.
        out: the directory of the cache.
        codec: the directory of a codec; None for the bundled one.
        text_encoder: the directory of a text encoder that `minisora import` wrote; None keeps captions as bytes.
        classes: captions are classes, which the cache stores as numbers. True: each caption is one, in the order of
            their letters. Or the names of all classes, so that several caches have the same ones: a text file with a
            name a line, or another latent cache.
        given: frames of each clip that are kept apart, for models that read given frames as channels of their input
            (Wan image to video): "first" or "ends". A clip without other frames is left out.
        image_encoder: the directory of the image encoder whose tokens of them such a model attends to; None for none.
        long_captions: share of clips that get their long caption, where a captioner wrote one (DALL-E 3 used 0.95).
        strict: raise at the first damaged clip instead of leaving it out.
        shard_mb: size of a shard in MiB.
        clips_per_part: clips that are encoded again at most after an interruption.
        progress: whether to show a progress bar.

    Returns:
        The directory of the cache, for `ms.open_latents`. Its manifest.json names the clips that were left out.

    Raises:
        FileNotFoundError: if there is no such data set or model.
        ValueError: if `out` holds a cache of another codec or data set, or two arguments do not go together.

    Example:
        >>> import tempfile
        >>> import minisora_jax as ms
        >>> latents = ms.open_latents(ms.encode("shapes:train:1", tempfile.mkdtemp() + "/latents", progress=False))
        >>> len(latents), latents[0].mean_thwc.shape[-1]
        (1, 16)
    """
    if clips_per_part < 1:
        raise ValueError(f"clips_per_part={clips_per_part} must be at least 1")
    keep_compiled_programs()
    loaded = Codec.load(codec or CODEC)
    if classes and text_encoder:
        raise ValueError("captions become classes (--classes) or features (--text-encoder), one of the two")
    captions = encoder_captions(text_encoder) if text_encoder else BYTES
    if image_encoder and not given:
        raise ValueError(
            f"--image-encoder={image_encoder} sees given frames: say which by --given=first or --given=ends"
        )
    images = ImageEncoder.load(image_encoder) if image_encoder else None
    frames = FrameEncoder(given, loaded, images) if given else None
    source = open_clips(str(data), long_captions=None if classes else long_captions)
    clips, examples = source, held_out_examples(str(data))
    if classes:
        names = classes_of(source, progress) if classes is True else read_classes(classes)
        captions, clips = class_captions(len(names) + 1, names), OfClasses(source, names)
        examples = [e for e in examples if clips.names.of_caption(e["prompt"]) is not None]
    mine = my_parts(len(clips), clips_per_part)
    count = sum(map(len, mine.values()))
    bar = Progress(desc="encoding", unit="clip", total=count, disable=not progress)
    with only_writer(out, "minisora encode"), contextlib.closing(bar):

        def latents(numbers):
            for clip in encode_clips(loaded, captions, clips, numbers, frames):
                if strict and isinstance(clip, DataError):
                    raise clip
                bar.update()
                yield clip

        write_latents(
            out,
            latents,
            count=len(clips),
            codec_hash=loaded.latents,
            text=captions.record,
            empty_text_LE=captions.encode([""])[0],
            given=frames.record if frames else None,
            source=getattr(source, "identity", str(data)),
            actions=getattr(source, "actions", ()),
            examples=examples,
            shard_bytes=shard_mb * 2**20,
            clips_per_part=clips_per_part,
        )
    return Path(out)
