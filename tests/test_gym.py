"""Games as clips with actions: each frame beside the action that led to it, the same bytes by any worker."""

import dataclasses
import json
import pickle
import sys

import gymnasium
import numpy as np
import pytest

import minisora_jax as ms
from minisora_jax.curation.prepare import prepare
from minisora_jax.curation.stages import Curation, Sizes, clips_of
from minisora_jax.data.latents import Latents, write_latents
from minisora_jax.inspection.datasets import action_facts
from minisora_jax.io.retry import DataError
from minisora_jax.io.user_function import UserFunctionError
from minisora_jax.media.video_writer import write_video
from minisora_jax.sources.clips import Records
from minisora_jax.sources.spec import open_source
from minisora_jax.types import LatentClip

GREY = (40, 90, 140, 190)  # of the picture after each action


class Echo(gymnasium.Env):
    """Its picture is the last action's grey, with the number of the step in a corner; 30 steps an episode."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}
    action_space = gymnasium.spaces.Discrete(4)
    observation_space = gymnasium.spaces.Discrete(100)

    def __init__(self, render_mode=None, length=30):
        self.render_mode, self.length = render_mode, length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.shade, self.steps = int(self.np_random.integers(256)), 0
        return 0, {}

    def step(self, action):
        self.shade, self.steps = GREY[action], self.steps + 1
        return self.steps, 0.0, self.steps == self.length, False, {}

    def render(self):
        frame = np.full((32, 32, 3), self.shade, np.uint8)
        frame[:8, :8] = self.steps
        return frame


gymnasium.register("Echo-v0", Echo)
SPEC = "gym:test_gym:Echo-v0?policy=random&episodes=4&frames=13"


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("echo")
    prepare(SPEC, out, held_out=0.4)
    return out


def test_each_frame_stands_beside_the_action_that_led_to_it(data):
    records = Records(data)
    assert records.actions == ("action 0", "action 1", "action 2", "action 3")
    starts = set()
    for clip in (records[i] for i in range(len(records))):
        assert clip.actions_TA.dtype == np.float32 and clip.actions_TA.shape == (13, 4)
        assert clip.fps == 12 and clip.caption == "a game of echo"
        assert not clip.actions_TA[0].any() and (clip.actions_TA[1:].sum(1) == 1).all()
        assert (clip.frames_THWC[1:, -1, -1, 0] == np.array(GREY)[clip.actions_TA[1:].argmax(1)]).all()
        first = clip.frames_THWC[0, 0, 0, 0]
        assert (clip.frames_THWC[:, 0, 0, 0] == first + np.arange(13)).all() and clip.name.endswith(
            f"#{first}-{first + 13}"
        )
        starts.add(int(first))
    assert starts == {0, 13}, "30 frames are two clips of 13; the last 4 are too few"
    assert len(np.unique([records[i].actions_TA.tobytes() for i in range(len(records))])) == len(records)


def test_workers_and_repetitions_write_the_same_bytes(data, tmp_path):
    source = pickle.loads(pickle.dumps(open_source(SPEC)))
    for i in (3, 0):
        ours, theirs = source[i].played(), open_source(SPEC)[i].played()
        assert (ours.data == theirs.data).all() and (ours.actions_TA == theirs.actions_TA).all()
    prepare(SPEC, tmp_path / "again", held_out=0.4, files_per_part=1)
    assert contents(tmp_path / "again") == contents(data)
    sides = [{Records(d)[i].name.split("#")[0] for i in range(len(Records(d)))} for d in (data, data / "heldout")]
    assert len(sides[0]) + len(sides[1]) == 4 and not sides[0] & sides[1], "an episode is on one side only"


class Arm(Echo):
    """Actions of all kinds, and no pictures but the observation's; it ends after 10 steps."""

    metadata = {"render_fps": 30}
    spaces = gymnasium.spaces
    action_space = spaces.Dict(
        {
            "grip": spaces.MultiBinary(2),
            "joint": spaces.Box(np.float32([-2, 0]), np.float32([2, 10])),
            "mode": spaces.MultiDiscrete([2, 3]),
            "turn": spaces.Box(-np.inf, np.inf, (1,)),
        }
    )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"view": np.zeros((16, 24, 1), np.uint8), "speed": np.zeros(2)}, {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        return (
            {"view": np.full((16, 24, 1), self.steps, np.uint8), "speed": np.zeros(2)},
            0.0,
            False,
            self.steps == 11,
            {},
        )


gymnasium.register("Arm-v0", Arm)


def test_all_kinds_of_actions_become_vectors(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def act(observation, space, rng):\n"
        "    return {'grip': np.array([0, 1], np.int8), 'joint': np.array([1, 7.5], np.float32),\n"
        "            'mode': np.array([1, 2]), 'turn': np.array([42], np.float32)}\n"
    )
    source = open_source(f"gym:test_gym:Arm-v0?policy={tmp_path}/mine.py:act&frame_skip=1&fps=5&caption=an arm")
    assert source.actions == (
        *("grip 0", "grip 1", "joint 0", "joint 1"),
        *("mode 0 = 0", "mode 0 = 1", "mode 1 = 0", "mode 1 = 1", "mode 1 = 2", "turn 0"),
    )
    media = source[2].played()
    assert media.fps == 5 and media.caption == "an arm" and media.data.shape == (11, 16, 24, 3)
    assert (media.actions_TA[1:] == np.float32([0, 1, 0.5, 0.5, 0, 1, 0, 0, 1, 42])).all()
    for policy in ("random", "sticky"):
        ours, theirs = (open_source(f"gym:test_gym:Arm-v0?policy={policy}")[1].played() for _ in range(2))
        assert (ours.actions_TA == theirs.actions_TA).all() and np.abs(ours.actions_TA[:, :9]).max() <= 1
        assert len(np.unique(ours.actions_TA[1:, 2])) > 1
    skipping = open_source("gym:test_gym:Echo-v0?frame_skip=3&seed=5&size=8x16")
    media = skipping[0].played()
    assert media.fps == 4 and (media.data[:, 0, 0, 0] == np.arange(0, 30, 3)).all() and media.data.shape[1:3] == (8, 16)


def test_a_latent_cache_stores_them_and_a_mixture_agrees(tmp_path):
    rng = np.random.default_rng(0)
    values = lambda *shape: rng.normal(size=shape).astype(np.float32)
    clip = LatentClip(values(3, 2, 2, 4), values(3, 2, 2, 4), values(3, 8), "a", 8.0, "n", None, values(9, 2))
    write = lambda name, clip, **options: write_latents(
        tmp_path / name, [clip], codec_hash="c", text={"encoder": "bytes"}, empty_text_LE=values(0, 8), **options
    )
    write("some", clip, actions=("left", "right"))
    write("none", dataclasses.replace(clip, actions_TA=None))
    write("other", clip, actions=("up", "down"))
    write("damaged", dataclasses.replace(clip, actions_TA=values(8, 2)), actions=("left", "right"))
    write("wide", clip, actions=("left",))
    mixture = ms.open_latents(f"{tmp_path}/none + {tmp_path}/some")
    assert mixture.actions == ("left", "right") and mixture[0].actions_TA is None
    assert (mixture[1].actions_TA == clip.actions_TA).all(), "as float32, not as float16"
    assert "actions" not in Latents(tmp_path / "none").shards.manifest["settings"]
    with pytest.raises(DataError, match="some has the actions left, right, and .*other has up, down"):
        ms.open_latents(f"{tmp_path}/some + {tmp_path}/other")
    with pytest.raises(DataError, match="it has 3 latent frames and 8 actions"):
        Latents(tmp_path / "damaged")[0]
    with pytest.raises(
        DataError, match=r"its actions are float32 \(9, 2\), and should be finite float32 \(frames, 1\)"
    ):
        Latents(tmp_path / "wide")[0]


@pytest.mark.slow
def test_encode_passes_them_into_the_cache(data, tmp_path):
    cache = ms.open_latents(ms.encode(data, tmp_path / "latents", progress=False))
    records = Records(data)
    assert cache.actions == records.actions and len(cache) == len(records)
    for i in range(len(cache)):
        assert (cache[i].actions_TA == records[i].actions_TA).all() and cache[i].actions_TA.dtype == np.float32
    none = ms.open_latents(ms.encode("shapes:train:2", tmp_path / "none", progress=False))
    assert none.actions == () and none[0].actions_TA is None
    assert "actions" not in none.caches[0].shards.manifest["settings"]
    assert ms.open_latents(f"{tmp_path}/none + {tmp_path}/latents").actions == cache.actions
    assert facts(Latents(tmp_path / "latents")) == facts(records)


def facts(clips):
    lines = action_facts(clips)
    columns = np.concatenate([clips[i].actions_TA[1:] for i in range(len(clips))]).sum(0)
    assert [int(value.split()[2]) for _, value in lines[1:]] == columns.tolist()
    return lines


def test_sets_whose_actions_differ_are_not_joined(data, tmp_path):
    prepare("gym:test_gym:Arm-v0?episodes=1", tmp_path / "arm", cell=8)
    with pytest.raises(DataError, match=r"has the actions action 0, action 1, .* and .*/arm has grip 0, .*cannot be"):
        open_source(f"{data} + {tmp_path}/arm")
    joined = open_source(f"shapes:train:2 + {data}")
    assert joined.actions == Records(data).actions and joined[0].actions_TA is None
    prepare(f"shapes:train:2 + {data}", tmp_path / "joined", max_frames=9)
    records = Records(tmp_path / "joined")
    assert records[0].actions_TA is None and (records[2].actions_TA == Records(data)[0].actions_TA[:9]).all()


def test_thinning_is_refused_and_shots_keep_the_frames(data, tmp_path):
    with pytest.raises(ValueError, match="has 12 frames per second and an action for each. fps=6 would leave out"):
        prepare(SPEC, tmp_path / "thin", fps=6)
    prepare(SPEC, tmp_path / "same", fps=12)
    assert len(Records(tmp_path / "same")) == 8
    media = open_source(SPEC)[0].played()
    short = dataclasses.replace(media, actions_TA=media.actions_TA[1:])
    [drop] = clips_of(short, Curation(Sizes(16, 9)))
    assert drop.reason == "actions differ" and drop.detail == "it has 30 frames and actions for 29"


@pytest.mark.parametrize(
    "options, words",
    [
        ("episodes=0", "episodes=0 must be 1 to"),
        ("frames=64", "frames=64 must be 1 \\+ 4\\*k; use 61 or 65"),
        ("size=64", "size=64 must be HEIGHTxWIDTH"),
        ("size=4x80", "size=4x80 must be 8 to 8192 pixels"),
        ("seed=one", "seed=one must be a whole number"),
        ("fps=nan", "fps=nan must be above 0"),
        ("policy=clever", "policy=clever must be random, sticky or FILE.py:FUNCTION"),
        ("policy=nowhere.py:f", "there is no file nowhere.py"),
        ("speed=2", "speed is no option of a gym source; those are policy, frame_skip"),
        ("seed=1&seed=2", "an option comes twice"),
        ("caption=", "caption= is empty"),
    ],
)
def test_bad_options_are_said(options, words):
    with pytest.raises(ValueError, match=words):
        open_source(f"gym:test_gym:Echo-v0?{options}")


def test_bad_environments_and_policies_are_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no environment Nowhere-v0"):
        open_source("gym:Nowhere-v0")
    with pytest.raises(ImportError, match=r"needs no_such_module: .*worlds"):
        open_source("gym:no_such_module:Maze-v0")
    with pytest.raises(ValueError, match="must look like gym:ENVIRONMENT"):
        open_source("gym:?seed=1")
    (tmp_path / "bad.py").write_text("def nine(observation, space, rng):\n    return 9\n")
    with pytest.raises(UserFunctionError, match=r"bad.py:nine gave 9, which is no action of Discrete\(4\)"):
        prepare(f"gym:test_gym:Echo-v0?policy={tmp_path}/bad.py:nine", tmp_path / "out")
    gymnasium.register("Short-v0", Echo, kwargs={"length": 5})
    with pytest.raises(DataError, match="3 too short"):
        prepare("gym:Short-v0?episodes=3", tmp_path / "short")
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    monkeypatch.setitem(sys.modules, "vizdoom.gymnasium_wrapper", None)
    with pytest.raises(ImportError, match=r"needs vizdoom: .*--extra worlds"):
        open_source("gym:VizdoomBasic-v1")


DOOM = "gym:VizdoomHealthGathering-v1?frame_skip=4&size=64x80&episodes=2&frames=17&steps=40"


def test_doom_is_played(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = open_source(DOOM)
    assert source.actions == ("nothing", "move forward", "turn right", "turn left") and source.fps == 35 / 4
    assert source[0].caption == "a game of doom: health gathering"
    ours, theirs = source[1].played(), open_source(DOOM)[1].played()
    assert ours.data.shape == (40, 64, 80, 3) and (ours.data == theirs.data).all()
    assert (ours.actions_TA == theirs.actions_TA).all() and (ours.actions_TA[1:].sum(1) == 1).all()
    # What the player sees moves to the right when they turn left, and the other way round.
    moves, frames, compared = ours.actions_TA.argmax(1), ours.data.astype(float).mean(3)[:, 30:50], 0
    for i in range(2, 40):
        if moves[i] == moves[i - 1] and moves[i] > 1:
            towards = 12 if moves[i] == 3 else -12
            moved = [np.abs(np.roll(frames[i - 1], shift, 1) - frames[i]).mean() for shift in (towards, -towards)]
            assert moved[0] < moved[1]
            compared += 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert compared and not files, "VizDoom leaves an empty folder where it runs, and no file"


@pytest.mark.slow
def test_two_processes_play_the_same_doom(tmp_path):
    for name, workers in (("one", 0), ("two", 2)):
        prepare(DOOM + "&policy=sticky", tmp_path / name, workers=workers, files_per_part=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(Records(tmp_path / "one")) == 4


def test_a_folder_has_them_in_a_table(tmp_path):
    clips = tmp_path / "clips"
    (clips / "sub").mkdir(parents=True)
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
    for name in ("a", "b", "sub/c"):
        write_video(clips / f"{name}.mp4", frames, 8)
        (clips / f"{name}.txt").write_text(name)
    before = open_source(clips).identity
    actions = np.arange(18).reshape(9, 2) / 4
    rows = [{"file": "sub/c.mp4", "actions": actions.tolist(), "names": ["left", "speed"]}]
    rows += [{**rows[0], "file": "b.mp4", "actions": actions[:8].tolist()}, {**rows[0], "file": "gone.mp4"}]
    rows += [{**rows[0], "names": ["left"]}, {**rows[0], "actions": [[1, 2], [3]]}, {"file": 3}, []]
    (clips / "actions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{\n")
    report = prepare(clips, tmp_path / "out", max_frames=5)
    assert report.counts == {"bad action row": 5, "actions without a clip": 1, "actions differ": 1}
    records = Records(tmp_path / "out")
    a, c = records[0], records[1]
    assert records.actions == ("left", "speed") and a.actions_TA is None and c.name == "sub/c.mp4"
    assert (c.actions_TA[1:] == actions[1:5].astype(np.float32)).all() and not c.actions_TA[0].any()
    assert open_source(clips).identity != before
    source = pickle.loads(pickle.dumps(open_source(clips)))
    assert (source[2].actions_TA == actions.astype(np.float32)).all()
    (clips / "actions.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps({**rows[1], "names": ["x", "y"]}))
    with pytest.raises(DataError, match="actions.jsonl:1 has the actions left, speed, and actions.jsonl:2 has x, y"):
        open_source(clips)
