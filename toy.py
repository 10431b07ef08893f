"""Toy Heads: endless made talking heads in which every number is known.

One motion causes both the sound and the picture, as in life: `voices` turns phonemes into
articulator tracks, the same tracks drive a synthesizer and the lips. Stress moves head and brows;
blinks, gaze and the rest of the head's motion are random processes of their own.

    python toy.py --seed 3 --seconds 6 --out toy.mp4      one head, its landmarks beside it
    python toy.py --sheet sheet.png                       64 identities
    python toy.py --say "Bob made papa mop" --out a.mp4   a sentence (needs espeak-ng)
    python toy.py --instruct "please smile" --out b.mp4   a head that obeys

Seeds from HELD_OUT on are never trained on. Letters: N frames, E expression numbers.
Nothing here is in the paper: it trained on 1,169 hours of real faces.
"""
from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from tqdm import tqdm

import media
import voices
from actions import INSTRUCTIONS, actions_of, random_actions, wording
from faces import EXPRESSION, NEUTRAL, random_identity
from landmarks import draw, head_pose
from painter import Painter

TOY_VERSION = 1                 # numbers measured on two versions must not be compared
HELD_OUT = 1_000_000_000        # the first seed of the held-out range
BLINKS_PER_MINUTE = 22
DEFECTS = ("profile", "jitter", "mask", "silence", "two_faces", "shifted_sound")
AT = {name: k for k, name in enumerate(EXPRESSION)}
ANGLES = ("pitch", "yaw", "roll")


@dataclass
class Motion:
    """What a head does: pose (N, 3) degrees, expression (N, E), sway (N, 2) in half face widths."""
    pose: np.ndarray
    expression: np.ndarray
    sway: np.ndarray

    def __len__(self):
        return len(self.pose)


@dataclass
class ToyClip:
    """A made clip. `landmarks` (N, 70, 2) px, `pose` (N, 3) fitted to them, `true_pose` drawn."""
    identity: object
    motion: Motion
    speech: voices.Speech | None = None
    text: str = ""
    said: np.ndarray | None = None
    size: int = 128
    jitter: tuple = (0.0, 0.0, 1.0)
    first: bool = False         # framed by its first frame alone, as a portrait is
    defect: str | None = None
    intruder: ToyClip | None = field(default=None, repr=False)

    @cached_property
    def painter(self):
        m = self.motion
        return Painter(self.identity, m.pose, m.expression, m.sway, self.size, self.jitter,
                       self.defect == "mask", self.first)

    @cached_property
    def landmarks(self):
        return self.painter.landmarks

    @cached_property
    def pose(self):
        return head_pose(self.landmarks)

    @property
    def true_pose(self):
        return self.motion.pose

    @property
    def sound(self):
        """(T,) float32 at 16 kHz; a clip without speech is silent."""
        if self.speech is None:
            return np.zeros(len(self) * media.RATE // media.FPS, dtype=np.float32)
        return self.speech.sound

    def __len__(self):
        return len(self.motion)

    def frames(self, indices=None):
        """Draw frames. -> (n, size, size, 3) uint8."""
        return np.stack([self.frame(k) for k in (range(len(self)) if indices is None else indices)])

    def frame(self, k):
        """Draw frame k. -> (size, size, 3) uint8."""
        picture = self.painter.frame(k).copy()
        if self.intruder is not None:
            small = self.intruder.frame(k % len(self.intruder))
            picture[-small.shape[0]:, :small.shape[1]] = small
        return picture


# ---- motion --------------------------------------------------------------------------------------

def wander(rng, n, seconds, columns=1):
    """Smooth motion of unit spread that forgets itself in about `seconds`. -> (n, columns)."""
    sigma = seconds * media.FPS
    reach = int(3 * sigma) + 1
    kernel = np.exp(-.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    noise = rng.standard_normal((n + 2 * reach, columns))
    kernel /= np.sqrt((kernel ** 2).sum())
    return np.stack([np.convolve(noise[:, c], kernel, "valid") for c in range(columns)], 1)


def blinks(rng, n):
    """Lid opening 0..1 of a random process of BLINKS_PER_MINUTE, no two within 0.5 s. -> (n,)."""
    lid, at = np.ones(n + 20), 0.0
    rest = 60 / BLINKS_PER_MINUTE - .5
    while True:
        at += .5 + rng.exponential(rest)
        first = int(at * media.FPS)
        if first >= n:
            return lid[:n]
        shape = [.55, .08, *[0.0] * int(rng.integers(1, 4)), .12, .5, .85]
        lid[first:first + len(shape)] = shape[:len(lid) - first]


def gaze(rng, n):
    """Eyes that rest on a point for a second or so, then jump. -> (n, 2), about -1..1."""
    track, k = np.zeros((n, 2)), 0
    while k < n:
        rest = int(rng.exponential(1.1) * media.FPS) + 6
        track[k:k + rest] = np.clip(rng.normal(0, .38, 2), -1, 1) if rng.random() < .7 else 0
        k += rest
    track[1:] = .7 * track[1:] + .3 * track[:-1]                # a jump takes two frames
    return track


def turns(rng, n):
    """A head that turns from one far pose to the next and rests there. -> (n, 3) degrees."""
    track, k = np.zeros((n + 30, 3)), 0
    while k < len(track):
        rest = int(rng.exponential(1.2) * media.FPS) + 8
        track[k:k + rest] = rng.uniform(-1, 1, 3) * (25, 26, 24)
        k += rest
    kernel = np.exp(-.5 * (np.arange(-15, 16) / 5) ** 2)
    return np.stack([np.convolve(c, kernel / kernel.sum(), "valid") for c in track.T], 1)


def make_motion(rng, n, speech=None, steered=False):
    """The whole motion of a clip of n frames: lips from the speech, as long, the rest its own.
    `steered` heads go through `turns`, which no speech explains."""
    stress = np.zeros(n) if speech is None else speech.stress
    nod = np.convolve(stress, np.exp(-.5 * (np.arange(-6, 7) / 2.5) ** 2) / 6.3)[6:6 + n]
    pose = rng.normal(0, (4, 6, 3), 3) + wander(rng, n, .9, 3) * (2.6, 4.5, 2.6)
    pose += wander(rng, n, .3, 3) * (.7, 1.0, .6)
    pose[:, 0] -= rng.uniform(4, 9) * nod
    pose[:, 2] += rng.choice([-1, 1]) * rng.uniform(0, 3) * nod
    pose = 32 * np.tanh(pose / 32)
    mean, spread = pose[:, 1].mean(), pose[:, 1].std()
    if n > 1 and spread < 4:                                    # every clip turns its head a little
        pose[:, 1] = mean + (pose[:, 1] - mean) * 4 / spread
    if steered:
        pose = turns(rng, n)

    e = np.repeat(NEUTRAL[None].astype(np.float64), n, 0)
    if speech is not None:
        e[:, :4] = speech.lips
    e[:, AT["smile"]] = rng.uniform(-.1, .5) + .15 * wander(rng, n, 1.0)[:, 0]
    brows = rng.uniform(.3, 1.0) * nod + .18 * wander(rng, n, .6)[:, 0]
    e[:, 5:7] = np.clip(brows[:, None] + .06 * wander(rng, n, .6, 2), -1, 1)
    rest = np.clip(rng.uniform(.85, 1.0) + .04 * wander(rng, n, .5)[:, 0], .6, 1.1)
    e[:, 7:9] = (rest * blinks(rng, n))[:, None]
    e[:, 9:11] = np.clip(gaze(rng, n) - np.stack([pose[:, 1], pose[:, 0]], 1) / 60, -1, 1)
    return Motion(pose, e.astype(np.float32), .02 * wander(rng, n, .8, 2))


def random_poses(rng, n, close=False, spread=(8, 12, 6)):
    """Unrelated poses and expressions, wider than speech alone shows: what the VAE learns from.
    `close` keeps the poses as near to one another as a clip does; else `spread`, in degrees."""
    e = np.repeat(NEUTRAL[None].astype(np.float64), n, 0)
    e[:, 0] = rng.beta(.7, 1.3, n) * (rng.random(n) < .8)
    e[:, 1:4] = np.stack([rng.uniform(.1, .9, n), rng.beta(.6, 1.6, n), rng.beta(.7, 1.3, n)], 1)
    e[:, 4] = rng.uniform(-.5, 1, n)
    e[:, 5:7] = np.clip(rng.uniform(-1, 1, (n, 1)) + rng.normal(0, .2, (n, 2)), -1, 1)
    lids = np.where(rng.random(n) < .2, rng.uniform(0, .8, n), rng.uniform(.8, 1.05, n))
    lids[rng.random(n) < .07] = 0
    e[:, 7:9] = lids[:, None]
    e[:, 9:11] = np.clip(rng.normal(0, .5, (n, 2)), -1, 1)
    pose = rng.normal(0, (4, 6, 3), 3) + rng.normal(0, (2.8, 5, 2.8), (n, 3)) if close else \
        rng.normal(0, spread, (n, 3))
    return Motion(32 * np.tanh(pose / 32), e.astype(np.float32), rng.normal(0, .02, (n, 2)))


# ---- clips ---------------------------------------------------------------------------------------

def make_clip(seed, seconds, size=128, held_out=False, defect=None, steered=False):
    """The talking head of a seed: always the same clip. `held_out` counts seeds from HELD_OUT.
    Identity, speech and motion each have a generator of their own, all keyed by the seed."""
    seed = seed + HELD_OUT * held_out
    who, says, moves = (np.random.default_rng((seed, k)) for k in range(3))
    n = round(seconds * media.FPS)
    speech = voices.make_speech(says, seconds, silence_share=1.0 if defect == "silence" else .03)
    clip = ToyClip(random_identity(who), make_motion(moves, n, speech, steered), speech, size=size,
                   jitter=random_jitter(moves), defect=defect)
    return _spoil(clip, moves) if defect else clip


def random_jitter(rng, shift=.02, zoom=.06):
    """How far a user's picture is off: (dx, dy) in sides of the crop, and its zoom."""
    return *rng.uniform(-shift, shift, 2), rng.uniform(1 - zoom, 1 + zoom)


def make_portraits(seed, count, size=128, close=False, **looks):
    """Unrelated poses of one identity, for the VAE: (count, H, W, 3) uint8, (count, 70, 2).
    `looks` are shares of glasses and the like among identities."""
    who, moves = (np.random.default_rng((seed, k)) for k in (0, 3))
    clip = ToyClip(random_identity(who, **looks), random_poses(moves, count, close), size=size,
                   jitter=random_jitter(moves, .03, .08))
    return clip.frames(), clip.landmarks


def portrait(seed, size=512):
    """One picture of an identity that looks at the viewer, framed a little wide as users' are."""
    still = Motion(np.array([[2.0, 6.0, -2.0]]), NEUTRAL[None].copy(), np.zeros((1, 2)))
    still.expression[:, AT["smile"]] = .35
    identity = random_identity(np.random.default_rng((seed, 0)))
    return ToyClip(identity, still, size=size, jitter=(-.1, -.12, 1.2)).frame(0)


def say(text, seed, size=128, voice="en"):
    """A sentence spoken by espeak-ng, on the face of a seed."""
    who, moves = (np.random.default_rng((seed, k)) for k in (0, 2))
    speech = voices.espeak(text, voice)
    n = round(len(speech.sound) / media.RATE * media.FPS)
    return ToyClip(random_identity(who), make_motion(moves, n, speech), speech, text, size)


def _spoil(clip, rng):
    """Put a defect into a clip: what the filters of A.1 are there to drop."""
    m, defect = clip.motion, clip.defect
    if defect == "profile":
        m.pose[:, 1] = rng.choice([-1, 1]) * rng.uniform(50, 70) + .3 * m.pose[:, 1]
    elif defect == "jitter":
        m.sway += rng.normal(0, .12, m.sway.shape)
    elif defect == "mask":
        m.expression[:, :4] = NEUTRAL[:4]
    elif defect == "two_faces":
        other = make_clip(int(rng.integers(HELD_OUT)), len(clip) / media.FPS, clip.size // 2)
        return replace(clip, intruder=other)
    elif defect == "shifted_sound":
        shift = int(rng.choice([-1, 1]) * rng.uniform(.3, .6) * media.RATE)
        return replace(clip, speech=replace(clip.speech, sound=np.roll(clip.speech.sound, shift)))
    return clip


# ---- instructions (appendix E) -------------------------------------------------------------------

def instruct(seed, seconds, held_out=False, actions=None, size=128, parts=1):
    """A silent clip whose head obeys instructions, `parts` of them one after another; `text` says
    which, joined by " | ", and `said` (N,) which is in force. Each is one action or two.

    It is framed by its first frame: the median of a head that turned left lies at the left, and
    would tell a model what was asked before it reads."""
    seed = seed + HELD_OUT * held_out
    who, words, moves = (np.random.default_rng((seed, k)) for k in (0, 4, 2))
    motion, texts = make_motion(moves, round(seconds * media.FPS)), []
    said = np.minimum(np.arange(len(motion)) * parts // len(motion), parts - 1)
    for k in range(parts):
        chosen = actions or random_actions(words)
        texts.append(" and ".join(wording(words, a, held_out) for a in chosen))
        frames = np.flatnonzero(said == k) / media.FPS
        obey(motion, chosen, frames[0] + .3, frames[-1] + .3 if k + 1 < parts else math.inf)
    return ToyClip(random_identity(who), motion, text=" | ".join(texts), said=said, size=size,
                   jitter=random_jitter(moves), first=True)


def obey(motion, actions, start=.3, end=math.inf):
    """Change a motion so that it carries out the named actions, eased in after `start` seconds and
    out after `end`."""
    t = np.arange(len(motion)) / media.FPS
    x = np.clip((t - np.array([[start], [end]])) / .5, 0, 1)                 # up, and down again
    ease = -np.diff(x ** 2 * (3 - 2 * x), axis=0)[0]
    for action in actions:
        for name, target in INSTRUCTIONS[action][2].items():
            if name in ANGLES:
                tracks, columns = motion.pose, [ANGLES.index(name)]
            else:
                tracks, columns = motion.expression, [AT[c] for c in AT if c.startswith(name)]
            goal = 12 * np.sin(2 * np.pi * 1.3 * (t - start)) if target == "wave" else target
            for k in columns:
                tracks[:, k] += ease * (goal - tracks[:, k]) * .92
    return motion


# ---- many at once --------------------------------------------------------------------------------

def training_seed(seed, k):
    """The seed of item k of a run: runs with other seeds see other heads, none held out."""
    return int(np.random.SeedSequence((seed, k)).generate_state(1)[0]) % HELD_OUT


def default_workers():
    """One process a core that this process may use; torchrun's processes share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def executor(workers):
    """Worker processes that start clean (forking a process with torch threads can hang)."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)


def _start_worker():
    """Ctrl-C is the parent's; a worker ends when its parent has, were it by kill -9. It has one
    core, and so one thread."""
    import torch

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()                            # so is SIGTERM to the whole group
    threading.Thread(target=watch, daemon=True).start()


def in_parallel(make, items, workers, what):
    """[make(item) for item in items] over processes, with a bar; in this process for workers=0."""
    if workers == 0:
        return [make(item) for item in tqdm(items, what, leave=False)]
    workers = workers or default_workers()
    with executor(workers) as pool:
        chunks = max(1, min(8, len(items) // (4 * workers)))
        return list(tqdm(pool.map(make, items, chunksize=chunks), what, len(items), leave=False))


# ---- command line --------------------------------------------------------------------------------

def main(argv=None):
    parser = media.ArgumentParser(__doc__)
    parser.add_argument("--seed", type=int, default=3, help="which head")
    parser.add_argument("--seconds", type=float, default=6, help="length of the clip")
    parser.add_argument("--size", type=int, default=128, help="side of the picture in pixels")
    parser.add_argument("--out", default="toy.mp4", help="video to write")
    parser.add_argument("--sheet", metavar="PNG", help="draw 64 identities instead")
    parser.add_argument("--portrait", metavar="PNG", help="draw one picture of the head instead")
    special = parser.add_mutually_exclusive_group()
    special.add_argument("--say", metavar="TEXT", help="speak a sentence (needs espeak-ng)")
    special.add_argument("--instruct", metavar="TEXT", help="obey an instruction")
    special.add_argument("--defect", choices=DEFECTS, help="put a defect into the clip")
    args = parser.parse_args(argv)
    if args.seconds < .2 or args.size < 32 or args.seed < 0:
        raise media.UserError("toy.py wants --seconds of 0.2 or more, --size of 32 or more and a "
                              "--seed that is not negative")
    if args.sheet:
        heads = [make_portraits(args.seed + k, 1, args.size)[0][0] for k in range(64)]
        media.write_image(args.sheet, media.grid(np.stack(heads), 8))
        return print(args.sheet)
    if args.portrait:
        media.write_image(args.portrait, portrait(args.seed, args.size))
        return print(args.portrait)
    if args.say:
        clip = say(args.say, args.seed, args.size)
    elif args.instruct:
        clip = instruct(args.seed, args.seconds, actions=actions_of(args.instruct), size=args.size)
    else:
        clip = make_clip(args.seed, args.seconds, args.size, defect=args.defect)
    with media.VideoWriter(args.out, args.size, 2 * args.size, clip.sound) as video:
        for k in range(len(clip)):
            x_m = draw(clip.landmarks[k], args.size)
            video.write(np.concatenate([clip.frame(k), x_m], 1)[None])
    print(args.out)


if __name__ == "__main__":
    media.run(main)
