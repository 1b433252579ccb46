"""The shape of the diffusion transformer, and the switches that make it DiT, SiT, PixArt-alpha, Latte or Wan 2.1.

Each row gives the settings that differ from `DiTConfig`'s defaults. weights/dit.py has the exact sizes.

    family         paper               settings
    this project                       the defaults
    DiT            arXiv:2212.09748    modulation="block", caption="label", positions="fixed"            (a)
    SiT            arXiv:2401.08740    as DiT, and time_input="1 - t"                                    (a)
    PixArt-alpha   arXiv:2310.00426    modulation="single", caption="projected", positions="fixed"       (a)
                                       the 1024 pixel model: size_pixels=16
    Latte          arXiv:2401.03048    as PixArt, and attention_pattern=("spatial", "temporal")          (a)
    Wan 2.1        arXiv:2503.20314    modulation="single", caption="projected", positions="none",
                                       caption_tokens=512, qk_norm="all", micro_conditioning=False
                                       image to video: given_channels=20, image_features=1280
                                       first and last frame: image_positions=514 too

    (a) also rope=False, qk_norm="none", cross_norm=False, micro_conditioning=False, out_channels=2 * latent_channels

`motion_modules` makes an image model one of videos (AnimateDiff: arXiv:2307.04725): its own layers see each latent
frame as an image, and attention over the frames is added after each block (models/motion.py).

`modulation` says which layers compute the shift, scale and gate of adaLN:

    value     in a block                                     in the head            families
    shared    one layer for all blocks + a table per block   a layer of its own     this project
    single    one layer for all blocks + a table per block   a table only           PixArt-alpha, Latte, Wan 2.1
    block     one layer per block, no table                  a layer of its own     DiT, SiT
"""

from __future__ import annotations

import dataclasses
import math

from minisora_jax.models.rope_scaling import RopeScaling
from minisora_jax.parallel.kernels import NAMES

_CHOICES = {
    "remat": ("none", "matmuls", "attention", "full", "host"),
    "attention": ("auto", *NAMES),
    "time_input": ("1000 t", "1 - t"),
    "modulation": ("shared", "single", "block"),
    "qk_norm": ("head", "all", "none"),
    "positions": ("learned", "space", "fixed", "none"),
    "caption": ("refined", "projected", "label"),
}


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Shape and switches of a `DiT`. The defaults are this project's own model.

    Raises:
        ValueError: A switch has an unknown value, or two settings contradict each other.
    """

    latent_channels: int = 16  # channels of the codec's latents
    out_channels: int | None = None  # None: latent_channels; 2 * latent_channels: a mean and a variance (DiT, PixArt)
    patch: tuple[int, int, int] = (1, 2, 2)  # latents of a token along t, y, x
    width: int = 384  # of a token in the blocks (D)
    depth: int = 12  # repeats of `attention_pattern`
    heads: int = 6  # of attention (N); width / heads is even
    mlp_ratio: float = 4.0  # hidden width of the mlp over width (F / D)
    text_features: int = 1  # width of the caption features; 1: byte ids, or with caption="label" a class
    text_width: int = 256  # width of the refined caption's tokens
    text_depth: int = 2  # layers of the refiner
    dtype: str = "bfloat16"  # of the computation; parameters are float32
    remat: str = "none"  # what the backward pass recomputes: "none", all but "matmuls", all but "attention", "full";
    # "host" recomputes all and keeps the blocks' inputs in the host's memory
    attention: str = "auto"  # the kernel, see parallel/kernels; "auto": the fastest on this backend
    # ---- Switches between the published families
    time_input: str = "1000 t"  # the number that the model receives for time t; SiT receives "1 - t"
    attention_pattern: tuple[str, ...] = ("joint",)  # one block each: over the clip, or "spatial", "temporal" (Latte)
    motion_modules: bool = False  # a motion module after each block (AnimateDiff); the blocks see frames as images
    modulation: str = "shared"  # the layers of adaLN: "shared", "single" or "block", see the table above
    qk_norm: str = "head"  # RMS norm of queries and keys over each "head", over "all" heads (Wan), or "none"
    rope: bool = True  # rotary positions
    rope_scaling: str = "none"  # for clips beyond training's: "linear", "ntk", "ntk-by-parts", "yarn", "riflex", "abf"
    rope_factors: tuple[float, float, float] = (1.0, 1.0, 1.0)  # tokens along t, y, x over those of training, for it
    rope_trained: tuple[int, int, int] = (0, 0, 0)  # tokens along t, y, x of training's longest clips, for it
    positions: str = "learned"  # added to the tokens: a "learned" projection of sinusoids of (t, y, x), or of "space"
    # alone (y, x), with which a stream may go on for ever; "fixed" sinusoids, or "none"
    base_grid: int = 16  # tokens along a side that fixed positions were trained at; other grids are stretched to it
    caption: str = "refined"  # by a small transformer; "projected" by two layers; a "label" without cross-attention
    caption_tokens: int = 0  # pad captions with zeros to this many tokens, and attend to the padding (Wan); 0: no
    cross_norm: bool = True  # LayerNorm before cross-attention
    micro_conditioning: bool = True  # size, frame rate and mean caption join the time (SDXL: arXiv:2307.01952)
    classes: int = 0  # rows of the label table, including the row for "no class"
    size_pixels: int = 0  # pixels along a token's side, for PixArt's embedding of height, width and aspect; 0: none
    image_features: int = 0  # width of image encoder tokens that the model attends to (Wan image to video); 0: none
    image_positions: int = 0  # image tokens of a clip, each with a learned position (Wan first and last frame); 0: none
    interval_input: bool = False  # the model is told t - r too, and predicts the mean velocity from r to t (MeanFlow)
    causal: bool = False  # attention of every clip is in the order of frames, as streaming needs; see also times.causal
    action_width: int = 0  # numbers of a latent frame's actions (data/actions.py), which join its time; 0: none
    given_channels: int = 0  # channels of given frames beside the latents (Wan image to video: 4 of a mask, 16 of
    # latents); 0: given frames are tokens at time 0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, allowed))}")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width={self.width} must be heads={self.heads} times an even head width")
        if self.caption == "refined" and self.text_width % 64:
            raise ValueError(f"text_width={self.text_width} must be a multiple of 64, the head width of the refiner")
        if self.caption != "refined" and self.micro_conditioning:
            raise ValueError(
                f"micro_conditioning=True reads the mean of a refined caption, and caption={self.caption!r}: "
                f"set micro_conditioning=False or caption='refined'"
            )
        if (self.caption == "label") != (self.classes > 0):
            raise ValueError(
                f"classes={self.classes} with caption={self.caption!r}: classes must be above 0 for caption='label' "
                f"and 0 for all others"
            )
        if self.image_positions and not self.image_features:
            raise ValueError(f"image_positions={self.image_positions} with image_features=0: there are no image tokens")
        if len(self.patch) != 3 or self.patch[0] != 1:
            raise ValueError(f"patch={self.patch} must be (1, y, x): a token holds one latent frame")
        if self.scaling.name != "none" and not self.rope:
            raise ValueError(f"rope_scaling={self.rope_scaling!r} with rope=False: the model has no rotary positions")
        if not self.attention_pattern or set(self.attention_pattern) - {"joint", "spatial", "temporal"}:
            raise ValueError(
                f"attention_pattern={self.attention_pattern} must be made of 'joint', 'spatial' and 'temporal'"
            )
        if self.causal and (self.motion_modules or self.attention_pattern != ("joint",)):
            raise ValueError(
                f"causal=True with attention_pattern={self.attention_pattern}, motion_modules={self.motion_modules}: "
                f"causal attention is for the pattern ('joint',) without motion modules"
            )
        if self.motion_modules and self.attention_pattern != ("joint",):
            raise ValueError(
                f"motion_modules=True with attention_pattern={self.attention_pattern}: motion modules are for an image "
                f"model, whose pattern is ('joint',)"
            )

    @property
    def scaling(self) -> RopeScaling:
        """How rotary positions are scaled."""
        return RopeScaling(self.rope_scaling, self.rope_factors, self.rope_trained)

    @property
    def attention_kinds(self) -> tuple[str, ...]:
        """Who attends to whom in each self-attention of a repeat of `attention_pattern`."""
        return ("spatial", "temporal", "temporal") if self.motion_modules else self.attention_pattern

    @property
    def makes_images(self) -> bool:
        """Whether the model makes single frames only: its tokens receive (y, x) and no time position."""
        return self.positions == "fixed" and "temporal" not in self.attention_kinds

    @property
    def token_width(self) -> int:
        """P: latents of a token."""
        return math.prod(self.patch) * self.latent_channels

    @property
    def given_width(self) -> int:
        """Numbers of given frames beside a token's latents."""
        return math.prod(self.patch) * self.given_channels

    @property
    def out_width(self) -> int:
        """Numbers that the model outputs for a token."""
        return math.prod(self.patch) * (self.out_channels or self.latent_channels)
