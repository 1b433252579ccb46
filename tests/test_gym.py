"""Games as clips with actions: each frame beside the action that led to it, the same bytes by any worker."""

import pickle

import gymnasium
import numpy as np
import pytest

from minisora_jax.curation.prepare import prepare
from minisora_jax.sources.clips import Records
from minisora_jax.sources.spec import open_source

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
