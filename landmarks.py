"""The 70-point face convention and everything that is computed from points alone (sec. 4.2, 4.3).

The 68 points of iBUG/300-W in its order, then the two iris centres (image-left, image-right).
Points are pixels, float32, x to the right and y down; every function takes leading batch axes.

    jaw 0-16 (ear to ear, open) | brows 17-21, 22-26 | nose 27-30, 31-35
    eyes 36-41, 42-47           | lips 48-59 outer, 60-67 inner | irises 68, 69

"left" and "right" in names are the viewer's. Head pose is (pitch, yaw, roll) in degrees:
pitch > 0 looks up, yaw > 0 turns to the viewer's right, roll > 0 tilts clockwise for the viewer.

Departures from the paper: 1. its landmark picture is "predicted by an external tool" and not
described further; ours joins few points to coloured contours. 2. its head poses come from 3DDFA;
ours from a closed-form fit of a mean face, so that they need no network.
"""
import numpy as np
from PIL import Image, ImageDraw

POINTS = 70
JAW, BROWS, NOSE = slice(0, 17), slice(17, 27), slice(27, 36)
EYE_LEFT, EYE_RIGHT, MOUTH, IRISES = slice(36, 42), slice(42, 48), slice(48, 68), slice(68, 70)

# (first point, last point, closed, colour): the contours of the landmark picture x^m
CONTOURS = (
    (0, 16, False, (255, 0, 0)),                                # jaw
    (17, 21, False, (255, 255, 0)), (22, 26, False, (255, 255, 0)),
    (27, 30, False, (0, 0, 255)), (31, 35, False, (0, 0, 255)),
    (36, 41, True, (0, 255, 0)), (42, 47, True, (0, 255, 0)),
    (48, 59, True, (255, 0, 255)), (60, 67, True, (0, 255, 255)),
)
IRIS_COLOUR = (255, 255, 255)
OPEN_EYE = 0.15            # lid gap over eye width under which the iris counts as hidden
SUPERSAMPLE = 3            # contours are drawn this much larger, then averaged: anti-aliasing


def eye_opening(points):
    """Lid gap over eye width of both eyes. points (..., 70, 2) -> (..., 2); about 0.4 wide open."""
    def one(first):
        p = points[..., first:first + 6, :]
        gap = _length((p[..., 1, :] + p[..., 2, :] - p[..., 4, :] - p[..., 5, :]) / 2)
        return gap / np.maximum(_length(p[..., 3, :] - p[..., 0, :]), 1e-6)
    return np.stack([one(36), one(42)], axis=-1)


def mouth_opening(points):
    """|p62 - p66| / |p36 - p45|: inner lips over outer eye corners. (..., 70, 2) -> (...)."""
    gap = _length(points[..., 62, :] - points[..., 66, :])
    return gap / np.maximum(_length(points[..., 36, :] - points[..., 45, :]), 1e-6)


def visible(points):
    """Points that count in errors: all but irises of closed eyes. (..., 70, 2) -> (..., 70)."""
    shown = np.ones(points.shape[:-1], dtype=bool)
    shown[..., IRISES] = eye_opening(points) >= OPEN_EYE
    return shown


def point_error(found, true):
    """Mean distance in pixels over the points that count. Two (..., 70, 2) -> (...)."""
    shown = visible(true)
    return (_length(found - true) * shown).sum(-1) / shown.sum(-1)


def region_box(points, region, margin=2.0):
    """Box (x0, y0, x1, y1) around a slice of the points, in pixels. (..., 70, 2) -> (..., 4)."""
    p = points[..., region, :]
    return np.concatenate([p.min(-2) - margin, p.max(-2) + margin], axis=-1)


def draw(points, size):
    """The landmark picture x^m of sec. 4.2. points (70, 2) px -> (size, size, 3) uint8.

    What leaves the picture is clipped; the iris of an eye less than 15 % open is not drawn.
    """
    scale, width = SUPERSAMPLE, round(SUPERSAMPLE * size / 128)
    canvas = Image.new("RGB", (size * scale, size * scale))
    pen = ImageDraw.Draw(canvas)
    p = (np.asarray(points, dtype=np.float64) + 0.5) * scale - 0.5
    for first, last, closed, colour in CONTOURS:
        line = p[first:last + 1].ravel().tolist()
        pen.line(line + line[:2] if closed else line, fill=colour, width=max(width, 1))
    radius = 1.4 * width
    for iris, is_open in zip(p[IRISES], eye_opening(points) >= OPEN_EYE):
        if is_open:
            x, y = iris.tolist()
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=IRIS_COLOUR)
    return np.asarray(canvas.reduce(scale))


def crop_box(points):
    """Where the square crop lies for a face: (x0, y0, side) in px. points (70, 2) or (N, 70, 2).

    One crop serves a whole clip, from its median points. The side is a fixed multiple of the
    mean of width and height from jaw to brows, so an open mouth hardly changes it.
    """
    points = np.asarray(points, dtype=np.float64).reshape(-1, POINTS, 2)
    frame = np.median(points, axis=0)[:27]                     # jaw and brows
    low, high = frame.min(0), frame.max(0)
    side = 1.9 * (high - low).mean()
    x, y = (low + high) / 2 - side / 2 - (0, 0.09 * side)       # room for hair above
    return float(x), float(y), float(side)


# The mean face: x to the viewer's right, y up, z to the viewer; the unit is half the face's width.
def _mean_face():
    u = np.linspace(-1, 1, 17)
    sin, cos = np.sin(u * np.pi / 2), np.abs(np.cos(u * np.pi / 2))
    jaw = np.stack([np.sign(sin) * np.abs(sin) ** .85, .1 - 1.32 * cos ** .9, .8 * cos - .5], 1)
    brow = [(-.74, .42, .1), (-.6, .52, .2), (-.44, .55, .27), (-.29, .53, .31), (-.16, .47, .34)]
    bridge = [(0, .17, .38), (0, .02, .47), (0, -.13, .57), (0, -.27, .66)]
    nostrils = [(-.17, -.36, .38), (-.09, -.4, .45), (0, -.42, .49), (.09, -.4, .45),
                (.17, -.36, .38)]
    eye = [(-.66, .13, .13), (-.52, .26, .24), (-.34, .26, .27), (-.21, .12, .24),
           (-.34, .02, .26), (-.52, .02, .22)]
    outer = [(-.31, -.70, .30), (-.20, -.63, .39), (-.08, -.595, .44), (0, -.61, .45),
             (.08, -.595, .44), (.20, -.63, .39), (.31, -.70, .30), (.20, -.79, .37),
             (.08, -.82, .41), (0, -.825, .42), (-.08, -.82, .41), (-.20, -.79, .37)]
    inner = [(-.26, -.70, .31), (-.13, -.70, .39), (0, -.70, .42), (.13, -.70, .39),
             (.26, -.70, .31), (.13, -.70, .39), (0, -.70, .42), (-.13, -.70, .39)]
    iris = [(-.43, .14, .25), (.43, .14, .25)]

    def mirror(points, order):
        return [(-points[k][0], *points[k][1:]) for k in order]
    return np.array([*jaw.tolist(), *brow, *mirror(brow, (4, 3, 2, 1, 0)), *bridge, *nostrils,
                     *eye, *mirror(eye, (3, 2, 1, 0, 5, 4)), *outer, *inner, *iris])


MEAN_FACE = _mean_face()                                        # (70, 3)
# rigid points: no lids, lips or brows; the ends of the jaw give depth, the chin would move
RIGID = np.array([0, 1, 2, 14, 15, 16, 27, 28, 29, 30, 31, 33, 35, 36, 39, 42, 45])
NECK = np.array([0, -.45, -.45])                                # around it a head turns
_CENTRED = MEAN_FACE[RIGID] - MEAN_FACE[RIGID].mean(0)
_PSEUDO_INVERSE = np.linalg.pinv(_CENTRED)                      # (3, 17)


def rotation(pose):
    """R = Rz(-roll) Ry(yaw) Rx(-pitch), x right, y up, z to the viewer. (..., 3) -> (..., 3, 3)."""
    pitch, yaw, roll = np.moveaxis(np.radians(np.asarray(pose, dtype=np.float64)), -1, 0)
    zero, one = np.zeros_like(pitch), np.ones_like(pitch)

    def matrix(*rows):
        return np.stack([np.stack(row, -1) for row in rows], -2)
    rx = matrix((one, zero, zero), (zero, np.cos(pitch), np.sin(pitch)),
                (zero, -np.sin(pitch), np.cos(pitch)))
    ry = matrix((np.cos(yaw), zero, np.sin(yaw)), (zero, one, zero),
                (-np.sin(yaw), zero, np.cos(yaw)))
    rz = matrix((np.cos(roll), np.sin(roll), zero), (-np.sin(roll), np.cos(roll), zero),
                (zero, zero, one))
    return rz @ ry @ rx


def head_pose(points):
    """Pitch, yaw, roll in degrees of the fit below. points (..., 70, 2) -> (..., 3)."""
    return angles(fit(points)[1])


def fit(points):
    """Weak-perspective fit of the mean face, in closed form: scale (...) px, rotation (..., 3, 3),
    centre (..., 2) of the rigid points, y up. points (..., 70, 2) px.

    The 2x3 affine map that best sends the mean face's rigid points to the picture is s [R]_12;
    the nearest pair of orthonormal rows is its polar factor.
    """
    p = np.asarray(points, dtype=np.float64)[..., RIGID, :] * (1, -1)
    affine = np.swapaxes(_PSEUDO_INVERSE @ (p - p.mean(-2, keepdims=True)), -1, -2)  # (..., 2, 3)
    u, s, v = np.linalg.svd(affine, full_matrices=False)
    rows = u @ v                                                               # (..., 2, 3)
    third = np.cross(rows[..., 0, :], rows[..., 1, :])                         # (..., 3)
    turn = np.stack([rows[..., 0, :], rows[..., 1, :], third], -2)
    return s.mean(-1), turn, p.mean(-2)


def unturned(points, scale, turn, centre):
    """The face as it would look at the viewer, in half face widths: (..., 70, 2) -> (..., 70, 3).

    What the picture does not tell, how far each point lies from the viewer, is the mean face's.
    """
    flat = np.asarray(points, dtype=np.float64) * (1, -1) - centre[..., None, :]
    depth = (MEAN_FACE - MEAN_FACE[RIGID].mean(0)) @ turn[..., 2, :, None]     # (..., 70, 1)
    return np.concatenate([flat / scale[..., None, None], depth], -1) @ turn   # R^T x


def turned(points, pose):
    """Faces turned about the neck to other poses: (..., 70, 2) px, (..., 3) degrees -> points."""
    scale, turn, centre = fit(points)
    face, other = unturned(points, scale, turn, centre), rotation(pose)
    swing = (other - turn) @ (MEAN_FACE[RIGID].mean(0) - NECK)                # of the face's middle
    moved = (face @ np.swapaxes(other, -1, -2) + swing[..., None, :])[..., :2]
    moved = moved * scale[..., None, None] + centre[..., None, :]
    return (moved * (1, -1)).astype(np.float32)


def retarget(portrait, driver):
    """Points of the portrait doing what a driver does since its first frame: its turn, shift and
    nearing, and the movement of its unturned face. (70, 2), (N, 70, 2) -> (N, 70, 2) px."""
    ours, theirs = fit(portrait), fit(driver)
    face, faces = unturned(portrait, *ours), unturned(driver, *theirs)
    (scale, turn, centre), (scales, turns, centres) = ours, theirs
    other = turn @ turns[0].T @ turns                                          # (N, 3, 3)
    moved = (face + faces - faces[0]) @ np.swapaxes(other, -1, -2)            # (N, 70, 3)
    flat = moved[..., :2] * (scale * scales / scales[0])[:, None, None]
    flat += (centre + (centres - centres[0]) * scale / scales[0])[:, None]
    return (flat * (1, -1)).astype(np.float32)


def angles(r):
    """Inverse of `rotation`. (..., 3, 3) -> (..., 3) degrees, for |yaw| < 90."""
    # the third row is (-sin yaw, -cos yaw sin pitch, cos yaw cos pitch)
    yaw = np.arcsin(np.clip(-r[..., 2, 0], -1, 1))
    pitch = np.arctan2(-r[..., 2, 1], r[..., 2, 2])
    roll = np.arctan2(-r[..., 1, 0], r[..., 0, 0])
    return np.degrees(np.stack([pitch, yaw, roll], -1)).astype(np.float32)


def _length(vectors):
    return np.sqrt((vectors ** 2).sum(-1))
