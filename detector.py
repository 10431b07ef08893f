"""Finds the 70 points in a picture (the "external tool" of sec. 4.2).

A small network that is trained on Toy Heads, and mediapipe's face mesh where it is installed:

    python detector.py                      ten minutes on rendered heads, to runs/detector
    python detector.py --steps 2000 --out runs/other

The network looks at 128x128 pixels and draws one heat map a point at a quarter of that size; the
point is the heat's mean place (soft-argmax) plus a small offset read there. It also says how sure
it is that there is a drawn face at all. The same command again goes on where it stopped. OUT gets
last.pt (everything), detector.pt (the EMA in fp16), log.csv, curve.png and grid.png (found points).

Letters: B batch, K = 70 points, C channels. Departures from the paper: its tool is that of Wood et
al. (2021); ours knows drawings only, since no photograph is in its training.
"""
from __future__ import annotations

import contextlib
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import curves
import media
import optim
import toy
import training
from detector_pictures import drawn_points, held_out_frames, make_batch, pool_item
from landmarks import POINTS, crop_box, point_error

SURE = .9                       # a picture whose confidence is above this holds a drawn face
FLAT = .45                      # share of pixels without an edge above which a face is a drawing
NOTE = "the shipped weights were trained on drawings, not photographs"
SHIPPED = Path(__file__).parent / "checkpoints" / "toy" / "detector.pt"
LARGEST = 2048                  # longer sides are shrunk by a whole factor before looking
SMALLEST = 32                   # a picture with a shorter side holds no face
MOST_WINDOWS = 40               # places where a face is looked for
MOVED = .1                      # of the crop's side: how far a face may move until the crop follows
CUT = .03                       # of the crop's side: how far points may lie outside a picture


# ---- the network ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class DetectorConfig:
    size: int = 128
    widths: tuple = (48, 96, 128)       # channels at 32, 16 and 8 pixels
    blocks: tuple = (1, 1, 2)           # residual blocks there, on the way down and on the way up


class Block(nn.Module):
    """SiLU, conv, one LayerNorm over channels, SiLU, zero-initialised conv, skip."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x):
        h = self.conv1(F.silu(x))                                            # (B, C, h, w)
        h = self.norm(h.movedim(1, -1)).movedim(-1, 1)
        return x + self.conv2(F.silu(h))


class Detector(nn.Module):
    """(B, 3, 128, 128) in [-1, 1] -> points (B, 70, 2) in its pixels, confidence logit (B,)."""

    adam_only = ("heat", "offset", "sure")             # Muon is for the kernels in between

    def __init__(self, config=DetectorConfig()):
        super().__init__()
        self.config = config
        widths, cells = config.widths, config.size // 4

        def stack(width, blocks):
            return nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.door = nn.Conv2d(48, widths[0], 3, padding=1)
        self.down = nn.ModuleList(map(stack, widths, config.blocks))
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1)
                                    for a, b in zip(widths, widths[1:]))
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in zip(widths, widths[1:]))
        self.up = nn.ModuleList(map(stack, widths[:-1], config.blocks))
        self.heat = nn.Conv2d(widths[0], POINTS, 1)
        self.temperature = nn.Parameter(torch.zeros(POINTS, 1))              # log of its inverse
        self.offset = nn.Parameter(torch.zeros(POINTS, 2, widths[0]))
        self.sure = nn.Linear(2 * widths[-1], 1)
        centres = 4 * torch.arange(cells) + 1.5                              # px of the input
        grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).flatten(0, 1)
        self.register_buffer("grid", grid, persistent=False)                 # (cells^2, 2)

    def forward(self, pictures, with_heat=False):
        x, skips = self.door(F.pixel_unshuffle(pictures, 4)), []             # (B, C, 32, 32)
        for blocks, shrink in zip(self.down, [*self.shrink, None]):
            x = blocks(x)
            skips.append(x)
            x = shrink(x) if shrink else x                                   # ... (B, C, 8, 8)
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        sure = self.sure(pooled).float()[:, 0]                               # (B,)
        for k in reversed(range(len(self.up))):
            x = self.up[k](F.interpolate(self.grow[k](x), scale_factor=2.0) + skips[k])
        with torch.autocast(x.device.type, enabled=False):
            x = F.silu(x.float())
            heat = self.heat(x).flatten(2) * self.temperature.exp()          # (B, K, 32 * 32)
            share = heat.softmax(-1)
            local = share @ x.flatten(2).transpose(1, 2)                     # (B, K, C)
            points = share @ self.grid + torch.einsum("bkc,kdc->bkd", local, self.offset)
        return (points, sure, heat) if with_heat else (points, sure)


def load(path=SHIPPED, device="cpu"):
    """The detector of a checkpoint, ready to look."""
    model, _ = training.load_model(Detector, DetectorConfig, path, device)
    return model.to(memory_format=torch.channels_last)


# ---- looking -------------------------------------------------------------------------------------

def cut(picture, box, size):
    """The square `box` (x0, y0, side) of a picture, resampled; outside it the edge goes on.

    Pixel q of the result lies at x0 + (q + 1/2) side / size. (H, W, 3) -> (size, size, 3) uint8.
    """
    x0, y0, side = box
    height, width = picture.shape[:2]
    low = np.floor([x0, y0]).astype(int) - 1                    # a little more than the square
    high = np.ceil([x0 + side, y0 + side]).astype(int) + 2
    rows = np.clip(np.arange(low[1], high[1]), 0, height - 1)
    columns = np.clip(np.arange(low[0], high[0]), 0, width - 1)
    region = Image.fromarray(picture[rows][:, columns])
    left, top = x0 + .5 - low[0], y0 + .5 - low[1]
    method = Image.Resampling.BICUBIC
    return np.asarray(region.resize((size, size), method, (left, top, left + side, top + side)))


def whole(picture):
    """The smallest square around a picture, as a box."""
    height, width = picture.shape[:2]
    side = max(height, width)
    return (width - side) / 2 - .5, (height - side) / 2 - .5, float(side)


@torch.no_grad()
def look(model, pictures):
    """One look. (n, 128, 128, 3) uint8 -> points (n, 70, 2) px float32, confidence (n,) in 0..1."""
    device = next(model.parameters()).device
    parts = np.array_split(pictures, max(1, -(-len(pictures) // 64)))
    found = [model(media.to_float(part).to(device, memory_format=torch.channels_last))
             for part in parts]
    points, sure = map(torch.cat, zip(*found))
    return points.float().cpu().numpy(), sure.sigmoid().cpu().numpy()


def find_in_crops(model, frames):
    """Points of frames that are framed already. (n, 128, 128, 3) uint8, or float in [-1, 1]
    as (n, 3, 128, 128) -> (n, 70, 2) px."""
    frames = media.to_uint8(frames) if torch.is_tensor(frames) else np.asarray(frames)
    return look(model, frames)[0]


def windows(picture):
    """Squares in which faces of a picture may lie: all of it, then smaller ones that overlap."""
    height, width = picture.shape[:2]
    boxes = [whole(picture)]
    for side in (min(height, width), min(height, width) / 2):
        rows, columns = (np.linspace(0, full - side, 1 + math.ceil(2 * (full / side - 1))) - .5
                         for full in (height, width))
        boxes += [(x, y, float(side)) for y in rows for x in columns]
    return boxes[:MOST_WINDOWS]


def find_all(model, picture):
    """The faces that it is sure of, largest first: [(points (70, 2) px, how sure), ...]."""
    factor, picture = shrunken(picture)
    boxes, faces = windows(picture), []
    _, sure = look(model, np.stack([cut(picture, box, 128) for box in boxes]))
    found = [find(model, picture, 4, box) for box, s in zip(boxes, sure) if s > .5]  # off the gaps
    for points, s in sorted(found, key=lambda face: -np.ptp(face[0], axis=0).prod()):
        where = [(points.mean(0) - (x, y)) / side for x, y, side in (crop_box(p) for p, _ in faces)]
        if s >= SURE and not any((0 < at).all() and (at < 1).all() for at in where):
            faces.append((points, s))
    return [((points + .5) * factor - .5, s) for points, s in faces]


def shrunken(picture):
    """How many times smaller, and the picture, so that no side is over LARGEST."""
    factor = -(-max(picture.shape[:2]) // LARGEST)
    return factor, np.asarray(Image.fromarray(picture).reduce(factor)) if factor > 1 else picture


def find(model, picture, looks=2, box=None):
    """Points (70, 2) in the picture's pixels, and how sure, 0..1. picture (H, W, 3) uint8.
    First the whole picture, or a box of it, then the crop that the answer before gives; the last
    look counts. One face is found; of several, whichever the first look leans to."""
    factor, picture = shrunken(picture)
    box = box or whole(picture)
    limit = whole(picture)[2]
    for _ in range(looks):
        points, sure = look(model, cut(picture, box, 128)[None])
        points = np.array(box[:2]) + (points[0].astype(np.float64) + .5) * box[2] / 128
        x, y, side = crop_box(points)
        kept = float(np.clip(side, 8, 2 * limit))
        box = x + (side - kept) / 2, y + (side - kept) / 2, kept
    return ((points + .5) * factor - .5).astype(np.float32), float(sure[0])


# The index in mediapipe's face mesh (refined, 478 points) of each of the 70. Its jaw is the oval of
# the face as seen, so these 17 slide along the cheek when the head turns, where ours stay on the
# skull; they were chosen to lie at the same shares of the jaw's length as the mean face's.
MEDIAPIPE_70 = (
    127, 93, 132, 58, 172, 136, 149, 176, 152, 400, 378, 365, 397, 288, 361, 323, 356,
    70, 63, 105, 66, 107, 336, 296, 334, 293, 300, 168, 197, 195, 4, 98, 97, 2, 326, 327,
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181,
    78, 82, 13, 312, 308, 317, 14, 87, 468, 473)


def mediapipe_points(picture, mesh=None):
    """Points (70, 2) px of the largest face, or None, and how many faces there are; ImportError
    where mediapipe is not installed. `mesh`: a `face_mesh()` that is open already."""
    factor, small = shrunken(picture)
    with contextlib.nullcontext(mesh) if mesh else face_mesh() as mesh:
        faces = mesh.process(np.ascontiguousarray(small)).multi_face_landmarks
    if not faces:
        return None, 0
    found = [np.array([(p.x, p.y) for p in face.landmark])[list(MEDIAPIPE_70)] for face in faces]
    points = max(found, key=lambda p: np.ptp(p, axis=0).prod()) * small.shape[1::-1]
    return (points * factor - .5).astype(np.float32), len(faces)


def face_mesh():
    os.environ.setdefault("GLOG_minloglevel", "2")
    from mediapipe.python.solutions.face_mesh import FaceMesh
    return FaceMesh(static_image_mode=True, max_num_faces=4, refine_landmarks=True)


def check_inside(name, picture, points):
    """UserError for a face that the picture's border cuts."""
    out = np.maximum(-points, points - np.array(picture.shape[1::-1]) + 1).max(1)    # px, (70,)
    beyond = out > CUT * crop_box(points)[2]
    if beyond.any():
        raise media.UserError(f"{name}: the picture's border cuts the face ({beyond.sum()} of "
                              f"{POINTS} points lie outside); choose one with the whole face")


def several(name, count):
    """What to tell of a picture with more than one face, or None."""
    return f"{name}: {count} faces; the largest speaks" if count > 1 else None


def is_drawing(picture, points):
    """Whether the face is drawn in flat colours, as Toy Heads are: most pixels of its crop continue
    their neighbours' colours to within one step of 255, which hardly any photograph's do."""
    face = cut(picture, crop_box(points), 128).astype(np.int16)
    bend = [np.abs(np.diff(face, 2, axis)).max(-1) for axis in (0, 1)]
    return (np.maximum(bend[0][:, 1:-1], bend[1][1:-1]) <= 1).mean() >= FLAT


def locate(picture, name, detector="auto", model=None):
    """The 70 points of a user's picture: ours if it is sure, else mediapipe's.
    -> points (70, 2) px, and a note for the user or None. UserError where no face is found;
    `name` is what to call the picture. detector: "auto", "toy" (ours alone) or "mediapipe"."""
    sure, missing, ours = 0.0, False, None
    height, width = picture.shape[:2]
    if min(height, width) < SMALLEST:
        raise media.UserError(f"{name}: only {width}x{height} pixels; wants a picture of at least "
                              f"{SMALLEST}x{SMALLEST}")
    if detector != "mediapipe":
        model = model or load()
        faces = find_all(model, picture) or [find(model, picture)]
        ours, sure = faces[0]
        if sure >= SURE and is_drawing(picture, ours):
            check_inside(name, picture, ours)
            return ours, several(name, len(faces))
    if detector != "toy":
        try:
            points, count = mediapipe_points(picture)
            if count:
                notes = [f"{name}: face found with mediapipe; {NOTE}", several(name, count)]
                check_inside(name, picture, points)
                return points, "; ".join(filter(None, notes))
        except ImportError:
            missing = True
    if sure >= SURE:
        check_inside(name, picture, ours)
        return ours, f"{name}: a photograph, or a drawing that a codec has blurred; {NOTE}"
    if sure >= .5:
        check_inside(name, picture, ours)                   # a part of a face is found, unsurely
    doubt = "" if detector == "mediapipe" else \
        f"; our detector, which knows drawings, is {100 * sure:.0f} % sure"
    advice = "for photographs `pip install -r requirements-real.txt`" if missing else \
        "try --detector auto" if detector == "toy" else "try a picture with one large frontal face"
    raise media.UserError(f"{name}: no face found ({width}x{height} pixels{doubt}); {advice}")


def follow(frames, name, detector="auto", model=None):
    """The 70 points of a video's face: (N, 70, 2) px, and a note for the user or None.

    Who finds them in the first frame, ours or mediapipe, finds them in all. Where there is no face,
    the points of the frame before stay; UserError if that is more than a fifth of the frames.
    """
    tracks, lost, model = [], 0, model or load()
    with contextlib.ExitStack() as stack:
        for picture in frames:
            if not tracks:
                points, note = locate(picture, name, detector, model)
                box, mesh = crop_box(points), None
                if detector == "mediapipe" or note and "found with mediapipe" in note:
                    mesh = stack.enter_context(face_mesh())
            elif mesh:
                points = mediapipe_points(picture, mesh)[0]
            else:
                points, sure = look(model, cut(picture, box, 128)[None])
                points = box[:2] + (points[0] + .5) * np.float32(box[2] / 128) - .5
                points = points if sure[0] >= .5 else None
            lost += points is None
            tracks.append(tracks[-1] if points is None else points)
            moved = np.abs(np.subtract(crop_box(tracks[-1]), box)).max() / box[2]
            box = crop_box(tracks[-1]) if moved > MOVED else box
    if not tracks:
        raise media.UserError(f"{name}: holds no pictures; export it again")
    if 5 * lost > len(tracks):
        raise media.UserError(f"{name}: no face in {lost} of {len(tracks)} frames; choose a video "
                              "of one frontal face")
    return np.stack(tracks), note


# ---- training ------------------------------------------------------------------------------------

RECIPE = {"batch": 8, "lr": 2e-3, "warmup": 50}
COLUMNS = ["loss", "px", "heat", "sure", "unseen", "lr"]


def loss_terms(model, pictures, points, counts, face):
    """Distance of the points that count (px), spread of the heat, and confidence, as tensors."""
    found, sure, heat = model(pictures, with_heat=True)
    n = counts.sum().clamp(min=1)
    far = F.smooth_l1_loss(found, points, reduction="none", beta=.25).sum(-1)
    px = (far * counts).sum() / n
    square = ((points[:, :, None] - model.grid) ** 2).sum(-1)                # (B, K, cells^2)
    target = (-square / (2 * 5.0 ** 2)).softmax(-1)             # a spot of 5 px around the truth
    spot = (-(target * heat.log_softmax(-1)).sum(-1) * counts).sum() / n
    known = face >= 0
    return px, spot, F.binary_cross_entropy_with_logits(sure[known], face[known])


def arguments(argv):
    p = media.ArgumentParser(__doc__)
    p.add_argument("--identities", type=int, default=1500, help="rendered heads, six pictures each")
    training.add_arguments(p, "runs/detector", "render")
    args = p.parse_args(argv)
    args.out = args.out or "runs/detector"
    training.settle(args, RECIPE, minutes=10.0)
    if args.batch < 4 or args.identities < 1:
        raise media.UserError("--batch must be at least 4 and --identities at least 1")
    return args


def main(argv=None):
    # ---- arguments, model, EMA, optimisers; start or go on ----
    args = arguments(argv)
    device = training.pick_device(args.device)
    dtype, out = training.pick_dtype(args.dtype, device), Path(args.out)
    last, shipped = out / "last.pt", out / "detector.pt"
    torch.manual_seed(args.seed)
    model = Detector().to(device, memory_format=torch.channels_last)
    optimisers, ema = optim.make_optimisers(model, "muon", args.lr, muon=1), optim.Ema(model)
    step, spent, _ = training.resume(last, {"model": model}, optimisers, ema,
                                     same={"seed": args.seed}, fresh=args.fresh)

    # ---- data ----
    budget = training.Budget(args.steps, args.minutes)
    seeds = [toy.training_seed(args.seed, k) for k in range(args.identities)]
    pool = toy.in_parallel(pool_item, seeds, args.workers, "heads")
    unseen, truth = held_out_frames()
    batches = training.ahead(lambda at: make_batch(pool, args.seed, at, args.batch), step, device)
    if args.fresh:
        last.unlink(missing_ok=True)
    log = curves.Log(out / "log.csv", COLUMNS, step)
    shadow = Detector().to(device, memory_format=torch.channels_last).eval()

    def report():
        """Measure the EMA on the held-out heads, draw, and save."""
        shadow.load_state_dict(ema.weights)
        found, sure = look(shadow, unseen)
        error, certain = float(point_error(found, truth).mean()), float((sure > SURE).mean())
        optim.check_finite(error, step, last)
        log.write(0, step=step, minutes=budget.spent(), unseen=error)
        log.flush()
        state = {"config": asdict(model.config), "model": model.state_dict(), "ema": ema.weights,
                 "optimisers": [o.state_dict() for o in optimisers], "step": step,
                 "minutes": budget.spent(), "seed": args.seed}
        training.save(last, state)
        training.ship(shipped, {"config": asdict(model.config), "weights": ema.half()},
                      seed=args.seed, steps=step, minutes=round(budget.spent(), 1))
        media.write_image(out / "grid.png", drawn_points(unseen[::16], found[::16]))
        curves.draw_curves(out / "log.csv", out / "curve.png", COLUMNS[:-1])
        return error, certain

    # ---- the loop ----
    budget.begin(spent)                                     # what is made again was paid for
    with training.progress("detector") as bar, training.stop_on_signals() as stop, \
            contextlib.closing(log), contextlib.closing(batches):
        while (share := budget.share(step)) < 1 and not stop:
            if step and step % args.every == 0:
                tqdm.write(f"step {step}: {report()[0]:.2f} px on held-out heads")
            drawn = [x.to(device) for x in next(batches)]
            drawn[0] = drawn[0].contiguous(memory_format=torch.channels_last)
            factor = optim.rate_factor("trapezoid", step, share, args.warmup)
            optim.set_rate(optimisers, factor)
            with training.autocast(device, dtype):
                px, heat, sure = loss_terms(model, *drawn)
            loss = px + .3 * heat + sure
            loss.backward()
            optim.update(model, optimisers, step, last, most=5.0, ema=ema)
            log.write(args.batch, step=step, minutes=budget.spent(), loss=loss.item(), px=px.item(),
                      heat=heat.item(), sure=sure.item(), lr=args.lr * factor)
            step += 1
            bar.set_postfix_str(f"step {step}, {px.item():.2f} px", refresh=False)
            bar.update(100 * budget.share(step) - bar.n)
        error, certain = report()
    print(f"detector_px {error:.3f}   sure of {100 * certain:.0f} % of held-out heads   "
          f"{step} steps, {budget.spent():.1f} min   {shipped}")


if __name__ == "__main__":
    media.run(main)
