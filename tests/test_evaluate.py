"""The rulers of evaluate.py in worlds where the right answer is known.

Here a picture is its own points: `frames` hold landmarks, the detector finds what it is given.
"""
import dataclasses
import json

import numpy as np
import pytest
import torch

import detector
import evaluate
import evaluate_control
import sample
import toy
from actions import INSTRUCTIONS
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
    def speak(models, finder, portrait, points, sound, how, seeds, solver, every=1):
        clip = next(c for c, _ in clips if np.array_equal(c.landmarks[0], points))
        track = np.stack([change(clip.landmarks.copy())[::every] for _ in seeds])
        return track, clip.pose[::every] + asked
    monkeypatch.setattr(evaluate, "speak", speak)
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


@pytest.mark.filterwarnings("error")
def test_voices_that_say_nothing_score_nothing(clips, monkeypatch):
    """No clip's mouth moves: rulers of lips are empty, without a warning, and still valid JSON."""
    monkeypatch.setattr(evaluate, "LEAST_SPREAD", 1e3)
    value, numbers = spoken(clips, monkeypatch)
    assert value["lip_r"] is None and numbers["lip_r"]["shuffled"] is None
    json.dumps(numbers["lip_r"], allow_nan=False)


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
    """A result that shows the points it is given: no distance from the driver's own, the targets'
    shape away from the renderer's drawing, which lies nearer than the portrait held still. Relative
    points are within a quarter of a pixel of the drawing."""
    monkeypatch.setattr(sample, "encode_portrait", lambda *_: (None, None))
    monkeypatch.setattr(evaluate_control, "redraw", lambda models, z_a, points: points)
    monkeypatch.setattr(evaluate_control, "psnr", lambda *_: 20.0)
    held = evaluate_control.score_cross(PLAN, clips, None, None)
    assert held["akd_cross"]["value"] == 0
    assert 0 < held["akd_cross_true"]["value"] < held["akd_cross_true"]["baseline"]
    relative = held["akd_cross_true_relative"]
    assert relative["value"] < .25 and relative["baseline"] > 4 * relative["value"]


# ---- ways to steer -------------------------------------------------------------------------------

HOW = ("dpmpp_2m", 20)


def test_a_head_that_obeys_every_pose_is_right_to_the_detectors_limit(clips, monkeypatch):
    """Heads drawn in the asked pose: no more error than true frames have. Heads that ignore it: as
    wrong as a frontal head. Blinks and lips of a still head: those of what was made."""
    def speak(models, finder, portrait, points, sound, pose, seeds, how, every=1, guidance=1.0):
        clip = next(c for c, _ in clips if np.array_equal(c.landmarks[0], points))
        if isinstance(pose, str):
            return np.stack([clip.landmarks[::every] for _ in seeds]), None
        turned = toy.Motion(np.array([pose if obeys else (0, 0, 0)], float),
                            clip.motion.expression[:1], clip.motion.sway[:1])
        drawn = toy.ToyClip(clip.identity, turned, size=128, jitter=clip.jitter)
        return drawn.landmarks[None], None

    def steer(models, maker, portrait, points, speech, pose, seed, how, every=1):
        own = any(np.array_equal(pose[0], clip.pose[0]) for clip, _ in clips)
        return speak(0, 0, portrait, points, 0, "still" if own else pose[0], [0], how, every)[0][0]
    monkeypatch.setattr(evaluate_control, "speak", speak)
    monkeypatch.setattr(evaluate_control, "steer", steer)
    monkeypatch.setattr(sample, "hear", lambda *_: range(25))
    monkeypatch.setattr(toy.ToyClip, "frames", lambda self, at=None: self.landmarks)
    obeys = True
    held = evaluate_control.score_poses(clips, None, None, None, HOW, 20.0)
    assert held["pose_control_mae"]["value"] == pytest.approx(held["pose_control_mae"]["truth"])
    assert held["pose_control_mae"]["value"] < 2 and held["lip_r_posed"]["value"] > .999
    true = np.mean([evaluate.blink_rate(c.landmarks[::2], 2) for c, _ in clips])
    assert held["blinks_still"]["value"] == held["blinks_posed"]["value"] == pytest.approx(true)
    obeys = False
    held = evaluate_control.score_poses(clips, None, None, None, HOW, 20.0)["pose_control_mae"]
    assert held["value"] == pytest.approx(held["baseline"], abs=1.5)


@pytest.mark.parametrize("obeys, right, wrong", [(True, 1.0, .25), (False, 0.0, .25)])
def test_words_count_when_the_head_does_them(clips, monkeypatch, obeys, right, wrong):
    """Heads that carry out what they are told are right in every instruction, and right by chance
    in few of another's; heads that hold still are right in none."""
    texts = {words: a for a in INSTRUCTIONS for words in INSTRUCTIONS[a][1]}

    def steer(models, teller, portrait, points, said, pose, seed, how, every):
        motion = toy.make_motion(np.random.default_rng(seed), 80)
        for track in (motion.pose, motion.expression, motion.sway):
            track[:] = track[:1]
        motion.expression[:] = toy.NEUTRAL
        if obeys:
            toy.obey(motion, [texts[said[0]]])
        return toy.ToyClip(identities[points[0, 0]], motion, size=128).landmarks[::every]
    identities = {c.landmarks[0, 0, 0]: c.identity for c in
                  (toy.make_clip(300 + k, .2, held_out=True) for k in range(2))}
    monkeypatch.setattr(evaluate_control, "steer", steer)
    monkeypatch.setattr(evaluate_control.control, "read_text", lambda teller, texts, seconds: texts)
    monkeypatch.setattr(evaluate_control, "back_again", lambda *_: 30.0)
    held, table = evaluate_control.score_text(None, None, None, HOW, heads=2)
    assert held["text_accuracy"]["value"] == right and len(table) == 15
    assert held["text_accuracy_shuffled"]["value"] <= wrong


def test_led_back_the_same_head_is_nearer_than_another(clips):
    """With the shipped VAE: a head's last frame, led back to its first one, is nearer to that than
    another head is."""
    models = sample.load_models(sample.training.SHIPPED, "cpu")
    clip, other = (toy.make_clip(k, .8, held_out=True) for k in (5, 6))
    first, last = clip.frame(0), clip.frame(19)
    own = evaluate_control.back_again(models, last, clip.landmarks[19], first, clip.landmarks[0])
    theirs = evaluate_control.back_again(models, other.frame(0), other.landmarks[0], first,
                                         clip.landmarks[0])
    assert own > 22 and own > theirs + 5
