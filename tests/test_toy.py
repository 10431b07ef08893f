"""Toy Heads: always the same, never seen in training, and true in every number."""
import hashlib
import os
import subprocess
import sys
import time

import numpy as np
import pytest

import actions
import media
import toy
from faces import EXPRESSION, NEUTRAL, random_identity
from landmarks import crop_box, eye_opening, head_pose, mouth_opening
from painter import Painter

AT = toy.AT

# The frozen held-out set. If these change, every number measured before is void: raise TOY_VERSION.
FROZEN_VERSION = 1
FROZEN_PHONEMES = "8b4e3e9a554d471a"
FROZEN_POINTS = {                       # (clip, frame, point): px
    (0, 0, 8): (62.2860, 108.5600),
    (0, 50, 30): (75.4943, 77.2624),
    (7, 99, 62): (68.3766, 92.4251),
    (15, 33, 66): (54.0200, 87.5223),
    (31, 70, 40): (42.4538, 64.3483),
    (31, 12, 68): (39.5945, 64.0789),
    (48, 88, 0): (24.6597, 60.0797),
    (63, 5, 57): (60.7824, 87.9961),
    (63, 99, 26): (85.7720, 49.2734),
}


@pytest.fixture(scope="module")
def held_out():
    """The 64 frozen clips of 4 s."""
    return [toy.make_clip(k, 4.0, held_out=True) for k in range(64)]


def still(pose=(0, 0, 0), seed=5, **expression):
    """One head, drawn in one pose and expression: picture (128, 128, 3) and points (70, 2)."""
    e = NEUTRAL.copy()
    for name, value in expression.items():
        e[AT[name]] = value
    who = random_identity(np.random.default_rng(seed), glasses=0, beard=0, fringe=0, hat=0)
    poses = np.array([[0, 0, 0]] * 4 + [pose], dtype=np.float64)       # framed by the still ones
    painter = Painter(who, poses, np.stack([NEUTRAL] * 4 + [e]), np.zeros((5, 2)))
    return painter.frame(4), painter.landmarks[4]


# ---- the same, and never seen --------------------------------------------------------------------

def test_a_seed_is_a_clip():
    """The same seed gives the same frames, points, pose and sound; another gives another head."""
    a, b, c = toy.make_clip(7, 1.0), toy.make_clip(7, 1.0), toy.make_clip(8, 1.0)
    for x, y in ((a.frames(), b.frames()), (a.landmarks, b.landmarks), (a.sound, b.sound)):
        np.testing.assert_array_equal(x, y)
    assert not np.array_equal(a.frame(0), c.frame(0))
    assert a.frames([3, 0]).shape == (2, 128, 128, 3)
    np.testing.assert_array_equal(a.frames([3, 0])[1], a.frame(0))


def test_held_out_seeds_are_never_trained_on():
    """Training seeds end where held-out ones begin; held_out counts from there."""
    seeds = [toy.training_seed(run, k) for run in range(20) for k in range(50)]
    assert 0 <= min(seeds) and max(seeds) < toy.HELD_OUT and len(set(seeds)) == len(seeds)
    a, b = toy.make_clip(3, .4, held_out=True), toy.make_clip(toy.HELD_OUT + 3, .4)
    np.testing.assert_array_equal(a.frame(0), b.frame(0))
    assert not np.array_equal(a.frame(0), toy.make_clip(3, .4).frame(0))


def test_lengths():
    """N = round(25 s) frames and 640 samples of sound for each."""
    for seconds in (.4, 1.0, 2.36):
        clip = toy.make_clip(1, seconds)
        assert len(clip) == len(clip.landmarks) == round(25 * seconds)
        assert len(clip.sound) == round(media.RATE * seconds) and clip.sound.dtype == np.float32


def test_the_held_out_set_is_frozen(held_out):
    """Version, phonemes and a sample of the points (to 1e-3 px) are those that were measured on."""
    said = "|".join(" ".join(s[0] for s in c.speech.segments) for c in held_out)
    assert toy.TOY_VERSION == FROZEN_VERSION
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == FROZEN_PHONEMES
    for (clip, frame, point), (x, y) in FROZEN_POINTS.items():
        np.testing.assert_allclose(held_out[clip].landmarks[frame, point], (x, y), atol=1e-3)


def test_the_held_out_mix(held_out):
    """Glasses 25 %, beards 20 %, fringes 50 %, hats 10 %, patterns 50 %, within chance."""
    who = [c.identity for c in held_out]
    shares = {"glasses": (.25, [i.glasses > 0 for i in who]),
              "beard": (.20, [i.beard > 0 for i in who]),
              "fringe": (.50, [i.fringe > 0 for i in who]),
              "hat": (.10, [i.hat is not None for i in who]),
              "pattern": (.50, [i.clothes > 0 or i.background > 0 for i in who])}
    for name, (share, found) in shares.items():
        spread = np.sqrt(share * (1 - share) / len(who))
        assert abs(np.mean(found) - share) < 2.5 * spread, name


def test_every_held_out_clip_turns_its_head(held_out):
    """Yaw within a clip has a standard deviation of at least 4 degrees."""
    assert min(c.true_pose[:, 1].std() for c in held_out) > 4 - 1e-6


# ---- true in every number ------------------------------------------------------------------------

def test_the_fitted_pose_is_near_the_renderers(held_out):
    """The closed-form fit from true points: below 1 degree, its change since frame 0 below 0.3."""
    error = np.mean([np.abs(c.pose - c.true_pose).mean() for c in held_out])
    change = np.mean([np.abs((c.pose - c.pose[0]) - (c.true_pose - c.true_pose[0])).mean()
                      for c in held_out])
    assert error < 1.0 and change < .3


def dark_centre(picture):
    """Mean place of what differs from the background's corner: the head and what it wears."""
    difference = np.abs(picture.astype(int) - picture[2, 2].astype(int)).sum(-1) > 60
    difference[100:] = False                                           # not the clothes
    y, x = np.nonzero(difference)
    return np.array([x.mean(), y.mean()])


@pytest.mark.parametrize("pose, direction", [((0, 20, 0), (1, 0)), ((20, 0, 0), (0, -1)),
                                             ((0, 0, 20), (1, 0))])
def test_pose_signs_on_pictures(pose, direction):
    """On the drawn picture: yaw > 0 goes to the right, pitch > 0 up, roll > 0 clockwise."""
    (rest, p), (turned, q) = still(), still(pose)
    moved = q[30] - p[30] if pose[2] == 0 else q[27] - p[27]
    assert moved @ direction > 2
    found = dark_centre(turned) - dark_centre(rest)
    assert found @ direction > .3
    np.testing.assert_allclose(head_pose(q) - head_pose(p), pose, atol=3)


def test_points_lie_on_what_is_drawn():
    """The pixel at an open eye's iris is dark, between the lips of an open mouth not skin."""
    picture, p = still(jaw=.9)
    skin = picture[tuple(np.round(p[28]).astype(int)[::-1])].astype(int)
    for point in (68, 69):
        x, y = np.round(p[point]).astype(int)
        assert picture[y, x].mean() < 90                               # the pupil
    x, y = np.round((p[62] + p[66]) / 2).astype(int)
    assert np.abs(picture[y, x] - skin).sum() > 80


def test_irises_are_big_enough_to_see():
    """An open eye at 128 x 128 shows an iris of at least five pixels."""
    picture, p = still()
    x, y = np.round(p[68]).astype(int)
    around = picture[y - 1:y + 2, x - 8:x + 9].astype(int)
    white = np.abs(around - (250, 250, 248)).sum(-1).min(0) < 60
    assert (~white[4:13]).sum() >= 5


def test_expressions_move_their_points():
    """Each expression number does what it is called."""
    def read(**expression):
        return still(**expression)[1]
    rest = read()
    assert mouth_opening(read(jaw=1.0)) > .2 > .02 > mouth_opening(rest)
    assert np.ptp(read(width=1.0)[48:60, 0]) > np.ptp(rest[48:60, 0]) > np.ptp(
        read(round=1.0)[48:60, 0])
    assert read(smile=1.0)[48, 1] < rest[48, 1]
    assert read(brow_left=1.0)[19, 1] < rest[19, 1] and read(brow_left=1.0)[24, 1] == rest[24, 1]
    left, right = eye_opening(read(lid_left=0.0))
    assert left < .1 < .2 < right
    assert read(gaze_x=1.0)[68, 0] > rest[68, 0] + 1 and read(gaze_y=1.0)[69, 1] < rest[69, 1]
    assert len(EXPRESSION) == 11


def test_a_frame_takes_at_most_six_milliseconds():
    """Drawing, background included, at 128 x 128 on one core (best of five clips)."""
    def once(seed):
        clip = toy.make_clip(seed, 2.0)
        start = time.perf_counter()
        clip.frames()
        return (time.perf_counter() - start) / len(clip)
    assert min(once(seed) for seed in range(5)) < .006


def test_blinks_come_about_22_times_a_minute():
    """The random process: 22 a minute within its own scatter, each 2 to 10 frames long."""
    minutes = 60
    shut = toy.blinks(np.random.default_rng(0), minutes * 60 * media.FPS) < .4
    edges = np.flatnonzero(np.diff(shut.astype(int)))
    starts, ends = edges[::2], edges[1::2]
    n = min(len(starts), len(ends))
    assert abs(len(starts) / minutes - toy.BLINKS_PER_MINUTE) < 2
    lengths = ends[:n] - starts[:n]
    assert lengths.min() >= 2 and lengths.max() <= 10


def test_lips_follow_speech(held_out):
    """Where the speech track opens the jaw, the drawn mouth opens: Pearson r above 0.9."""
    clip = next(c for c in held_out if c.speech.lips[:, 0].std() > .05)
    opening = mouth_opening(clip.landmarks)
    assert np.corrcoef(opening, clip.speech.lips[:len(clip), 0])[0, 1] > .9


# ---- defects and instructions --------------------------------------------------------------------

def test_defects_do_what_they_say():
    """Each defect spoils its own thing and nothing else."""
    good = toy.make_clip(4, 2.0)
    bad = {name: toy.make_clip(4, 2.0, defect=name) for name in toy.DEFECTS}
    assert np.abs(bad["profile"].true_pose[:, 1]).min() > 35
    steps = {n: np.abs(np.diff(c.landmarks[:, 30], axis=0)).mean()
             for n, c in (("good", good), ("jitter", bad["jitter"]))}
    assert steps["jitter"] > 4 * steps["good"]
    assert mouth_opening(bad["mask"].landmarks).std() < .005 < mouth_opening(good.landmarks).std()
    x, y = np.round(bad["mask"].landmarks[0, 57]).astype(int)
    assert np.abs(bad["mask"].frame(0)[y, x].astype(int) - (150, 200, 215)).sum() < 30
    assert np.abs(bad["silence"].sound).max() < .2 * np.abs(good.sound).max()
    assert mouth_opening(bad["silence"].landmarks).std() < .01
    corner = (slice(64, 128), slice(0, 64))
    two = bad["two_faces"]
    np.testing.assert_array_equal(two.frame(1)[corner], two.intruder.frame(1))
    np.testing.assert_array_equal(two.frame(1)[:64], good.frame(1)[:64])
    shifted = bad["shifted_sound"].sound
    assert not np.array_equal(shifted, good.sound)
    np.testing.assert_allclose(np.sort(shifted), np.sort(good.sound))
    np.testing.assert_array_equal(bad["shifted_sound"].frame(0), good.frame(0))


@pytest.mark.parametrize("action", toy.INSTRUCTIONS)
def test_instructions_are_obeyed(action):
    """Against the same motion without it, each told quantity goes where its word says."""
    motion = toy.make_motion(np.random.default_rng(1), 75)
    told = toy.obey(toy.make_motion(np.random.default_rng(1), 75), [action])
    for name, target in toy.INSTRUCTIONS[action][2].items():
        def track(m):
            if name in toy.ANGLES:
                return m.pose[:, toy.ANGLES.index(name)]
            return m.expression[:, [AT[c] for c in AT if c.startswith(name)]].mean(1)
        if target == "wave":
            assert np.ptp(track(told)[20:]) > 18
        else:
            before, after = (np.abs(track(m)[40:] - target).mean() for m in (motion, told))
            assert after < .25 * before + .05
        np.testing.assert_array_equal(track(told)[:7], track(motion)[:7])      # not yet


def test_instruction_words():
    """Words name their actions; two are joined by "and"; unknown words are one clear error."""
    assert toy.actions_of("please smile and turn left") == ["smile", "turn_left"]
    with pytest.raises(media.UserError, match="dance"):
        toy.actions_of("dance")
    for seed in range(6):
        for held_out in (False, True):
            clip = toy.instruct(seed, 2.0, held_out=held_out)
            for part in clip.text.split(" and "):
                assert any(part == w if held_out else said_in_order(w, part)
                           for told in toy.INSTRUCTIONS.values() for w in told[held_out])
            assert not clip.sound.any() and len(clip.sound) == 2 * media.RATE


def said_in_order(wording, text):
    """Are all of its words in the text, in their order?"""
    left = iter(text.split())
    return all(word in left for word in wording.split())


def test_training_never_meets_a_held_out_wording():
    """Of 30,000 drawn to train on, with manners and with words that slip in, none has one in it,
    and most are there once."""
    rng = np.random.default_rng(0)
    held = {w for _, held, _ in actions.INSTRUCTIONS.values() for w in held}
    drawn = [actions.wording(rng, a) for a in actions.INSTRUCTIONS for _ in range(2000)]
    assert not any(f" {w} " in f" {text} " for text in drawn for w in held)
    assert len(set(drawn)) > len(drawn) / 2
    assert {actions.wording(rng, a, held_out=True) for a in actions.INSTRUCTIONS
            for _ in range(50)} == held


def test_the_first_frame_does_not_tell_what_was_asked():
    """Heads that do different things begin as one picture, off the middle as a user's portrait is."""
    left, right, mouth = (toy.instruct(5, 2.0, actions=[a]) for a in
                          ("turn_left", "turn_right", "open_mouth"))
    assert np.abs(left.landmarks[-1] - right.landmarks[-1]).max() > 8
    for clip in (right, mouth):
        np.testing.assert_array_equal(left.landmarks[0], clip.landmarks[0])
        np.testing.assert_array_equal(left.frame(0), clip.frame(0))
    x, y, side = np.array([crop_box(toy.instruct(k, .4).landmarks[0]) for k in range(8)]).T
    assert min(np.std(x / side), np.std(y / side)) > .005 and 3 < np.std(side) < 9


def test_portraits_share_an_identity():
    """make_portraits: unrelated poses of one head, with points, in one framing."""
    pictures, points = toy.make_portraits(11, 4)
    assert pictures.shape == (4, 128, 128, 3) and points.shape == (4, 70, 2)
    assert pictures.dtype == np.uint8 and points.dtype == np.float32
    assert np.ptp(head_pose(points)[:, 1]) > 3
    np.testing.assert_array_equal(pictures[:, 1, 1], np.repeat(pictures[:1, 1, 1], 4, 0))


def test_close_portraits_turn_as_little_as_in_a_clip():
    """close=True: the yaw of a head spreads by about 5 degrees; else by about 12."""
    close, wide = (np.mean([toy.random_poses(np.random.default_rng(k), 8, c).pose[:, 1].std()
                            for k in range(200)]) for c in (True, False))
    assert 3.8 < close < 5.5 and 9 < wide < 13


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--size", "8"], ["--instruct", "dance"],
                                       ["--defect", "ugly"],
                                       ["--say", "mama", "--defect", "mask"]])
def test_bad_arguments(arguments, tmp_path):
    """toy.py refuses what it cannot draw, in one line, and writes nothing."""
    out = tmp_path / "toy.mp4"
    with pytest.raises(media.UserError):
        toy.main([*arguments, "--out", str(out)])
    assert not out.exists()


def test_workers_end_with_their_parent_even_by_kill_9():
    """A process that kills itself leaves no worker behind; until then a signal to its group, as
    torchrun and schedulers send, does not reach them."""
    code = ("import os, signal, toy; pool = toy.executor(1); print(pool.submit(os.getpid).result(), "
            "pool.submit(os.getpgrp).result() == os.getpgrp(), flush=True); "
            "os.kill(os.getpid(), signal.SIGKILL)")
    done = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(toy.__file__), text=True,
                          stdout=subprocess.PIPE, timeout=60)
    worker, reached = done.stdout.split()
    until = time.monotonic() + 10
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < until:
        time.sleep(.05)
    assert done.returncode == -9 and reached == "False" and not os.path.exists(f"/proc/{worker}")


def test_the_sheet_shows_64_heads(tmp_path):
    """--sheet draws eight by eight identities."""
    toy.main(["--sheet", str(tmp_path / "sheet.png"), "--size", "32"])
    from PIL import Image
    assert Image.open(tmp_path / "sheet.png").size == (256, 256)


def test_steered_heads_rest_without_harm():
    """A head that rests over its whole clip has no spread to be scaled: every number is finite."""
    for seed in range(100):
        motion = toy.make_motion(np.random.default_rng(seed), 8, steered=True)
        assert np.isfinite(motion.pose).all() and np.abs(motion.pose).max() <= 26
