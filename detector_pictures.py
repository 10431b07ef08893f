"""The pictures that the detector learns from: heads in every framing, and pictures without one.

Heads are Toy Heads, some near and some far off; faceless are walls and clothes, shapes, noise,
shuffled heads, and heads textured as photographs are, so that what is not a flat drawing leaves
the detector unsure. Everything is augmented. Letters: B batch, H W picture. Not in the paper.
"""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import media
import toy
import training
from faces import random_identity
from landmarks import visible

TURNS = (13, 15, 10)             # spread of the poses in degrees: --pose asks for 20 and more


def pool_item(seed, size=128):
    """One identity: six heads, four framed roughly as clips are and two far off, and two faceless.
    -> pictures (6, size, size, 3) uint8, points (6, 70, 2) px, faceless (2, size, size, 3)."""
    who, moves = (np.random.default_rng((seed, k)) for k in (0, 5))
    identity, pictures, points = random_identity(who), [], []
    for count, low, high in ((4, .8, 1.3), (2, 1.3, 2.8)):
        zoom = np.exp(moves.uniform(np.log(low), np.log(high)))
        room = max((1 - 1 / zoom) / 2, .06)                     # how far off the middle
        x, y = .5 / zoom - .5 + moves.uniform(-room, room, 2)
        clip = toy.ToyClip(identity, toy.random_poses(moves, count, spread=TURNS), size=size,
                           jitter=(x, y, zoom))
        pictures.append(clip.frames())
        points.append(clip.landmarks)
    faceless = np.stack([_body(clip.painter), _shapes(moves, size)])
    return np.concatenate(pictures), np.concatenate(points), faceless


def _body(painter):
    """A wall and clothes without a head."""
    canvas = painter.wall.copy()
    canvas.paste(*painter.cloth)
    return np.asarray(canvas.resize((painter.size, painter.size), Image.Resampling.BOX))


def _shapes(rng, size):
    """Ellipses and polygons in random colours over a gradient, some of them shaded."""
    ramp = np.linspace(0, 1, size)[:, None, None]
    picture = rng.uniform(0, 255, 3) * ramp + rng.uniform(0, 255, 3) * (1 - ramp)
    image = Image.fromarray(np.repeat(picture, size, 1).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 14)):
        colour, (x, y) = rng.uniform(0, 255, 3), rng.uniform(0, size, 2)
        a, b = rng.uniform(3, 45, 2)
        if rng.random() < .3:
            corners = (x, y) + rng.normal(0, 25, (rng.integers(3, 7), 2))
            pen.polygon(corners.ravel().tolist(), tuple(colour.astype(int)))
            continue
        for k in range(rng.choice([1, 8])):                     # eight rings, each a little lighter
            tone, r = tuple((colour + 8 * k).clip(0, 255).astype(int)), 1 - k / 9
            pen.ellipse([x - a * r - k, y - b * r - k, x + a * r - k, y + b * r - k], tone)
    return np.asarray(image)


def pink(n, size, key):
    """Noise whose spectrum falls as 1/f^a, as natural pictures' does. -> (n, 3, size, size)."""
    y, x = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)
    f = (x ** 2 + y ** 2).sqrt().clamp(min=1 / size)
    slope = .6 + 1.2 * torch.rand(n, 1, 1, 1, generator=key)
    spectrum = torch.fft.rfft2(torch.randn(n, 3, size, size, generator=key)) / f ** slope
    noise = torch.fft.irfft2(spectrum, s=(size, size))
    noise = torch.lerp(noise.mean(1, keepdim=True), noise, .5)           # mostly grey
    return noise / noise.std((1, 2, 3), keepdim=True).clamp(min=1e-6) * .6


def faceless(pictures, heads, key):
    """Pictures with no drawn face: as given, noise, shuffled heads, and heads textured like photos,
    which keep an unsure answer for what is not a flat drawing. Two (n, 3, H, W) -> (n, 3, H, W)."""
    n, size = len(pictures), pictures.shape[-1]
    kind = torch.randint(6, (n, 1, 1, 1), generator=key)        # 3, 4 and 5 are textured heads
    noise, light = pink(n, size, key), F.avg_pool2d(pink(n, size, key), 31, 1, 15)
    tiles = heads.unflatten(3, (4, -1)).unflatten(2, (4, -1))            # (n, 3, 4, h, 4, w)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, torch.randperm(16, generator=key)]
    shuffled = tiles.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(heads.shape)
    soft = F.avg_pool2d(heads, 5, 1, 2, count_include_pad=False)
    weight = .1 + .4 * torch.rand(n, 1, 1, 1, generator=key)
    textured = .8 * soft * (1 + .8 * light.mean(1, keepdim=True)) + .5 * light + weight * noise
    return torch.where(kind == 0, pictures, torch.where(
        kind == 1, noise, torch.where(kind == 2, shuffled, textured))).clamp(-1, 1)


def augment(pictures, points, key):
    """Turned (25 degrees), scaled, moved, recoloured, coarsened, noisy: pictures (B, 3, H, W) and
    points (B, 70, 2) px, moved alike."""
    b, size = len(pictures), pictures.shape[-1]

    def spread(low, high, *shape):
        return low + (high - low) * torch.rand(b, *shape, generator=key)
    angle = .44 * spread(-1, 1) ** 3 + .05 * spread(-1, 1)      # mostly small
    zoom, shift = spread(-.2, .2).exp(), size * .07 * spread(-1, 1, 2)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    matrix = torch.stack([cos, -sin, sin, cos], -1).view(b, 2, 2)
    theta = torch.cat([matrix, shift[..., None] * 2 / size], -1)
    grid = F.affine_grid(theta, pictures.shape, align_corners=False)
    pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    centre = (size - 1) / 2
    points = (points - centre - shift[:, None]) @ torch.linalg.inv(matrix).mT + centre
    side = int(torch.randint(size * 3 // 10, size, (1,), generator=key))
    small = F.interpolate(pictures, side, mode="area")          # as a small JPEG or a blur would
    coarse = F.interpolate(small, size, mode="bilinear", align_corners=False)
    pictures = torch.where(spread(0, 1, 1, 1, 1) < .35, coarse, pictures)
    grey = pictures.mean(1, keepdim=True).expand_as(pictures)
    pictures = torch.where(spread(0, 1, 1, 1, 1) < .1, grey, pictures)
    pictures = pictures * spread(.7, 1.2, 3, 1, 1) + spread(-.2, .2, 3, 1, 1)
    noise = torch.randn(pictures.shape, generator=key) * spread(-.06, .08, 1, 1, 1).clamp(min=0)
    return (pictures + noise).clamp(-1, 1), points


def make_batch(pool, seed, step, size):
    """Three quarters heads, one quarter faceless, augmented; keyed by (seed, step).
    -> pictures (size, 3, H, W), points (size, 70, 2), counts (size, 70) of points that lie inside
    and show, face (size,) 1 or 0, and -1 for a head that is mostly outside."""
    rng, key = np.random.default_rng((seed, step)), training.generator(seed, step)
    drawn = [pool[k] for k in rng.integers(len(pool), size=size)]
    which = rng.integers(len(drawn[0][0]), size=size)
    points = np.stack([item[1][k] for item, k in zip(drawn, which)])
    shown = torch.from_numpy(visible(points))
    pictures = media.to_float(np.stack([item[0][k] for item, k in zip(drawn, which)]))
    bare = media.to_float(np.stack([item[2][k % 2] for item, k in zip(drawn, which)])[:size // 4])
    pictures[:size // 4] = faceless(bare, pictures[:size // 4], key)
    pictures, points = augment(pictures, torch.from_numpy(points), key)
    inside = ((points > -.5) & (points < pictures.shape[-1] - .5)).all(-1) & shown
    face = torch.where(inside.float().mean(1) > .8, 1.0, -1.0)
    face[:size // 4] = 0
    inside[:size // 4] = False
    return pictures, points, inside.float(), face


def held_out_frames(clips=64, frames=4, seconds=4.0):
    """Frames of the frozen held-out heads, framed as sample.py frames: pictures and points."""
    pictures, points = [], []
    for k in tqdm(range(clips), "held-out heads", leave=False):
        clip = toy.make_clip(k, seconds, held_out=True)
        shown = np.linspace(0, len(clip) - 1, frames).astype(int)
        pictures.append(clip.frames(shown))
        points.append(clip.landmarks[shown])
    return np.concatenate(pictures), np.concatenate(points)


def drawn_points(pictures, points):
    """Pictures with a dot at every point found."""
    sheets = []
    for picture, p in zip(pictures, points):
        image = Image.fromarray(picture).resize((256, 256), Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(image)
        for x, y in (p * 2 + .5).tolist():
            pen.ellipse([x - 1.5, y - 1.5, x + 1.5, y + 1.5], "#00ff60", "#003010")
        sheets.append(np.asarray(image))
    return media.grid(np.stack(sheets), 4)
