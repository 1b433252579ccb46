"""The pack plan: every clip once, nothing over the limits, pure, and full."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisora_jax.data.conditioning import ConditioningConfig
from minisora_jax.data.epochs import Epochs, _shuffled, curriculum, parse_mixture, within
from minisora_jax.data.packing import PackConfig, PackPlan, StagedPlan, pack_rows, token_counts
from minisora_jax.data.rows import Segment, pack_segments, patchify, unpatchify


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 32)), min_size=1, max_size=200),
    st.integers(0, 5),
    st.integers(1, 9),
)
def test_every_clip_once_and_no_row_overfull(clips, epoch, slots):
    tokens, text = np.array(clips).T
    config = PackConfig(tokens=64, text_tokens=48, slots=slots, rows=4, window=50)
    rows = pack_rows(tokens, text, config, seed=3, epoch=epoch)
    assert sorted(np.concatenate(rows)) == list(range(len(clips)))
    for row in rows:
        assert tokens[row].sum() <= 64 and text[row].sum() <= 48 and len(row) <= slots
    again = pack_rows(tokens, text, config, seed=3, epoch=epoch)
    assert all(np.array_equal(a, b) for a, b in zip(rows, again))


def test_epochs_differ():
    tokens = np.random.default_rng(0).integers(1, 64, 500)
    a, b = (pack_rows(tokens, np.ones(500, int), PackConfig(64, 64, 16, 4), 0, e) for e in (0, 1))
    assert not all(np.array_equal(x, y) for x, y in zip(a, b))


def test_rows_are_full_on_images_and_video_where_padding_and_buckets_are_not():
    path = Path(__file__).parent.parent / "docs" / "packing_table.py"
    spec = importlib.util.spec_from_file_location("packing_table", path)
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    config = PackConfig(tokens=4096, text_tokens=8192, slots=128, rows=8)
    shares = table.useful_shares(table.web_mix(2000), (1, 2, 2), config)
    assert shares["packed (this project)"] >= 0.97
    assert shares["packed (this project)"] > shares["bucketed by (t, h, w)"] > shares["padded to the longest"]


def test_captions_that_fill_rows_up_are_spread():
    """Long clips with short captions share rows with short clips that have long ones, within 2 % of the least rows."""
    rng = np.random.default_rng(0)
    tokens, text = rng.integers(16, 1025, 4000), 4 * rng.integers(8, 64, 4000)
    config = PackConfig(4096, 1100, 64, 8)
    rows = pack_rows(tokens, text, config, 0, 0)
    assert len(rows) <= 1.02 * max(tokens.sum() / 4096, text.sum() / 1100)


def test_rows_of_a_step_have_like_cost():
    tokens = np.random.default_rng(0).integers(1, 1024, 4000)
    cost = lambda rows: np.array([np.sum(tokens[r].astype(float) ** 2) for r in rows])
    rows = pack_rows(tokens, np.ones(4000, int), PackConfig(1024, 1024, 64, rows=16), 0, 0)
    costs = cost(rows)[: len(rows) // 16 * 16]
    straggler = lambda c: np.mean(c.reshape(-1, 16).max(1) / c.reshape(-1, 16).mean(1))
    assert straggler(costs) < 0.7 * straggler(np.random.default_rng(1).permutation(costs)) + 0.3
    assert straggler(costs) < 1.2


def test_a_clip_too_long_for_a_row_is_named():
    with pytest.raises(ValueError, match=r"clip 1 has 99 video and 4 caption tokens, a row has 64"):
        pack_rows(np.array([3, 99]), np.array([4, 4]), PackConfig(64, 64, 4, 1), 0, 0)


def test_a_plan_goes_on_where_it_was_left():
    tokens = np.random.default_rng(0).integers(1, 64, 300)
    make = lambda: PackPlan(tokens, np.ones(300, int), PackConfig(64, 64, 16, 4), seed=1, per_step=8)
    whole, late = make(), make()
    steps = [whole.rows(n) for n in range(60)]
    for n in (59, 7, 30):  # a fresh plan asked in any order
        assert all(np.array_equal(a, b) for a, b in zip(late.rows(n), steps[n]))
    epoch_of = [whole.epoch(n) for n in range(60)]
    assert epoch_of == sorted(epoch_of) and epoch_of[-1] >= 1
    first = [i for n in range(60) if epoch_of[n] == 0 for r in steps[n] for i in r]
    assert len(first) == len(set(first))


def test_a_plan_of_parts_shows_every_clip_once_and_remembers_where_they_begin(tmp_path):
    tokens = np.random.default_rng(0).integers(1, 64, 1000).astype(np.int32)
    file = tmp_path / "steps.json"

    def make(remember=None):
        epochs = Epochs((1000,), seed=1, part_size=300)
        return PackPlan(tokens, np.ones(1000, np.int32), PackConfig(64, 64, 16, 2), 1, 2, epochs, remember)

    plan, steps = make(file), []
    while plan.epoch(len(steps)) == 0:
        steps.append(plan.rows(len(steps)))
    seen = [int(i) for rows in steps for row in rows for i in row]
    assert len(seen) == len(set(seen)) > 0.97 * 1000  # each of 4 parts leaves at most one row out
    late = make(file)
    assert all(map(np.array_equal, late.rows(len(steps) - 1), steps[-1]))
    assert len(late._parts) == 1  # nothing before was planned
    assert all(map(np.array_equal, make().rows(len(steps) - 1), steps[-1]))


def test_what_a_plan_remembers_of_other_clips_or_settings_is_not_believed(tmp_path, caplog):
    rng = np.random.default_rng(0)
    tokens, others = (rng.integers(1, 64, 1000).astype(np.int32) for _ in range(2))
    usual = dict(tokens=tokens, slots=16, seed=1, part_size=300, members=None)

    def plan(remember=None, **changes):
        s = usual | changes
        epochs = Epochs((1000,), seed=s["seed"], members=(s["members"],), part_size=s["part_size"])
        text, pack = np.ones(1000, np.int32), PackConfig(64, 64, s["slots"], 2)
        return PackPlan(s["tokens"], text, pack, s["seed"], 2, epochs, remember)

    file = tmp_path / "steps.json"
    some = np.sort(rng.permutation(1000)[:900])
    changes = [dict(tokens=others), dict(slots=2), dict(seed=2), dict(part_size=200), dict(members=some)]
    for change in changes:
        plan(file).rows(400)
        caplog.clear()
        plan(file).rows(400)
        assert not caplog.text
        assert all(map(np.array_equal, plan(file, **change).rows(400), plan(**change).rows(400)))
        assert "steps.json is of other clips or settings" in caplog.text
        late = plan(file, **change)  # written anew
        late.rows(400)
        assert len(late._parts) == 1
    for broken in ("[0, 1, 2]", '{"of": ', "3"):
        file.write_text(broken)
        assert all(map(np.array_equal, plan(file).rows(400), plan().rows(400)))


def test_a_curriculum_begins_with_images():
    sizes = np.array([(1, 2, 2, 4)] * 60 + [(3, 2, 2, 4)] * 60 + [(5, 4, 4, 4)] * 60)
    stages = []
    for stage in curriculum("4:1x2x2 8:3x9x9", steps=20):
        tokens, text = token_counts(sizes, (1, 2, 2))
        epochs = Epochs((180,), 0, members=(within(sizes, stage),))
        stages.append((stage, PackPlan(tokens, text, PackConfig(24, 96, 16, 2), 0, 2, epochs)))
    plan = StagedPlan(stages)
    longest = [max(tokens[i] for row in plan.rows(n) for i in row) for n in range(20)]
    assert max(longest[:4]) == 1 and max(longest[4:8]) == 3 and max(longest[8:]) == 20 == plan.max_segment_len
    assert len({plan.epoch(n) // 1000 for n in (0, 4, 8)}) == 3


def test_a_clip_that_no_stage_takes_may_be_too_long_for_a_row():
    sizes = np.array([(1, 2, 2, 4)] * 60 + [(9, 8, 8, 4)])
    tokens, text = token_counts(sizes, (1, 2, 2))
    [stage] = curriculum("20:1x2x2", steps=20)
    plan = lambda members: PackPlan(tokens, text, PackConfig(24, 96, 16, 2), 0, 2, Epochs((61,), 0, members=members))
    small = plan((within(sizes, stage),))
    assert small.max_segment_len == 1 and all(i < 60 for n in range(20) for row in small.rows(n) for i in row)
    with pytest.raises(ValueError, match="1 clips do not fit a row; clip 60 has 144 video"):
        plan(())


@pytest.mark.parametrize("text", ["1000", "5:1x2", "9:1x1x1 4:2x2x2"])
def test_a_curriculum_that_cannot_be_read_is_named(text):
    with pytest.raises(ValueError, match="curriculum"):
        curriculum(text, 100)


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(0.1, 3)), min_size=1, max_size=4),
    st.floats(0.5, 5),
    st.integers(20, 200),
)
def test_data_sets_come_by_their_shares_and_go_round(sets, temperature, part_size):
    counts, weights = zip(*sets)
    epochs = Epochs(counts, 3, weights, temperature, part_size=part_size)
    assert sum(epochs.entries) == sum(counts)
    exact = np.array(weights) * np.array(counts) ** (1 / temperature)
    np.testing.assert_allclose(epochs.entries, sum(counts) * exact / exact.sum(), atol=1)
    parts = [epochs.part(n) for n in range(3 * epochs.parts)]
    seen = np.concatenate([clips for _, clips in parts])
    times = np.bincount(seen, minlength=sum(counts))
    assert [e for e, _ in parts] == sorted(e for e, _ in parts) and max(len(c) for _, c in parts) <= part_size
    ends = np.cumsum(counts)
    for end, count, entries in zip(ends, counts, epochs.entries):
        mine = times[end - count : end]
        assert mine.sum() == 3 * entries and mine.max() - mine.min() <= 1  # nobody twice before all others once
    again = Epochs(counts, 3, weights, temperature, part_size=part_size)
    assert np.array_equal(again.part(2)[1], parts[2][1] if len(parts) > 2 else again.part(2)[1])


def test_shuffles_are_even():
    """Where each of 10 things goes, over 5000 shuffles: as often to each place, within the noise of a fair draw."""
    moved = np.array([_shuffled(np.arange(10), 10, 0, stream) for stream in range(5000)])
    assert (np.sort(moved, axis=1) == np.arange(10)).all()
    counts = np.array([np.bincount(moved[:, i], minlength=10) for i in range(10)])
    assert counts.std() < 1.3 * np.sqrt(5000 * 0.1 * 0.9)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 2]))
def test_unpatchify_undoes_patchify(t, h, w, c, p):
    x = np.random.default_rng(0).standard_normal((t, h * p, w * p, c))
    patches = patchify(x, (1, p, p))
    assert patches.shape == (t, h, w, p * p * c)
    np.testing.assert_array_equal(patches[0, 0, 0].reshape(p, p, c), x[0, :p, :p])
    np.testing.assert_array_equal(unpatchify(patches, (1, p, p)), x)


def test_latents_that_are_not_whole_patches_are_refused():
    with pytest.raises(ValueError, match="clip 1 has latents 1x3x2"):
        token_counts(np.array([(1, 2, 2, 4), (1, 3, 2, 4)]), (1, 2, 2))


def test_a_row_is_laid_out_clip_after_clip():
    make = lambda n, size: Segment(np.full((n, 2), n, np.float32), np.ones(n, bool), size, np.full((4, 1), n), 8.0)
    batch = pack_segments([[make(4, (1, 2, 2)), make(3, (3, 1, 1))]], PackConfig(9, 12, 3, 1))
    assert batch.segment_BS.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0, 0]]
    assert batch.text_segment_BL.tolist() == [[1] * 4 + [2] * 4 + [0] * 4]
    assert batch.position_BS3[0, 4:7].tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
    assert batch.size_BG3[0].tolist() == [[1, 2, 2], [3, 1, 1], [0, 0, 0]]
    with pytest.raises(ValueError, match="row 0 is full: 12 of 9"):
        pack_segments([[make(4, (1, 2, 2))] * 3], PackConfig(9, 12, 3, 1))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
def test_known_tokens_always_leave_something_to_learn(t, h, w, seed):
    every = ConditioningConfig(0.1, 0.1, 0.1, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1)
    cond_mask = every.draw((t, h, w), np.random.default_rng(seed))
    assert cond_mask.shape == (t, h, w) and not cond_mask.all()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 7), st.integers(0, 10_000))
def test_a_data_set_may_fix_its_masks_to_both_ends(t, seed):
    known_t = ConditioningConfig().draw((t, 1, 1), np.random.default_rng(seed), "between").reshape(-1)
    assert not known_t.all() and known_t[0] == (t > 1)
    if t > 2:
        unknown = np.flatnonzero(~known_t)
        assert known_t[-1] and (np.diff(unknown) == 1).all()  # one stretch, and not at an end


def test_clips_of_fixed_masks_are_shown_whole_or_from_their_second_latent_frame_on():
    clips, frames = np.arange(4000), np.full(4000, 6)
    fixed = clips % 2 == 0
    spans = ConditioningConfig(middle=0.1).stretches(clips, frames, 0, 0, fixed)
    assert set(map(tuple, spans[fixed])) == {(0, 6), (1, 6)} and abs((spans[fixed, 0] == 1).mean() - 0.5) < 0.05
    assert (spans[~fixed] == ConditioningConfig(middle=0.1).stretches(clips, frames, 0, 0)[~fixed]).all()


def test_a_mixture_names_weights_and_masks():
    parts = parse_mixture("data/a + gs://b/c*0.5 + d@between + e@f/g*2@prefix")
    assert [(p.directory, p.weight, p.mask) for p in parts] == [
        ("data/a", 1.0, ""), ("gs://b/c", 0.5, ""), ("d", 1.0, "between"), ("e@f/g", 2.0, "prefix"),
    ]  # fmt: skip
    for wrong in ("", "a + ", "a*1.2.3", "*2"):
        with pytest.raises(ValueError, match="must look like DIR"):
            parse_mixture(wrong)


def test_known_shares_are_kept():
    config = ConditioningConfig()
    draws = [config.draw((5, 2, 2), np.random.default_rng(i)) for i in range(3000)]
    first_only = np.mean([d[0].all() and not d[1:].any() for d in draws])
    assert abs(np.mean([not d.any() for d in draws]) - 0.6) < 0.05
    assert first_only >= config.first - 0.02


def test_stretches_are_of_the_middle_and_of_the_clip_not_of_its_company():
    config, clips, frames = ConditioningConfig(middle=0.3), np.arange(20_000), np.tile([1, 2, 5, 9], 5000)
    spans = config.stretches(clips, frames, seed=3, epoch=2)
    cut = spans[:, 0] > 0
    assert not cut[frames == 1].any() and abs(cut[frames > 1].mean() - 0.3) < 0.02
    assert (spans[~cut] == np.stack([0 * frames, frames], -1)[~cut]).all()
    assert (spans[:, 0] < spans[:, 1]).all() and (spans[:, 1] <= frames).all()
    assert set(map(tuple, spans[(frames == 5) & cut])) == {(a, b) for a in range(1, 5) for b in range(a + 1, 6)}
    assert (config.stretches(clips[7:9], frames[7:9], 3, 2) == spans[7:9]).all()
    assert (config.stretches(clips, frames, 3, 3) != spans).any()
