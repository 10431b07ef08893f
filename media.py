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
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".m4v")


class UserError(Exception):
    """Something a user can put right; shown as one line, `error: ...`, and exit status 2."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors take the house's form: one line, no usage text, exit status 2."""

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


# ---- arrays --------------------------------------------------------------------------------------

def to_float(pictures):
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32 tensor in [-1, 1]."""
    tensor = torch.tensor(np.asarray(pictures)).float()
    return tensor.movedim(-1, -3).contiguous() / 127.5 - 1


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

@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; rename it on success, delete it on failure.

    Whatever happens, `path` is either the whole new file or what it was before. OSError becomes
    UserError, naming the file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_image(path, picture):
    """Write (H, W, 3) uint8 in the format that the suffix names."""
    with replacing(path) as temporary:
        try:
            Image.fromarray(picture).save(temporary)
        except ValueError as error:
            raise UserError(f"{path}: {error}; use .png or .jpg") from error


def write_sound(path, sound, rate=RATE):
    """Write (T,) float in [-1, 1] as a 16-bit mono wav."""
    samples = (np.clip(sound, -1, 1) * 32767).round().astype("<i2")
    with replacing(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


# ---- pictures ------------------------------------------------------------------------------------

def check_file(path):
    """UserError for what is missing, a folder, empty or not to be read."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: may not be read; check its permissions")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")


def read_image(path):
    """Any picture Pillow opens, turned as its EXIF says -> (H, W, 3) uint8.

    What is transparent becomes white. Of a video the first frame is taken, with a note. UserError
    for what is not a picture, is cut short, or has over 100 megapixels.
    """
    check_file(path)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None             # ours is below
    try:
        with Image.open(path) as image:
            if image.width * image.height > MEGAPIXELS * 10 ** 6:
                raise UserError(f"{path}: {image.width}x{image.height} pixels, over "
                                f"{MEGAPIXELS} megapixels; make it smaller")
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        return _first_frame(path)
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: a broken picture ({reason}); save it again") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


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
    try:
        frame = next(read_video(path))
    except (UserError, StopIteration) as error:
        raise UserError(f"{path}: not a picture; use a png or jpg") from error
    print(f"note: {path} is a video; its first frame is the portrait", file=sys.stderr)
    return frame


# ---- sound and video, read -----------------------------------------------------------------------

@contextlib.contextmanager
def _opened(path, kind):
    """An open container and its first stream of a kind, "audio" or "video"; UserError otherwise."""
    import av
    check_file(path)
    av.logging.set_level(None)
    try:
        with av.open(str(path)) as container:
            streams = getattr(container.streams, kind)
            if kind == "video":                                  # not a record's sleeve
                streams = [s for s in streams if not _is_cover(s)]
            if not streams:
                held = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
                raise UserError(f"{path}: no {kind} in it, only {held}")
            yield container, streams[0]
    except (av.FFmpegError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: cannot be read as {kind} ({reason})") from error


def _is_cover(stream):
    disposition = getattr(stream, "disposition", None)
    return bool(disposition) and "attached_pic" in str(disposition)


def read_sound(path, rate=RATE):
    """Any sound that PyAV opens, or a video's -> (T,) float32 mono, aligned with its pictures.

    UserError for no sound, for less than 0.2 s, and for samples that are not numbers.
    """
    import av
    with _opened(path, "audio") as (container, stream):
        resampler = av.AudioResampler(format="fltp", rate=rate)      # all channels, then their mean
        pieces, start = [], None
        for frame in container.decode(stream):
            if start is None:
                start = frame.time or 0.0
            pieces += [f.to_ndarray().mean(0) for f in resampler.resample(frame)]
        if start is not None:
            pieces += [f.to_ndarray().mean(0) for f in resampler.resample(None)]
        zero = _start_of_pictures(container, start or 0.0)
    sound = np.concatenate([np.zeros(0, np.float32), *pieces]).astype(np.float32)
    if not np.isfinite(sound).all():
        raise UserError(f"{path}: holds samples that are not numbers; export it again")
    shift = round(((start or 0.0) - zero) * rate)           # late sound is padded, early cut
    sound = np.pad(sound, (shift, 0)) if shift > 0 else sound[-shift:]
    if len(sound) < SHORTEST * rate:
        raise UserError(f"{path}: {len(sound) / rate:.2f} s of sound, at least {SHORTEST} s are "
                        "needed")
    return np.clip(sound, -1, 1)


def _start_of_pictures(container, otherwise):
    for stream in container.streams.video:
        if not _is_cover(stream) and stream.start_time is not None:
            return float(stream.start_time * stream.time_base)
    return otherwise


def read_video(path):
    """Frames of a video at exactly 25 a second, one at a time: (H, W, 3) uint8.

    Frame k is what a player shows in the middle of [k / 25, (k + 1) / 25); there are
    round(25 seconds) of them, whatever the source's own rate.
    """
    with _opened(path, "video") as (container, stream):
        stream.thread_type = "AUTO"
        zero, shown, count, time, step = None, None, 0, 0.0, 1 / FPS
        for frame in container.decode(stream):
            now = frame.time or 0.0
            zero = now if zero is None else zero
            if shown is not None:
                step = max(now - zero - time, 0) or step
            time = now - zero
            while shown is not None and (count + .5) / FPS < time:
                count += 1
                yield shown
            shown = _upright(frame)
        for _ in range(count, round(FPS * (time + step)) if shown is not None else 0):
            yield shown


def _upright(frame):
    """The pixels of a frame, turned as a phone's metadata says."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


# ---- video, written ------------------------------------------------------------------------------

class VideoWriter:
    """Writes H.264 and AAC frame by frame, 25 a second; a context manager.

        with VideoWriter("a.mp4", 128, 128, sound) as video:
            video.write(frames)                          # (n, H, W, 3) uint8, again and again

    The file appears when all of it is written. Ctrl-C keeps what is done, playable, with
    `.partial` before the suffix; any other exception leaves nothing behind. `intra` makes every
    frame a key frame. UserError where the file cannot be written.
    """

    def __init__(self, path, height, width, sound=None, rate=RATE, intra=False):
        self.path, self.sound, self.rate = Path(path), sound, rate
        self.size, self.intra = (height, width), intra
        self.frames = self.samples = 0
        if self.path.suffix.lower() not in VIDEO_SUFFIXES:
            raise UserError(f"{path}: a video's name ends in one of {' '.join(VIDEO_SUFFIXES)}")
        if self.path.is_dir():
            raise UserError(f"{path}: is a folder; name a file in it")
        name = f".{self.path.stem}.{os.getpid()}{self.path.suffix}"
        self.temporary = self.path.with_name(name)

    def __enter__(self):
        import av
        av.logging.set_level(None)
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.container = av.open(str(self.temporary), "w")
            options = {"crf": "18", "preset": "veryfast", "bf": "0"}
            options |= {"g": "1"} if self.intra else {}
            self.video = self.container.add_stream("libx264", rate=FPS, options=options)
            height, width = self.size
            self.video.height, self.video.width = height + height % 2, width + width % 2
            self.video.pix_fmt = "yuv420p"
            if self.sound is not None:
                self.audio = self.container.add_stream("aac", rate=self.rate, layout="mono")
        return self

    def write(self, frames):
        """Append frames (n, H, W, 3) uint8, and the sound that belongs to them."""
        import av
        height, width = self.size
        for picture in frames:
            even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(even, format="rgb24")
            frame.pts = self.frames
            with self._explained():
                self.container.mux(self.video.encode(frame))
                self.frames += 1
                self._write_sound(round(self.frames / FPS * self.rate))

    def _write_sound(self, until):
        """Encode the sound's samples up to `until`."""
        import av
        while self.sound is not None and self.samples < min(until, len(self.sound)):
            piece = self.sound[self.samples:min(self.samples + 1024, until)].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(piece[None], format="flt", layout="mono")
            frame.sample_rate, frame.pts = self.rate, self.samples
            self.container.mux(self.audio.encode(frame))
            self.samples += len(piece)

    def __exit__(self, kind, error, trace):
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        try:
            with self._explained():
                if kind is None or (interrupted and self.frames):
                    self._finish(len(self.sound) if kind is None and self.sound is not None else 0)
                    goal = self.path if kind is None else \
                        self.path.with_suffix(f".partial{self.path.suffix}")
                    os.replace(self.temporary, goal)
                    if interrupted:
                        print(f"\nstopped; the {self.frames} frames that were done are in {goal}",
                              file=sys.stderr)
                else:
                    self.container.close()
        finally:
            with contextlib.suppress(OSError):
                self.temporary.unlink()

    def _finish(self, until):
        self._write_sound(until)
        self.container.mux(self.video.encode(None))
        if self.sound is not None:
            self.container.mux(self.audio.encode(None))
        self.container.close()

    @contextlib.contextmanager
    def _explained(self):
        """What goes wrong below becomes one line with the file's name."""
        import av
        try:
            yield
        except (OSError, av.FFmpegError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
            raise UserError(f"{self.path}: cannot be written ({reason})") from error
