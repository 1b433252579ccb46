"""A wrong config is refused in a sentence that names the entry and the fix; every config in configs/ is right."""

import dataclasses
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from minisora_jax.config import build, load, names, parse_arg, read_config, settings
from minisora_jax.models.discriminator import scores
from minisora_jax.training.codec_task import CodecTask, init_params
from minisora_jax.training.diffusion_task import DiffusionTask

CONFIGS = Path(__file__).parent.parent / "configs"


def test_every_config_builds_and_flags_reach_it():
    config = read_config(["--config=configs/vae_tiny.py:steps=7,lr=1e-4", "--config.run.mesh.fsdp=2"], CodecTask, "")
    task = build(CodecTask, config)
    assert (task.data.path, task.data.held_out) == ("shapes:train:100000", "shapes:heldout:1000")
    assert task.run.steps == 7 and task.run.optim.learning_rate == 1e-4 and task.run.mesh.fsdp == 2

    config = read_config(
        [
            "--config=configs/dit_tiny.py:data=d,rows=4",
            "--config.run.optim.accumulate=2",
            "--config.conditioning.box=0",
        ],
        DiffusionTask,
        "",
    )
    assert config["data"]["path"] == "d" and config.pop("prompts")
    task = build(DiffusionTask, config)
    assert (
        task.pack.rows == 4
        and task.run.optim.accumulate == 2
        and task.conditioning.box == 0.0
        and task.dit.patch == (1, 2, 2)
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "no --config=NAME given; for example --config=x"),
        (["--config=configs/none.py"], "no config file configs/none.py"),
        (["--config=configs/vae_tiny.py:stepz=3"], "'stepz=3': give data=..., held_out=..., steps=..."),
        (["--config=configs/vae_tiny.py", "--config.run.stepz=3"], "stepz"),
        (["--config=configs/vae_tiny.py", "--config.run.steps=many"], "many"),
        (["--config=configs/vae_tiny.py", "--speed=3"], "speed"),
        (["--config=configs/dit_tiny.py"], "name the latent cache"),
    ],
)
def test_wrong_flags_are_named(flags, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_config(flags, CodecTask, "x")
    assert message in str(error.value)


def test_a_value_where_a_group_belongs_is_named():
    with pytest.raises(ValueError, match="config.data='here' must be a group of settings: config.data.path, "):
        build(DiffusionTask, {"data": "here"})


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    sizes: tuple[int, ...] = (1,)
    on: bool = False
    count: int = 1
    note: str | None = None


def test_build_makes_dataclasses_of_dicts():
    assert build(Outer, {"inner": {"rate": 1}, "sizes": [2, 3], "on": True, "note": None}) == Outer(
        Inner(1), (2, 3), True
    )


@pytest.mark.parametrize(
    "values, message",
    [
        ({"inner": {"rats": 1}}, "config.inner.rats is not a setting; config.inner has rate"),
        ({"count": "3"}, "config.count='3' must be int"),
        ({"count": True}, "config.count=True must be int"),
        ({"count": 1.5}, "config.count=1.5 must be int"),
        ({"on": 1}, "config.on=1 must be bool"),
        ({"inner": {"rate": float("nan")}}, "config.inner.rate=nan must be finite float"),
        ({"inner": {"rate": float("inf")}}, "config.inner.rate=inf must be finite float"),
    ],
)
def test_build_refuses_what_does_not_fit(values, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        build(Outer, values)


def test_arguments_take_the_type_of_their_default():
    with pytest.raises(ValueError, match="config argument 'a=x' must be a number such as a=1"):
        parse_arg("a=x", a=1)
    values = parse_arg("steps=3,lr=1e-3,fast=true,name=x", steps=1, lr=0.1, fast=False, name="")
    assert values == {"steps": 3, "lr": 1e-3, "fast": True, "name": "x"}


def test_every_setting_has_a_meaning_and_the_page_is_that_of_the_code():
    """`minisora train --list-config` and docs/configuration.md print what settings() gives."""
    for cls in (DiffusionTask, CodecTask):
        rows = list(settings(cls))
        assert len(rows) > 40 and not [row.key for row in rows if not row.meaning]
    page = runpy.run_path("docs/make_configuration.py")
    assert page["PAGE"].read_text(encoding="utf-8") == page["page"](), "run docs/make_configuration.py"


def test_a_shipped_config_is_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("vae_tiny", steps=7).run.steps == 7
    (tmp_path / "mine.py").write_text("def get_config(arg=None):\n    return {'arg': arg}\n")
    assert load("mine.py:a=1") == {"arg": "a=1"}
    with pytest.raises(FileNotFoundError, match="no config file nope; the shipped configs are dit_256, dit_distill"):
        load("nope")
    with pytest.raises(ValueError, match="steps=0 must be 1 or more"):
        load("dit_distill:data=nowhere,steps=0")  # not a plain training by a distillation's config
    assert set(names()) == {path.stem for path in CONFIGS.glob("*.py")} and all(names().values())


@pytest.mark.parametrize("name", [name for name in names() if name.startswith("vae")])
def test_a_codec_has_the_size_that_its_config_states(name):
    task = build(CodecTask, load(name).to_dict())
    stated, time, space, channels = re.search(
        r"([\d.]+) M parameters, (\d+)x(\d+)x\3 compression into (\d+) channels", names()[name]
    ).groups()
    shapes = jax.eval_shape(lambda key: init_params(task, None, key), jax.random.key(0))
    codec = shapes["codec"] if task.gan.weight else shapes
    assert f"{sum(x.size for x in jax.tree.leaves(codec)) / 1e6:.1f}" == stated
    vae = task.vae
    assert (vae.time_factor, vae.space_factor, vae.latent_channels) == tuple(map(int, (time, space, channels)))
    if task.gan.weight:  # a score for each part of a crop, and more than one
        of = lambda params: scores(task.gan.discriminator, params, jnp.zeros((1, *task.crop_THW, 3)))
        assert jax.eval_shape(of, shapes["discriminator"]).shape[1] > 100
    assert len((Path("configs") / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60


def test_old_keys_are_taken_for_one_release_and_unknown_ones_named():
    flags = ["--config=dit_tiny:data=d", "--config.times.law=uniform", "--config.known.box=0"]
    config = read_config(flags, DiffusionTask, "x")
    assert config["times"]["distribution"] == "uniform" and config["conditioning"]["box"] == 0
    with pytest.raises(ValueError, match=r"there is no setting 'speed'; did you mean 'seed'\?. `--list-config`"):
        read_config(["--config=dit_tiny:data=d", "--config.run.speed=3"], DiffusionTask, "x")
