"""Data sets: keyed draws, pools that grow, clips at rest."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import media
import toy
from training import Processes


class Numbers:
    """A data set whose example is its key's first draw."""

    def example(self, rng):
        return {"x": torch.tensor(rng.random())}


def test_a_batch_is_the_same_however_it_is_split():
    """Six samples on one process are the six of two and of three processes, in order."""
    whole = data.batch(Numbers(), 1, 5, range(6))["x"]
    for world in (2, 3):
        parts = [data.batch(Numbers(), 1, 5, Processes(rank, world, "cpu").samples(6))["x"]
                 for rank in range(world)]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, data.batch(Numbers(), 1, 6, range(6))["x"])


def test_frames_of_an_example_are_two_of_one_head():
    """Reference and target differ, are of one identity, and x_m is drawn from the target's points."""
    frames = data.toy_frames(0, identities=3, frames=3, size=64, workers=0)
    frames.grow(0)
    pairs = [frames.example(np.random.default_rng(k)) for k in range(200)]
    differ = [p for p in pairs if not torch.equal(p["reference"], p["target"])]
    assert abs(1 - len(differ) / 200 - data.SAME) < .08
    drawn = differ[0]
    assert drawn["reference"].shape == drawn["x_m"].shape == (3, 64, 64)
    assert (drawn["reference"] - drawn["target"]).abs().max() > .1
    who = [k for k in range(3) if any(torch.equal(media.to_float(p), drawn["target"])
                                      for p in frames.pictures[k])]
    assert len(who) == 1
    assert any(torch.equal(media.to_float(p), drawn["reference"]) for p in frames.pictures[who[0]])
    x_m = media.to_float(data.draw(drawn["landmarks"].numpy(), 64))
    assert torch.equal(x_m, drawn["x_m"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pool_grows_in_order_and_on_time(workers):
    """At each step the pool holds min(limit, first + per_step step) items, made in order."""
    pool = data.GrowingPool(abs, 2, .5, 5, workers)
    held, sizes = [], []
    for step in range(0, 10, 2):
        held += pool.grow(step)
        sizes.append(len(held))
    pool.close()
    assert held == [0, 1, 2, 3, 4] and sizes == [2, 3, 4, 5, 5]


def test_a_resumed_pool_is_the_same():
    """A pool that starts at step 6 holds what one that grew there holds."""
    grown = data.GrowingPool(abs, 2, .5, 9, 0)
    a = [x for step in range(7) for x in grown.grow(step)]
    assert a == list(data.GrowingPool(abs, 2, .5, 9, 0).grow(6))


def test_training_never_meets_held_out_heads():
    """Seeds of any run stay below the held-out range."""
    seeds = [data.training_seed(s, k) for s in range(5) for k in range(200)]
    assert max(seeds) < toy.HELD_OUT and len(set(seeds)) == 1000


def test_motion_of_a_clip_has_its_parts_aligned():
    """Landmarks, poses and speech have a row a frame; another kind of augmentation changes sound."""
    made = data.toy_motion(0, seconds=1.2)
    assert made["landmarks"].shape == (30, 70, 2) and made["pose"].shape == (30, 3)
    assert made["speech"].shape == (30, 320)
    assert made["x_m"].shape == (30, 128, 128, 3) and not made["steered"]
    assert "x_m" not in data.toy_motion(0, seconds=1.2, drawn=False)
    clean = data.toy_motion(0, seconds=1.2, augment=False)
    assert np.array_equal(made["landmarks"], clean["landmarks"])
    assert not np.array_equal(made["speech"], clean["speech"])


def test_every_fourth_clip_turns_far_and_stays_there():
    """Steered heads reach beyond 15 degrees on each side and rest; the others hardly ever do."""
    poses = np.stack([data.toy_motion(k, drawn=False)["pose"] for k in range(16)])
    assert [data.toy_motion(k, seconds=.4, drawn=False)["steered"] for k in range(4)] == [0, 0, 0, 1]
    far, near = poses[3::4], np.delete(poses, range(3, 16, 4), 0)
    assert (np.abs(far) > 12).mean() > 3 * (np.abs(near) > 12).mean()
    assert (far[..., 1].max() > 15) and (far[..., 1].min() < -15) and np.ptp(far[..., 0]) > 25
    still = np.abs(np.diff(far, axis=1)).max(-1) < .3                          # degrees a frame
    assert .2 < still.mean() < .9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("toys")
    data.main(["toy", "--clips", "2", "--seconds", "1", "--size", "64", "--workers", "0",
               "--out", str(out)])
    return out


def test_clips_at_rest_hold_the_renderers_truth(folder):
    """index.json lists them; the video, its sound and the numbers are those of the renderer."""
    assert json.loads((folder / "index.json").read_text())["clips"] == [
        "toy_000000.mp4", "toy_000001.mp4"]
    path = data.clip_paths(folder)[1]
    clip, held = toy.make_clip(data.training_seed(0, 1), 1.0, 64), data.read_clip(path)
    np.testing.assert_allclose(held["landmarks"], clip.landmarks, atol=1e-4)
    np.testing.assert_allclose(held["pose"], clip.pose, atol=1e-4)
    frames = np.stack(list(media.read_video(path)))
    assert len(frames) == 25 and np.abs(frames.astype(int) - clip.frames()).mean() < 4
    sound = media.read_sound(path)[:16000]
    assert np.corrcoef(sound, clip.sound)[0, 1] > .9


def test_training_sees_no_difference_between_clips_and_renderer(folder):
    """clip_frames gives the same kind of example as toy_frames, clip_motion as toy_motion."""
    example = data.clip_frames(folder, 64, stride=5).example(np.random.default_rng(0))
    rendered = data.toy_frames(0, 2, 2, 64, 0)
    rendered.grow(0)
    for name, value in rendered.example(np.random.default_rng(0)).items():
        assert example[name].shape == value.shape and example[name].dtype == value.dtype
    paths = data.clip_paths(folder)
    motion, wanted = (make(0, augment=False, **more) for make, more in (
        (data.clip_motion, {"paths": paths, "size": 64}),
        (data.toy_motion, {"seconds": 1.0, "size": 64})))
    for name in wanted:
        assert np.shape(motion[name]) == np.shape(wanted[name])
    assert np.corrcoef(motion["speech"].ravel(), wanted["speech"].ravel())[0, 1] > .9
    assert not np.array_equal(data.clip_motion(0, paths, 64)["speech"], motion["speech"])   # augmented


def test_the_same_command_goes_on(folder):
    """Whole clips are kept as they are; the missing half of one is made again."""
    first, second = data.clip_paths(folder)
    stamp = first.stat().st_mtime_ns
    second.with_suffix(".npz").unlink()
    data.main(["toy", "--clips", "2", "--seconds", "1", "--size", "64", "--workers", "0",
               "--out", str(folder)])
    assert first.stat().st_mtime_ns == stamp and second.with_suffix(".npz").exists()


def test_broken_data_sets_are_named(folder, tmp_path):
    """No index, an index of something else, a clip without numbers, frames of another size."""
    with pytest.raises(media.UserError, match="index.json"):
        data.clip_paths(tmp_path)
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(media.UserError, match="index.json"):
        data.clip_paths(tmp_path)
    with pytest.raises(media.UserError, match="other flags"):
        data.main(["toy", "--clips", "1", "--out", str(tmp_path)])
    with pytest.raises(media.UserError, match="none.npz"):
        data.read_clip(Path(tmp_path) / "none.mp4")
    with pytest.raises(media.UserError, match="64x64"):
        data.clip_frames(folder, 128)
    with pytest.raises(media.UserError, match="64x64"):
        data.clip_motion(0, data.clip_paths(folder), 128)
    with pytest.raises(media.UserError, match="other flags"):
        data.main(["toy", "--clips", "2", "--seconds", "1", "--size", "64", "--seed", "5",
                   "--out", str(folder)])


def test_clips_whose_frames_are_not_valid(folder, tmp_path):
    """A clip whose first frame is not valid is refused; one with a single valid frame is left out."""
    paths = [tmp_path / path.name for path in data.clip_paths(folder)]
    for path, valid in zip(paths, ([False] + [True] * 24, [True] + [False] * 24)):
        held = data.read_clip(folder / path.name)
        (tmp_path / path.name).write_bytes((folder / path.name).read_bytes())
        np.savez(path.with_suffix(".npz"), **(held | {"valid": np.array(valid)}))
    (tmp_path / "index.json").write_text(json.dumps({"clips": [path.name for path in paths]}))
    with pytest.raises(media.UserError, match="toy_000000.*not valid"):
        data.clip_motion(0, paths, 64)
    assert len(data.clip_frames(tmp_path, 64, stride=5).pictures) == 1


def test_rare_looks_come_more_often_in_training(monkeypatch):
    """Of 60 heads that the VAE learns from over 40 % wear glasses and over 40 % a beard."""
    made, real = [], toy.random_identity
    monkeypatch.setattr(toy, "random_identity", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    for k in range(60):
        data._portraits(k, seed=0, frames=1, size=32)
    assert np.mean([who.glasses > 0 for who in made]) > .4
    assert np.mean([who.beard > 0 for who in made]) > .4
