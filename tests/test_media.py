"""Pictures, sound and video: what goes in comes out in place and in time."""
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

import media

SECOND = media.RATE


def write_source(path, fps, rate, flash=.8, seconds=1.6, codec="aac"):
    """A foreign video: a white flash and a click at the same instant, written with PyAV alone."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        audio = container.add_stream(codec, rate=rate, layout="mono")
        for k in range(round(seconds * fps)):
            lit = flash <= (k + .5) / fps < flash + .04
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 255 * lit, np.uint8), format="rgb24")
            frame.pts = k
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        sound = np.zeros(round(seconds * rate), np.float32)
        sound[round(flash * rate):round((flash + .004) * rate)] = .9
        for first in range(0, len(sound), 1024):
            piece = sound[first:first + 1024][None]
            frame = av.AudioFrame.from_ndarray(piece, format="flt", layout="mono")
            frame.sample_rate, frame.pts = rate, first
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


@pytest.mark.parametrize("fps, rate", [(24, 44100), (25, 48000), (30000 / 1001, 22050), (30, 8000),
                                       (50, 16000), (60, 48000)])
def test_click_and_flash_stay_together(tmp_path, fps, rate):
    """From any frame rate and any sample rate, click and flash land within a frame of their instant."""
    write_source(tmp_path / "a.mp4", fps, rate)
    light = [f.mean() for f in media.read_video(tmp_path / "a.mp4")]
    sound = media.read_sound(tmp_path / "a.mp4")
    assert abs(len(light) - 40) <= 1
    click = np.abs(sound).argmax() / media.RATE
    flash = int(np.argmax(light)) / 25
    assert abs(click - .8) < .012
    assert abs(flash - .8) <= .04 and abs(flash - click) <= .05


def clip(seconds=2.0, size=32):
    """A flash in frame 20 and a click at its start."""
    sound = np.zeros(round(seconds * SECOND), np.float32)
    sound[20 * 640:20 * 640 + 40] = .9
    frames = np.zeros((round(25 * seconds), size, size, 3), np.uint8)
    frames[20] = 255
    return frames, sound


def test_what_is_written_is_read_back(tmp_path):
    """Exactly the frames written, the whole sound, the click within 5 ms: AAC shifts nothing."""
    frames, sound = clip(2.03)
    with media.VideoWriter(tmp_path / "a.mp4", 32, 32, sound) as video:
        for part in np.array_split(frames, 7):
            video.write(part)
    read = np.stack(list(media.read_video(tmp_path / "a.mp4")))
    heard = media.read_sound(tmp_path / "a.mp4")
    assert len(read) == len(frames) and read[20].mean() > 200 and read[19].mean() < 20
    assert len(sound) <= len(heard) < len(sound) + 2048
    assert abs(np.abs(heard).argmax() - 20 * 640) < 80
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_every_frame_is_a_key_frame_on_request(tmp_path):
    """`intra` makes each packet a key frame, as clips at rest want."""
    frames, sound = clip()
    with media.VideoWriter(tmp_path / "a.mp4", 32, 32, sound, intra=True) as video:
        video.write(frames)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert all(p.is_keyframe for p in container.demux(video=0) if p.size)


def test_odd_sizes_are_written(tmp_path):
    """A 33x31 picture becomes a video of even size, not an error."""
    with media.VideoWriter(tmp_path / "a.mp4", 33, 31) as video:
        video.write(np.zeros((3, 33, 31, 3), np.uint8))
    assert next(media.read_video(tmp_path / "a.mp4")).shape == (34, 32, 3)


def test_an_interrupt_leaves_a_playable_part(tmp_path, capsys):
    """Ctrl-C after 30 frames: NAME.partial.mp4 with 30 frames and their sound, and a line saying so."""
    frames, sound = clip()
    with pytest.raises(KeyboardInterrupt):
        with media.VideoWriter(tmp_path / "a.mp4", 32, 32, sound) as video:
            video.write(frames[:30])
            raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a.partial.mp4"]
    assert len(list(media.read_video(tmp_path / "a.partial.mp4"))) == 30
    assert abs(len(media.read_sound(tmp_path / "a.partial.mp4")) / SECOND - 1.2) < .1
    assert "a.partial.mp4" in capsys.readouterr().err


def test_a_failure_leaves_nothing_and_keeps_what_was(tmp_path):
    """An exception while writing removes the temporary file and leaves the old video as it was."""
    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        with media.VideoWriter(tmp_path / "a.mp4", 32, 32) as video:
            video.write(np.zeros((2, 32, 32, 3), np.uint8))
            1 / 0
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.mp4", b"old")]


@pytest.mark.parametrize("name", ["a.txt", "a", "folder.mp4", "file/a.mp4"])
def test_places_where_no_video_can_go(tmp_path, name):
    """A wrong suffix, a folder, a path through a file: one clear error that names it."""
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(media.UserError, match=name.split("/")[0]):
        with media.VideoWriter(tmp_path / name, 32, 32) as video:
            video.write(np.zeros((1, 32, 32, 3), np.uint8))


@pytest.mark.parametrize("suffix, codec", [("wav", "pcm_s16le"), ("mp3", "libmp3lame"), ("m4a", "aac"),
                                           ("flac", "flac"), ("ogg", "libopus"), ("mkv", "pcm_f32le")])
@pytest.mark.parametrize("rate, layout", [(44100, "stereo"), (48000, "mono")])
def test_sounds_of_many_kinds(tmp_path, suffix, codec, rate, layout):
    """A tone of one second keeps its length and pitch from every container, in mono and stereo."""
    rate = 48000 if codec == "libopus" else rate
    path, t = tmp_path / f"a.{suffix}", np.arange(rate) / rate
    tone = .5 * np.sin(2 * np.pi * 440 * t)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        channels = 2 if layout == "stereo" else 1
        resampler = av.AudioResampler(format=stream.format, layout=layout, rate=rate,
                                      frame_size=stream.frame_size or 1024)
        interleaved = np.repeat(tone, channels)[None].astype(np.float32)
        frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    sound = media.read_sound(path)
    assert abs(len(sound) / SECOND - 1) < .08
    spectrum = np.abs(np.fft.rfft(sound[:SECOND // 2 * 2], SECOND))
    assert abs(int(spectrum.argmax()) - 440) <= 2
    assert abs(sound[4000:12000].std() - .5 / 2 ** .5) < .04


def test_sounds_that_cannot_serve(tmp_path):
    """Too short, empty, not numbers, no sound at all: each a clear error that names the file."""
    media.write_sound(tmp_path / "short.wav", np.zeros(1600))
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.mp3").write_text("not a sound")
    with media.VideoWriter(tmp_path / "silent.mp4", 32, 32) as video:
        video.write(np.zeros((10, 32, 32, 3), np.uint8))
    with av.open(str(tmp_path / "nan.wav"), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.full((1, 8000), np.nan, np.float32), format="flt",
                                           layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
    for name in ("short.wav", "empty.wav", "text.mp3", "silent.mp4", "nan.wav", "none.wav"):
        with pytest.raises(media.UserError, match=name):
            media.read_sound(tmp_path / name)


def test_pictures_of_every_mode(tmp_path):
    """Grey, palette, 16-bit, CMYK and transparent pictures come out as the colours one sees."""
    grey = np.linspace(0, 255, 16 * 16).reshape(16, 16).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "l.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "i16.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "p.png")
    for name in ("l.png", "i16.png", "p.png"):
        assert np.abs(media.read_image(tmp_path / name)[..., 1].astype(int) - grey).max() <= 1
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    red = media.read_image(tmp_path / "cmyk.jpg")[4, 4]
    assert red[0] > 200 and red[1] < 60
    for mode, colour in (("RGBA", (255, 0, 0, 0)), ("LA", (0, 0))):
        Image.new(mode, (8, 8), colour).save(tmp_path / "a.png")
        assert (media.read_image(tmp_path / "a.png") == 255).all()


def test_pictures_are_turned_as_exif_says(tmp_path):
    """Orientation 6 (turn right): what was on the left is on top."""
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    turned = media.read_image(tmp_path / "a.png")
    assert turned.shape == (32, 16, 3) and turned[0].min() == 255 and turned[-1].max() == 0


def test_pictures_that_cannot_serve(tmp_path):
    """Bombs, cut files, text, folders, nothing: each a clear error that names the file."""
    Image.new("1", (12_000, 9_000)).save(tmp_path / "bomb.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    media.write_sound(tmp_path / "sound.wav", np.zeros(SECOND))
    for name in ("bomb.png", "cut.png", "text.jpg", "folder.png", "none.png", "sound.wav"):
        with pytest.raises(media.UserError, match=name):
            media.read_image(tmp_path / name)


def test_a_video_serves_as_a_picture_by_its_first_frame(tmp_path, capsys):
    """The first frame is taken, and a note says so."""
    frames, sound = clip()
    frames[0] = 255
    with media.VideoWriter(tmp_path / "a.mp4", 32, 32, sound) as video:
        video.write(frames)
    assert media.read_image(tmp_path / "a.mp4").mean() > 240
    assert "note" in capsys.readouterr().err


def test_arrays_go_to_tensors_and_back():
    """uint8 -> [-1, 1] channels first -> the same uint8; beyond the range is clipped."""
    picture = np.arange(160, 160 + 96, dtype=np.uint8).reshape(2, 4, 4, 3)
    tensor = media.to_float(picture)
    assert tensor.shape == (2, 3, 4, 4) and tensor[0, 1, 0, 0].item() == pytest.approx(161 / 127.5 - 1)
    assert (media.to_uint8(tensor) == picture).all()
    assert media.to_uint8(tensor * 99).max() == 255


def test_grid_lays_pictures_out_row_by_row():
    """Picture 3 of a grid of two columns lies in the second row, on the right."""
    pictures = np.stack([np.full((4, 5, 3), 10 * k, np.uint8) for k in range(3)] +
                        [np.full((4, 5, 3), 99, np.uint8)])
    sheet = media.grid(pictures, 2)
    assert sheet.shape == (8, 10, 3) and (sheet[4:, 5:] == 99).all() and (sheet[:4, 5:] == 10).all()


def test_errors_take_one_line_and_status_2(capsys):
    """A UserError and a wrong flag both end in one `error: ` line on stderr and exit status 2."""
    def main(argv):
        media.ArgumentParser(prog="x").parse_args(argv)
        raise media.UserError("a.png: two\nlines")
    for argv in ([], ["--nonsense"]):
        with pytest.raises(SystemExit) as ended:
            media.run(main, argv)
        shown = capsys.readouterr()
        assert ended.value.code == 2 and shown.out == ""
        assert shown.err.startswith("error: ") and shown.err.count("\n") == 1


def test_sigint_is_one_word(tmp_path):
    """A script stopped by Ctrl-C says so and exits 130, without a traceback."""
    code = ("import media\ndef main(argv): raise KeyboardInterrupt\nmedia.run(main)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=media.Path(media.__file__).parent)
    assert done.returncode == 130 and "Traceback" not in done.stderr
