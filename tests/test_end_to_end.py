"""The whole road: the commands that users type, in miniature and with the shipped weights."""
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import audio
import curves
import data
import detector
import evaluate
import media
import metrics
import sample
import toy
import train_diffusion
import train_vae
import training
from conformer import split
from landmarks import head_pose, mouth_opening

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = training.SHIPPED


def command(*words, expect=0):
    """Run a script of the root as a user would; returns what it printed."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A video of the demo's portrait saying 1.63 s of the demo's speech with the shipped weights."""
    folder = tmp_path_factory.mktemp("spoken")
    sound = media.read_sound(ROOT / "assets" / "speech.wav")[:26_080]
    media.write_sound(folder / "a.wav", sound)
    done = command("sample.py", "--image", "assets/face.png", "--audio", folder / "a.wav",
                   "--out", folder / "a.mp4")
    return folder, sound, done


def test_sample_writes_exactly_the_frames_and_the_whole_sound(spoken):
    """round(25 s) frames at 25 a second, the sound in place, a line with path, length and speed."""
    folder, sound, done = spoken
    frames = list(media.read_video(folder / "a.mp4"))
    heard = media.read_sound(folder / "a.mp4")
    assert len(frames) == round(25 * len(sound) / 16000) == 41 and frames[0].shape == (128, 128, 3)
    assert len(sound) <= len(heard) < len(sound) + 2048
    assert np.corrcoef(heard[:len(sound)], sound)[0, 1] > .95
    assert str(folder / "a.mp4") in done.stdout
    assert re.search(r"41 frames, 1\.63 s .* times real time", done.stdout)
    assert "Traceback" not in done.stderr


def test_the_same_seed_gives_the_same_video(spoken):
    """A second run writes the same pictures, pixel for pixel; another seed does not."""
    folder, _, _ = spoken
    first = np.stack(list(media.read_video(folder / "a.mp4")))
    for seed, same in ((0, True), (1, False)):
        command("sample.py", "--image", "assets/face.png", "--audio", folder / "a.wav",
                "--out", folder / "b.mp4", "--seed", seed)
        assert np.array_equal(first, np.stack(list(media.read_video(folder / "b.mp4")))) == same


def test_the_portrait_is_recognised_and_moves(spoken):
    """Frames look like the framed portrait (over 18 dB), and the mouth opens and closes."""
    folder, _, _ = spoken
    finder = detector.load(SHIPPED / "detector.pt")
    picture = media.read_image(ROOT / "assets" / "face.png")
    points, _ = detector.locate(picture, "face.png", "auto", finder)
    portrait, _ = sample.frame_portrait(picture, points, 128)
    frames = np.stack(list(media.read_video(folder / "a.mp4")))
    assert evaluate.psnr(frames, portrait[None]) > 18
    assert mouth_opening(detector.find_in_crops(finder, frames)).std() > .02


def test_lips_follow_the_voice_and_not_another():
    """On four unseen heads the mouth correlates with its own sound over 0.5, with another's far less."""
    finder = detector.load(SHIPPED / "detector.pt")
    models = sample.load_models(SHIPPED, "cpu")
    clips = [evaluate.held_out(100 + k) for k in range(4)]
    found = [evaluate.speak(models, finder, f[0], c.landmarks[0], c.sound, "predict", [0, 1],
                            ("dpmpp_2m", 10), 2)[0] for c, f in clips]
    made = [mouth_opening(f).mean(0) for f in found]
    true = [mouth_opening(c.landmarks)[::2] for c, _ in clips]
    own = np.mean([evaluate.pearson(a, b) for a, b in zip(made, true)])
    other = np.mean([evaluate.pearson(a, b) for a, b in zip(made, true[1:] + true[:1])])
    assert own > .5 and own > other + .3


def test_a_still_head_turns_less_than_a_free_one():
    """--pose still asks for the portrait's pose in every frame: the head stays within 5 degrees of it
    on the whole, and yaw moves less than with --pose free."""
    finder, models = detector.load(SHIPPED / "detector.pt"), sample.load_models(SHIPPED, "cpu")
    moved = {"still": 0, "free": 0}
    for clip, frames in (evaluate.held_out(103), evaluate.held_out(105)):
        for how in moved:
            found, asked = evaluate.speak(models, finder, frames[0], clip.landmarks[0], clip.sound,
                                          how, [0], ("dpmpp_2m", 10), 5)
            assert asked is None if how == "free" else (asked == clip.pose[0]).all()
            moved[how] += head_pose(found[0])[:, 1].std()
            if how == "still":
                assert np.abs(np.median(head_pose(found[0]), 0) - clip.pose[0]).max() < 5
    assert 0 < moved["still"] < .75 * moved["free"], moved


def test_ctrl_c_keeps_what_is_done(tmp_path, monkeypatch, request):
    """SIGINT after 32 frames: they and their sound are in `.partial`, nothing else is there."""
    real = sample.decode

    def decode(*given):
        for frames in real(*given):
            yield frames
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(sample, "decode", decode)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)    # a job of `&` ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt):
        sample.main(["--image", str(ROOT / "assets/face.png"), "--audio",
                     str(ROOT / "assets/speech.wav"), "--out", str(tmp_path / "a.mp4"), "--steps", "1"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.partial.mp4"]
    assert len(list(media.read_video(tmp_path / "a.partial.mp4"))) == 32
    heard = media.read_sound(tmp_path / "a.partial.mp4")
    assert 32 * 640 <= len(heard) < 32 * 640 + 2048


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_speech(tmp_path):
    """100 s of speech through small models need the memory of 20 s and at most 30 MB more: the sound
    is 5 MB of it, the frames alone would be 98 MB."""
    import diffusion
    import vae
    torch.manual_seed(0)
    model = vae.VAE(vae.VAEConfig(width=32, layers=1, depth=1))
    motion = diffusion.MotionModel(diffusion.MotionConfig(width=32, layers=1, token_width=32))
    for name, made, more in (("vae", model, {}), ("motion", motion, {
            "vae": training.fingerprint(model), "mean": [0.0] * 3, "std": [1.0] * 3})):
        training.save(tmp_path / f"{name}.pt", {"config": dataclasses.asdict(made.config),
                                                "weights": made.state_dict()} | more)
    shutil.copy(SHIPPED / "detector.pt", tmp_path)
    voice = media.read_sound(ROOT / "assets" / "speech.wav")
    code = ("import sys, sample; sample.main(sys.argv[1:], quiet=True); "
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")
    peak = {}
    for seconds in (20, 100):
        media.write_sound(tmp_path / "a.wav", np.resize(voice, seconds * media.RATE))
        done = subprocess.run([sys.executable, "-c", code, "--image", "assets/face.png", "--audio",
                               str(tmp_path / "a.wav"), "--out", str(tmp_path / "a.mp4"), "--steps", "1",
                               "--checkpoint", str(tmp_path), "--device", "cpu"], cwd=ROOT, text=True,
                              env={**os.environ, "MALLOC_ARENA_MAX": "1",     # without these two,
                                   "MALLOC_MMAP_THRESHOLD_": "262144"},       # 40 MB of chance
                              capture_output=True, timeout=240)
        assert done.returncode == 0, done.stderr
        peak[seconds] = int(done.stdout) / 1000                                     # MB
    assert peak[100] < peak[20] + 30, peak


def test_attention_to_the_reference_is_not_uniform():
    """In the shipped weights frames look at some places of the reference more than at others, though
    the toy preset has a way around attention: in one block at three quarters of them or fewer."""
    models = sample.load_models(SHIPPED, "cpu")
    clip, frames = evaluate.held_out(0)
    _, reference = sample.encode_portrait(models, frames[0], clip.landmarks[0])
    speech = audio.log_mel(clip.sound)[None, :40]
    model, asked = models.motion, []
    for block in model.conformer.blocks:
        block.cross.register_forward_pre_hook(lambda layer, given: asked.append((layer, *given)))
    with torch.inference_mode():
        _, condition = model.condition(speech)
        model.denoise(torch.randn(1, 40, 3, 16, 16), torch.tensor([.5]), condition, reference)
        entropy = []
        for layer, x, tokens in asked:
            q, = split(layer.q(layer.norm(x)), 1, layer.heads)
            k, _ = split(layer.kv(layer.token_norm(tokens)), 2, layer.heads)
            w = (q @ k.mT / q.shape[-1] ** .5).softmax(-1)
            entropy.append(-(w * (w + 1e-12).log()).sum(-1).mean())
    assert np.exp(float(min(entropy))) < .75 * 256


def test_shipped_files_are_small_and_say_how_they_were_made():
    """Each checkpoint is fp16 and has its command, seed, steps and minutes beside it."""
    assert sum(p.stat().st_size for p in (ROOT / "checkpoints").rglob("*.pt")) < 32e6
    for name in ("vae", "motion", "detector", "landmarks", "text"):
        told = json.loads((SHIPPED / f"{name}.json").read_text())
        assert {"command", "seed", "steps", "minutes"} <= set(told)
        held = training.load(SHIPPED / f"{name}.pt")
        assert all(v.dtype == torch.float16 for v in held["weights"].values() if v.is_floating_point())


def pale_pixels(picture):
    """How much of a picture has the colour in which --compare draws."""
    pale = [int(curves.PALE[k:k + 2], 16) for k in (1, 3, 5)]
    return (media.read_image(picture) == pale).all(-1).sum()


def steps_of(run):
    """The rows of a log that are steps, and not only measurements between them."""
    return [row for row in curves.read_log(run / "log.csv") if row["loss"] == row["loss"]]


def test_the_whole_road_in_miniature(tmp_path):
    """Train all three for a few steps, resume one, sample with them, read the video back."""
    runs, few = tmp_path, ["--workers", "0", "--every", "2"]
    detector.main(["--out", str(runs / "detector"), "--steps", "2", "--identities", "4", "--batch", "4",
                   *few])
    vae = ["--out", str(runs / "vae"), "--identities", "3", "--frames", "2", "--batch", "2", *few]
    train_vae.main([*vae, "--steps", "4"])
    for name in ("last.pt", "vae.pt", "log.csv", "curve.png", "grid.png"):
        assert (runs / "vae" / name).is_file()
    rows = steps_of(runs / "vae")
    assert [r["step"] for r in rows] == [0, 1, 2, 3] and rows[-1]["real"] == rows[-1]["real"]
    motion = ["--vae", str(runs / "vae" / "vae.pt"), "--out", str(runs / "diffusion"), "--clips", "2",
              "--batch", "2", *few]
    train_diffusion.main([*motion, "--steps", "2"])
    assert pale_pixels(runs / "diffusion" / "curve.png") < 60             # letters are smoothed
    train_diffusion.main([*motion, "--steps", "3", "--compare",             # the same run goes on
                          str(ROOT / "results" / "toy_curves.csv")])
    assert pale_pixels(runs / "diffusion" / "curve.png") > 200
    rows = steps_of(runs / "diffusion")
    assert [r["step"] for r in rows] == [0, 1, 2]
    shutil.copy(SHIPPED / "detector.pt", runs / "detector" / "detector.pt")
    clip = toy.make_clip(5, 1.0, 128)
    media.write_image(runs / "face.png", clip.frame(0))
    media.write_sound(runs / "voice.wav", clip.sound)
    sample.main(["--image", str(runs / "face.png"), "--audio", str(runs / "voice.wav"), "--checkpoint",
                 str(runs), "--out", str(runs / "out.mp4"), "--steps", "2"])
    assert len(list(media.read_video(runs / "out.mp4"))) == 25


@pytest.mark.parametrize("script", [detector, train_vae, train_diffusion])
@pytest.mark.parametrize("rate", ["0", "-1", "1e300", "nan"])
def test_learning_rates_that_are_none(script, rate, tmp_path):
    """--lr lies above 0 and is at most 1; nothing is written for another."""
    with pytest.raises(media.UserError, match="--lr"):
        script.main(["--lr", rate, "--steps", "2", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script, flags", [
    (train_vae, ["--data", "nowhere"]), (train_vae, ["--identities", "0"]),
    (train_vae, ["--data", "SMALL"]), (train_diffusion, ["--data", "nowhere"]),
    (train_diffusion, ["--vae", "nowhere"]), (train_diffusion, ["--data", "SMALL"])])
def test_a_fresh_start_that_cannot_be_made_deletes_nothing(script, flags, tmp_path):
    """--fresh beside a wrong flag, or data that cannot serve: the old run is there still."""
    if "SMALL" in flags:
        flags = ["--data", str(tmp_path / "clips")]
        data.main(["toy", "--clips", "1", "--seconds", "1", "--size", "64", "--workers", "0", "--out",
                   flags[1]])
    run = tmp_path / "run"
    run.mkdir()
    for name in ("last.pt", "log.csv"):
        (run / name).write_text("weeks of training")
    with pytest.raises(media.UserError, match="nowhere|--identities|64x64"):
        script.main(["--fresh", "--out", str(run), "--steps", "2", "--device", "cpu", "--workers", "0",
                     *flags])
    assert {p.name: p.read_text() for p in run.iterdir()} == dict.fromkeys(
        ("last.pt", "log.csv"), "weeks of training")


@pytest.mark.parametrize("flags, named", [
    (["--image", "none.png"], "none.png"), (["--audio", "none.wav"], "none.wav"),
    (["--image", "."], "folder"), (["--audio", "assets/face.png"], "face.png"),
    (["--image", "assets/speech.wav"], "speech.wav"), (["--out", "out.txt"], "out.txt"),
    (["--out", "assets/face.png"], "input"), (["--steps", "0"], "--steps"), (["--seed", "-1"], "--seed"),
    (["--checkpoint", "tests"], "tests"), (["--device", "nonsense"], "nonsense"),
    (["--sampler", "magic"], "magic")])
def test_mistakes_take_one_line(flags, named):
    """Wrong files and flags end in a UserError that names the culprit; nothing is written."""
    given = {"--image": "assets/face.png", "--audio": "assets/speech.wav", "--out": "out_of_tests.mp4"}
    given |= dict(zip(flags[::2], flags[1::2]))
    words = [w for k, v in given.items()
             for w in (k, str(ROOT / v) if v.startswith("assets") else v)]
    with pytest.raises(media.UserError, match=named):
        sample.main(words)
    assert not Path("out_of_tests.mp4").exists()


def test_a_mistake_as_a_command():
    """As a command: one line on stderr, exit status 2, no traceback."""
    done = command("sample.py", "--image", "none.png", "--audio", "assets/speech.wav", expect=2)
    assert done.stderr.startswith("error: none.png") and done.stderr.count("\n") == 1


def test_a_picture_without_a_face_is_one_line(tmp_path):
    """Noise is no face: the error says so and what to do."""
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    with pytest.raises(media.UserError, match="noise.png: no face"):
        sample.main(["--image", str(tmp_path / "noise.png"), "--audio",
                     str(ROOT / "assets" / "speech.wav"), "--out", str(tmp_path / "a.mp4")])
    assert not (tmp_path / "a.mp4").exists()


def test_a_small_model_learns_a_clip_by_heart(tmp_path, monkeypatch):
    """--overfit: 150 steps on one head bring its own PSNR above 24 dB, from 12 at the start."""
    import vae
    monkeypatch.setitem(vae.PRESETS, "toy", vae.VAEConfig(width=32, layers=1, depth=1))
    train_vae.main(["--overfit", "--steps", "150", "--batch", "4", "--workers", "0", "--warmup", "20",
                    "--out", str(tmp_path), "--compare", str(ROOT / "results" / "toy_curves.csv")])
    measured = [row["unseen"] for row in curves.read_log(tmp_path / "log.csv")]
    assert measured[-1] > 24, measured[-1]
    assert pale_pixels(tmp_path / "curve.png") > 200


def test_frechet_of_known_gaussians():
    """N(0, 1) against N(m, s^2): (m^2 + (1 - s)^2) in every dimension."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((200_000, 3))
    assert evaluate.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert evaluate.frechet(a, 2 + 3 * a) == pytest.approx(3 * (4 + 4), rel=.02)


def test_the_table_of_samplers(monkeypatch, tmp_path, capsys):
    """Every sampler and number of steps has its row; eight of eq. 6 are nearer to the truth than one."""
    assert evaluate.SAMPLER_STEPS == (1, 2, 5, 10, 20, 50, 150)
    monkeypatch.setattr(evaluate, "SAMPLER_STEPS", (1, 8))
    monkeypatch.setattr(evaluate.data, "in_parallel", lambda *_: [evaluate.held_out(101)])
    evaluate.main(["samplers", "--json", str(tmp_path / "table.json")])
    table = json.loads((tmp_path / "table.json").read_text())
    told = capsys.readouterr().out
    assert all(told.count(f"{name} ") == 2 for name in evaluate.diffusion.SAMPLERS)
    rows = {(r["sampler"], r["steps"]): r for r in table["rows"]}
    assert len(rows) == 8 and all(r["seconds"] > 0 for r in rows.values())
    many, one = rows["euler_maruyama", 8], rows["euler_maruyama", 1]
    assert many["lip_r_mean8"] > max(.5, one["lip_r_mean8"]) and many["distance"] < one["distance"]
    assert rows["dpmpp_2m", 8]["lip_r_mean8"] > .5


def test_the_sheet_of_identities(tmp_path):
    """Portrait, result and truth side by side; the result lies nearer to the truth than the portrait."""
    models, clips = sample.load_models(SHIPPED, "cpu"), [evaluate.held_out(k) for k in (100, 101)]
    evaluate.draw_sheet(tmp_path / "sheet.png", clips, models)
    sheet = media.read_image(tmp_path / "sheet.png")
    assert sheet.shape == (128, 12 * 128, 3)
    for k, (_, frames) in enumerate(clips):
        portrait, made, true = np.split(sheet[:, 384 * k:384 * (k + 1)], 3, 1)
        assert (portrait == frames[0]).all() and (frames == true).all((1, 2, 3)).any()
        assert evaluate.psnr(made, true) > evaluate.psnr(portrait, true) + 3


def test_scores_of_known_numbers():
    """psnr, Pearson, blinks and the bootstrap of evaluate.py on cases worked out by hand."""
    a = np.zeros((2, 8, 8, 3), np.uint8)
    assert evaluate.psnr(a, a + 51) == pytest.approx(10 * np.log10(4 / .16))
    boxes = np.array([[[0, 0, 3, 3]], [[0, 0, 3, 3]]], dtype=float)
    b = a.copy()
    b[:, 4:] = 255
    assert evaluate.psnr_in(a, b, boxes) > 99
    assert evaluate.pearson([1, 2, 3], [2, 4, 6.]) == pytest.approx(1)
    lids = np.full(100, .3)
    lids[10:14] = lids[40:42] = 0                    # two blinks
    lids[60:61] = lids[80:95] = 0                    # too short, too long
    assert metrics.count_blinks(lids) == 2
    held = evaluate.score([1.0, 2.0, 3.0, np.nan])
    assert held["value"] == 2 and 1 <= held["low"] < 2 < held["high"] <= 3
