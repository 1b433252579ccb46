"""The VAEs of Wan 2.1 and 2.2 against diffusers and their own code: values, gradients, names, both layouts.

Fixtures: tests/parity/make_codecs.py.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from published import export_params, import_params  # noqa: E402
from random_weights import draw, draw_input  # noqa: E402

from minisora_jax.cli import main  # noqa: E402
from minisora_jax.models.codec import Codec  # noqa: E402
from minisora_jax.models.vae import VAE  # noqa: E402
from minisora_jax.weights import wan_vae  # noqa: E402
from minisora_jax.weights.checkpoint import Checkpoint, WeightsFileError  # noqa: E402
from minisora_jax.weights.presets import CODECS  # noqa: E402
from minisora_jax.weights.rules import export_lazily, save_sharded  # noqa: E402

FIXTURES = Path(__file__).parent / "parity/fixtures"
PRESETS = {"wan_vae": "wan2.1-vae", "wan22_vae": "wan2.2-vae"}
FULL = {"wan_vae": wan_vae.WAN_21, "wan22_vae": wan_vae.WAN_22}
SMALL = {
    "wan_vae": dataclasses.replace(wan_vae.WAN_21, base=4, latent_channels=3),
    "wan22_vae": dataclasses.replace(wan_vae.WAN_22, base=4, decoder_base=8, latent_channels=3),
}
PARAMETERS = {"wan_vae": 126_892_531, "wan22_vae": 704_688_668}


def abstract(config):
    return jax.eval_shape(VAE(config).init, jax.random.key(0), jnp.zeros((1, 5, 16, 16, 3)))


def to_jax(x_BCTHW):
    return jnp.asarray(np.moveaxis(x_BCTHW, 1, -1))


def to_torch(x_BTHWC):
    return np.moveaxis(np.asarray(x_BTHWC), -1, 1)


SYSTEMS = {"wan_vae": "Wan 2.1 VAE", "wan22_vae": "Wan 2.2 VAE"}


def published_file(config, path, layout="diffusers", drawn_as="diffusers"):
    """The small model as a published file of a layout would hold it, with weights drawn by a layout's names."""
    flat, tensors = traverse_util.flatten_dict(abstract(config), sep="/"), {}
    for rule, drawn in zip(wan_vae.rules(config, layout), wan_vae.rules(config, drawn_as)):
        tensors[rule.theirs] = draw(drawn.theirs, rule.to_theirs(np.zeros(flat[rule.ours].shape)).shape)
    save_file(tensors, path)
    return path


def facts(fixture, key):
    with safe_open(FIXTURES / f"{fixture}.safetensors", framework="numpy") as file:
        return json.loads(file.metadata()[key])


@dataclasses.dataclass
class Case:
    family: str
    config: object
    file: Path
    params: dict
    reference: dict

    def input(self, key):
        """The reference's input of this name; a result's shape tells the batch."""
        what, size = key.split()
        T, H, W = map(int, size.split("x"))
        batch = len(self.reference[f"moments {size}"])
        if what == "decoded":
            return draw_input(f"latents {size}", (batch, 3, *self.config.latent_size((T, H, W))))
        return np.clip(draw_input(f"pixels {size}", (batch, 3, T, H, W)), -1, 1)

    def output(self, params, key):
        x = to_jax(self.input(key))
        if key.startswith("decoded"):
            return jnp.clip(VAE(self.config).apply(params, x, method="decode")[0], -1, 1)
        return jnp.concatenate(VAE(self.config).apply(params, x, method="encode")[:2], -1)


@pytest.fixture(scope="module", params=SMALL)
def case(request, tmp_path_factory):
    family, config = request.param, SMALL[request.param]
    file = published_file(config, tmp_path_factory.mktemp(family) / "diffusion_pytorch_model.safetensors")
    params = import_params(Checkpoint(file), wan_vae.rules(config), abstract(config))
    return Case(family, config, file, params, load_file(FIXTURES / f"{family}.safetensors"))


def test_values_are_the_references(case, parity):
    keys = [k for k in case.reference if not k.startswith("grad/")]
    assert len(keys) == 6
    for key in keys:
        size = key.split()[1] if key.startswith("moments") else ""
        ours = jax.jit(lambda params, key=key: case.output(params, key))(case.params)
        parity(SYSTEMS[case.family], "forward", to_torch(ours), case.reference[key], size)


def test_gradients_are_the_references(case, parity):
    size = next(k.split()[1] for k in case.reference if k.startswith("moments 5x"))
    grads = {}
    for key, side in ((f"moments {size}", "encoder/"), (f"decoded {size}", "decoder/")):
        tree = jax.jit(jax.grad(lambda p, key=key: jnp.mean(case.output(p, key) ** 2)))(case.params)
        rules = [rule for rule in wan_vae.rules(case.config) if side in rule.ours]
        grads |= export_params(tree, rules)
    checked = [k.removeprefix("grad/") for k in case.reference if k.startswith("grad/")]
    assert len(checked) == 6
    for name in checked:
        parity(SYSTEMS[case.family], "gradient", grads[name], case.reference[f"grad/{name}"], name)


@pytest.mark.parametrize("family", FULL)
@pytest.mark.parametrize("layout", wan_vae.NAME_MAPS)
def test_every_published_tensor_has_its_place(family, layout):
    fixture, key = (family, "published") if layout == "diffusers" else ("wan_original", "published")
    published = facts(fixture, key) if layout == "diffusers" else facts(fixture, key)[family]
    assert wan_vae.name_map_of(list(published)) == layout
    flat = traverse_util.flatten_dict(abstract(FULL[family]), sep="/")
    rules = wan_vae.rules(FULL[family], layout)
    assert {rule.ours for rule in rules} == set(flat)
    blank = lambda shape: np.lib.stride_tricks.as_strided(np.zeros(1), shape, [0] * len(shape))
    shapes = {rule.theirs: list(rule.to_theirs(blank(flat[rule.ours].shape)).shape) for rule in rules}
    assert shapes == published
    assert sum(np.prod(s) for s in published.values()) == PARAMETERS[family]


def test_wans_own_layout_gives_the_same_model(case, tmp_path):
    path = published_file(case.config, tmp_path / "Wan_VAE.safetensors", "wan")
    file = Checkpoint(path)
    assert wan_vae.name_map_of(file.names) == "wan"
    again = import_params(file, wan_vae.rules(case.config, "wan"), abstract(case.config))
    jax.tree.map(np.testing.assert_array_equal, again, case.params)


def test_values_are_those_of_wans_own_code(case, tmp_path, parity):
    path = published_file(case.config, tmp_path / "Wan_VAE.safetensors", "wan", drawn_as="wan")
    params = import_params(Checkpoint(path), wan_vae.rules(case.config, "wan"), abstract(case.config))
    reference = load_file(FIXTURES / "wan_original.safetensors")
    size = "5x24x16" if case.family == "wan_vae" else "5x48x16"
    x = to_jax(np.clip(draw_input(f"pixels {size}", (1, 3, *map(int, size.split("x")))), -1, 1))
    mean = to_torch(VAE(case.config).apply(params, x, method="encode")[0])
    parity(f"{SYSTEMS[case.family]}, own layout", "forward", mean, reference[f"{case.family} mean"], size)
    z = to_jax(draw_input(f"latents {size}", mean.shape))
    y = to_torch(VAE(case.config).apply(params, z, method="decode")[0])
    decoded = reference[f"{case.family} decoded"]
    parity(f"{SYSTEMS[case.family]}, own layout", "forward", np.clip(y, -1, 1), decoded)


def test_the_round_trip_is_exact(case, tmp_path):
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    rules = wan_vae.rules(case.config)
    save_sharded(whole, export_lazily(case.params, rules), "model")
    save_sharded(shards, export_lazily(case.params, rules), "model", shard_bytes=100_000)
    assert len(list(shards.glob("*.safetensors"))) > 3
    before = load_file(case.file)
    for directory in (whole, shards):
        again = Checkpoint(directory)
        assert set(again.names) == set(before)
        assert all(np.array_equal(again.read(k), v) for k, v in before.items())


def test_import_and_export_from_the_command_line(case, tmp_path, monkeypatch, capsys):
    name = PRESETS[case.family]
    statistics = {"latent_mean": (0.1, 0.2, 0.3), "latent_std": (1, 2, 3)}
    monkeypatch.setitem(CODECS, name, dataclasses.replace(CODECS[name], config=case.config, **statistics))
    original = published_file(case.config, tmp_path / "original.safetensors", "wan")
    for i, path in enumerate((case.file.parent, original)):
        out = tmp_path / f"codec{i}"
        assert main(["import", name, str(path), f"--out={out}"]) == 0
        codec = Codec.load(out)
        assert codec.hash in capsys.readouterr().out and codec.latent_std.tolist() == [1, 2, 3]
        assert main(["export", str(out), str(tmp_path / f"again{i}")]) == 0
        again = Checkpoint(tmp_path / f"again{i}")
        assert all(np.array_equal(again.read(k), v) for k, v in load_file(case.file).items())


@pytest.mark.parametrize("family", FULL)
def test_statistics_are_of_the_latents_width(family):
    preset = CODECS[PRESETS[family]]
    assert len(preset.latent_mean) == len(preset.latent_std) == preset.config.latent_channels
    assert preset.config == FULL[family]


def test_another_architecture_is_refused():
    with pytest.raises(ValueError, match="attention=False.*Wan's layouts have .*attention=True"):
        wan_vae.rules(dataclasses.replace(wan_vae.WAN_21, attention=False))
    with pytest.raises(ValueError, match="either halve_up"):
        wan_vae.rules(dataclasses.replace(wan_vae.WAN_22, halve_up=True))


def test_what_does_not_fit_is_named(tmp_path):
    config = SMALL["wan_vae"]
    rules, path = wan_vae.rules(config), tmp_path / "model.safetensors"
    tensors = load_file(published_file(config, path))
    changed = {k: v for k, v in tensors.items() if k != "quant_conv.bias"} | {"more.weight": np.zeros(3, np.float32)}
    save_file(changed, path)
    with pytest.raises(WeightsFileError, match=r"1 missing \(quant_conv.bias\) and 1 extra \(more.weight\)"):
        import_params(Checkpoint(path), rules, abstract(config))
    save_file(tensors | {"quant_conv.bias": np.zeros(8, np.float32)}, path)
    with pytest.raises(
        WeightsFileError, match=r"quant_conv.bias of shape \(8,\) gives .*moments/bias.* which is \(6,\)"
    ):
        import_params(Checkpoint(path), rules, abstract(config))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsFileError, match="not a whole safetensors file"):
        Checkpoint(path)
    with pytest.raises(FileNotFoundError):
        Checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(WeightsFileError, match="gone.safetensors first"):
        Checkpoint(tmp_path / "model.safetensors.index.json")
