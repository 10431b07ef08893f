"""Data sets: rendered Toy Heads, or clips at rest (sec. 3).

A clip at rest is NAME.mp4 (H.264, every frame a key frame, 25 fps, with its sound) beside NAME.npz:
landmarks (N, 70, 2), pose (N, 3), optional speech (N, d_s), text, speaker, valid (N,). A data set
is a folder of such pairs and one index.json. Training treats both kinds alike, but for the poses
and looks that `toy_frames` chooses and the heads that `toy_motion` steers; stored speech features
are taken as they are.

    python data.py toy --clips 2000 --out runs/toys

Every draw is keyed by (seed, step, global sample index): neither a resume nor a split over
processes changes what a step sees. Letters: B batch, N frames, H W picture.
"""
from __future__ import annotations

import functools
import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import audio
import media
import toy
import voices
from landmarks import draw
from text import load_clip
from toy import default_workers, executor, in_parallel, training_seed


def batch(dataset, seed, step, samples):
    """Examples of a step, stacked: sample k depends on (seed, step, k) alone."""
    examples = [dataset.example(np.random.default_rng((seed, step, k))) for k in samples]
    return {name: torch.stack([e[name] for e in examples]) for name in examples[0]}


# ---- frames, for the VAE -------------------------------------------------------------------------

RARE = {"glasses": .6, "beard": .6}                  # shares among heads that are trained on
SAME = .15                      # share of the VAE's examples that redraw the portrait itself


class Frames:
    """Pairs of frames of one identity: for each, pictures (F, H, W, 3) uint8, points (F, 70, 2)."""

    def __init__(self, pictures=(), landmarks=(), pool=None):
        self.pictures, self.landmarks, self.pool = list(pictures), list(landmarks), pool

    def grow(self, step):
        """Gain what the pool must hold before this step; clips at rest are all there."""
        for pictures, points in self.pool.grow(step) if self.pool else ():
            self.pictures.append(pictures)
            self.landmarks.append(points)

    def example(self, rng):
        """Frames i, j of a clip (sec. 4.2): reference, target, x_m (3, H, W), points (70, 2).
        In a few examples i = j: z^a learns to hold what D cannot yet move."""
        who = rng.integers(len(self.pictures))
        i, j = rng.choice(len(self.pictures[who]), 2, replace=False)
        if rng.random() < SAME:
            i = j
        points = self.landmarks[who][j]
        x_m = draw(points, self.pictures[who].shape[-2])
        return {"reference": media.to_float(self.pictures[who][i]),
                "target": media.to_float(self.pictures[who][j]),
                "x_m": media.to_float(x_m), "landmarks": torch.from_numpy(points)}

    def close(self):
        """End the processes that render, if any."""
        if self.pool:
            self.pool.close()


def toy_frames(seed=0, identities=4000, frames=8, size=128, workers=None, per_step=.8):
    """Rendered identities in `frames` poses each, made while training goes on. Four of five heads
    keep their poses as close as in a clip, the rest turn as far as heads do; RARE looks come
    more often than among held-out heads, since what is rare is learnt last. -> Frames"""
    if seed < 0 or identities < 1 or frames < 2:
        raise media.UserError("rendered heads need --identities of at least 1, --frames of at "
                              "least 2 and a seed that is not negative")
    make = functools.partial(_portraits, seed=seed, frames=frames, size=size)
    return Frames(pool=GrowingPool(make, 400, per_step, identities, workers))


def _portraits(k, seed, frames, size):
    return toy.make_portraits(training_seed(seed, k), frames, size, close=k % 5 < 4, **RARE)


def clip_frames(folder, size=128, stride=10):
    """Every `stride`-th frame of a folder's clips, decoded once and kept in memory. -> Frames"""
    pictures, points = [], []
    for path in tqdm(clip_paths(folder), "clips", leave=False):
        held = read_clip(path)
        shown = [k for k in range(0, len(held["landmarks"]), stride) if held["valid"][k]]
        frames = [f for k, f in enumerate(media.read_video(path)) if k in shown]
        if len(frames) < 2:
            continue
        pictures.append(np.stack(frames))
        points.append(held["landmarks"][shown[:len(frames)]])
        check_size(path, frames[0], size)
    if not pictures:
        raise media.UserError(f"{folder}: no clip has two valid frames; make it again")
    return Frames(pictures, points)


def check_size(path, frame, size):
    """UserError for a clip of another size than the model's."""
    if frame.shape[:2] != (size, size):
        raise media.UserError(f"{path}: frames are {frame.shape[1]}x{frame.shape[0]} and the model "
                              f"wants {size}x{size}; prepare the clips at that size")


# ---- motion, for the diffusion model -------------------------------------------------------------

def draw_all(points, size):
    """x_m of every frame: (N, 70, 2) -> (N, size, size, 3) uint8."""
    return np.stack([draw(p, size) for p in points])


@torch.no_grad()
def encode_motion(vae, x_m, device):
    """Posterior means of z^m (sec. 4.2). x_m (N, H, W, 3) uint8 -> (N, 3, h_m, w_m) on the CPU."""
    parts = np.array_split(x_m, max(1, len(x_m) // 16))
    return torch.cat([vae.encode_motion(media.to_float(part).to(device))[0].cpu()
                      for part in parts])


def toy_motion(k, seed=0, seconds=4.8, size=128, augment=True, kind="mel", weights=None,
               drawn=True):
    """Clip k of a run: landmarks (N, 70, 2), pose (N, 3), speech (N, d_s), as float32 arrays, and,
    if it is to be drawn, x_m (N, H, W, 3). Every fourth is `steered`: its head turns far, so that
    the model learns to follow a pose it is given."""
    steered = k % 4 == 3
    clip = toy.make_clip(training_seed(seed, k), seconds, size, steered=steered)
    pictures = {"x_m": draw_all(clip.landmarks, size)} if drawn else {}
    return pictures | {
        "landmarks": clip.landmarks, "pose": clip.pose, "steered": steered,
        "speech": _speech(clip.sound, (seed, k, 9) if augment else None, kind, weights)}


def toy_text(k, seed=0, seconds=4.8, size=128):
    """Clip k of a run of instructions: landmarks, pose, two texts, one after another or twice the
    same, and which is in force (N,), since how many frames (N,)."""
    clip = toy.instruct(training_seed(seed, k), seconds, size=size, parts=1 + k % 2)
    return {"landmarks": clip.landmarks, "pose": clip.pose, "steered": False,
            "texts": (clip.text.split(" | ") * 2)[:2], "said": clip.said,
            "since": np.arange(len(clip)) - np.searchsorted(clip.said, clip.said)}


def open_clip(folder):
    """`load_clip` with errors for users."""
    try:
        return load_clip(folder)
    except ValueError as error:
        raise media.UserError(f"--clip {error}; wants CLIP as transformers saves it") from error


def _speech(sound, key, kind, weights):
    """Features of sound, which a key augments. -> (N, d_s)"""
    heard = sound if key is None else voices.augment(sound, np.random.default_rng(key))
    return audio.speech_features(heard, kind, weights).numpy()


class GrowingPool:
    """Items made by worker processes while training goes on, so that the first step comes early.
    At a step the pool holds min(limit, first + per_step * step) items, each a function of its
    number alone: a resumed run makes the same ones again."""

    def __init__(self, make, first, per_step, limit, workers=None):
        self.make, self.first, self.per_step, self.limit = make, first, per_step, limit
        self.workers = default_workers() if workers is None else workers
        self.made, self.pool, self.waiting = 0, None, []

    def grow(self, step, ahead=32):
        """Yield, in order, the items that the pool must gain before this step."""
        want = int(min(self.limit, self.first + self.per_step * step))
        if self.workers and self.pool is None and self.made < self.limit:
            self.pool = executor(self.workers)
        for _ in tqdm(range(self.made, want), "rendering", leave=False,
                      disable=want < self.made + 50):
            if self.workers:
                self._order(min(want, self.made + 1) + ahead)
                item = self.waiting.pop(0).result()
            else:
                item = self.make(self.made)
            self.made += 1
            yield item
        if self.workers and self.made < self.limit:
            self._order(want + ahead)

    def _order(self, upto):
        while self.made + len(self.waiting) < min(upto, self.limit):
            self.waiting.append(self.pool.submit(self.make, self.made + len(self.waiting)))

    def close(self):
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = None


def clip_motion(k, paths, size, seed=0, augment=True, kind="mel", weights=None):
    """Clip k of a folder in the form of `toy_motion`, up to its first frame that is not valid.
    Speech features of this kind are taken from the clip where it holds them, or made anew."""
    held = read_clip(paths[k])
    for frame in itertools.islice(media.read_video(paths[k]), 1):
        check_size(paths[k], frame, size)
    if held.get("speech", np.zeros((0, 0))).shape[-1] == audio.FEATURES[kind]:
        speech = held["speech"].astype(np.float32)
    else:
        key = (seed, k, 9) if augment else None
        speech = _speech(media.read_sound(paths[k]), key, kind, weights)
    broken = np.flatnonzero(~held["valid"])
    n = min(len(speech), len(held["landmarks"]), *broken[:1])
    if n < 2:
        raise media.UserError(f"{paths[k]}: begins with a frame that is not valid; make it again")
    return {"landmarks": held["landmarks"][:n], "pose": held["pose"][:n], "speech": speech[:n],
            "steered": False, "x_m": draw_all(held["landmarks"][:n], size)}


# ---- clips at rest -------------------------------------------------------------------------------

def write_clip(path, clip, speech=None, speaker=""):
    """Write a clip in the format above. `path` ends in .mp4; the .npz is written beside it."""
    path = Path(path)
    with media.VideoWriter(path, clip.size, clip.size, clip.sound, intra=True) as video:
        video.write(clip.frames())
    arrays = {"landmarks": clip.landmarks, "pose": clip.pose, "text": clip.text, "speaker": speaker,
              "valid": np.ones(len(clip), dtype=bool)}
    if speech is not None:
        arrays["speech"] = speech
    with media.replacing(path.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def read_clip(path):
    """The numbers beside a clip: dict of arrays; UserError names what is missing."""
    path = Path(path).with_suffix(".npz")
    try:
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        arrays["landmarks"] = arrays["landmarks"].astype(np.float32)
        arrays["pose"] = arrays["pose"].astype(np.float32)
        arrays.setdefault("valid", np.ones(len(arrays["landmarks"]), dtype=bool))
        if not len(arrays["landmarks"]) == len(arrays["pose"]) == len(arrays["valid"]):
            raise ValueError("landmarks, pose and valid are not of one length")
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise media.UserError(f"{path}: not the numbers of a clip ({error}); make it again"
                              ) from error
    return arrays


def clip_paths(folder):
    """The clips of a data set, as its index.json lists them."""
    index = Path(folder) / "index.json"
    try:
        names = json.loads(index.read_text())["clips"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise media.UserError(f"{index}: not a data set's index ({error}); make one with "
                              "`python data.py toy --out FOLDER`") from error
    if not names:
        raise media.UserError(f"{index}: lists no clips")
    return [Path(folder) / name for name in names]


def _write_toy(k, seed, seconds, size, out):
    clip = toy.make_clip(training_seed(seed, k), seconds, size)
    path = Path(out) / f"toy_{k:06d}.mp4"
    if not path.with_suffix(".npz").exists():                  # the .npz comes last: a whole clip
        write_clip(path, clip, speaker=f"toy {training_seed(seed, k)}")
    return path.name


def _begin(path, recipe):
    """Start or go on with a folder; UserError where it holds clips of another recipe."""
    try:
        held = dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return _write_index(path, recipe | {"clips": []})
    except (OSError, ValueError, TypeError) as error:
        raise media.UserError(f"{path}: cannot be read ({error}); choose another --out") from error
    if {k: held.get(k) for k in recipe} != recipe:
        raise media.UserError(f"{path.parent}: holds clips made with other flags; change --out")


def _write_index(path, index):
    with media.replacing(path) as temporary:
        temporary.write_text(json.dumps(index, indent=1))


def main(argv=None):
    parser = media.ArgumentParser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    made = kinds.add_parser("toy", help="write rendered Toy Heads as clips")
    made.add_argument("--clips", type=int, default=2000, help="how many")
    made.add_argument("--seconds", type=float, default=4.8, help="length of each")
    made.add_argument("--size", type=int, default=128, help="side of the picture in pixels")
    made.add_argument("--seed", type=int, default=0, help="other seeds give other heads")
    made.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")
    made.add_argument("--out", required=True, help="folder; the same command again goes on")
    args = parser.parse_args(argv)
    if args.clips < 1 or args.seconds < .4 or args.seed < 0 or args.size < 32:
        raise media.UserError("data.py toy wants --clips of 1 or more, --seconds of 0.4 or more, "
                              "--size of 32 or more and a --seed that is not negative")
    out = Path(args.out)
    recipe = {"toy_version": toy.TOY_VERSION, "seed": args.seed, "seconds": args.seconds,
              "size": args.size, "fps": media.FPS}
    _begin(out / "index.json", recipe)
    make = functools.partial(_write_toy, seed=args.seed, seconds=args.seconds, size=args.size,
                             out=out)
    names = in_parallel(make, range(args.clips), args.workers, "clips")
    _write_index(out / "index.json", recipe | {"clips": names})
    print(out)


if __name__ == "__main__":
    media.run(main)
