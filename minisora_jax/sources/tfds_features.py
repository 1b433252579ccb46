"""Find the features of a TFDS data set that hold the clip, its caption and its rate, and read them from examples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from minisora_jax.config import how_to_install
from minisora_jax.media.video import VideoError, read_clip_frames

CAPTIONS = (  # names of features, the likeliest first
    *("language_instruction", "natural_language_instruction", "instruction"),
    *("caption", "text", "prompt", "description"),
)
RATES = ("fps", "frame_rate", "frames_per_second")
FILES = ("clip", "video", "mp4", "bytes")  # names of string features that hold a file
OURS = {("clip",), ("caption",), ("fps",), ("name",)}  # the features of VideoClips, whose names are unique

Path = tuple[str, ...]  # the path of a feature: ("steps", "observation", "image")


def import_tfds() -> ModuleType:
    """tensorflow_datasets; ImportError with the command that installs it."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(f"this needs tensorflow-datasets: {how_to_install('tfds')} ({error})") from error
    return tensorflow_datasets


def builder_of(directory: str) -> Any:
    """TFDS's read-only builder of a directory. Features of type `Video` become Sequence(Image), as they are stored."""
    import_tfds()
    from etils import epath
    from google.protobuf import json_format
    from tensorflow_datasets.core import dataset_info, read_only_builder

    info = dataset_info.read_proto_from_builder_dir(directory)
    content = json.loads((epath.Path(directory) / "features.json").read_text())
    if "pythonClassName" in content:  # TFDS below 4.4 writes "type", and needs no change
        json_format.ParseDict(_without_video(content), info.features)
    return read_only_builder.ReadOnlyBuilder(builder_dir=directory, info_proto=info)


def _without_video(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_video(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "video" in node and str(node.get("pythonClassName", "")).endswith(".Video"):
        video, features = node["video"], "tensorflow_datasets.core.features"
        length, *frame = video.get("shape", {}).get("dimensions", ["-1"] * 3 + ["3"])
        image = {"shape": {"dimensions": frame}, "dtype": video.get("dtype", "uint8")}
        image |= {"encodingFormat": video["encodingFormat"]} if video.get("encodingFormat") else {}
        element = {"pythonClassName": f"{features}.image_feature.Image", "image": image}
        sequence = {"feature": element, "length": length}
        return {"pythonClassName": f"{features}.sequence_feature.Sequence", "sequence": sequence}
    return {key: _without_video(value) for key, value in node.items()}


# ---- Finding features


class Feature:
    """The feature that holds the clip.

    Args:
        kind: "file", "frames", "tensor", "steps" or "image".
        named: the examples have unique names.
    """

    def __init__(self, path: Path, kind: str, named: bool):
        self.path, self.kind, self.named = path, kind, named

    def read(self, example: dict) -> bytes | np.ndarray:
        """The clip of an example: the bytes of a file, or uint8 frames (T, H, W, 3)."""
        if self.kind == "steps":
            return _decoded([value_of(step, self.path[1:]) for step in example[self.path[0]]])
        value = value_of(example, self.path)
        if self.kind == "frames":
            return _decoded(list(value))
        return np.asarray(value) if self.kind == "tensor" else value


def find_features(
    features: Any, where: str, media: str, caption: str, need_caption: bool
) -> tuple[Feature, Path, Path]:
    """(the clip's feature, the path of its caption, the path of its frame rate); a missing path is ().

    Args:
        features: the data set's FeaturesDict.
        where: the name of the data set in errors.
        media: the path of the clip's feature; "" finds it.
        caption: the path of the caption's feature, a text or a class; "" finds it.

    Raises:
        ValueError: no feature fits, or several do.
    """
    leaves = dict(_leaves(features))
    kinds = {path: kind for path, leaf in leaves.items() if (kind := _kind(path, leaf, features))}
    clip = tuple(media.split("/")) if media else _best(kinds, where)
    if clip not in kinds:
        raise ValueError(f"{where} has no clips in {media!r}; it may have them in {_listed(kinds) or 'no feature'}")
    texts = [path for path, leaf in leaves.items() if _is_text(leaf) and path != clip]
    labels = [path for path, leaf in leaves.items() if _is_label(leaf)]
    known = _listed([*texts, *labels]) or "no feature"
    if caption and tuple(caption.split("/")) not in [*texts, *labels]:
        raise ValueError(f"{where} has no text in {caption!r}; it has text in {known}")
    named = sorted((path for path in texts if path[-1] in CAPTIONS), key=lambda path: CAPTIONS.index(path[-1]))
    named = named or (labels if len(labels) == 1 else [])
    if not caption and not named and need_caption:
        raise ValueError(f"{where}: which feature is the caption? Name it by '?caption=PATH'; text is in {known}")
    caption_path: Path = tuple(caption.split("/")) if caption else (named or [()])[0]
    rates = [path for path in leaves if path[-1] in RATES and not _in_steps(path, features)]
    return Feature(clip, kinds[clip], set(leaves) == OURS), caption_path, (rates or [()])[0]


def _best(kinds: dict[Path, str], where: str) -> Path:
    """The likeliest feature of the clip."""
    for kind in ("steps", "frames", "tensor", "file", "image"):
        paths = [path for path, k in kinds.items() if k == kind]
        plain = [path for path in paths if path[-1] in ("image", "video", "clip")]
        if len(paths) == 1 or len(plain) == 1:
            return (paths if len(paths) == 1 else plain)[0]
        if paths:
            raise ValueError(f"{where}: which feature is the clip? Name it by '?media=PATH': {_listed(paths)}")
    raise ValueError(
        f"{where} has no feature that is a clip: no Image, Video or frames, and no string called {', '.join(FILES)}"
    )


def _kind(path: Path, leaf: Any, features: Any) -> str:
    """The kind of clip that a feature holds; "" for none."""
    import tensorflow_datasets as tfds

    if _in_steps(path, features):
        return "steps" if isinstance(leaf, tfds.features.Image) and _is_rgb(leaf) else ""
    if isinstance(leaf, tfds.features.Sequence):
        return "frames" if isinstance(leaf.feature, tfds.features.Image) and _is_rgb(leaf.feature) else ""
    if isinstance(leaf, tfds.features.Image):
        return "image" if _is_rgb(leaf) else ""
    if _is_text(leaf):
        return "file" if path[-1] in FILES else ""
    shape = getattr(leaf, "shape", None) or ()
    return "tensor" if len(shape) == 4 and shape[-1] == 3 and leaf.np_dtype == np.uint8 else ""


def _is_rgb(image: Any) -> bool:
    return image.np_dtype == np.uint8 and image.shape[-1] in (1, 3, 4)


def _is_text(leaf: Any) -> bool:
    return getattr(leaf, "shape", None) == () and getattr(leaf, "np_dtype", None) == np.object_


def class_names(features: Any, path: Path) -> list[str]:
    """The names of the classes of a feature; [] for a text."""
    leaf = dict(_leaves(features)).get(path)
    return list(leaf.names) if leaf is not None and _is_label(leaf) else []


def _is_label(leaf: Any) -> bool:
    import tensorflow_datasets as tfds

    return isinstance(leaf, tfds.features.ClassLabel)


def _in_steps(path: Path, features: Any) -> bool:
    import tensorflow_datasets as tfds

    return isinstance(features[path[0]], tfds.features.Dataset)


def _leaves(features: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, feature) of every leaf: inside dictionaries and episode steps, but not inside other sequences."""
    import tensorflow_datasets as tfds

    if isinstance(features, tfds.features.FeaturesDict):
        for name, feature in sorted(features.items()):  # TFDS does not keep their order
            yield from _leaves(feature, (*path, name))
    elif isinstance(features, tfds.features.Dataset) and len(path) == 1:
        yield from _leaves(features.feature, path)
    else:
        yield path, features


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join("/".join(path) for path in paths)


def undecoded(features: Any) -> dict:
    """TFDS's decoders that leave every image encoded, in sequences too."""
    import tensorflow_datasets as tfds

    class Skip(tfds.decode.SkipDecoding):
        def decode_batch_example_np(self, images):
            return images

    tree: dict = {}
    for path, leaf in _leaves(features):
        if isinstance(leaf, tfds.features.Image) or isinstance(getattr(leaf, "feature", None), tfds.features.Image):
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = Skip()
    return tree


# ---- Reading an example


def value_of(example: Any, path: Path) -> Any:
    """The value of a feature."""
    for part in path:
        example = example[part]
    return example


def texts_of(example: dict, path: Path) -> Iterator[bytes]:
    """The texts of a feature: one text, or one for each step."""
    if isinstance(example[path[0]], Sequence) and not isinstance(example[path[0]], bytes):
        for step in example[path[0]]:
            yield value_of(step, path[1:])
    else:
        yield value_of(example, path)


def _decoded(images: list[bytes]) -> np.ndarray:
    """Encoded images as frames, uint8 (T, H, W, 3)."""
    if not images:
        raise VideoError("zero frames", "the example has no frames")
    frames = [read_clip_frames(image)[0][0] for image in images]
    if len(sizes := sorted({frame.shape[:2] for frame in frames})) > 1:
        raise VideoError("corrupt frames", f"the example's frames have several sizes: {sizes}")
    return np.stack(frames)
