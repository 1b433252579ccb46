"""The procedural world that is steered: its rules, and the reader of moves."""

import numpy as np

import minisora_jax as ms
from minisora_jax.toy.checker import observe
from minisora_jax.toy.steering import ACTIONS, MOVES, RADIUS, SIDE, Steer, moves_shown


def placed(at, thing, wall=None):
    env = Steer()
    env.reset(seed=0)
    env._at, env._thing, env._wall = np.array(at, float), np.array(thing, float), wall
    return env


def play(env, *names):
    return np.stack([env.render(), *(env.step(ACTIONS.index(name))[0] for name in names)])


def test_moves_are_read_off_true_pictures_and_other_commands_are_not():
    right = steps = wrong = 0
    rng = np.random.default_rng(0)
    for seed in range(24):
        env = Steer()
        env.reset(seed=seed)
        names = [str(name) for name in rng.choice(list(MOVES), 32)]
        frames, colour = play(env, *names), env._looks[0][0]
        shown, other = moves_shown(frames, names, colour), moves_shown(frames, names[::-1], colour)
        right, steps, wrong = right + shown.right, steps + shown.steps, wrong + other.right
    assert steps > 250 and right / steps > 0.97 and wrong / steps < 0.4


def test_the_second_shape_is_pushed_taken_and_dropped():
    env = placed((12, 24), (26, 24))
    play(env, "right", "right", "right")
    assert np.allclose(env._thing - env._at, [2 * RADIUS, 0]) and env._thing[0] > 30
    play(env, *["right"] * 12)
    assert env._thing[0] == SIDE - RADIUS and env._at[0] <= SIDE - 3 * RADIUS + 1  # it stops both
    apart = env._thing - env._at
    play(env, "take", "left", "up left")
    assert np.allclose(env._thing - env._at, apart)
    left = env._thing.copy()
    play(env, "take", "left", "left")
    assert np.array_equal(env._thing, left)


def test_a_jump_goes_up_and_comes_down_and_a_wall_hides():
    env = placed((12, 30), (40, 10))
    [seen] = [s for s in observe(play(env, "jump", *["stay"] * 5), 2) if s.colour == env._looks[0][0]]
    y = seen.path_T2[:, 1]
    assert y.min() < y[0] - 5 and abs(y[-1] - y[0]) < 0.5
    env = placed((8, 30), (40, 10), wall=15.0)
    [seen] = [s for s in observe(play(env, *["right"] * 8), 2) if s.colour == env._looks[0][0]]
    assert seen.returns or not seen.visible_T[4:6].any()


def test_it_is_a_source_of_clips_with_actions(tmp_path):
    ms.prepare("gym:minisora_jax.toy.steering:Steer-v0?policy=random&episodes=2&frames=33", tmp_path / "clips")
    clips = ms.open_clips(tmp_path / "clips")
    clip = clips[0]
    assert clip.frames_THWC.shape == (33, SIDE, SIDE, 3) and clip.fps == 8.0
    assert np.asarray(clip.actions_TA).shape == (33, len(ACTIONS)) and clips.actions == ACTIONS
