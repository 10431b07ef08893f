"""The drawing side of Toy Heads: an identity, a pose and an expression become a picture.

Everything is flat vector art: 3-D points, turned by the head pose, projected without perspective,
filled with Pillow at three times the size and averaged down. The 70 landmarks are those same
points, so a picture and its truth cannot disagree. All geometry of a clip is computed at once
(`project`); only the filling of polygons is done frame by frame (`Painter.frame`).

Letters: N frames, V vertices, E = len(EXPRESSION). Units of 3-D points: half a face's width.
Nothing here is in the paper: it trained on 1,169 hours of real faces.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import ImageColor

from landmarks import EYE_LEFT, EYE_RIGHT, MEAN_FACE, NECK, NOSE, crop_box, rotation

EXPRESSION = ("jaw", "width", "round", "upper", "smile", "brow_left", "brow_right",
              "lid_left", "lid_right", "gaze_x", "gaze_y")
NEUTRAL = np.array([0, .5, 0, 0, .1, 0, 0, 1, 1, 0, 0], dtype=np.float32)
SCALE = 3                                     # drawn this much larger, then averaged
SKULL_CENTRE, SKULL = np.array([0, .28, -.3]), np.array([1.0, 1.1, .72])
IRIS = .088                                   # radius

SKINS = ["#ffe0c9", "#fbd0b0", "#f3bd95", "#e6a878", "#d6915f", "#bd7a4b", "#9c6038", "#7c4a2b",
         "#5f3822", "#f6c6b0", "#e9b48c", "#4a2c1c"]
HAIRS = ["#1d1715", "#2e211b", "#4a2f1f", "#6b4226", "#8f5a2e", "#b9803f", "#dcb267", "#efd9a0",
         "#a33f22", "#c9632f", "#8b8682", "#cfcac4", "#2b2f4a", "#7b3f73", "#2f6f73", "#e08aa8"]
EYES = ["#3b2616", "#5a3a1e", "#7a5127", "#3f6b3a", "#5f8f4a", "#3c7da6", "#5aa7d6", "#6d7f8c",
        "#2a2a2a", "#9a6f2e"]
CLOTHES = ["#e4572e", "#17bebb", "#ffc914", "#76b041", "#2e282a", "#3d5a80", "#98c1d9", "#ee6c4d",
           "#6d597a", "#b56576", "#355070", "#eaac8b", "#f2f2f0", "#588157", "#a3b18a", "#8d99ae"]
WALLS = ["#f4d9c6", "#cfe8ef", "#f7e7a9", "#d7e8ba", "#e3d0f0", "#f9c9c3", "#b8d8d8", "#7a9e9f",
         "#4f6d7a", "#c06c84", "#6c5b7b", "#355c7d", "#f67280", "#99b898", "#feceab", "#2a363b"]
HAIR_STYLES = {"bald": .06, "buzz": .08, "short": .16, "swept": .14, "bob": .14, "long": .14,
               "curly": .10, "afro": .08, "bun": .07, "mohawk": .03}                    # shares
HATS = ("beanie", "cap", "straw")


@dataclass(frozen=True)
class Identity:
    """Who a head is: shape numbers (about 0 +- 1), colours (RGB 0-255), and what it wears."""
    shape: dict
    colours: dict
    hair: str
    fringe: int             # 0 none, 1 straight, 2 parted, 3 ragged
    hat: str | None
    glasses: int            # 0 none, 1 round, 2 square, 3 cat-eye
    beard: int              # 0 none, 1 full, 2 goatee, 3 moustache, 4 stubble
    freckles: int
    earrings: bool
    lashes: bool
    clothes: int            # pattern: 0 plain, 1 stripes, 2 dots, 3 checks
    collar: int
    background: int         # 0 gradient, 1 stripes, 2 dots, 3 hills, 4 window, 5 checks
    light: float            # where the light stands: -1 from the viewer's left .. 1 from the right
    seed: int               # of the small details


SHAPE = ("width", "chin", "square", "eye_gap", "eye_size", "eye_tilt", "brow_height", "brow_tilt",
         "brow_thick", "nose_length", "nose_width", "mouth_width", "mouth_height", "lips", "ears",
         "lid", "neck", "volume")


def random_identity(rng, glasses=.25, beard=.2, fringe=.5, hat=.1, patterned=.5):
    """A new face. The shares are those of the frozen held-out mix."""
    def pick(palette):
        return palette[rng.integers(len(palette))]

    def vary(colour):
        return np.clip(ImageColor.getrgb(colour) + rng.normal(0, 6, 3), 0, 255)
    chosen = {"skin": pick(SKINS), "hair": pick(HAIRS), "iris": pick(EYES),
              "cloth": pick(CLOTHES), "wall": pick(WALLS)}
    colours = {name: vary(colour) for name, colour in chosen.items()}
    for name in ("cloth2", "wall2", "frame", "hat"):
        colours[name] = vary(pick(WALLS if name == "wall2" else CLOTHES))
    red = (200, 60, 70) if colours["skin"].mean() > 110 else (150, 50, 60)
    colours["lip"] = mix(colours["skin"], red, rng.uniform(.4, .8))
    has_pattern = rng.random(2) < 1 - np.sqrt(1 - patterned)
    bearded = rng.random() < beard
    return Identity(
        shape=dict(zip(SHAPE, np.clip(rng.normal(0, .6, len(SHAPE)), -1.2, 1.2).tolist())),
        colours=colours, hair=str(rng.choice(list(HAIR_STYLES), p=list(HAIR_STYLES.values()))),
        fringe=int(rng.integers(1, 4)) if rng.random() < fringe else 0,
        hat=HATS[rng.integers(len(HATS))] if rng.random() < hat else None,
        glasses=int(rng.integers(1, 4)) if rng.random() < glasses else 0,
        beard=int(rng.integers(1, 5)) if bearded else 0,
        freckles=int(rng.integers(8, 16)) if rng.random() < .2 else 0,
        earrings=bool(rng.random() < .2), lashes=bool(not bearded and rng.random() < .5),
        clothes=int(rng.integers(1, 4)) if has_pattern[0] else 0, collar=int(rng.integers(3)),
        background=int(rng.integers(1, 6)) if has_pattern[1] else 0,
        light=float(rng.uniform(-1, 1)), seed=int(rng.integers(2 ** 31)))


def mix(a, b, share):
    """Colour between a and b: share 0 gives a, 1 gives b."""
    return np.asarray(a, dtype=np.float64) * (1 - share) + np.asarray(b, dtype=np.float64) * share


def rgb(colour):
    return tuple(int(c) for c in np.clip(np.round(colour), 0, 255))


# ---- geometry ------------------------------------------------------------------------------------

def neutral_points(identity):
    """The 70 points of this face at rest, lips closed, eyes open. -> (70, 3)."""
    p, s = MEAN_FACE.copy(), identity.shape
    angle = np.linspace(-1, 1, 17) * np.pi / 2
    p[:17, 0] = p[:17, 0] * (1 + .07 * s["width"]) + .07 * s["square"] * np.sin(2 * angle)
    p[:17, 1] -= .12 * s["chin"] * np.cos(angle) ** 2
    for eye, iris, side in ((EYE_LEFT, 68, -1), (EYE_RIGHT, 69, 1)):
        centre = p[iris].copy()
        offset = np.vstack([p[eye], p[iris]]) - centre
        offset[:, :2] *= 1 + .13 * s["eye_size"]
        offset[:, 1] += .09 * s["eye_tilt"] * offset[:, 0] * side * 2
        centre[0] += .045 * s["eye_gap"] * side
        p[eye], p[iris] = centre + offset[:6], centre + offset[6]
        brow = slice(17, 22) if side < 0 else slice(22, 27)
        p[brow, 1] += .05 * s["brow_height"] + .12 * s["brow_tilt"] * (p[brow, 0] * side - .45)
        p[brow, 0] += .03 * s["eye_gap"] * side
    p[NOSE, 1] = .17 + (p[NOSE, 1] - .17) * (1 + .10 * s["nose_length"])
    p[31:36, 0] *= 1 + .22 * s["nose_width"]
    p[48:68, 0] *= 1 + .14 * s["mouth_width"]
    p[48:60, 1] = -.70 + (p[48:60, 1] + .70) * (1 + .28 * s["lips"])
    p[48:68, 1] += .05 * s["mouth_height"]
    return p


# how far each lip point follows: 0 at the corners, 1 in the middle
_FOLLOW = np.array([0, .5, .9, 1, .9, .5, 0, .66, .94, 1, .94, .66, 0, .75, 1, .75, 0, .84, 1, .84])
_IS_LOWER = np.array([0] * 7 + [1] * 5 + [0] * 5 + [1] * 3, dtype=bool)
_CORNERS = np.array([1, .45, .1, 0, .1, .45, 1, .35, .1, 0, .1, .35, 1, .3, 0, .3, 1, .3, 0, .3])


def expressive_points(identity, expression):
    """Points with an expression, the head not yet turned. expression (N, E) -> (N, 70, 3)."""
    e = {name: np.asarray(expression, dtype=np.float64)[:, k, None]
         for k, name in enumerate(EXPRESSION)}
    p = np.repeat(neutral_points(identity)[None], len(expression), 0)
    lips, middle = p[:, 48:68], p[:, 62:63, 1]
    lips[..., 0] *= 1 + .40 * (e["width"] - .5) - .42 * e["round"] + .16 * e["smile"]
    drop = .37 * e["jaw"] * (1 + .25 * e["round"])
    raise_ = (.09 * e["upper"] + .05 * e["jaw"]) * np.clip(e["jaw"] * 6, 0, 1)
    lips[..., 1] += _FOLLOW * np.where(_IS_LOWER, -drop, raise_) - .10 * e["jaw"] * (1 - _FOLLOW)
    lips[..., 1] += .11 * e["smile"] * _CORNERS
    lips[..., 2] += .12 * e["round"] * _FOLLOW
    lips[:, :12, 1] += .25 * e["round"] * (lips[:, :12, 1] - middle) * .5
    p[:, :17, 1] -= .30 * e["jaw"] * np.cos(np.linspace(-1, 1, 17) * np.pi / 2) ** 2
    for brow, name, inner in ((slice(17, 22), "brow_left", [0, .1, .2, .35, .5]),
                              (slice(22, 27), "brow_right", [.5, .35, .2, .1, 0])):
        p[:, brow, 1] += .13 * e[name] + np.where(e[name] < 0, e[name], 0) * .12 * np.array(inner)
    droop = .88 + .10 * identity.shape["lid"]
    for eye, iris, name in ((36, 68, "lid_left"), (42, 69, "lid_right")):
        lids, low, high = p[:, eye:eye + 6], p[:, [eye + 5, eye + 4]], p[:, [eye + 1, eye + 2]]
        shut = .78 * low[..., 1] + .22 * high[..., 1]                         # (N, 2)
        for pair in ((1, 2), (5, 4)):
            lids[:, pair, 1] = shut + (lids[:, pair, 1] - shut) * e[name] * droop
        p[:, iris, 0] += .105 * e["gaze_x"][:, 0]
        p[:, iris, 1] += .055 * e["gaze_y"][:, 0] - .03 * (1 - e[name][:, 0])
    return p


class View:
    """Where 3-D points fall in a square picture: turned by the pose (N, 3) in degrees, swayed by
    `shift` (N, 2) in units, and framed by `crop_box` of the clip's own landmarks, or of the first
    frame's alone (`first`), moved and scaled by `jitter` (dx, dy, zoom) as a user's picture is."""

    def __init__(self, pose, shift, size, landmarks, jitter=(0, 0, 1), first=False):
        self.turn, self.shift, self.size = rotation(pose), shift[:, None], size
        x, y, side = crop_box(self._flat(landmarks)[:1 if first else None] * (1, -1))
        side *= jitter[2]
        self.zoom = size / side
        self.corner = np.array([x + jitter[0] * side, y + jitter[1] * side])

    def _flat(self, points):
        """(V, 3) rigid or (N, V, 3) moving points -> (N, V, 2), y up."""
        return ((points - NECK) @ np.swapaxes(self.turn, -1, -2) + NECK)[..., :2] + self.shift

    def pixels(self, points):
        """Points on the head -> pixels, (N, V, 2); pixel centres are at whole numbers."""
        return (self._flat(points) * (1, -1) - self.corner) * self.zoom - .5

    def still(self, points):
        """Points on the body, which does not move: (V, 2) units -> (V, 2) pixels."""
        return (np.asarray(points, dtype=np.float64) * (1, -1) - self.corner) * self.zoom - .5

    def ellipsoid(self, centre, radii, samples=48):
        """The outline of an ellipsoid on the head, counter-clockwise from its right: (N, V, 2)."""
        flip = np.array([[1], [-1]])
        m = (self.turn * np.asarray(radii))[:, :2] * (self.zoom * flip)       # (N, 2, 3)
        values, vectors = np.linalg.eigh(m @ np.swapaxes(m, 1, 2))
        root = (vectors * np.sqrt(values)[:, None]) @ np.swapaxes(vectors, 1, 2)    # (N, 2, 2)
        right = np.linalg.inv(root) @ m[:, :, 0, None]
        start = np.arctan2(right[:, 1, 0], right[:, 0, 0])[:, None]
        angle = start - np.linspace(0, 2 * np.pi, samples, endpoint=False)    # (N, V)
        circle = np.stack([np.cos(angle), np.sin(angle)], -1)
        return circle @ np.swapaxes(root, 1, 2) + self.pixels(np.asarray(centre)[None])


def smooth(points, per=3, closed=False):
    """Catmull-Rom curve through points (..., V, 2), `per` pieces a span. -> (..., W, 2)."""
    n = points.shape[-2]
    at = np.arange(n * per if closed else (n - 1) * per + 1) / per
    k, t = at.astype(int), (at % 1)[:, None]
    a, b, c, d = (np.take(points, k + offset, -2, mode="wrap" if closed else "clip")
                  for offset in (-1, 0, 1, 2))
    return b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))


def on_skull(x, y, lift=1.0):
    """Points of the skull's front at (x, y): (V, 3)."""
    x, y = np.broadcast_arrays(np.asarray(x, dtype=np.float64), y)
    flat = 1 - (x / SKULL[0]) ** 2 - ((y - SKULL_CENTRE[1]) / SKULL[1]) ** 2
    return np.stack([x, y, SKULL_CENTRE[2] + lift * SKULL[2] * np.sqrt(np.maximum(flat, 0))], -1)
