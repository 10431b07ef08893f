"""Pictures, sound and video; the one error type for users and the one safe way to write a file.

The only file that knows containers and codecs; `av` (PyAV) is imported inside its functions, so
that training on rendered heads runs without it. Pictures at rest are (H, W, 3) uint8, in memory
float32 in [-1, 1]; sound is float32 mono at 16 kHz; video is 25 frames a second, frame i covering
the sound's samples [640 i, 640 (i + 1)).
"""
from __future__ import annotations

import argparse
import contextlib
import os
import sys
import wave
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

FPS = 25                        # frames a second
RATE = 16_000                   # samples a second
MEGAPIXELS = 100                # the largest picture that is read
SHORTEST = .2                   # seconds of sound that make speech
HOLE, LEAP = .05, 600           # seconds between packets that are silence, that are a broken clock
HEIC = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc", b"ftypheim")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".m4v")


class UserError(Exception):
    """Something a user can put right; shown as one line, `error: ...`, and exit status 2."""


class TooLarge(UserError):
    """A picture that would not fit into memory."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors take the house's form: one line, no usage text, exit status 2. `doc`
    is a script's docstring: its first line says what the script is for, its commands are examples.
    """

    def __init__(self, doc="", **more):
        first, *lines = doc.split("\n")
        examples = [line for line in lines if line.startswith(("    python", "    torchrun"))]
        told = ["examples:", *examples] if examples else []
        super().__init__(description=first, epilog="\n".join(told),
                         formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def run(main, argv=None):
    """Run a script's main(argv); end in one line and status 2 where the user can help."""
    try:
        main(argv)
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _av():
    """PyAV, quiet."""
    try:
        import av
    except ImportError as error:
        raise UserError("sound and video need PyAV: pip install av") from error
    av.logging.set_level(None)
    return av


def _reason(error):
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:100]


# ---- arrays --------------------------------------------------------------------------------------

def to_float(pictures):
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32 tensor in [-1, 1]."""
    return torch.tensor(np.asarray(pictures)).float().movedim(-1, -3).contiguous() / 127.5 - 1


def to_uint8(tensor):
    """(..., 3, H, W) tensor in [-1, 1], clipped -> (..., H, W, 3) uint8 array."""
    scaled = ((tensor.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.movedim(-3, -1).to(torch.uint8).cpu().numpy()


def grid(pictures, columns):
    """Pictures of one size as a contact sheet, row by row. (n, H, W, 3) -> (H', W', 3) uint8."""
    n, h, w, _ = pictures.shape
    rows = -(-n // columns)
    sheet = np.full((rows * columns, h, w, 3), 255, dtype=np.uint8)
    sheet[:n] = pictures
    return sheet.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)


# ---- writing safely ------------------------------------------------------------------------------

def _beside(path):
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")


@contextlib.contextmanager
def writing(path):
    """OSError becomes UserError, naming the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); free some space "
                        "or choose another place") from error


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; rename it on success, delete it on failure: `path` is
    either the whole new file or what it was before."""
    path = Path(path)
    temporary = _beside(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(path):
    """UserError where a file could not be written."""
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        _beside(Path(path)).touch()
        _beside(Path(path)).unlink()


def write_image(path, picture):
    """Write (H, W, 3) uint8 in the format that the suffix names."""
    with replacing(path) as temporary:
        try:
            Image.fromarray(picture).save(temporary)
        except ValueError as error:
            raise UserError(f"{path}: {error}; use .png or .jpg") from error


def write_sound(path, sound, rate=RATE):
    """Write (T,) float in [-1, 1] as a 16-bit mono wav."""
    if Path(path).suffix.lower() != ".wav":
        raise UserError(f"{path}: sound is written as .wav; give it that ending")
    samples = (np.clip(sound, -1, 1) * 32767).round().astype("<i2")
    with replacing(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))                      # mono, two bytes a sample
        file.writeframes(samples.tobytes())


# ---- pictures ------------------------------------------------------------------------------------

def check_file(path):
    """UserError for what is missing, a folder, empty or not to be read."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; name a file in it")
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file; check its spelling and its folder's permissions")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: may not be read; check its permissions")
    if os.path.getsize(path) == 0:
        raise UserError(f"{path}: is empty; make or copy it again")


def read_image(path):
    """Any picture Pillow opens, turned as its EXIF says, or a video's first frame, with a note.
    -> (H, W, 3) uint8; what is transparent becomes white. UserError for what is not a picture, is
    cut short, or has over 100 megapixels."""
    check_file(path)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None             # ours is below
    try:
        with Image.open(path) as image:
            _check_size(path, image)
            with contextlib.suppress(Exception):         # a broken EXIF turns nothing
                image = ImageOps.exif_transpose(image)
            return _to_rgb(image)
    except UnidentifiedImageError:
        return _first_frame(path)
    except UserError:
        raise
    except Exception as error:                           # Pillow raises a dozen kinds
        raise UserError(f"{path}: a broken picture ({_reason(error)}); save it again") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_size(path, picture):
    if picture.width * picture.height > MEGAPIXELS * 10 ** 6:
        raise TooLarge(f"{path}: {picture.width}x{picture.height} pixels, over {MEGAPIXELS} "
                       "megapixels; make it smaller")


def _to_rgb(image):
    """(H, W, 3) uint8 from any of Pillow's modes; 16 bits are scaled, not clipped."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        high = 65535 if image.mode.startswith("I") and values.max(initial=0) > 255 else \
            1 if image.mode == "F" and values.max(initial=0) <= 1 else 255
        grey = (values.clip(0, high) * 255 / high).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, -1)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _first_frame(path):
    with open(path, "rb") as file:
        begin = file.read(12)
    if begin[4:] in HEIC:
        raise UserError(f"{path}: a HEIC picture, as phones take; save it as jpg")
    try:
        frame = next(read_video(path))
    except TooLarge:
        raise
    except (UserError, StopIteration) as error:
        raise UserError(f"{path}: neither a picture nor a video (it begins {begin!r}); "
                        "use a png or jpg") from error
    print(f"note: {path} is a video; its first frame is the portrait", file=sys.stderr)
    return frame


# ---- sound and video, read -----------------------------------------------------------------------

@contextlib.contextmanager
def _opened(path, kind):
    """An open container and its first stream of a kind, "audio" or "video"; UserError otherwise."""
    check_file(path)
    av = _av()
    try:
        with av.open(f"file:{path}", metadata_errors="ignore") as container:
            text = container.format.name == "tty"            # would be drawn as a terminal's screen
            streams = [s for s in container.streams if not text and not _is_cover(s)]
            chosen = [s for s in streams if s.type == kind and s.codec_context]
            if not chosen:
                held = "text" if text else ", ".join(sorted({s.type for s in streams})) or "nothing"
                raise UserError(f"{path}: no {kind} in it that can be read (found: {held}); give a "
                                f"file with {kind}")
            yield container, chosen[0]
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise UserError(f"{path}: cannot be read as {kind} ({_reason(error)}); export it "
                        "again") from error


def _is_cover(stream):                                       # the picture on a record's sleeve
    return "attached_pic" in repr(getattr(stream, "disposition", ""))


def _decoded(path, container, stream):
    """The frames of a stream; damaged packets are left out with a note, UserError if all are."""
    av, count, damaged = _av(), 0, None
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError as error:
            damaged = error
            continue
        count += len(frames)
        yield from frames
    if damaged and count:
        print(f"note: {path} is damaged in places; those are left out", file=sys.stderr)
    elif damaged:
        raise damaged


def read_sound(path, rate=RATE):
    """Any sound that PyAV opens, or a video's -> (T,) float32 mono, aligned with its pictures.
    UserError for no sound, for less than 0.2 s, and for samples that are not numbers."""
    with _opened(path, "audio") as (container, stream):
        sound, start = _resampled(_decoded(path, container, stream), stream, rate)
        late = start - _start_of_pictures(container, start)
    shift = round(late * rate) if abs(late) < LEAP else 0
    sound = np.pad(sound, (shift, 0)) if shift > 0 else sound[-shift:]  # late: padded, early: cut
    if len(sound) < SHORTEST * rate:
        raise UserError(f"{path}: {len(sound) / rate:.2f} s of sound; wants at least {SHORTEST} s")
    if not np.isfinite(sound).all():
        raise UserError(f"{path}: holds samples that are not numbers; export it again")
    peak = np.abs(sound).max()
    return sound / peak if peak > 2 else np.clip(sound, -1, 1)     # floats on the scale of integers


def read_sound_if_any(path, rate=RATE):
    """The sound of a video, or None where it has none."""
    check_file(path)
    with contextlib.suppress(_av().FFmpegError, ValueError), \
            _av().open(f"file:{path}", metadata_errors="ignore") as container:
        if not container.streams.audio:
            return None
    return read_sound(path, rate)


def _resampled(frames, stream, rate):
    """Frames of sound -> (T,) float32 mono at `rate`, holes as silence; the first one's time, s."""
    layout = "mono" if stream.channels > 2 else None         # stereo's mean; of more, centre first
    resampler = _av().AudioResampler(format="fltp", layout=layout, rate=rate)
    pieces, start, end = [np.zeros(0, np.float32)], None, 0.0
    for frame in frames:
        time = end if frame.time is None else frame.time
        if start is None:
            start = end = time
        if HOLE < time - end < LEAP:
            pieces.append(np.zeros(round((time - end) * rate), np.float32))
            end = time
        pieces += [f.to_ndarray().mean(0) for f in resampler.resample(frame)]
        end += frame.samples / frame.sample_rate
    if start is not None:
        pieces += [f.to_ndarray().mean(0) for f in resampler.resample(None)]
    sound, length = np.concatenate(pieces), float((stream.duration or 0) * stream.time_base)
    filled = 0 < len(sound) - length * rate < 2048 / stream.rate * rate      # up to a last packet
    return sound[:round(length * rate)] if filled else sound, start or 0.0


def _start_of_pictures(container, otherwise):
    """When a container's video begins, in seconds."""
    return next((float(s.start_time * s.time_base) for s in container.streams.video
                 if not _is_cover(s) and s.start_time is not None), otherwise)


def read_video(path):
    """Frames of a video at exactly 25 a second, one at a time: (H, W, 3) uint8. Frame k is what a
    player shows in the middle of [k / 25, (k + 1) / 25); there are round(25 seconds) of them,
    whatever the source's own rate."""
    with _opened(path, "video") as (container, stream):
        _check_size(path, stream)
        stream.thread_type = "AUTO"
        frames = _decoded(path, container, stream)
        yield from map(_upright, _at_25(frames, float(stream.average_rate or FPS)))


def _at_25(frames, rate):
    """Frames with times, or of a known rate -> the one on show at (k + 0.5) / 25, k = 0, 1, ..."""
    shown, zero, time, step, count = None, 0.0, 0.0, 1 / rate, 0
    for frame in frames:
        if shown is None:
            zero = frame.time or 0.0
        else:
            later = time + step if frame.time is None else frame.time - zero
            step = later - time if 0 < later - time < LEAP else step
            time += step if later > time else 0
        while shown is not None and (count + .5) / FPS < time:
            count += 1
            yield shown
        shown = frame
    for _ in range(count, round(FPS * (time + step)) if shown is not None else 0):
        yield shown


def _upright(frame):
    """The pixels of a frame, turned as a phone's metadata says."""
    turns = round(getattr(frame, "rotation", 0) / 90)
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


# ---- video, written ------------------------------------------------------------------------------

def partial(path):
    """Where an interrupted video goes."""
    root, suffix = os.path.splitext(path)
    return Path(f"{root}.partial{suffix}")


class VideoWriter:
    """Writes H.264 and AAC frame by frame, 25 a second; a context manager.

        with VideoWriter("a.mp4", 128, 128, sound) as video:
            video.write(frames)                          # (n, H, W, 3) uint8, again and again

    The file appears when all of it is written. Ctrl-C keeps what is done, playable, with
    `.partial` before the suffix; any other exception leaves nothing behind. `intra` makes every
    frame a key frame. UserError where the file cannot be written.
    """

    def __init__(self, path, height, width, sound=None, rate=RATE, intra=False):
        self.path, self.rate = Path(path), rate
        self.sound = None if sound is None else np.asarray(sound, dtype=np.float32)
        self.size, self.intra = (height, width), intra
        self.frames = self.samples = 0
        if self.path.suffix.lower() not in VIDEO_SUFFIXES:
            raise UserError(f"{path}: a video's name ends in one of {' '.join(VIDEO_SUFFIXES)}")
        if os.path.isdir(path):
            raise UserError(f"{path}: is a folder; name a file in it")
        self.temporary = _beside(self.path)

    def __enter__(self):
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.container = _av().open(f"file:{self.temporary}", "w",
                                        container_options={"movflags": "+faststart"})
            self._add_streams()
        return self

    def _add_streams(self):
        """H.264 that every player shows in the same colours, and AAC where there is sound."""
        options = {"crf": "18", "preset": "veryfast", "bf": "0", "g": "1" if self.intra else "250"}
        self.video = self.container.add_stream("libx264", rate=FPS, options=options)
        height, width = self.size
        self.video.height, self.video.width = height + height % 2, width + width % 2
        self.video.pix_fmt = "yuv420p"
        codec = self.video.codec_context                     # sRGB through BT.601, video's range
        codec.colorspace, codec.color_range, codec.color_primaries, codec.color_trc = 5, 1, 1, 13
        if self.sound is not None:
            self.audio = self.container.add_stream("aac", rate=self.rate, layout="mono")

    def write(self, frames):
        """Append frames (n, H, W, 3) uint8, and the sound that belongs to them."""
        height, width = self.size
        assert frames.shape[1:] == (height, width, 3), f"frames {frames.shape} for {self.size}"
        for picture in frames:
            even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            frame = _av().VideoFrame.from_ndarray(even, format="rgb24")
            frame.pts = self.frames
            with self._explained():
                self.container.mux(self.video.encode(frame))
                self.frames += 1
                self._write_sound(round(self.frames / FPS * self.rate))

    def _write_sound(self, until):
        """Encode the sound's samples up to `until`."""
        while self.sound is not None and self.samples < min(until, len(self.sound)):
            piece = self.sound[self.samples:min(self.samples + 1024, until)]
            frame = _av().AudioFrame.from_ndarray(piece[None], format="flt", layout="mono")
            frame.sample_rate, frame.pts = self.rate, self.samples
            self.container.mux(self.audio.encode(frame))
            self.samples += len(piece)

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self._finish(self.path, 0 if self.sound is None else len(self.sound))
            elif issubclass(kind, KeyboardInterrupt) and self.frames:
                part = partial(self.path)
                self._finish(part, 0)
                print(f"\nnote: stopped; the {self.frames} frames that were done are in {part}",
                      file=sys.stderr)
            else:
                with contextlib.suppress(Exception):                     # the first error counts
                    self.container.close()
        finally:
            with contextlib.suppress(OSError):
                self.temporary.unlink()

    def _finish(self, path, until):
        """Write the sound up to sample `until`, empty the codecs, and give the file its name."""
        with self._explained():
            self._write_sound(until)
            self.container.mux(self.video.encode(None))
            if self.sound is not None:
                self.container.mux(self.audio.encode(None))
            self.container.close()
            os.replace(self.temporary, path)

    @contextlib.contextmanager
    def _explained(self):
        """What goes wrong below becomes one line with the file's name."""
        try:
            yield
        except (OSError, _av().FFmpegError) as error:
            raise UserError(f"{self.path}: cannot be written ({_reason(error)}); free some space "
                            "or choose another place") from error
