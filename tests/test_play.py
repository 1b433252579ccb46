"""Walking through a world: keys, what visitors say, their turns and places, and scripts that become videos."""

import json
import time

import numpy as np
import pytest
from small_world import ACTIONS, SIZE, write_world

from minisora_jax.cli import main
from minisora_jax.commands.play import read_script
from minisora_jax.curation.prepare import prepare
from minisora_jax.generate import streaming
from minisora_jax.generate.streaming import StreamConfig
from minisora_jax.generate.world import World
from minisora_jax.media.video import read_clip_frames, read_note
from minisora_jax.media.video_writer import write_video
from minisora_jax.ui import visitors as module
from minisora_jax.ui.controls import held_action, keys_of
from minisora_jax.ui.uploads import InvalidInput
from minisora_jax.ui.visitors import AHEAD, Visitors, Wish


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def world(names):
    model, codec = (name.partition("=")[2] for name in names)
    return World.load(model, codec, StreamConfig(steps=1, window=3))


@pytest.fixture
def place(world):
    here = Visitors(world, seed=7, most=2)
    yield here
    here.close()


def wait(what):
    for _ in range(6000):
        if what():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to it in 60 s")


def say(place, visitor, number, **wish):
    place.hear(visitor.token, json.dumps({"number": number} | wish).encode())


# ---- Keys


@pytest.mark.parametrize(
    "actions, keys",
    [
        (ACTIONS, {"move forward": "ArrowUp w", "turn left": "ArrowLeft a", "turn right": "ArrowRight d",
                   "move left": "q", "move right": "e", "nothing": ""}),
        (("noop", "left", "right", "down", "up", "do", "sleep"),
         {"left": "ArrowLeft a", "right": "ArrowRight d", "down": "ArrowDown s", "up": "ArrowUp w", "do": "1",
          "sleep": "2", "noop": ""}),
        (("nothing", "attack", "move backward", "attack and move backward"),
         {"nothing": "", "attack": "1", "move backward": "ArrowDown s", "attack and move backward": ""}),
        (("noop", "move left", "move right"), {"noop": "", "move left": "ArrowLeft a", "move right": "ArrowRight d"}),
        (tuple(f"action {n}" for n in range(12)),
         {f"action {n}": str((n + 1) % 10) if n < 10 else "" for n in range(12)}),
        ((), {}),
    ],
)  # fmt: skip
def test_keys_follow_from_the_names_of_actions(actions, keys):
    assert {name: " ".join(own) for name, own in keys_of(actions).items()} == keys


def test_of_what_is_held_the_newest_counts_or_the_action_of_both():
    assert held_action(ACTIONS, []) == "nothing"
    assert held_action(ACTIONS, ["move forward", "turn left"]) == "turn left"
    both = ("nothing", "run", "turn", "turn and run")
    assert held_action(both, ["run", "turn"]) == held_action(both, ["turn", "run"]) == "turn and run"
    buttons = ("run", "turn", "jump")  # pressed or not, each by itself
    assert held_action(buttons, ["jump", "run"]) == "jump + run" and held_action(buttons, []) is None


# ---- Visitors


@pytest.mark.parametrize(
    "message, words",
    [
        (b"x" * 5000, "at most 4096 bytes"),
        (b"\xff\xfe\x00", "a JSON object of actions, caption, number, resets, seen"),
        (b"[" * 4000, "a JSON object"),
        (b"[1]", "a JSON object"),
        (b'{"token": 1}', "a JSON object"),
        (b'{"number": true}', "number=True must be a whole number"),
        (b'{"seen": -1}', "seen=-1 must be"),
        (b'{"resets": 1e3}', "resets=1000.0 must be"),
        (b'{"number": %s}' % (b"9" * 4000), "number|JSON object"),
        (b'{"actions": "nothing"}', "a list of at most 16 names"),
        (b'{"actions": [["nothing"]]}', "a list of at most 16 names"),
        (json.dumps({"actions": ["nothing"] * 17}).encode(), "a list of at most 16 names"),
        (b'{"actions": ["fly \\u001b[2J"]}', r"'fly .* is no action of this world; those are nothing, move right"),
        (json.dumps({"caption": "x" * 301}).encode(), "at most 300 characters"),
        (b'{"caption": 3}', "caption must be a text"),
        (b'{"caption": "\\ud800"}', "half of a character"),
    ],
)
def test_a_message_of_a_stranger_is_refused_in_a_sentence(message, words):
    with pytest.raises(InvalidInput, match=words) as refused:
        Wish.read(message, ACTIONS)
    assert "\x1b" not in str(refused.value) and len(str(refused.value)) < 300


def test_a_walk_is_what_its_player_makes_and_waits_for_who_looks(world, place):
    visitor = place.enter(lambda: None)
    say(place, visitor, 1, actions=["turn left"])
    wait(lambda: visitor.made == AHEAD + 1)
    time.sleep(0.3)
    assert visitor.made == len(visitor.pictures) == AHEAD + 1, "six more frames were due, and nobody saw the first"
    with pytest.raises(InvalidInput):
        say(place, visitor, 2, actions=["fly"])
    with pytest.raises(KeyError):
        place.hear("another", b"{}")
    say(place, visitor, 3, seen=10**9)
    time.sleep(0.3)
    assert visitor.made == AHEAD + 1, "who says that they saw more, and reads nothing, gets no more"
    say(place, visitor, 2, actions=["move left"], seen=1)
    assert visitor.wish.number == 3, "an older message comes late"
    heard = []
    while len(heard) < 12:
        wait(lambda: visitor.pictures)
        picture = visitor.pictures.popleft()
        heard.append(picture.heard)
        assert picture.frame == len(heard) and picture.data[:2] == b"\xff\xd8"
        say(place, visitor, 4, actions=["move forward"], seen=picture.frame)
    assert heard == sorted(heard) and heard[-1] == 4
    # The same actions again give the same picture.
    player, frames = world.player(7), []
    for number in heard:
        frames.append(player.step({0: "nothing", 1: "turn left", 3: "nothing", 4: "move forward"}[number])[0])
    assert module._jpeg(frames[-1]) == picture.data
    visitor.pictures.clear()
    compiled, caption = streaming._next._cache_size(), "a large world with many more words than the other"
    say(place, visitor, 5, resets=1, caption=caption, seen=10**9)
    wait(lambda: visitor.pictures and visitor.pictures[-1].heard == 5)
    assert visitor.seed == 8 and visitor.player.caption == caption
    assert streaming._next._cache_size() == compiled, "other words make nobody wait"


def test_places_are_few_and_free_again(place, monkeypatch):
    first, second = place.enter(lambda: None), place.enter(lambda: None)
    assert first.token != second.token and len(first.token) > 20 and first.seed != second.seed
    with pytest.raises(InvalidInput, match="all 2 places of this world are taken"):
        place.enter(lambda: None)
    place.leave(first)
    third = place.enter(lambda: None)
    woken = []
    second.wake = lambda: woken.append(second.end)
    monkeypatch.setattr(module, "AWAY", 0.5)
    say(place, third, 1, actions=["turn left"])
    wait(lambda: len(place) == 0)
    assert woken and "nothing was pressed" in second.end and "nothing was pressed" in third.end


def test_visitors_take_turns_at_the_rate_of_the_world(world, place):
    both = [place.enter(lambda: None) for _ in range(2)]
    wait(lambda: all(v.made for v in both))
    since, made = time.monotonic(), [v.made for v in both]
    while time.monotonic() - since < 1:
        for v in both:
            v.pictures.clear()
            say(place, v, 1, seen=v.made)
        time.sleep(0.005)
    counts = [v.made - n for v, n in zip(both, made)]
    assert max(counts) <= world.fps + 2 and min(counts) >= 4, counts


def test_a_failure_ends_one_walk_and_not_the_world(world, place, monkeypatch, caplog):
    ill, well = place.enter(lambda: None), place.enter(lambda: None)
    wait(lambda: ill.made and well.made)
    monkeypatch.setattr(ill.player, "step", lambda _: 1 / 0)
    ill.pictures.clear()
    say(place, ill, 1, seen=10**9)
    wait(lambda: ill.end)
    assert "the world failed here" in ill.end and "ZeroDivisionError" in caplog.text
    before = well.made
    well.pictures.clear()
    say(place, well, 1, seen=10**9)
    wait(lambda: well.made > before)


# ---- Scripts


def test_scripts():
    assert read_script("move forward*2, turn left ,move left * 1", ACTIONS) == [
        "move forward",
        "move forward",
        "turn left",
        "move left",
    ]
    assert read_script("turn left + move forward*2", ACTIONS) == ["turn left + move forward"] * 2
    for text, words in [
        ("fly*3", "'fly' is no action of this world; those are nothing, move right"),
        ("", "NAME.TIMES"),
        ("turn left*x", "no action"),
        ("turn left*0", "0 actions; a script has 1 to"),
        ("turn left*999999", "999999 actions"),
    ]:
        with pytest.raises(ValueError, match=words):
            read_script(text, ACTIONS)


def test_a_script_becomes_a_video_with_its_record(names, tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (5, *SIZE, 3), np.uint8)
    write_video(tmp_path / "clips/a.mp4", frames, 20)
    prepare(tmp_path / "clips", tmp_path / "data", cell=16, need_caption=False)
    out = tmp_path / "walk.mp4"
    own = [*names, "--steps=1", "--window=3", f"--out={out}", f"--start={tmp_path / 'data'}"]
    assert main(["play", *own, "--actions", "move forward*3, turn left"]) == 0
    assert f"{out}: 5 frames" in capsys.readouterr().out
    video, _ = read_clip_frames(out)
    assert video.shape == (5, 4 * SIZE[0], 4 * SIZE[1], 3)
    record = json.loads((tmp_path / "walk.mp4.json").read_text())
    assert record["walk"]["actions"] == "move forward*3, turn left" and record["stream"]["window"] == 3
    assert record["frames"] == 5 and json.loads(read_note(out))["walk"] == record["walk"]
    for wrong, words in [
        (["--actions", "fly"], "'fly' is no action of this world"),
        (["--actions", "turn left", "--sinks=9"], "sinks=9 from 0 to"),
        (["--actions", "turn left", "--guidance=nan"], "guidance=nan must be a finite number"),
        (["--visitors=0"], "--visitors 0 must be from 1 to 64"),
        (["--actions", "turn left", "--out=walk.txt"], "ends in '.txt'"),
        (["--actions", "turn left", "--start=nowhere"], "nowhere is not a prepared data set"),
    ]:
        assert main(["play", *own, *wrong]) == 2
        assert words in capsys.readouterr().err
