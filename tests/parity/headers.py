"""Published checkpoints at full size of which only the header is real: a sparse file, whose tensors are holes."""

import json
import math
from pathlib import Path

from safetensors import safe_open

FIXTURES = Path(__file__).with_name("fixtures")
BYTES = {"F32": 4, "BF16": 2}


def models(file: str) -> dict[str, dict]:
    """The published transformers that a fixture knows: by name, {i} for its block, a tensor's shape and count."""
    with safe_open(FIXTURES / f"{file}.safetensors", framework="numpy") as fixture:
        return json.loads(fixture.metadata()["published"])


def published(file: str, model: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published transformer and its shape, as the reference class of its full size has them."""
    tensors = models(file)[model].items()
    return {key.replace("{i}", str(i)): tuple(shape) for key, (shape, count) in tensors for i in range(count)}


def write_header(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """A safetensors file of zeros that takes no room: its header, and then a hole as long as the tensors."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
