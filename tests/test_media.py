"""Pictures, sound and video: what goes in comes out in place and in time."""
import io
import struct
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

import media

SECOND = media.RATE


def mux_pictures(container, stream, pictures, times):
    """Encode (H, W, 3) pictures shown from `times` on, in seconds."""
    for picture, time in zip(pictures, times):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=stream.pix_fmt)
        frame.time_base = Fraction(1, 90_000)
        frame.pts = round(time * 90_000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def mux_sound(container, stream, sound, rate, late=0.0):
    """Encode (T,) or (channels, T) that begins `late` seconds after zero."""
    sound, layout = np.atleast_2d(sound).astype(np.float32), stream.layout.name
    for first in range(0, sound.shape[1], 1024):
        piece = np.ascontiguousarray(sound[:, first:first + 1024].T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(piece, format="flt", layout=layout)
        frame.sample_rate, frame.pts = rate, first + round(late * rate)
        frame.time_base = Fraction(1, rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_source(path, fps, rate, times=None, late=0.0, sound_late=0.0):
    """A foreign video of 1.6 s: white from 0.8 to 0.84 s of the pictures' time, a click at 0.8 s.

    `times`, when each frame begins, default to an even `fps`; `late` delays the pictures against
    zero; what the sound holds before `sound_late` is missing.
    """
    times = np.arange(round(1.6 * fps)) / fps if times is None else times
    ends = np.append(times[1:], 1.6)
    lit = (times <= .82 + 1e-9) & (ends > .82 + 1e-9)
    sound = np.zeros(round((1.6 + late) * rate))
    sound[round((.8 + late) * rate):round((.804 + late) * rate)] = .9
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        video.width = video.height = 64
        video.pix_fmt, video.codec_context.time_base = "yuv420p", Fraction(1, 90_000)
        audio = container.add_stream("aac", rate=rate, layout="mono")
        pictures = [np.full((64, 64, 3), 255 * on, np.uint8) for on in lit]
        mux_pictures(container, video, pictures, times + late)
        mux_sound(container, audio, sound[round(sound_late * rate):], rate, sound_late)


def check_together(path):
    """Frame 20 of 40 is the bright one; the click's first sample is 12,800."""
    light = np.array([f.mean() for f in media.read_video(path)])
    sound = np.abs(media.read_sound(path))
    assert len(light) == 40 and light.argmax() == 20 and light[19] < 60 and light[21] < 60
    assert abs((sound > sound.max() / 2).argmax() / SECOND - .8) < .005


@pytest.mark.parametrize("fps, rate", [(24, 44100), (25, 48000), (30000 / 1001, 22050), (30, 8000),
                                       (50, 16000), (60, 48000)])
def test_click_and_flash_stay_together(tmp_path, fps, rate):
    """From any frame and sample rate: the flash in its very frame, the click within 5 ms."""
    write_source(tmp_path / "a.mp4", fps, rate)
    check_together(tmp_path / "a.mp4")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("late, sound_late", [(.5, 0), (0, .5), (.3, .1)])
def test_a_late_start_of_either_keeps_them_together(tmp_path, suffix, late, sound_late):
    """Sound from before the first picture is cut, missing sound is silence."""
    write_source(tmp_path / f"a.{suffix}", 25, 16000, late=late, sound_late=sound_late)
    check_together(tmp_path / f"a.{suffix}")


def test_frames_of_uneven_length_stand_as_long_as_they_are_shown(tmp_path):
    """A variable frame rate, as phones and screen recorders write it, keeps its timing."""
    times = np.sort(np.random.default_rng(0).choice(np.arange(1, 159), 50, False)) / 100
    times = np.concatenate([[0], times[abs(times - .82) > .03], [.8, .84, 1.58]])
    write_source(tmp_path / "a.mp4", 25, 16000, times=np.sort(times))
    check_together(tmp_path / "a.mp4")


def clip(seconds=2.0, size=32):
    """A flash in frame 20 and a click at its start."""
    sound = np.zeros(round(seconds * SECOND), np.float32)
    sound[20 * 640:20 * 640 + 40] = .9
    frames = np.zeros((round(25 * seconds), size, size, 3), np.uint8)
    frames[20] = 255
    return frames, sound


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_what_is_written_is_read_back(tmp_path, monkeypatch, suffix):
    """Exactly the frames written, the whole sound, the click within 5 ms: AAC shifts nothing."""
    frames, sound = clip(2.03)
    monkeypatch.chdir(tmp_path)
    path = media.Path(f"10:30.{suffix}")                               # not a protocol called 10
    with media.VideoWriter(path, 32, 32, sound) as video:
        for part in np.array_split(frames, 7):
            video.write(part)
    assert video.frames == len(frames)
    read, heard = np.stack(list(media.read_video(path))), media.read_sound(path)
    assert len(read) == len(frames) and read[20].mean() > 200 and read[19].mean() < 20
    assert len(heard) == len(sound) if suffix == "mp4" else 0 <= len(heard) - len(sound) < 1024
    assert abs(np.abs(heard).argmax() - 20 * 640) < 80
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_player_can_start_at_once(tmp_path):
    """Sound and pictures alternate, and the index stands in front."""
    frames, sound = clip(13.0)                    # longer than the muxer sorts of its own accord
    with media.VideoWriter(tmp_path / "a.mp4", 32, 32, sound) as video:
        video.write(frames)
    with av.open(str(tmp_path / "a.mp4")) as container:
        kinds = [p.stream.type for p in container.demux() if p.size]
    for kind in ("audio", "video"):
        places = np.flatnonzero(np.array(kinds) == kind)
        assert np.diff(places).max() <= 4 and places[0] < 4
    written = (tmp_path / "a.mp4").read_bytes()
    assert written.index(b"moov") < written.index(b"mdat")


def test_colours_come_back(tmp_path):
    """Red, green, blue, skin and grey survive H.264, and are tagged as what they are."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 150, 120], [128, 128, 128]])
    picture = np.kron(colours[None], np.ones((32, 32, 1))).astype(np.uint8)
    with media.VideoWriter(tmp_path / "a.mp4", *picture.shape[:2]) as video:
        video.write(np.stack([picture] * 3))
    read = next(media.read_video(tmp_path / "a.mp4"))
    assert np.abs(read[16, 16::32].astype(int) - colours).max() <= 4
    with av.open(str(tmp_path / "a.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.colorspace, codec.color_range, codec.color_primaries) == (5, 1, 1)


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
    """Ctrl-C after 30 frames: NAME.partial.mp4 with these and their sound, and a note."""
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
            video.write(np.zeros((90, 32, 32, 3), np.uint8))
            assert len(list(tmp_path.iterdir())) == 2                  # something is being written
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


def test_a_full_disk_is_one_clear_error(tmp_path):
    """Out of room in the middle: a UserError naming the file, nothing left, the old file kept."""
    code = """if True:
        import numpy as np, media, resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        def main(argv):
            noise = np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3), dtype=np.uint8)
            with media.VideoWriter(sys.argv[1] + "/a.mp4", 64, 64) as video:
                video.write(noise)
        media.run(main)"""
    (tmp_path / "a.mp4").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True,
                          text=True, cwd=media.Path(media.__file__).parent)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "a.mp4" in done.stderr
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.mp4", b"old")]


@pytest.mark.parametrize("suffix, codec", [
    ("wav", "pcm_s16le"), ("wav", "pcm_u8"), ("wav", "pcm_s24le"), ("mp3", "libmp3lame"),
    ("m4a", "aac"), ("flac", "flac"), ("ogg", "libopus"), ("mkv", "pcm_f32le")])
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
    assert abs(len(sound) / SECOND - 1) < (.08 if suffix == "mp3" else .05)     # mp3 has no end
    spectrum = np.abs(np.fft.rfft(sound[:SECOND // 2 * 2], SECOND))
    assert abs(int(spectrum.argmax()) - 440) <= 2
    assert abs(sound[4000:12000].std() - .5 / 2 ** .5) < .04


def write_wav(path, sound, rate=16000, layout="mono"):
    """A wav of 32-bit floats, (T,) or (channels, T)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=rate, layout=layout)
        mux_sound(container, stream, sound, rate)


def tone(rate, frequency, seconds=1.0):
    return .5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def test_sounds_out_of_the_common(tmp_path):
    """Speech in the centre of 5.1 keeps its level; floats on the scale of integers are brought
    down, not squared; what 16 kHz cannot hold is filtered out, not folded."""
    surround = np.zeros((6, 48000))
    surround[2] = tone(48000, 440)
    write_wav(tmp_path / "a.wav", surround, 48000, "5.1")
    assert abs(np.abs(media.read_sound(tmp_path / "a.wav")).max() - .5) < .01
    write_wav(tmp_path / "a.wav", 40_000 * tone(16000, 440))
    assert abs(media.read_sound(tmp_path / "a.wav").std() - .5 ** .5) < .01
    write_wav(tmp_path / "a.wav", tone(48000, 10_000), 48000)
    heard = media.read_sound(tmp_path / "a.wav")
    assert np.abs(heard[500:-500]).max() < 1e-3 and abs(len(heard) - SECOND) <= 2


def mp3(tmp_path):
    with av.open(str(tmp_path / "whole.mp3"), "w") as container:
        stream = container.add_stream("libmp3lame", rate=16000, layout="mono")
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=16000,
                                      frame_size=576)
        frame = av.AudioFrame.from_ndarray(tone(16000, 440).astype(np.float32)[None], format="flt",
                                           layout="mono")
        frame.sample_rate = 16000
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return (tmp_path / "whole.mp3").read_bytes()


def test_sounds_with_odd_bytes_in_them(tmp_path, capsys):
    """Latin-1 tags and a sleeve picture do not matter; damage is left out with a note, the sound
    after it in its place."""
    whole, path, sleeve = mp3(tmp_path), tmp_path / "a.mp3", io.BytesIO()
    Image.new("RGB", (64, 64)).save(sleeve, "JPEG")
    tags = b""
    for name, body in ((b"TIT2", b"\0Ren\xe9"),
                       (b"APIC", b"\0image/jpeg\0\3\0" + sleeve.getvalue())):
        tags += name + struct.pack(">IH", len(body), 0) + body
    size = bytes(len(tags) >> bits & 127 for bits in (21, 14, 7, 0))
    path.write_bytes(b"ID3\3\0\0" + size + tags + whole + b"TAG" + b"\xe9" * 125)
    assert abs(len(media.read_sound(path)) - SECOND) < 1200 and capsys.readouterr().err == ""
    with pytest.raises(media.UserError, match="no video.*found: audio"):
        next(media.read_video(path))
    media.write_sound(tmp_path / "a.wav", tone(16000, 440))
    wav = (tmp_path / "a.wav").read_bytes()
    tag = b"LIST" + struct.pack("<I", 16) + b"INFOIART" + struct.pack("<I", 4) + b"Ren\xe9"
    (tmp_path / "a.wav").write_bytes(wav[:4] + struct.pack("<I", len(wav) + 16) + wav[8:] + tag)
    assert len(media.read_sound(tmp_path / "a.wav")) == SECOND
    junk = np.random.default_rng(0).bytes(700)
    path.write_bytes(whole[:len(whole) // 2] + junk + whole[len(whole) // 2:])
    assert abs(len(media.read_sound(path)) - SECOND) < 2400
    assert capsys.readouterr().err.startswith("note: ")


def test_a_hole_in_the_sound_is_silence(tmp_path):
    """Packets that are missing leave silence, so that what follows keeps its time."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for first in (0, 4096, 12_800):
            frame = av.AudioFrame.from_ndarray(np.full((1, 1024), 9000, np.int16), format="s16",
                                               layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, first, Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    sound = media.read_sound(tmp_path / "a.mkv")
    steps = np.flatnonzero(np.diff(sound > .1)) + 1
    assert np.abs(steps - np.array([1024, 4096, 5120, 12_800])).max() < 24


def test_sounds_that_cannot_serve(tmp_path):
    """Too short, empty, not numbers, no sound at all: each a clear error that names the file."""
    media.write_sound(tmp_path / "short.wav", np.zeros(1600))
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.mp3").write_text("not a sound")
    with media.VideoWriter(tmp_path / "silent.mp4", 32, 32) as video:
        video.write(np.zeros((10, 32, 32, 3), np.uint8))
    for name, bad in (("nan.wav", np.nan), ("inf.wav", np.inf)):
        write_wav(tmp_path / name, np.where(np.arange(8000) == 4000, bad, 0))
    media.write_sound(tmp_path / "none.wav", np.zeros(0))
    (tmp_path / "text.txt").write_text("not a sound\n" * 50)
    for name in ("short.wav", "empty.wav", "text.mp3", "silent.mp4", "nan.wav", "inf.wav",
                 "none.wav", "text.txt", "missing.wav"):
        with pytest.raises(media.UserError, match=name):
            media.read_sound(tmp_path / name)
    with pytest.raises(media.UserError, match="no audio.*found: video"):
        media.read_sound(tmp_path / "silent.mp4")
    with pytest.raises(media.UserError, match="ending"):
        media.write_sound(tmp_path / "a.mp3", np.zeros(SECOND))


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
    (tmp_path / "text.txt").write_text("not a picture\n" * 50)     # a terminal's screen to FFmpeg
    (tmp_path / "folder.png").mkdir()
    media.write_sound(tmp_path / "sound.wav", np.zeros(SECOND))
    for name in ("bomb.png", "cut.png", "text.jpg", "text.txt", "folder.png", "none.png",
                "sound.wav"):
        with pytest.raises(media.UserError, match=name):
            media.read_image(tmp_path / name)


def test_a_phone_picture_says_what_it_is(tmp_path):
    """HEIC, which FFmpeg would give the first tile of, is refused by name."""
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    with pytest.raises(media.UserError, match="HEIC"):
        media.read_image(tmp_path / "phone.heic")


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, recwarn):
    """Over 100 megapixels nothing is decoded and Pillow gives no warning of its own."""
    Image.new("1", (12_000, 9_000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(media.ImageOps, "exif_transpose", lambda image: pytest.fail("decoded"))
    with pytest.raises(media.UserError, match="12000x9000"):
        media.read_image(tmp_path / "bomb.png")
    assert not recwarn.list


def test_a_bomb_in_a_video_is_refused(tmp_path, monkeypatch):
    """The first frame counts like a picture."""
    with media.VideoWriter(tmp_path / "a.mp4", 128, 128) as video:
        video.write(np.zeros((2, 128, 128, 3), np.uint8))
    monkeypatch.setattr(media, "MEGAPIXELS", .01)
    with pytest.raises(media.UserError, match="128x128"):
        media.read_image(tmp_path / "a.mp4")


def test_phone_videos_are_turned(tmp_path):
    """The rotation in an mp4's header is applied: what lay on the left is on top."""
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :32] = 255
    with media.VideoWriter(tmp_path / "a.mp4", 32, 64) as video:
        video.write(np.stack([picture] * 3))
    written = bytearray((tmp_path / "a.mp4").read_bytes())
    at = written.index(b"tkhd") + 44                                     # its matrix, 16.16
    written[at:at + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 32 << 16, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(written)
    turned = next(media.read_video(tmp_path / "a.mp4"))
    assert turned.shape == (64, 32, 3) and turned[:28].min() > 240 and turned[36:].max() < 15


def test_frames_without_times_are_counted(tmp_path):
    """A bare H.264 stream, which holds no times, gives its frames one by one."""
    with av.open(str(tmp_path / "a.h264"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 25)
        for k in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 255 * (k == 20), np.uint8),
                                               format="rgb24").reformat(format="yuv420p")
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    light = [f.mean() for f in media.read_video(tmp_path / "a.h264")]
    assert len(light) == 30 and np.argmax(light) == 20


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
    assert tensor.shape == (2, 3, 4, 4)
    assert tensor[0, 1, 0, 0].item() == pytest.approx(161 / 127.5 - 1)
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
