"""Ways to steer: poses, another video, guidance, each by its effect on what is made."""
import shlex
from pathlib import Path

import numpy as np
import pytest

import control
import detector
import media
import sample
import toy
import train_diffusion
import training
from actions import obeyed
from landmarks import (BROWS, EYE_LEFT, EYE_RIGHT, IRISES, MOUTH, NOSE, head_pose, mouth_opening,
                       point_error)

ROOT = Path(__file__).resolve().parent.parent
FACE, SPEECH = str(ROOT / "assets" / "face.png"), str(ROOT / "assets" / "speech.wav")


@pytest.fixture(scope="module")
def finder():
    return detector.load(training.SHIPPED / "detector.pt")


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    path = tmp_path_factory.mktemp("voice") / "a.wav"
    media.write_sound(path, media.read_sound(SPEECH)[:25_600])                   # 40 frames
    return path


def points_of(finder, path, every=3):
    return detector.find_in_crops(finder, np.stack(list(media.read_video(path))[::every]))


def make(out, *flags, audio=None, image=FACE):
    """Run sample.py, on the demo's portrait if not on another; returns the video."""
    drive = ["--audio", str(audio)] if audio else []
    sample.main(["--image", str(image), *drive, "--steps", "8", "--out", str(out),
                 *map(str, flags)], True)
    return out


@pytest.mark.parametrize("axis, least", [(0, 28), (1, 36), (2, 36)])
def test_a_head_turns_where_it_is_asked_to(tmp_path, finder, voice, axis, least):
    """--pose PITCH YAW ROLL: between -20 and 20 degrees the head turns by 36 to 45 (nods, which the
    detector reads low, by 28), by less than 6 about the other axes, and the lips still move."""
    poses, lips = [], []
    for sign in (-20, 20):
        asked = np.eye(3, dtype=int)[axis] * sign
        found = points_of(finder, make(tmp_path / "a.mp4", "--pose", *asked, audio=voice))
        poses.append(np.median(head_pose(found), 0))
        lips.append(mouth_opening(found).std())
    turned = np.delete(poses[1] - poses[0], axis)
    assert least < (poses[1] - poses[0])[axis] < 45 and np.abs(turned).max() < 6 and min(lips) > .02


def test_poses_come_from_a_csv_and_turn_round(tmp_path, finder, voice, capfd):
    """A head that a CSV of 21 lines turns from -20 to 20 degrees turns back over the other half."""
    track = np.stack([np.zeros(21), np.linspace(-20, 20, 21), np.zeros(21)], 1)
    np.savetxt(tmp_path / "a.csv", track, delimiter=",", header="pitch,yaw,roll", comments="")
    out = make(tmp_path / "a.mp4", "--pose-from", tmp_path / "a.csv", audio=voice)
    assert "21 frames for 40; played back and forth" in capfd.readouterr().err
    yaw = head_pose(points_of(finder, out, 1))[:, 1]
    wanted = np.concatenate([np.linspace(-20, 20, 21), np.linspace(18, -18, 19)])
    assert np.corrcoef(yaw, wanted)[0, 1] > .95 and np.ptp(yaw) > 30


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A toy video, with its sound, and its points."""
    clip = toy.make_clip(11, 1.6, held_out=True)
    path = tmp_path_factory.mktemp("driver") / "driver.mp4"
    with media.VideoWriter(path, 128, 128, clip.sound) as video:
        video.write(clip.frames())
    return path, clip


def test_poses_come_from_a_video(tmp_path, finder, voice, driver):
    """The head turns as the head of another video does."""
    path, clip = driver
    out = make(tmp_path / "a.mp4", "--pose-from", path, audio=voice)
    yaw = head_pose(points_of(finder, out))[:, 1]
    assert np.corrcoef(yaw, clip.pose[::3, 1])[0, 1] > .95


def test_a_video_drives_the_portrait(tmp_path, finder, driver):
    """--drive: the points found are the driver's to 1.5 px, frame by frame, with its sound kept."""
    path, clip = driver
    out = make(tmp_path / "a.mp4", "--drive", path)
    found = points_of(finder, out, 1)
    assert len(found) == len(clip) == 40
    framed = control.watch(path, "toy", finder, 128)
    assert point_error(found, framed).mean() < 1.5
    heard = media.read_sound(out)[:len(clip.sound)]
    assert np.corrcoef(heard, clip.sound[:len(heard)])[0, 1] > .95


def test_a_relative_driver_keeps_the_portraits_face(tmp_path, finder, driver):
    """--relative: the first frame is the portrait's own face; from there the mouth does the driver's."""
    path, clip = driver
    found = points_of(finder, make(tmp_path / "a.mp4", "--drive", path, "--relative"), 1)
    picture = media.read_image(FACE)
    own, _ = detector.locate(picture, FACE, "toy", finder)
    _, own = sample.frame_portrait(picture, own, 128)
    assert point_error(found[:1], own[None]).mean() < 1.5
    theirs = mouth_opening(clip.landmarks)
    assert np.corrcoef(mouth_opening(found), theirs)[0, 1] > .8


def test_a_silent_video_drives_too(tmp_path, driver):
    """A driver without sound gives a video without sound."""
    with media.VideoWriter(tmp_path / "b.mp4", 128, 128) as video:
        video.write(driver[1].frames(range(10)))
    out = make(tmp_path / "a.mp4", "--drive", tmp_path / "b.mp4")
    assert len(list(media.read_video(out))) == 10
    assert media.read_sound_if_any(out) is None


@pytest.fixture(scope="module")
def dubbed(tmp_path_factory, driver):
    """A toy's first frame as a picture, and another toy that says something, with its sound."""
    path = tmp_path_factory.mktemp("dubbed")
    media.write_image(path / "a.png", driver[1].frame(0))
    voice = toy.make_clip(21, 1.6, held_out=True)
    media.write_sound(path / "b.wav", voice.sound)
    return path / "a.png", path / "b.wav", voice


def held_off(finder, out, framed, *regions):
    """Mean distance in px of the found points of some regions from those of a video."""
    found = points_of(finder, out, 1)
    at = np.concatenate([np.arange(70)[region] for region in regions])
    return np.sqrt(((found - framed)[:, at] ** 2).sum(-1)).mean(), found


def test_dubbing_keeps_the_face_and_takes_the_lips(tmp_path, finder, driver, dubbed):
    """--keep-from: eyes, brows and nose stay within 1.3 px of the video's, the mouth follows the
    new voice and not the old one."""
    image, voice, clip = dubbed
    out = make(tmp_path / "a.mp4", "--keep-from", driver[0], audio=voice, image=image)
    framed = control.watch(driver[0], "toy", finder, 128)
    off, found = held_off(finder, out, framed, BROWS, NOSE, EYE_LEFT, EYE_RIGHT)
    assert off < 1.3
    new, old = (np.corrcoef(mouth_opening(found), mouth_opening(c.landmarks))[0, 1]
                for c in (clip, driver[1]))
    assert new > .6 and new > old + .2


def test_other_parts_can_be_made_instead(tmp_path, finder, driver, dubbed):
    """--edit eyes: the mouth is the video's, the eyes are not."""
    image, voice, _ = dubbed
    out = make(tmp_path / "a.mp4", "--keep-from", driver[0], "--edit", "eyes", audio=voice,
               image=image)
    framed = control.watch(driver[0], "toy", finder, 128)
    lips, found = held_off(finder, out, framed, MOUTH)
    eyes, _ = held_off(finder, out, framed, IRISES)
    assert lips < 1.3 and eyes > lips
    assert np.corrcoef(mouth_opening(found), mouth_opening(driver[1].landmarks))[0, 1] > .8


def test_a_head_does_what_it_is_told(tmp_path, finder):
    """--text: one instruction after the other is obeyed, as far as it must be, without a jump."""
    out = make(tmp_path / "a.mp4", "--text", "please turn left", "--text", "open your mouth",
               "--seconds", 2)
    points = points_of(finder, out, 1)
    assert len(points) == 100
    assert obeyed(points[:50], "turn_left") >= 1 and obeyed(points[:50], "turn_right") < 0
    told = np.concatenate([points[:1], points[75:]])
    assert obeyed(told, "open_mouth", .04) >= 1 > obeyed(points[:50], "open_mouth")
    steps = np.sqrt((np.diff(points, axis=0) ** 2).sum(-1)).mean(-1)             # px a frame
    assert steps[49] < 3 * np.median(steps) + 1 and steps.max() < 4


def test_words_and_a_pose_go_together(tmp_path, finder):
    """--text with --pose: a mouth that opens in a head that is turned."""
    out = make(tmp_path / "a.mp4", "--text", "open your mouth", "--pose", 0, -15, 0, "--seconds", 2)
    points = points_of(finder, out, 1)
    assert head_pose(points[30:])[:, 1].mean() < -8 and obeyed(points, "open_mouth") >= 1


def test_words_nobody_knows_give_a_plausible_motion(tmp_path, finder):
    """The head stays one: no point further from the first frame's than a head can turn."""
    points = points_of(finder, make(tmp_path / "a.mp4", "--text", "xyzzy ☃ 42", "--seconds", 1), 1)
    assert np.isfinite(points).all() and point_error(points, points[:1]).max() < 25


def test_guidance_scales_what_the_voice_does(tmp_path, finder, voice):
    """Without the voice (0) the mouth does something else than with it (1); with twice its weight it
    does the same, and more of it."""
    without, plain, twice = (mouth_opening(points_of(finder, make(
        tmp_path / f"{w}.mp4", "--guidance", w, audio=voice), 1)) for w in (0, 1, 2))
    alike, other = (np.corrcoef(plain, track)[0, 1] for track in (twice, without))
    assert alike > .8 and alike > other + .3 and twice.std() > plain.std()


def test_a_track_is_played_back_and_forth(capfd):
    """Three frames for eight: 0 1 2 1 0 1 2 1; one frame stays; a longer one is cut."""
    track = np.arange(3)[:, None]
    assert control.back_and_forth(track, 8, "x")[:, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert control.back_and_forth(track[:1], 3, "x")[:, 0].tolist() == [0, 0, 0]
    assert "x: 3 frames for 8" in capfd.readouterr().err
    assert control.back_and_forth(track, 2, "x")[:, 0].tolist() == [0, 1]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("text, named", [
    ("", "empty"), ("pitch,yaw,roll\n", "no line"), ("1,2,3\n1,2\n", "line 2"),
    ("a\n1,2,x\n", "line 2"), ("0,95,0\n1,2,3\n", "line 1"), ("1,2,3\n0,95,0\n", "line 2"), ("1,2,3\nnan,0,0\n", "line 2")])
def test_broken_tracks_take_one_line(tmp_path, text, named):
    """What is not a track of poses is refused with its line."""
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(media.UserError, match=f"a.csv: .*{named}"):
        control.read_poses(tmp_path / "a.csv")


@pytest.mark.parametrize("flags, named", [
    (["--audio", SPEECH, "--pose", "1", "2"], "--pose 1 2"),
    (["--audio", SPEECH, "--pose", "left"], "--pose left"),
    (["--audio", SPEECH, "--pose", "0", "99", "0"], "--pose 0 99 0"),
    (["--audio", SPEECH, "--pose", "nan", "0", "0"], "--pose nan"),
    (["--audio", SPEECH, "--pose", "still", "--pose-from", "a.csv"], "--pose-from"),
    (["--audio", SPEECH, "--pose-from", "none.csv"], "none.csv"),
    (["--audio", SPEECH, "--relative"], "--relative"), (["--audio", SPEECH, "--guidance", "-1"], "guid"),
    (["--audio", SPEECH, "--drive", "a.mp4"], "not allowed"), ([], "required"),
    (["--drive", "none.mp4"], "none.mp4"), (["--drive", SPEECH], "speech.wav"),
    (["--drive", FACE, "--pose", "still"], "--drive"), (["--drive", FACE, "--guidance", "2"], "--drive"),
    (["--text", "smile", "--keep-from", "a.mp4"], "--keep-from"), (["--text", " "], "--text is empty"),
    (["--text", "smile", "--pose", "predict"], "--pose predict"),
    (["--text", "smile", "--seconds", "0"], "--seconds"), (["--audio", SPEECH, "--seconds", "2"], "--seconds"),
    (["--audio", SPEECH, "--edit", "eyes"], "--edit"), (["--audio", SPEECH, "--keep-from", "none.mp4"], "none"),
    (["--audio", SPEECH, "--keep-from", "a.mp4", "--pose", "still"], "--keep-from"),
    (["--text", "smile", "--pose-from", "none.csv", "--pose", "still"], "--pose-from"),
    (["--text", "smile", "--clip", "none"], "leave --clip out"),
    (["--audio", SPEECH, "--clip", "none"], "--clip belongs to --text")])
def test_flags_that_make_no_sense_together(tmp_path, flags, named):
    """One line that names the flag; nothing is written."""
    with pytest.raises(media.UserError, match=named):
        sample.main(["--image", FACE, "--out", str(tmp_path / "a.mp4"), *flags], True)
    assert not list(tmp_path.iterdir())


def test_models_that_hear_differently_do_not_mix(tmp_path, voice):
    """motion.pt of one kind of speech features and landmarks.pt of another: one line, no video."""
    other = tmp_path / "other.pt"
    training.save(other, training.load(training.SHIPPED / "landmarks.pt") | {"speech": "wav2vec2"})
    linked(tmp_path, landmarks=other)
    with pytest.raises(media.UserError, match="motion.pt hears mel, landmarks.pt wav2vec2"):
        make(tmp_path / "a.mp4", "--pose", 0, 20, 0, "--checkpoint", tmp_path, audio=voice)
    assert not list(tmp_path.glob("*.mp4"))


def test_a_face_that_is_lost_stays_where_it_was(finder):
    """Two frames of noise among twelve keep the points before them; five are one clear line."""
    frames = toy.make_clip(11, 1.0, held_out=True).frames(range(12))
    noise = np.random.default_rng(0).integers(0, 255, frames.shape, dtype=np.uint8)
    frames[5:7] = noise[5:7]
    points, _ = detector.follow(frames, "a.mp4", "toy", finder)
    assert (points[5] == points[4]).all() and (points[6] == points[4]).all()
    assert point_error(points[7:], toy.make_clip(11, 1.0, held_out=True).landmarks[7:12]).max() < 3
    frames[5:10] = noise[5:10]
    with pytest.raises(media.UserError, match="a.mp4: no face in 5 of 12 frames"):
        detector.follow(frames, "a.mp4", "toy", finder)
    with pytest.raises(media.UserError, match="a.mp4: holds no pictures"):
        detector.follow([], "a.mp4", "toy", finder)


@pytest.mark.parametrize("flags, name, width", [
    (["--driver", "text"], "text", 128), (["--target", "landmarks"], "landmarks", 320)])
def test_words_and_points_are_learnt_from_what_s_knows(tmp_path, flags, name, width):
    """Two steps from the motion model's weights: those that fit are taken, the others are new, and
    the file that sample.py looks for is written. Another process makes the clips."""
    before = training.load(training.SHIPPED / "motion.pt")["weights"]
    train_diffusion.main([*flags, "--init", str(training.SHIPPED / "motion.pt"), "--clips", "2",
                          "--steps", "2", "--batch", "2", "--workers", "1", "--out", str(tmp_path)])
    after = training.load(tmp_path / f"{name}.pt")["weights"]
    inner = "conformer.blocks.1.first.1.weight"
    assert 0 < (after[inner] - before[inner]).abs().max() < .02 < before[inner].std()
    assert after["speech_encoder.door.weight"].shape == (192, width)
    assert after["out.weight"].shape[0] == 140
    assert (tmp_path / f"{name}.json").is_file()


def test_minutes_that_clips_use_up_ship_nothing_and_delete_nothing(tmp_path):
    """One line, no weights that have learnt nothing, and with --fresh the run before is still there."""
    (tmp_path / "last.pt").write_text("a"), (tmp_path / "log.csv").write_text("b")
    with pytest.raises(media.UserError, match="clips took all"):
        train_diffusion.main(["--minutes", "1e-4", "--clips", "2", "--workers", "0", "--target",
                              "landmarks", "--fresh", "--out", str(tmp_path)])
    assert (tmp_path / "last.pt").read_text() == "a" and (tmp_path / "log.csv").read_text() == "b"
    assert [p.name for p in tmp_path.glob("*.pt")] == ["last.pt"]


@pytest.mark.parametrize("flags, named", [
    (["--preset", "small"], "another size than --preset small"),
    (["--wav2vec2", "a.pth"], "--driver text makes points"), (["--data", "clips"], "--driver text"),
    (["--target", "latents"], "--driver text")])
def test_words_that_cannot_be_learnt_take_one_line(tmp_path, flags, named):
    """--init from a model of another size would keep next to nothing; a voice would not be heard."""
    with pytest.raises(media.UserError, match=named):
        train_diffusion.main(["--driver", "text", "--init", str(training.SHIPPED / "landmarks.pt"),
                              "--steps", "1", "--clips", "1", "--out", str(tmp_path), *flags])
    assert not list(tmp_path.iterdir())


def linked(folder, **instead):
    """A folder with the shipped weights, some of them others': name=path of what stands there."""
    for path in training.SHIPPED.glob("*.pt"):
        (folder / path.name).symlink_to(instead.get(path.stem, path).resolve())
    return folder


@pytest.mark.parametrize("name, flags", [
    ("landmarks", ["--pose", 0, 20, 0]), ("text", ["--text", "smile"]), ("motion", [])])
def test_a_model_of_another_kind_takes_one_line(tmp_path, voice, name, flags):
    """Speech over latents as landmarks.pt, speech over points as text.pt or motion.pt."""
    other = training.SHIPPED / ("motion.pt" if name == "landmarks" else "landmarks.pt")
    folder = linked(tmp_path, **{name: other})
    with pytest.raises(media.UserError, match=f"{name}.pt: holds a model of another kind"):
        make(tmp_path / "a.mp4", *flags, "--checkpoint", folder, audio=None if name == "text" else voice)


def test_models_over_points_go_with_any_vae(tmp_path):
    """landmarks.pt beside a VAE with other numbers, which motion.pt refuses; where it is missing, the
    error says what to copy."""
    held = training.load(training.SHIPPED / "vae.pt")
    name = next(n for n, v in held["weights"].items() if v.is_floating_point())
    held["weights"][name] = held["weights"][name] * 1.1
    training.save(tmp_path / "other.pt", held)
    linked(tmp_path, vae=tmp_path / "other.pt")
    assert sample.load_models(tmp_path, "cpu", name="landmarks").motion.config.target == "landmarks"
    with pytest.raises(media.UserError, match="another VAE"):
        sample.load_models(tmp_path, "cpu")
    (tmp_path / "landmarks.pt").unlink()
    with pytest.raises(media.UserError, match="no landmarks.pt in it.*toy/landmarks.pt, which goes"):
        sample.load_models(tmp_path, "cpu", name="landmarks")


def test_the_examples_of_help_can_be_pasted(capsys):
    """Each is a command that sample.py takes, and what it reads is there or made by one before."""
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    told = capsys.readouterr().out
    examples = [shlex.split(line)[2:] for line in told.split("examples:")[1].splitlines() if line]
    made = set()
    for flags in examples:
        args = sample.arguments(flags)
        for path in filter(None, (args.image, args.audio, args.drive, args.keep_from)):
            assert path in made or (ROOT / path).is_file(), path
        assert args.out not in made
        made.add(args.out)
    assert len(examples) >= 5 and all(group in told for group in ("in and out:", "how:", "control:"))
