"""Published weights to a fine-tuned model and back, from the command line: small random Wan in diffusers' layout."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from needs import needs
from random_weights import draw  # noqa: E402

from minisora_jax.cli import main  # noqa: E402
from minisora_jax.data.latents import Latents, write_latents  # noqa: E402
from minisora_jax.io.model_dir import load_model, load_params_onto  # noqa: E402
from minisora_jax.media.video import read_clip_frames  # noqa: E402
from minisora_jax.media.video_writer import write_video  # noqa: E402
from minisora_jax.models.captions import BYTES, class_captions  # noqa: E402
from minisora_jax.models.codec import Codec  # noqa: E402
from minisora_jax.models.dit import DiT, abstract_batch, abstract_params  # noqa: E402
from minisora_jax.models.t5 import T5Config, T5Encoder  # noqa: E402
from minisora_jax.models.vae import VAE  # noqa: E402
from minisora_jax.parallel.mesh import SHARDS, MeshConfig, make_mesh, with_shardings  # noqa: E402
from minisora_jax.toy.shapes import Shapes  # noqa: E402
from minisora_jax.training.metrics import Metrics  # noqa: E402
from minisora_jax.training.optim import OptimConfig, make_optimizer  # noqa: E402
from minisora_jax.training.step import init_state  # noqa: E402
from minisora_jax.types import LatentClip  # noqa: E402
from minisora_jax.weights import dit, sd_vae, t5, wan_vae  # noqa: E402
from minisora_jax.weights.checkpoint import Checkpoint  # noqa: E402
from minisora_jax.weights.presets import CODECS, TEXT_ENCODERS, TRANSFORMERS  # noqa: E402
from minisora_jax.weights.rules import export_lazily  # noqa: E402

pytestmark = pytest.mark.slow
WAN_VAE = dataclasses.replace(wan_vae.WAN_21, base=4, latent_channels=4, residual_blocks=1)
SD_VAE = dataclasses.replace(sd_vae.CONFIG, base=32, multipliers=(1, 1, 1, 1), residual_blocks=1)
UMT5 = T5Config(64, 24, 3, 8, 40, 2, shared_bias=False, dtype="float32")
_SMALL = dict(width=32, depth=2, heads=2, dtype="float32")
WAN = dataclasses.replace(
    dit.CONFIGS["wan2.1-t2v-1.3b"], **_SMALL, latent_channels=4, mlp_ratio=40 / 32, text_features=24, caption_tokens=16
)
DIT = dataclasses.replace(dit.CONFIGS["dit-xl-2-256"], **_SMALL | dict(width=24), base_grid=8, classes=11)


def abstract_vae(config):
    return jax.eval_shape(VAE(config).init, jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3)))


def publish(path: Path, rules, abstract) -> None:
    """A published file with random weights, drawn by name; copies of a tensor are drawn once."""
    copied = {name: rule.names[0] for rule in rules if rule.copies for name in rule.names}
    blank = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), abstract)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: draw(copied.get(k, k), x.shape) for k, x in export_lazily(blank, rules).items()}, path)


def publish_tokenizer(directory: Path, captions: list[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    PreTrainedTokenizerFast = needs("transformers").PreTrainedTokenizerFast

    words = sorted({word for caption in captions for word in caption.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words][: UMT5.vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    fast.save_pretrained(directory)


def minisora(*argv):
    assert main([str(a) for a in argv]) == 0


def refused(capsys, *argv) -> str:
    assert main([str(a) for a in argv]) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A directory with the published files, the models imported from them, clips, and a latent cache of those."""
    at = tmp_path_factory.mktemp("project")
    ids = jnp.zeros((1, 4), jnp.int32)
    publish(at / "theirs/transformer/model.safetensors", dit.rules(WAN), abstract_params(WAN))
    publish(at / "theirs/vae/model.safetensors", wan_vae.rules(WAN_VAE), abstract_vae(WAN_VAE))
    abstract_t5 = jax.eval_shape(T5Encoder(UMT5).init, jax.random.key(0), ids, ids)
    publish(at / "theirs/text_encoder/model.safetensors", t5.rules(UMT5), abstract_t5)
    publish(at / "classes/transformer/model.safetensors", dit.rules(DIT), abstract_params(DIT))
    publish(at / "classes/vae/model.safetensors", sd_vae.rules(SD_VAE), abstract_vae(SD_VAE))

    clips = Shapes("train", 20, size_THW=(5, 32, 32))
    publish_tokenizer(at / "theirs/tokenizer", [clips[i].caption for i in range(20)])
    (at / "my_clips").mkdir()
    for i in range(20):
        write_video(at / f"my_clips/{i:02}.mp4", clips[i].frames_THWC, clips[i].fps)
        (at / f"my_clips/{i:02}.txt").write_text(clips[i].caption)

    with pytest.MonkeyPatch.context() as patch:
        statistics = dict(latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4)
        small = lambda presets, name, **changes: patch.setitem(
            presets, name, dataclasses.replace(presets[name], **changes)
        )
        small(CODECS, "wan2.1-vae", config=WAN_VAE, **statistics)
        small(CODECS, "sd-vae", config=SD_VAE)
        small(TEXT_ENCODERS, "umt5-xxl", config=UMT5)
        small(TRANSFORMERS, "wan2.1-t2v-1.3b", config=WAN)
        small(TRANSFORMERS, "dit-xl-2-256", config=DIT)
        minisora("import", "wan2.1-vae", at / "theirs/vae", f"--out={at / 'wan-vae'}")
        minisora("import", "umt5-xxl", at / "theirs/text_encoder", f"--out={at / 'umt5'}")
        minisora("import", "wan2.1-t2v-1.3b", at / "theirs/transformer", f"--out={at / 'wan'}")
        minisora("import", "sd-vae", at / "classes/vae", f"--out={at / 'sd-vae'}")
        minisora("import", "dit-xl-2-256", at / "classes/transformer", f"--out={at / 'dit'}")
    minisora("prepare", at / "my_clips", at / "clips")
    minisora("encode", at / "clips", at / "latents", f"--codec={at / 'wan-vae'}", f"--text-encoder={at / 'umt5'}")
    return at


def finetune(at, workdir="run", data="latents", init="wan", codec="wan-vae", changes=(), config="dit_finetune"):
    settings = ["pack.tokens=16", "pack.text_tokens=64", "run.log_every=1", "run.save_every=3", "dit.remat=none"]
    return [
        "train",
        f"--config=configs/{config}.py:data={at / data},steps=5",
        *[f"--config.{s}" for s in (*settings, *changes)],
        f"--init={at / init}",
        f"--codec={at / codec}",
        f"--workdir={at / workdir}",
    ]


def test_an_adapter_trained_used_merged_and_given_back(project, capsys, tmp_path):
    at = project
    base = [f"--codec={at / 'wan-vae'}", f"--text-encoder={at / 'umt5'}"]
    sampling = ["--size=32x32", "--frames=5", "--steps=2", "--upscale=1", *base]
    flags = [*finetune(at, tmp_path / "run"), "--lora", "rank=2,alpha=4,base=float32", "--config.run.optim.warmup=1"]
    minisora(*flags, "--config.run.optim.learning_rate=0.05")
    adapter = tmp_path / "run/export"
    minisora("inspect", adapter)
    assert "lora.rank" in capsys.readouterr().out

    def made(name, model, *loras, more=()):
        adapters = [part for lora in loras for part in ("--lora", lora)]
        flags = [f"--model={model}", *sampling, *adapters, *more, f"--out={tmp_path / name}"]
        minisora("generate", "a red circle", *flags)
        path = next(line for line in capsys.readouterr().out.splitlines() if line.endswith(".mp4"))
        return read_clip_frames(path)[0].astype(int), path

    plain, _ = made("plain", at / "wan")
    adapted, path = made("adapted", at / "wan", adapter)
    changed = np.abs(adapted - plain).mean()  # files are compressed, so equal to the bit they need not be
    same = lambda frames: np.abs(frames - adapted).mean() < 0.1 * changed
    assert changed > 1
    minisora("generate", "--reproduce", path, f"--out={tmp_path / 'again'}")
    assert "the same to the bit" in capsys.readouterr().out
    half, _ = made("half", at / "wan", f"{adapter}:0.5", f"{adapter}:0.5")
    assert same(half)
    on_mesh, _ = made("mesh", at / "wan", adapter, more=["--mesh=data=1,fsdp=2,ring=2,tensor=2"])
    assert same(on_mesh)
    nothing, _ = made("nothing", at / "wan", f"{adapter}:0")
    assert np.array_equal(nothing, plain)

    minisora("merge", at / "wan", adapter, f"--out={tmp_path / 'merged'}")
    merged, _ = made("of-merged", tmp_path / "merged")
    assert same(merged)
    for style in ("peft", "comfyui", "kohya"):
        minisora("export", adapter, tmp_path / f"{style}.safetensors", "--as", style)
        published, _ = made(style, at / "wan", tmp_path / f"{style}.safetensors")
        assert same(published)
    minisora("import", "lora", tmp_path / "kohya.safetensors", f"--base={at / 'wan'}", f"--out={tmp_path / 'imported'}")
    imported, _ = made("imported", at / "wan", tmp_path / "imported")
    assert same(imported)
    said = refused(capsys, "generate", "a red circle", "--lora", adapter)
    assert "is an adapter of another model than" in said and "and the model wants" in said
    said = refused(capsys, "generate", "a red circle", f"--model={adapter}")
    assert "is an adapter, not a whole model: name its base by --model" in said
    said = refused(capsys, "generate", "a red circle", "--lora", tmp_path / "none.safetensors")
    assert "there is no adapter" in said


def test_every_task_of_a_text_to_video_model(project, capsys, tmp_path):
    """As published it is held to what is given. An adapter of configs/wan_tasks_lora.py takes it clean."""
    at, adapter = project, tmp_path / "run/export"
    minisora("inspect", at / "wan")
    assert (
        "text_to_video, video_to_video; not trained for, what is given is held: image_to_video"
        in capsys.readouterr().out
    )
    minisora(*finetune(at, tmp_path / "run", config="wan_tasks_lora", changes=["run.optim.warmup=1"]))
    minisora("inspect", adapter)
    assert "image_to_video, interpolate, video_to_video, inpaint, outpaint, extend" in capsys.readouterr().out
    clip = at / "my_clips/00.mp4"
    picture, mask = tmp_path / "first.png", tmp_path / "mask.png"
    Image.fromarray(frames := read_clip_frames(clip)[0][0]).save(picture)
    Image.fromarray(np.where(np.arange(32)[:, None, None] < 16, 255, 0 * frames).astype(np.uint8)).save(mask)
    model = [f"--model={at / 'wan'}", f"--codec={at / 'wan-vae'}", f"--text-encoder={at / 'umt5'}", "--upscale=1"]
    for name, flags, frames in (
        ("image to video", ["--image", picture, "--frames=9"], 9),
        ("interpolate", ["--first", picture, "--last", picture, "--frames=9"], 9),
        ("video to video", ["--video", clip, "--strength=0.5"], 5),
        ("inpaint", ["--video", clip, "--mask", mask], 5),
        ("outpaint", ["--video", clip, "--size=48x48"], 5),
        ("extend", ["--video", clip, "--extend", "both", "0.5"], 13),
        ("transition", ["--transition", clip, clip], 25),
        ("long video", ["--frames=105", "--size=16x16"], 105),
        ("loop", ["--loop", "--frames=12", "--size=32x32"], 12),
    ):
        for lora in ([], ["--lora", adapter]):
            minisora("generate", "a red circle", *flags, *model, *lora, "--steps=2", f"--out={tmp_path / 'made'}")
            path = next(line for line in capsys.readouterr().out.splitlines() if line.endswith(".mp4"))
            made = read_clip_frames(path)[0]
            assert abs(len(made) - frames) <= 3, (name, len(made))
            if name == "image to video":
                assert np.abs(made[0].astype(int) - read_clip_frames(clip)[0][0]).mean() < 40


def test_fine_tuned_interrupted_sampled_and_given_back(project, monkeypatch, capsys, caplog):
    at = project
    latents = Latents(at / "latents")
    assert latents.text["path"] == str(at / "umt5") and latents.empty_text_LE.shape == (1, 24)
    assert latents[0].text_LE.shape[1] == 24 and latents[0].text_LE.std() > 0.1

    class Killed(BaseException):
        pass

    def kill(self, advance=Metrics.advance, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == 5:
            raise Killed
        advance(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Metrics, "advance", kill)
        main(finetune(at))
    caplog.set_level("INFO", "minisora")
    minisora(*finetune(at))
    assert "resumed at step 3 of 5" in caplog.text and "'fsdp': 8" in caplog.text
    rows = [json.loads(line) for line in (at / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5] and all(np.isfinite(r["loss"]) for r in rows)

    (before, _), (after, config) = load_model(at / "wan"), load_model(at / "run/export")
    assert config["text"] == latents.text and config["codec"] == latents.codec_hash
    assert config["dit"]["caption_tokens"] == 16 and config["times"]["distribution"] == "logit-normal"
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(a).max(), before, after))
    assert 0 < max(moved) < 0.02  # from the imported weights, by a few small steps and the export's rounding

    sampling = ["--size=32x32", "--frames=5", "--steps=2", f"--codec={at / 'wan-vae'}", "--upscale=1"]
    capsys.readouterr()
    minisora("generate", "a red circle", f"--model={at / 'run/export'}", *sampling, f"--out={at / 'out'}")
    tuned = read_clip_frames(capsys.readouterr().out.splitlines()[0])[0]
    assert tuned.shape == (5, 32, 32, 3)
    imported = [f"--model={at / 'wan'}", f"--text-encoder={at / 'umt5'}"]
    minisora("generate", "a red circle", *imported, *sampling, f"--out={at / 'out2'}")
    assert np.abs(read_clip_frames(capsys.readouterr().out.splitlines()[0])[0].astype(int) - tuned).mean() < 8

    minisora("export", at / "run/export", at / "back")
    theirs, back = load_file(at / "theirs/transformer/model.safetensors"), Checkpoint(at / "back")
    assert {k: v.shape for k, v in theirs.items()} == {k: back.shape(k) for k in back.names}
    assert json.loads((at / "back/config.json").read_text())["_class_name"] == "WanTransformer3DModel"


def test_weights_go_straight_to_their_devices(project):
    mesh, optimizer = make_mesh(MeshConfig(data=2, fsdp=4)), make_optimizer(OptimConfig(), 10)
    with jax.set_mesh(mesh):
        fresh = jax.eval_shape(lambda: init_state(abstract_init(WAN), optimizer))
        placed = load_params_onto(project / "wan", with_shardings(fresh.params, mesh))
        state = jax.jit(lambda p: init_state(p, optimizer))(placed)
    kernel = placed["params"]["blocks"]["joint"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, SHARDS, "tensor") and kernel.addressable_shards[0].data.shape == (
        2,
        8,
        40,
    )
    # The layout of all of the state is that of a run that starts from random weights: the step is compiled once.
    specs = lambda tree: [x.sharding.spec for x in jax.tree.leaves(with_shardings(tree, mesh))]
    strip = lambda spec: tuple(spec)[: max((i + 1 for i, a in enumerate(spec) if a), default=0)]
    assert [strip(a) for a in specs(fresh)] == [strip(x.sharding.spec) for x in jax.tree.leaves(state)]
    jax.tree.map(np.testing.assert_array_equal, placed, load_model(project / "wan")[0])


def abstract_init(config):
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_batch(config))
    return DiT(config).init(jax.random.key(0), batch.tokens_BSP, jnp.zeros((1, 1)), batch)


def test_a_class_is_asked_for_by_its_number(project, capsys):
    at = project
    model = [
        f"--model={at / 'dit'}",
        f"--codec={at / 'sd-vae'}",
        "--size=32x32",
        "--steps=2",
        f"--out={at / 'classes'}",
    ]
    capsys.readouterr()
    minisora("generate", "7", *model, "--frames=1", "--upscale=1", "--sampler=ddim")
    assert (at / "classes/7-0.png").exists()
    assert "frames=5: this model makes images; use --frames 1" in refused(capsys, "generate", "7", *model, "--frames=5")
    said = refused(capsys, "generate", "a dog", *model, "--frames=1")
    assert "prompt 'a dog' must be the number of a class, 0 to 9" in said
    said = refused(capsys, *finetune(at, "no", init="dit"))
    assert "dit learns from 10 classes, and the latent cache was made with the text encoder" in said
    assert "encode the clips with --classes" in said


def test_a_model_of_classes_learns_from_images_of_its_classes(project, capsys):
    at, codec_hash = project, Codec.load(project / "sd-vae").latents
    names, image = [f"class {i}" for i in range(10)], (1, 8, 8)
    write(at / "labels", codec_hash, 4, class_captions(11, names), names[3], image)
    minisora(*finetune(at, "labelled", "labels", "dit", "sd-vae", changes=["pack.rows=8", "run.steps=1"]))
    assert load_model(at / "labelled/export")[1]["text"] == {"encoder": "classes", "names": names}
    write(at / "fewer", codec_hash, 4, class_captions(4, names[:3]), names[2], image)
    said = refused(capsys, *finetune(at, "no", "fewer", "dit", "sd-vae"))
    assert "learns from 10 classes, and the latent cache has 3 classes: 'class 0'" in said
    assert "encode the clips with --classes=FILE of all 10 names" in said
    write(at / "films", codec_hash, 4, class_captions(11, names), names[3], (2, 8, 8))
    assert "makes images, since its tokens have no place in time, and 8 of the 8 clips are videos" in refused(
        capsys, *finetune(at, "no", "films", "dit", "sd-vae")
    )


def write(directory: Path, codec_hash: str, channels: int, captions=BYTES, caption="", size=(1, 4, 4)) -> None:
    """A latent cache of 8 blank clips."""
    blank, [text, empty] = np.zeros((*size, channels), np.float32), captions.encode([caption, ""])
    clips = [LatentClip(blank, blank, text, caption, 8.0, "blank")] * 8
    write_latents(directory, clips, codec_hash=codec_hash, text=captions.record, empty_text_LE=empty)


def test_what_does_not_fit_is_said_before_anything_is_compiled(project, capsys, monkeypatch):
    at = project
    codec_hash = Latents(at / "latents").codec_hash
    write(at / "bytes", codec_hash, 4)
    write(at / "wide", codec_hash, 16)
    monkeypatch.setattr("minisora_jax.training.diffusion_task.train", None)
    said = refused(capsys, *finetune(at, "no", data="bytes"))
    assert (
        f"caption features of width 1: {at / 'wan'} reads 24" in said and "minisora encode --text-encoder=DIR" in said
    )
    said = refused(capsys, *finetune(at, "no", codec="sd-vae"))
    assert "codec" in said and codec_hash in said
    said = refused(capsys, *finetune(at, "no", data="wide"))
    assert f"the latent cache has 16 channels: {at / 'wan'} takes 4" in said
    said = refused(capsys, *finetune(at, "no", changes=["dit.width=64"]))
    assert f"{at / 'wan'} does not fit" in said and "it has (2, 2, 16), the config wants (2, 2, 32)" in said
    said = refused(capsys, *finetune(at, "no", init="umt5"))
    assert "holds a 't5' model, not a diffusion transformer" in said
    assert not (at / "no").exists()


def test_what_an_imported_model_does_not_name_is_asked_for(project, capsys):
    at = project
    sample = ["generate", "x", "--size=32x32", "--frames=5", f"--model={at / 'wan'}"]
    assert "does not name its codec: give it by --codec=DIR (made by `minisora import wan2.1-vae`)" in refused(
        capsys, *sample
    )
    said = refused(capsys, *sample, f"--codec={at / 'wan-vae'}")
    assert "reads features of width 24 and does not name its text encoder" in said and "import umt5-xxl" in said
    said = refused(capsys, *sample, "--codec=minisora_jax/bundled/codec")
    assert "takes latents of 4 channels, codec minisora_jax/bundled/codec makes 16" in said
