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
from pathlib import Path

import numpy as np
import torch
from PIL import Image

FPS = 25                        # frames a second
RATE = 16_000                   # samples a second


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
