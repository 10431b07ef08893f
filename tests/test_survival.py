"""What users bring: wrong, broken, odd and hostile files, each through sample.py's main(argv).

A case ends in a video of the right length, or in one line that names the culprit; never in a
traceback, a hang, a half-written file, or a changed one.
"""
import contextlib
import faulthandler
import os
import resource
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import media
import sample
import toy
import training

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 30


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def wav(path, samples, width=2, channels=1, rate=16_000, kind=1):
    """A wav file by hand: any width, any number of channels, kind 3 for floats."""
    data = samples.tobytes()
    head = struct.pack("<HHIIHH", kind, channels, rate, rate * channels * width, channels * width,
                       8 * width)
    path.write_bytes(b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " +
                     struct.pack("<I", 16) + head + b"data" + struct.pack("<I", len(data)) + data)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the files of all cases, made from a good face and a good voice."""
    f = tmp_path_factory.mktemp("survival")
    face, voice = media.read_image(ROOT / "assets/face.png"), \
        media.read_sound(ROOT / "assets/speech.wav")[16_000:24_000]
    picture, rng = Image.fromarray(face), np.random.default_rng(0)
    short = (voice * 32_000).astype("<i2")

    # pictures that can serve
    picture.save(f / "face.png")
    for name in ("face.jpg", "face.webp", "face.bmp", "face.gif", "face.tiff"):
        picture.save(f / name)
    (f / "png_called.jpg").write_bytes((f / "face.png").read_bytes())
    (f / "no_suffix").write_bytes((f / "face.png").read_bytes())
    for mode in ("L", "RGBA", "P", "1", "CMYK", "LA"):
        picture.convert("RGB" if mode == "1" else mode).save(
            f / f"mode_{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(f / "bits16.png")
    picture.transpose(Image.Transpose.ROTATE_90).save(
        f / "exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    begin = (f / "face.png").read_bytes()
    (f / "exif_broken.png").write_bytes(begin[:33] + chunk(b"eXIf", b"II+\0\x08") + begin[33:])
    Image.fromarray(np.concatenate([face, face[:, ::-1]], 1)).save(f / "two_faces.png")
    picture.resize((90, 90)).save(f / "small.png")
    with media.VideoWriter(f / "video.mp4", 128, 128, voice) as video:
        video.write(np.repeat(np.asarray(picture.resize((128, 128)))[None], 12, 0))
    (f / "link.mp4").symlink_to("video.mp4")
    (f / "other.partial.mp4").write_bytes((f / "video.mp4").read_bytes())
    with media.VideoWriter(f / "silent_video.mp4", 128, 128) as video:
        video.write(np.repeat(np.asarray(picture.resize((128, 128)))[None], 12, 0))

    # pictures that cannot
    whole = (f / "face.png").read_bytes()
    (f / "half.png").write_bytes(whole[:len(whole) // 2])
    (f / "head.png").write_bytes(whole[:60])
    (f / "half.jpg").write_bytes((f / "face.jpg").read_bytes()[:300])
    (f / "text.png").write_text("I am a picture, honestly.\n" * 20)
    (f / "empty.png").touch()
    (f / "folder.png").mkdir()
    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    (f / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) +
                                 chunk(b"IDAT", zlib.compress(bytes(10 ** 6))) + chunk(b"IEND", b""))
    picture.resize((16, 16)).save(f / "16x16.png")
    picture.resize((1, 1)).save(f / "1x1.png")
    picture.resize((600, 20)).save(f / "600x20.png")
    Image.fromarray(rng.integers(0, 255, (200, 300, 3), dtype=np.uint8)).save(f / "noise.png")
    Image.new("RGB", (256, 256), "teal").save(f / "plain.png")
    Image.fromarray(face[:, 230:]).save(f / "cut_left.png")
    Image.fromarray(face[:360]).save(f / "cut_chin.png")

    # sounds that can serve
    wav(f / "voice.wav", short)
    (f / "wav_called.mp3").write_bytes((f / "voice.wav").read_bytes())
    wav(f / "stereo.wav", np.repeat(short, 2), channels=2)
    wav(f / "six.wav", np.repeat(short, 6), channels=6)
    wav(f / "8bit.wav", (voice * 127 + 128).astype(np.uint8), width=1)
    wav(f / "float.wav", voice.astype("<f4"), width=4, kind=3)
    wav(f / "8khz.wav", short[::2], rate=8_000)
    wav(f / "96khz.wav", np.repeat(short, 6), rate=96_000)
    wav(f / "silence.wav", short * 0)
    wav(f / "loud.wav", (voice * 50).astype("<f4"), width=4, kind=3)
    (f / "half.wav").write_bytes((f / "voice.wav").read_bytes()[:9_000])
    voiced = (f / "voice.wav").read_bytes()
    (f / "junk_behind.wav").write_bytes(voiced + b"\xff" * 999)

    # sounds that cannot
    wav(f / "none.wav", short[:0])
    wav(f / "short.wav", short[:2_000])
    spoiled = voice.astype("<f4").copy()
    spoiled[4_000] = np.nan
    wav(f / "nan.wav", spoiled, width=4, kind=3)
    spoiled[4_000] = np.inf
    wav(f / "inf.wav", spoiled, width=4, kind=3)
    (f / "head.wav").write_bytes(voiced[:30])
    (f / "text.wav").write_text("la la la\n" * 50)
    (f / "empty.wav").touch()

    # weights
    def weights(name, **changed):
        folder = f / name
        folder.mkdir()
        for part in ("vae.pt", "motion.pt", "detector.pt"):
            (folder / part).symlink_to(training.SHIPPED / part)
        for part, content in changed.items():
            (folder / f"{part}.pt").unlink()
            if isinstance(content, bytes):
                (folder / f"{part}.pt").write_bytes(content)
            else:
                torch.save(content, folder / f"{part}.pt")
    shipped = (training.SHIPPED / "vae.pt").read_bytes()
    held = training.load(training.SHIPPED / "vae.pt")
    for part in ("vae", "motion", "detector"):
        whole = (training.SHIPPED / f"{part}.pt").read_bytes()
        weights(f"cut_{part}", **{part: whole[:len(whole) // 2]})
    weights("hostile_motion", motion=Hostile())
    weights("hostile_detector", detector={"config": {}, "weights": Hostile()})
    weights("foreign_vae", vae={"state_dict": {"a": torch.ones(3)}})
    weights("list_motion", motion=[1, 2, 3])
    weights("text_detector", detector=b"weights, honestly")
    weights("other_sizes", vae=held | {"config": held["config"] | {"width": 32}})
    weights("other_vae", vae=held | {"weights": {k: v + 1 for k, v in held["weights"].items()}})
    weights("sentence_vae", vae=b"this is no checkpoint, and its first letter unpickles")
    weights("negative_vae", vae=held | {"config": held["config"] | {"width": -1}})
    weights("no_patch", vae=held | {"config": held["config"] | {"patch": 0}})
    for k in range(4):
        damaged = bytearray(shipped)
        for place in rng.integers(0, len(damaged) if k % 2 else 4_000, 12):
            damaged[place] ^= 255
        weights(f"flipped{k}_vae", vae=bytes(damaged))
    held = training.load(training.SHIPPED / "motion.pt")
    weights("endless_motion", motion=held | {"config": held["config"] | {"window": 24}})
    weights("mean_missing", motion=held | {"mean": None})
    weights("mean_of_two", motion=held | {"mean": [0.0, 0.0]})
    (f / "empty_weights").mkdir()

    # damage: bytes flipped at random in otherwise good files
    for k in range(5):
        for name in ("face.png", "face.jpg", "face.webp", "voice.wav", "video.mp4"):
            damaged = bytearray((f / name).read_bytes())
            at = rng.integers(0, min(len(damaged), 4_000), 12)
            for place in at:
                damaged[place] = rng.integers(256)
            (f / f"flipped{k}_{name}").write_bytes(damaged)
    return f


PICTURES = ["face.jpg", "face.webp", "face.bmp", "face.gif", "face.tiff", "png_called.jpg", "no_suffix",
            "mode_L.png", "mode_RGBA.png", "mode_P.png", "mode_CMYK.jpg", "mode_LA.png", "bits16.png",
            "exif.jpg", "exif_broken.png", "small.png"]
SOUNDS = ["wav_called.mp3", "stereo.wav", "six.wav", "8bit.wav", "float.wav", "8khz.wav", "96khz.wav",
          "silence.wav", "loud.wav", "half.wav", "junk_behind.wav", "video.mp4"]
REFUSED = [                                               # flags, what the one line must say
    ("--image missing.png", "no such file"), ("--image folder.png", "folder"),
    ("--image empty.png", "empty"), ("--image text.png", "neither a picture nor a video"),
    ("--image half.png", "broken picture"), ("--image head.png", "picture"),
    ("--image half.jpg", "picture"), ("--image voice.wav", "neither a picture nor a video"),
    ("--image bomb.png", "megapixels"), ("--image 16x16.png", "at least 32x32"),
    ("--image 1x1.png", "at least 32x32"), ("--image 600x20.png", "at least 32x32"),
    ("--image noise.png", "no face"), ("--image plain.png", "no face"),
    ("--image cut_left.png", "border cuts"), ("--image cut_chin.png", "border cuts"),
    ("--audio missing.wav", "no such file"), ("--audio folder.png", "folder"),
    ("--audio empty.wav", "empty"), ("--audio text.wav", "text.wav"), ("--audio head.wav", "head.wav"),
    ("--audio none.wav", "none.wav"), ("--audio short.wav", "at least 0.2 s"),
    ("--audio nan.wav", "not numbers"), ("--audio inf.wav", "not numbers"),
    ("--audio face.png", "no audio"), ("--audio silent_video.mp4", "no audio"),
    ("--checkpoint missing", "no vae.pt"), ("--checkpoint empty_weights", "no vae.pt"),
    ("--checkpoint face.png", "no vae.pt"), ("--checkpoint cut_vae", "cut short"),
    ("--checkpoint cut_motion", "cut short"), ("--checkpoint cut_detector", "cut short"),
    ("--out link.mp4 --audio video.mp4", "input"), ("--sheet face.png", "input"),
    ("--checkpoint hostile_motion", "not a checkpoint"),
    ("--checkpoint hostile_detector", "not a checkpoint"),
    ("--checkpoint foreign_vae", "not the weights of a VAE"),
    ("--checkpoint list_motion", "not a checkpoint"), ("--checkpoint text_detector", "not a checkpoint"),
    ("--checkpoint sentence_vae", "not a checkpoint"), ("--checkpoint no_patch", "not the weights"),
    ("--checkpoint negative_vae", "not the weights"), ("--checkpoint endless_motion", "longer than"),
    ("--checkpoint mean_missing", "mean and std"), ("--checkpoint mean_of_two", "mean and std"),
    *((f"--checkpoint flipped{k}_vae", ".pt: ") for k in range(4)),
    ("--checkpoint other_sizes", "do not fit"), ("--checkpoint other_vae", "another VAE"),
    ("--steps 0", "--steps"), ("--steps -3", "--steps"), ("--steps many", "--steps"),
    ("--steps 2.5", "--steps"), ("--steps 100000", "--steps"), ("--seed -1", "--seed"),
    ("--sampler magic", "magic"), ("--pose sideways", "sideways"), ("--device nonsense", "nonsense"),
    ("--device meta", "meta"), (f"--image {'x' * 300}.png", "no such file"),
    (f"--out {'x' * 300}.mp4", "cannot be written"), ("--sheet face.png/a.png", "face.png/a.png"),
    ("--sheet /proc/a.png", "/proc/a.png"),
    ("--out other.mp4 --audio other.partial.mp4", "input"),
    ("--nonsense 3", "--nonsense"), ("--detector eyes", "eyes"), ("--wav2vec2 missing.pt", "mel"),
    ("--out .", "ends in"), ("--out /", "ends in"), ("--out out.txt", "out.txt"),
    ("--out out", "ends in"), ("--out folder.png", "folder.png"),
    ("--out face.png/a.mp4", "face.png"), ("--out video.mp4 --audio video.mp4", "input"),
    ("--out /proc/a.mp4", "/proc/a.mp4"), ("--sheet sheet.xyz", "sheet.xyz"),
]


class Slow(BaseException):
    """No `except Exception` takes it for a broken file."""


@contextlib.contextmanager
def within(seconds):
    """Slow, when what is inside takes longer."""
    def late(*_):
        raise Slow
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(seconds + 15, exit=True, file=sys.__stderr__)     # loops in C
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def speak(files, flags, monkeypatch):
    """Run sample.main in the folder of the files; returns the error's line or None.

    Checks that nothing but the wanted video appears, and that an old one stays on an error.
    """
    monkeypatch.chdir(files)
    given = {"--image": "face.png", "--audio": "voice.wav", "--out": "out.mp4", "--steps": "1"}
    given |= dict(zip(flags[::2], flags[1::2]))
    (files / "out.mp4").write_bytes(b"what was there before")
    before = {p: p.stat().st_mtime_ns for p in files.rglob("*")}
    error = None
    try:
        with within(SECONDS):
            sample.main([word for pair in given.items() for word in pair])
    except media.UserError as told:
        error = str(told)
        assert (files / "out.mp4").read_bytes() == b"what was there before"
        assert {p: p.stat().st_mtime_ns for p in files.rglob("*")} == before
    else:
        made = {p.name for p in files.rglob("*")} - {p.name for p in before}
        assert not made and len(list(media.read_video(files / "out.mp4"))) == \
            round(25 * len(media.read_sound(given["--audio"])) / media.RATE)
    assert not (files / "harmed").exists()
    return error


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_serve(files, name, monkeypatch):
    """Every format, mode and orientation makes a video."""
    assert speak(files, ["--image", name], monkeypatch) is None


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds_that_serve(files, name, monkeypatch):
    """Every width, rate and number of channels makes a video as long as the sound."""
    assert speak(files, ["--audio", name], monkeypatch) is None


@pytest.mark.parametrize("flags, told", REFUSED, ids=[flags for flags, _ in REFUSED])
def test_what_cannot_be_done_is_one_line(files, flags, told, monkeypatch):
    """One line names the culprit; nothing is written, nothing is changed."""
    error = speak(files, flags.split(), monkeypatch)
    assert error and told in error, error
    if flags.split()[0] in ("--image", "--audio", "--checkpoint"):
        assert flags.split()[-1] in error and "; " in error, f"without a name or advice: {error}"


@pytest.mark.parametrize("name", ["face.png", "face.jpg", "face.webp", "voice.wav", "video.mp4"])
@pytest.mark.parametrize("k", range(5))
def test_damaged_files_end_well_or_in_one_line(files, name, k, monkeypatch):
    """Bytes flipped at random: a video of the right length or one line, never anything else."""
    flag = "--image" if name.startswith("face") else "--audio"
    error = speak(files, [flag, f"flipped{k}_{name}"], monkeypatch)
    assert error is None or f"flipped{k}_{name}" in error


def test_of_several_faces_the_largest_speaks(files, monkeypatch, capsys):
    """A note says how many there are."""
    assert speak(files, ["--image", "two_faces.png"], monkeypatch) is None
    assert "2 faces; the largest speaks" in capsys.readouterr().err


def test_a_video_serves_by_its_first_frame(files, monkeypatch, capsys):
    assert speak(files, ["--image", "video.mp4"], monkeypatch) is None
    assert "its first frame is the portrait" in capsys.readouterr().err


def test_a_disk_that_fills_keeps_what_was(files, monkeypatch):
    """When the video cannot grow past 2 kB, one line says so and the old file stays."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limit[1]))
    try:
        error = speak(files, [], monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "out.mp4: cannot be written" in error


@pytest.mark.parametrize("flags", ["--image half.png", "--audio nan.wav", "--checkpoint hostile_motion",
                                   "--steps 0", "--out face.png/a.mp4"])
def test_five_of_them_as_commands(files, flags):
    """As a user types them: exit status 2, one line on stderr, nothing on stdout."""
    given = {"--image": "face.png", "--audio": "voice.wav", "--out": "none.mp4"}
    given |= dict([flags.split()])
    done = subprocess.run([sys.executable, ROOT / "sample.py", *(w for p in given.items() for w in p)],
                          cwd=files, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and not (files / "none.mp4").exists()


def test_a_silent_voice_keeps_the_mouth_shut(tmp_path):
    """Two seconds of silence: the mouth opens less than a third as far as in speech."""
    import detector
    from landmarks import mouth_opening
    clip, finder = toy.make_clip(5, 2.0, held_out=True), detector.load()
    media.write_image(tmp_path / "a.png", clip.frame(0))
    openings = []
    for name, sound in (("speech", clip.sound), ("silence", 0 * clip.sound)):
        media.write_sound(tmp_path / f"{name}.wav", sound)
        sample.main(["--image", str(tmp_path / "a.png"), "--audio", str(tmp_path / f"{name}.wav"),
                     "--out", str(tmp_path / f"{name}.mp4"), "--steps", "10"])
        frames = np.stack(list(media.read_video(tmp_path / f"{name}.mp4")))
        openings.append(mouth_opening(detector.find_in_crops(finder, frames))[12:].mean())
    assert openings[1] < openings[0] / 3
