"""The rulers of evaluate.py in worlds where the right answer is known.

Here a picture is its own points: `frames` hold landmarks, the detector finds what it is given.
"""
import dataclasses

import numpy as np
import pytest
import torch

import detector
import evaluate
import sample
from landmarks import MOUTH, POINTS

PLAN = evaluate.Plan(clips=2, stride=2, seeded_clips=2, seeds=3, drivers=2, rounds=1, cross_frames=5)


@pytest.fixture()
def clips(monkeypatch):
    """Two held-out clips whose frames are their landmarks."""
    monkeypatch.setattr(detector, "find_in_crops", lambda finder, frames: np.asarray(frames))
    made = [evaluate.toy.make_clip(k, 4.0, 128, held_out=True) for k in (0, 1)]
    return [(clip, clip.landmarks) for clip in made]


def spoken(clips, monkeypatch, change=lambda points: points, asked=0.0, plan=PLAN):
    """score_speech when the model's answer is the truth with a change."""
    def generate(models, finder, clip, frames, seeds, how, sampler, steps, stride=1):
        track = np.stack([change(frames.copy())[::stride] for _ in seeds])
        return track, clip.pose[::stride] + asked
    monkeypatch.setattr(evaluate, "generate", generate)
    held = evaluate.score_speech(plan, clips, None, None, "predict", "dpmpp_2m", 20)
    return {name: value["value"] for name, value in held.items()}, held


def test_the_truth_itself_is_perfect(clips, monkeypatch):
    """Correlation, gain and spreads 1, the true number of blinks, no error of silence and pose."""
    value, held = spoken(clips, monkeypatch)
    perfect = {"lip_r": 1, "lip_r_mean8": 1, "lip_gain": 1, "pose_mae": 0, "silence_opening": 0,
               "seed_diversity": 0} | {f"pose_spread_{n}": 1 for n in ("pitch", "yaw", "roll")}
    for name, wanted in perfect.items():
        assert value[name] == pytest.approx(wanted, abs=2e-3), name
    assert value["blinks_per_minute"] == held["blinks_per_minute"]["truth"]
    assert held["lip_r"]["baseline"] < .9 and held["lip_r"]["shuffled"] < .5


def test_a_portrait_that_does_not_move_scores_nothing(clips, monkeypatch):
    """The first frame held: no gain, no spread, no blinks."""
    value, _ = spoken(clips, monkeypatch, lambda points: np.repeat(points[:1], len(points), 0))
    for name in ("lip_gain", "pose_spread_pitch", "pose_spread_yaw", "blinks_per_minute"):
        assert value[name] == pytest.approx(0, abs=1e-3), name


def test_noise_is_diversity_and_a_turned_head_is_an_error(clips, monkeypatch):
    """Points moved by N(0, 1) px in x and in y spread sqrt(2) px; poses asked three degrees off are
    three degrees wrong."""
    rng = np.random.default_rng(0)
    value, _ = spoken(clips, monkeypatch, lambda points: points + rng.normal(size=points.shape),
                      plan=dataclasses.replace(PLAN, seeds=40))
    assert value["seed_diversity"] == pytest.approx(np.sqrt(2), rel=.03)
    value, _ = spoken(clips, monkeypatch, asked=3.0)
    assert value["pose_mae"] == pytest.approx(3, abs=1e-3)


def test_seam_of_a_known_jerk(clips, monkeypatch):
    """Points go one pixel a frame and three at joins of windows: three times the movement."""
    steps = np.ones(300)
    steps[[72, 144, 216, 288]] = 3
    motion = torch.tensor(np.cumsum(steps))[:, None].float()
    for module, name, stand_in in ((sample, "encode_portrait", (None, None)),
                                   (sample, "hear", torch.zeros(300, 1)),
                                   (evaluate.control, "poses", None)):
        monkeypatch.setattr(module, name, lambda *_, out=stand_in: out)
    monkeypatch.setattr(evaluate.diffusion, "sample_motion", lambda *_: motion[None].split(72, 1))
    monkeypatch.setattr(sample, "decode", lambda models, z_a, track: [
        np.stack([track.numpy(), 0 * track.numpy()], -1).repeat(POINTS, 1)])
    models = type("", (), {"motion": None})()
    held = evaluate.score_long(PLAN, clips, models, None, "free", "dpmpp_2m", 20)
    assert held["seam"]["value"] == pytest.approx(3)


def test_redrawn_pictures_are_compared_where_they_should_be(monkeypatch):
    """A redrawing that errs by 51 of 255 in the mouth's box alone: 14 dB there, perfect elsewhere."""
    monkeypatch.setattr(detector, "find_in_crops", lambda finder, frames: clip.landmarks[1::2])
    monkeypatch.setattr(sample, "encode_portrait", lambda *_: (None, None))
    clip = evaluate.toy.make_clip(0, 1.0, 128, held_out=True)
    frames = np.full((25, 128, 128, 3), 100, np.uint8)

    def redraw(models, z_a, points):
        made = np.full((len(points), 128, 128, 3), 100, np.uint8)
        for picture, (x0, y0, x1, y1) in zip(made, evaluate.region_box(points, MOUTH)):
            picture[int(np.ceil(y0)):int(y1) + 1, int(np.ceil(x0)):int(x1) + 1] += 51
        return made
    monkeypatch.setattr(evaluate, "redraw", redraw)
    held = evaluate.score_self(PLAN, [(clip, frames)], None, None, [0.5])
    assert held["psnr_mouth"]["value"] == pytest.approx(10 * np.log10(4 / .16), abs=.2)
    assert held["psnr_eyes"]["value"] > 40 and 14.5 < held["psnr_self"]["value"] < 40
    assert held["akd_self"]["value"] == 0 and held["lip_r_ceiling"]["value"] == pytest.approx(1)


def test_cross_driving_is_measured_against_the_renderer(clips, monkeypatch):
    """A result that shows the driver's own points: no distance from them, the targets' shape away
    from the renderer's drawing, which lies nearer than the portrait held still."""
    monkeypatch.setattr(sample, "encode_portrait", lambda *_: (None, None))
    monkeypatch.setattr(evaluate, "redraw", lambda models, z_a, points: points)
    monkeypatch.setattr(evaluate, "psnr", lambda *_: 20.0)
    held = evaluate.score_cross(PLAN, clips, None, None)
    assert held["akd_cross"]["value"] == 0
    assert 0 < held["akd_cross_true"]["value"] < held["akd_cross_true"]["baseline"]
