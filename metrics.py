"""What numbers are made of: scores with their intervals, PSNR, correlation, blinks, and the way
from a portrait and a sound to the points of what was made.

evaluate.py and evaluate_control.py are built on these. Points of made frames are found by our own
detector. Letters: S seeds, N frames, n of them.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

import control
import detector as detectors
import diffusion
import media
import sample
import toy
from landmarks import eye_opening, head_pose

SIZE, SECONDS = 128, 4.0        # of held-out clips
LEAST_SPREAD = .01              # of the true mouth opening; stiller clips have no lip numbers


# ---- numbers -------------------------------------------------------------------------------------

def score(values, **beside):
    """The mean over clips with its bootstrap 95 % interval, and what stands beside it."""
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return {"value": None} | beside
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"value": values.mean(), "low": low, "high": high} | beside


def psnr(a, b):
    """10 log10(4 / MSE) of uint8 pictures, on the scale [-1, 1]."""
    difference = (a.astype(np.float32) - b) / 127.5
    return 10 * np.log10(4 / np.maximum((difference ** 2).mean(), 1e-10))


def psnr_in(a, b, boxes):
    """PSNR over the pixels inside R boxes a frame. (n, H, W, 3) twice, (n, R, 4) -> float."""
    at = np.arange(a.shape[1])
    x0, y0, x1, y1 = np.moveaxis(boxes[..., None], 2, 0)                     # (n, R, 1)
    rows, columns = (at >= y0) & (at <= y1), (at >= x0) & (at <= x1)
    inside = (rows[..., :, None] & columns[..., None, :]).any(1)             # (n, H, W)
    return float(psnr(a[inside], b[inside]))


def pearson(a, b):
    """Correlation over the last axis; nan where either stands still."""
    a, b = (v - v.mean(-1, keepdims=True) for v in (np.asarray(a, float), np.asarray(b, float)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(-1) / np.sqrt((a ** 2).sum(-1) * (b ** 2).sum(-1))


def count_blinks(opening, every=1):
    """Blinks in a track (N,), one frame in `every`: under 40 % of its median, 2 to 10 frames."""
    shut = np.concatenate([[0], (opening < .4 * np.median(opening)).astype(int), [0]])
    edges = np.flatnonzero(np.diff(shut))
    lengths = edges[1::2] - edges[::2]
    return int(((lengths * every >= 2) & (lengths * every <= 10)).sum())


def blink_rate(points, every=1):
    """Blinks a minute of (N, 70, 2)."""
    return count_blinks(eye_opening(points).mean(-1), every) * 60 * media.FPS / len(points) / every


def loudness(sound, n):
    """Log root mean square of each frame's samples. -> (n,)"""
    step = media.RATE // media.FPS
    padded = np.pad(sound, (0, max(0, n * step - len(sound))))[:n * step].reshape(n, step)
    return np.log(np.sqrt((padded ** 2).mean(1)) + 1e-4)


# ---- making and finding --------------------------------------------------------------------------

def held_out(k):
    """Held-out clip k with its frames drawn: (clip, frames (N, 128, 128, 3) uint8)."""
    clip = toy.make_clip(k, SECONDS, SIZE, held_out=True)
    return replace(clip), clip.frames()         # without the painter that `clip` keeps by now


def redraw(models, z_a, points):
    """D(z^a, E_M(x^m)) for given points. -> (n, 128, 128, 3) uint8."""
    return np.concatenate(list(sample.decode(
        models, z_a, torch.cat(list(control.encode_points(models, points))))))


@torch.inference_mode()
def speak(models, finder, portrait, points, sound, how, seeds, solver, every=1, guidance=1.0):
    """Points of a portrait that says something: (S, n, 70, 2), and the poses it was asked for.

    how: as `control.poses` takes it; solver: (sampler, steps).
    """
    speech, count = sample.hear(models, sound), len(seeds)
    asked = control.poses(models, speech, head_pose(points), how)
    z_a, reference = sample.encode_portrait(models, portrait, points)
    windows = diffusion.sample_motion(
        models.motion, speech[None].expand(count, -1, -1), reference.expand(count, -1, -1, -1),
        None if asked is None else asked.expand(count, -1, -1), seeds, *solver, guidance=guidance)
    tracks = torch.cat(list(windows), 1)[:, ::every]                         # (S, n, 3, h, w)
    made = (np.concatenate(list(sample.decode(models, z_a, track))) for track in tracks)
    found = np.stack([detectors.find_in_crops(finder, frames) for frames in made])
    return found, None if asked is None else asked[0].cpu().numpy()
