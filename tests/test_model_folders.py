"""Model folders that are damaged: a sentence for each, at load; weights and results that are not finite are said."""

import json
import os
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import minisora_jax as ms
from minisora_jax.bundled import CODEC, MODEL
from minisora_jax.cli import main
from minisora_jax.io.filesystem import json_or_none
from minisora_jax.io.model_dir import is_finite, load_model, load_params_onto
from minisora_jax.models import perceptual
from minisora_jax.models.codec import Codec
from minisora_jax.models.encoder import TextEncoder
from minisora_jax.models.perceptual import LPIPS, LPIPSConfig
from minisora_jax.models.t5 import T5Config
from minisora_jax.training.diffusion_task import settings_of


def copied(source, path: Path) -> Path:
    """A copy without checksums.json, which would refuse whatever is changed."""
    shutil.copytree(source, path, ignore=shutil.ignore_patterns("checksums.json"))
    for file in path.iterdir():
        file.chmod(0o644)
    return path


def changed(source, path: Path, *keys: str, to) -> Path:
    """A copy of a model whose config has another value under the keys."""
    config = json.loads((copied(source, path) / "config.json").read_text())
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    "keys, value, words",
    [
        (["dit"], [1], "dit is a list, and must be an object"),
        (["dit"], None, "dit is a NoneType"),
        (["dit", "width"], "384", "dit.width='384' must be int"),
        (["dit", "width"], 1e3, "dit.width=1000.0 must be int"),
        (["dit", "width"], 10**12, "is more than any model has"),
        (["dit", "text_depth"], 10**6, "is more than any model has"),
        (["dit", "width"], -4, "config.json|does not fit"),
        (["dit", "heads"], 0, "config.json"),
        (["dit", "rope"], 1, "dit.rope=1 must be bool"),
        (["dit", "patch"], [1, "2", 2], "dit.patch="),
        (["dit", "patch"], 2, "dit.patch=2 must be"),
        (["dit", "attention_pattern"], {"a": 1}, "dit.attention_pattern="),
        (["dit", "dtype"], "float7", "dit.dtype='float7' must be"),
        (["dit", "dtype"], ["float32"], "dit.dtype="),
        (["dit", "colour"], "red", "dit.colour is not a setting"),
        (["times", "std"], "wide", "times.std='wide' must be float"),
        (["objective", "path"], 3, "objective.path=3 must be str"),
        (["latent_size"], "big", "latent_size='big' must be"),
        (["latent_size"], [1, 2], "latent_size="),
        (["kind"], {"dit": 1}, "not a diffusion transformer"),
    ],
)
def test_a_config_of_wrong_types(keys, value, words, tmp_path, capsys):
    model = changed(MODEL, tmp_path / "model", *keys, to=value)
    with pytest.raises(ValueError, match=words):
        ms.VideoPipeline.load(model)
    assert main(["generate", "a red circle", f"--model={model}", f"--out={tmp_path / 'out'}"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    if keys[0] in ("dit", "times", "objective") and value not in (-4, 0):
        with pytest.raises(ValueError, match=words):
            settings_of(model)


@pytest.mark.parametrize("value", [5, {"imported": 7}, None, []])
def test_notes_on_the_training_are_not_needed(value, tmp_path):
    ms.VideoPipeline.load(changed(MODEL, tmp_path / "model", "training", to=value))


@pytest.mark.parametrize(
    "keys, value, words",
    [
        (["latent_mean"], "x", "latent_mean='x' must be 16 numbers"),
        (["latent_mean"], [0.0], "must be 16 numbers"),
        (["latent_std"], [0.0] * 16, "a spread above 0"),
        (["latent_std"], [None] * 16, "must be 16 numbers"),
        (["vae", "base"], "8", "vae.base='8' must be int"),
        (["vae"], 3, "vae is a int"),
    ],
)
def test_a_codecs_config_of_wrong_types(keys, value, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Codec.load(changed(CODEC, tmp_path / "codec", *keys, to=value))


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"a": NaN', "\ud800"])
def test_a_config_that_is_no_object(text, tmp_path):
    model = copied(MODEL, tmp_path / "model")
    (model / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="config.json is"):
        load_model(model)


def test_weights_that_do_not_fit_the_config(tmp_path):
    model = changed(MODEL, tmp_path / "model", "dit", "mlp_ratio", to=3.0)
    with pytest.raises(ValueError, match="does not fit: for params/blocks"):
        ms.VideoPipeline.load(model)
    weights = load_file(model / "model.safetensors")
    for name in (f"{next(iter(weights))}/more", "params"):
        save_file(weights | {name: np.ones(1, np.float32)}, model / "model.safetensors")
        with pytest.raises(ValueError, match="model.safetensors is no tree"):
            ms.VideoPipeline.load(model)


def test_codecs_encoders_and_losses_that_do_not_fit_their_config(exported, tmp_path):
    with pytest.raises(ValueError, match="does not fit: for params/"):
        Codec.load(changed(CODEC, tmp_path / "codec", "vae", "base", to=8))
    with pytest.raises(ValueError, match="does not fit: for params/"):
        TextEncoder.load(changed(exported, tmp_path / "t5", "t5", "width", to=16))
    config = LPIPSConfig()
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), perceptual.abstract_params(config))
    LPIPS(config, params).export(tmp_path / "lpips", {})
    LPIPS.load(tmp_path / "lpips")
    weights = load_file(tmp_path / "lpips/model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name][..., :1]}, tmp_path / "lpips/model.safetensors")
    (tmp_path / "lpips/checksums.json").unlink()
    with pytest.raises(ValueError, match=f"does not fit: for {name}"):
        LPIPS.load(tmp_path / "lpips")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64, ml_dtypes.float8_e5m2])
def test_numbers_that_are_not_finite_are_seen(dtype, value):
    array = np.linspace(-5, 5, 60).astype(dtype).reshape(5, 12)
    assert is_finite(array) and is_finite(array[:0]) and is_finite(np.ones(3, np.int32))
    assert is_finite(np.full(3, ml_dtypes.finfo(dtype).max)) and is_finite(np.full(3, ml_dtypes.finfo(dtype).min))
    array[3, 4] = value
    assert not is_finite(array) and not is_finite(array.T)


@pytest.mark.parametrize("source", [MODEL, CODEC])
def test_damaged_weights_are_named_at_load(source, tmp_path):
    model = copied(source, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    name = sorted(weights)[3]
    weights[name].flat[-1] = np.nan
    save_file(weights, model / "model.safetensors")
    with pytest.raises(
        ValueError, match=f"1 of {len(weights)} parameters hold numbers that are NaN or infinite, {name}"
    ):
        load_model(model)
    shapes = {k: jax.ShapeDtypeStruct(v.shape, np.float32) for k, v in weights.items()}
    from flax.traverse_util import unflatten_dict

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    with pytest.raises(ValueError, match="weights that are NaN"):
        load_params_onto(model, unflatten_dict(placed, sep="/"))


PROMPT = "a red circle moves left on a black background"


def test_a_result_that_is_not_finite_is_an_error(tmp_path, capsys):
    """Finite weights that overflow: no black picture, and no exit code 0."""
    model = copied(MODEL, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    last = weights["params/patch_out/kernel"].astype(np.float32)
    save_file(weights | {"params/patch_out/kernel": np.full_like(last, 3e38)}, model / "model.safetensors")
    command = ["generate", PROMPT, "--frames=5", "--steps=2", f"--out={tmp_path / 'out'}", f"--model={model}"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "latents that are NaN or infinite" in error and "Traceback" not in error
    assert not list((tmp_path / "out").rglob("*.mp4"))
    batch = tmp_path / "jobs.jsonl"
    batch.write_text(json.dumps({"prompt": PROMPT, "frames": 5}) + "\n")
    assert main(["generate", f"--batch={batch}", *command[3:]]) == 1
    line = json.loads((tmp_path / "out/manifest.jsonl").read_text())
    assert "NaN or infinite" in line["error"]


def test_a_result_of_one_colour_is_said(tmp_path, caplog, monkeypatch):
    """Weights of zero are finite, and a codec of zeros decodes to one colour."""
    codec = copied(CODEC, tmp_path / "codec")
    weights = load_file(codec / "model.safetensors")
    save_file({k: np.zeros_like(v) if "decoder" in k else v for k, v in weights.items()}, codec / "model.safetensors")
    model = changed(MODEL, tmp_path / "model", "codec", to=Codec.load(codec).latents)
    flags = [f"--model={model}", f"--codec={codec}", f"--out={tmp_path / 'out'}", "--frames=5", "--steps=1"]
    assert main(["generate", PROMPT, *flags]) == 1
    assert "shows one colour only" in caplog.text
    [video] = (tmp_path / "out").glob("*.mp4")
    record = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert len(record["one_colour"]) == 3 and video.exists()


def test_a_precision_may_be_chosen(tmp_path):
    pipelines = {dtype: ms.VideoPipeline.load(dtype=dtype) for dtype in ("float32", "bfloat16")}
    for dtype, pipeline in pipelines.items():
        assert pipeline.config.dtype == dtype
        assert {x.dtype for x in jax.tree.leaves(pipeline.params)} == {np.dtype(dtype)}
    assert sum(x.nbytes for x in jax.tree.leaves(pipelines["bfloat16"].params)) * 2 == sum(
        x.nbytes for x in jax.tree.leaves(pipelines["float32"].params)
    )
    request = [ms.Request(PROMPT, (5, 48, 48))]
    full, half = (p.sample(request, steps=2, progress=False)[0] for p in pipelines.values())
    assert 1e-4 < np.abs(full - half).mean() < 0.1 * np.abs(full).mean()
    with pytest.raises(ValueError, match="dtype='float8' must be one of float32, bfloat16, int8"):
        ms.VideoPipeline.load(dtype="float8")
    flags = ["--frames=1", "--steps=1", f"--out={tmp_path}", "--dtype=float32"]
    assert main(["generate", PROMPT, *flags]) == 0
    [record] = tmp_path.glob("*.json")
    assert json.loads(record.read_text())["model"]["dtype"] == "float32"
    assert main(["generate", f"--reproduce={record}", f"--out={tmp_path / 'again'}"]) == 0


def test_a_tokenizers_own_code_is_not_run_and_not_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from minisora_jax.models.captions import load_tokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on stdin"))
    with pytest.raises(ValueError, match="holds no tokenizer that transformers reads"):
        load_tokenizer(tmp_path, 100, 20)
    assert not marker.exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small text encoder, as `export_model` writes every kind of model."""
    config = T5Config(50, 24, 3, 8, 40, 1, dtype="float32")
    ids = jax.ShapeDtypeStruct((1, 4), np.int32)
    shapes = jax.eval_shape(TextEncoder(config, {}).module.init, jax.random.key(0), ids, ids)
    params = jax.tree.map(lambda x: np.random.default_rng(x.size).standard_normal(x.shape).astype(np.float32), shapes)
    folder = tmp_path_factory.mktemp("exported") / "encoder"
    TextEncoder(config, params).export(folder, {"imported": "small"})
    return folder


def test_every_flipped_bit_is_seen(exported, tmp_path):
    TextEncoder.load(exported)
    rng = np.random.default_rng(0)
    for name in ("model.safetensors", "config.json", "checksums.json"):
        content = (exported / name).read_bytes()
        for _ in range(60):
            folder, data = Path(shutil.copytree(exported, tmp_path / "flipped")), bytearray(content)
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            (folder / name).write_bytes(data)
            if name == "checksums.json" and json_or_none(data.decode("utf-8", "replace")) == json.loads(content):
                shutil.rmtree(folder)  # white space
                continue
            with pytest.raises(ValueError):
                TextEncoder.load(folder)
            shutil.rmtree(folder)


def test_an_export_over_another_has_its_own_checksums(exported, tmp_path):
    folder = copied(exported, tmp_path / "encoder")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/spiece.model").write_text("x")
    encoder = TextEncoder.load(folder)
    encoder.export(folder, {"imported": "again"})
    (folder / "tokenizer/spiece.model").write_text("y")  # not ours
    assert TextEncoder.load(folder).hash != encoder.hash
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("again", "edited"))
    with pytest.raises(ValueError, match="config.json is damaged.* If you changed it on purpose, delete"):
        TextEncoder.load(folder)
    (folder / "checksums.json").unlink()
    TextEncoder.load(folder)


def test_a_published_export_is_checked_when_it_is_imported(exported, tmp_path, capsys):
    assert main(["export", str(exported), str(tmp_path / "theirs")]) == 0
    weights = tmp_path / "theirs/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert main(["import", "umt5-small", str(tmp_path / "theirs"), f"--out={tmp_path / 'ours'}"]) == 2
    assert "model.safetensors is damaged: expected crc32" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path, name):
    (copied(CODEC, tmp_path / "codec") / name).unlink()
    os.mkfifo(tmp_path / "codec" / name)
    with pytest.raises(OSError, match="a named pipe"):
        load_model(tmp_path / "codec")
