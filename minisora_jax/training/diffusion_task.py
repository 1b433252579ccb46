"""Training of the diffusion transformer on a latent cache. Clips keep their own size and are packed into rows."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from minisora_jax.data.conditioning import ConditioningConfig, known_masks
from minisora_jax.data.latents import Latents, Mixture
from minisora_jax.data.loader import DataConfig, packed_batches
from minisora_jax.data.packing import PackConfig
from minisora_jax.data.rows import Segment, pack_segments, padded_text
from minisora_jax.diffusion.distillation import FAKE, DistillConfig
from minisora_jax.diffusion.grpo import GrpoConfig, grpo_loss, roll_out
from minisora_jax.diffusion.loss import diffusion_loss
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.time import TimeConfig
from minisora_jax.io.model_dir import (
    check_shapes,
    config_fields,
    export_model,
    load_config,
    model_hash,
    open_model,
    require_kind,
    saved_settings,
)
from minisora_jax.io.retry import Damaged, DataError
from minisora_jax.models.captions import in_words
from minisora_jax.models.codec import Codec
from minisora_jax.models.dit import DiT, DiTConfig, abstract_params
from minisora_jax.models.lora import LoraConfig, apart, init_adapter, together
from minisora_jax.models.text import encode_bytes
from minisora_jax.parallel.processes import barrier
from minisora_jax.training import distilling
from minisora_jax.training.clip_plan import pack_plan, trained_size, with_row_size
from minisora_jax.training.flops import count_work
from minisora_jax.training.frozen import (
    NOTHING,
    Frozen,
    adds_modules,
    frozen_base,
    frozen_rest,
    read_part,
    unchanged,
)
from minisora_jax.training.held_out import held_out_loss
from minisora_jax.training.latents_check import check_latents
from minisora_jax.training.loop import RunConfig, train
from minisora_jax.training.mup import base_model, base_shapes
from minisora_jax.training.optim import make_optimizer
from minisora_jax.training.rollouts import rollouts
from minisora_jax.training.step import LossFn
from minisora_jax.types import PackedBatch

log = logging.getLogger("minisora")


@dataclasses.dataclass(frozen=True)
class DiffusionTask:
    """The settings of a transformer's training.

    Raises:
        ValueError: A dropout is not in [0, 1), or two settings contradict each other.
    """

    dit: DiTConfig = DiTConfig()
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    pack: PackConfig = PackConfig()
    times: TimeConfig = TimeConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    caption_dropout: float = 0.1  # share of clips that are trained with the empty caption, for guidance
    action_dropout: float = 0.1  # share of clips that are trained without their actions, with dit.action_width
    lora: LoraConfig = LoraConfig()  # train adapters over the model of --init, which stays as it is
    train_only: str = ""  # train the parameters of --init whose path this pattern matches, such as "norm"; "": all.
    # Where --init has none of them they start at random, as new modules do
    distill: DistillConfig = DistillConfig()  # train it to sample in fewer steps, after the model of --init
    grpo: GrpoConfig = GrpoConfig()  # tune the model of --init by a reward of its videos
    mup_base_width: int = 0  # muP: the dit.width that the learning rate was found at; 0: use it as it is at any width
    export_dtype: str = "float32"  # of the exported weights

    def __post_init__(self) -> None:
        for name in ("caption_dropout", "action_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if self.mup_base_width:
            base_model(self.dit, self.mup_base_width)  # raises for heads of another width
            if self.in_part:
                raise ValueError(
                    f"mup_base_width={self.mup_base_width} is for the training of all parameters: set it to 0"
                )
        distilling.require_fitting(self.distill, self.objective, self.lora.rank, self.train_only)
        alone = {
            "distill.steps": (self.distill.steps, 0),
            "conditioning.middle": (self.conditioning.middle, 0.0),
            "run.optim.accumulate": (self.run.optim.accumulate, 1),
        }
        wrong = ", ".join(f"{name}={value} to {must}" for name, (value, must) in alone.items() if value != must)
        if self.grpo.reward and wrong:
            raise ValueError(f"grpo.reward={self.grpo.reward!r} judges whole videos, each update its own: set {wrong}")
        if self.lora.debias and (self.distill.steps or self.grpo.reward or not self.lora.rank):
            raise ValueError(
                f"lora.debias={self.lora.debias} is for the training of adapters on clips: set lora.rank, and "
                f"distill.steps={self.distill.steps} to 0, grpo.reward={self.grpo.reward!r} to ''"
            )
        if self.lora.rank and self.train_only:
            raise ValueError(
                f"lora.rank={self.lora.rank} trains adapters only: train_only={self.train_only!r} must be ''"
            )

    @property
    def trained_dit(self) -> DiTConfig:
        """The shape of the model that is trained: `dit`, or that of its student."""
        return distilling.student_dit(self.distill, self.dit)

    @property
    def in_part(self) -> bool:
        """Whether the run changes a given model: parts of it stay, or a model beside the trained one."""
        return bool(self.lora.rank or self.train_only or self.distill.steps or self.grpo.reward)


def example_batch(task: DiffusionTask) -> PackedBatch:
    """The smallest batch that can initialise the model: one token in one row."""
    text_LE = example_text(task.dit)
    zeros = lambda width: np.zeros((1, width), np.float32)
    given: dict[str, Any] = {
        "given_nx": zeros(task.dit.given_width) if task.dit.given_channels else None,
        "image_IE": zeros(task.dit.image_features) if task.dit.image_features else None,
    }
    segment = Segment(zeros(task.dit.token_width), np.zeros(1, bool), (1, 1, 1), text_LE, 8.0, **given)
    pack = PackConfig(tokens=1, text_tokens=4, slots=1, rows=1)
    return pack_segments([[segment]], pack, action_width=task.dit.action_width)


def example_text(dit: DiTConfig) -> np.ndarray:
    """Features of a caption (L, E), for shapes alone."""
    return encode_bytes("") if dit.text_features == 1 else np.zeros((4, dit.text_features), np.float32)


def init_params(task: DiffusionTask, key: jax.Array) -> Any:
    """The parameters that the task trains, at random."""
    if task.lora.rank:
        return init_adapter(task.lora, abstract_params(task.dit), key)
    batch = jax.tree.map(jnp.asarray, example_batch(task))
    params: Any = DiT(task.trained_dit).init(key, batch.tokens_BSP, jnp.zeros((1, 1)), batch)
    if task.distill.steps and task.distill.method == "dmd":
        return params | {FAKE: params["params"]}
    return apart(params, task.train_only)[0] if task.train_only else params


def frozen_of(task: DiffusionTask, init: str | Path | None = None) -> Frozen:
    """The parameters that the task does not train, read from the model `init`; None: they are only planned."""
    abstract = functools.partial(abstract_params, task.dit)
    if task.lora.rank:
        return frozen_base(task.lora, abstract, init)
    if task.distill.steps or (task.grpo.reward and task.grpo.kl):
        return distilling.frozen_teacher(abstract, init)
    return frozen_rest(task.train_only, abstract, init) if task.train_only else NOTHING


def loss_of(task: DiffusionTask, empty_text_LE: np.ndarray | None = None) -> LossFn:
    """The loss function of the task's model, times and objective.

    Args:
        task: The settings.
        empty_text_LE: Features of the empty caption, for distillation; None: of one token, as in a plan.
    """
    model, empty_LE = DiT(task.dit), empty_text(task, empty_text_LE)
    if task.grpo.reward:
        return lambda params, rollout, key, step: grpo_loss(model, task.grpo, empty_LE, params, rollout, task.objective)
    if task.distill.steps:
        return distilling.loss_of(task.distill, task.dit, task.times, task.objective, empty_LE)
    debias = task.lora.debias
    return lambda params, batch, key, step: diffusion_loss(
        model, task.times, params, batch, key, task.objective, debias
    )


def empty_text(task: DiffusionTask, text_LE: np.ndarray | None) -> np.ndarray:
    """Features of the empty caption (L, E), on the host: a plan has no devices. None: of one token, as in a plan."""
    text_LE = example_text(task.dit) if text_LE is None else text_LE
    return padded_text(text_LE, task.dit.caption_tokens)


def optimizer_of(task: DiffusionTask) -> optax.GradientTransformation:
    """The optimiser of the task's run."""
    if task.distill.steps and task.distill.method == "dmd":
        return distilling.two_optimizers(task.distill, task.run.optim, task.run.steps)
    return make_optimizer(task.run.optim, task.run.steps, base_shapes(task.dit, task.mup_base_width))


def train_diffusion(
    task: DiffusionTask,
    workdir: Path,
    latents: Latents | Mixture,
    run_config: dict,
    export: dict,
    sample: Callable | None = None,
    init: str | Path | None = None,
    held_out: Latents | Mixture | None = None,
    codec: Codec | None = None,
) -> Path:
    """Train on a latent cache and export the averaged weights to WORKDIR/export.

    Args:
        task: The settings.
        workdir: The work directory. A run with checkpoints there goes on from the newest.
        latents: The cache, or several.
        run_config: The run's whole configuration, stored with the model.
        export: Further entries of the exported config: the codec's hash, the text encoder.
        sample: Writes sample videos, see `train.loop.train`.
        init: An exported or imported model to start from. `task.dit` must have its shape, see `settings_of`. It is the
            base of an adapter.
        held_out: A cache whose loss is measured every `run.evaluate_every` steps.
        codec: The latents' codec, for `task.grpo`.

    Returns:
        The path of the exported model, or of the exported adapter.

    Raises:
        ValueError: The model cannot learn from these latents, or `init` has another shape.
    """
    task = with_row_size(task, latents)
    check_latents(task.dit, latents, init, task.data.strict)
    if held_out is not None and held_out.text != latents.text:
        raise ValueError(
            f"data.held_out={task.data.held_out} was made with {in_words(held_out.text)}, and data.path with "
            f"{in_words(latents.text)}: encode one of them again"
        )
    added = False
    if init:
        wanted = abstract_params(task.dit)
        added = bool(task.train_only) and adds_modules(task.train_only, wanted, init)
        check_shapes(open_model(init)[0], apart(wanted, task.train_only)[1] if added else wanted, init)
    if task.in_part:
        if not init:
            raise ValueError("lora, train_only, distill and grpo change a given model: name it by --init=DIR")
        run_config = run_config | {"base": model_hash(init)}  # a run goes on over the same base only

    plan = pack_plan(task, latents, workdir)
    plan.rows(0)  # raises here if the clips do not fill a step
    damaged = Damaged(workdir / f"damaged_{jax.process_index()}.jsonl", strict=task.data.strict)

    def batches(numbers: range) -> Iterator:
        options = {name: getattr(task.dit, name) for name in ("patch", "caption_tokens", "action_width")}
        options |= {name: getattr(task, name) for name in ("conditioning", "caption_dropout", "action_dropout")}
        for batch, rows in packed_batches(latents, plan, numbers, **options, damaged=damaged):
            yield batch, count_work(task.dit, task.pack, rows * again, frozen=task.lora.rank > 0)

    again, of_grpo = 1, None
    if task.grpo.reward:
        empty_LE = empty_text(task, latents.empty_text_LE)
        sample_videos = functools.partial(roll_out, DiT(task.dit), task.times, task.grpo, task.objective, empty_LE)
        again, of_grpo = task.grpo.group, rollouts(task.grpo, sample_videos, codec, task.dit.patch, latents, plan)

    read = distilling.read_student if task.distill.steps else read_part
    evaluate, within = None, (task.times.low, task.times.high)
    if held_out is not None:
        evaluate = held_out_loss(task.trained_dit, task.objective, task.pack, held_out, damaged, within)
    state = train(
        task.run,
        workdir,
        name="diffusion",
        rows=task.pack.rows,
        tokens=task.pack.tokens,
        heads=task.dit.heads,
        init_params=functools.partial(init_params, task),
        loss_fn=loss_of(task, latents.empty_text_LE),
        batches=batches,
        run_config=run_config,
        settings=DiffusionTask,
        start_params=functools.partial(read, init) if init and not added and not task.lora.rank else None,
        frozen=frozen_of(task, init),
        roll_out=of_grpo,
        optimizer=optimizer_of(task),
        sample=sample,
        evaluate=evaluate,
        clip_names=lambda number: [_name(latents, int(i)) for row in plan.rows(number) for i in row],
    )
    if damaged.count:
        log.warning("damaged clips were skipped %d times, listed in %s", damaged.count, damaged.path)
    kept = ("dit", "times", "objective", *(("lora",) if task.lora.rank else ()))
    config = {k: dataclasses.asdict(getattr(task, k)) for k in kept} | export | {"training": run_config}
    config["dit"] = dataclasses.asdict(task.trained_dit)
    config |= {"kind": kept[-1] if task.lora.rank else "dit", "latent_size": trained_size(latents)}
    config["conditioning"] = known_masks(task.conditioning, task.data.path, None if task.lora.rank else init)
    if task.grpo.reward and init:
        config["distilled"] = load_config(init).get("distilled", {"steps": 0})  # it is sampled as it was
    if task.distill.steps:
        config["distilled"] = {name: getattr(task.distill, name) for name in ("method", "steps", "guidance")}
    average = {name: tree for name, tree in state.average.items() if name != FAKE}
    if task.train_only and init:
        average = together(average, unchanged(init) if added else apart(unchanged(init), task.train_only)[1])
    export_model(workdir / "export", average, config, dtype=task.export_dtype)
    barrier("export")
    return workdir / "export"


def _name(latents: Latents | Mixture, i: int) -> str:
    try:
        return latents[i].name
    except DataError as error:
        return str(error)


def settings_of(model: str | Path) -> dict:
    """The settings that a task takes over from the model that it starts from: "dit", "times" and "objective".

    Raises:
        ValueError: `model` is not a diffusion transformer, or its config is damaged.
    """
    config = load_config(model)
    require_kind(config, "dit", model)
    for key, cls in (("dit", DiTConfig), ("times", TimeConfig), ("objective", ObjectiveConfig)):
        saved_settings(cls, config, key, model)  # raises for what is no setting
    return {k: config_fields(config.get(k, {})) for k in ("dit", "times", "objective")}
