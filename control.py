"""The ways to steer: poses, another video, a face that is held but for its lips, an instruction.

    poses       --pose, --pose-from     what A's output is given beside the speech          4.3, D.1
    a video     --drive                 its points instead of motion from speech            5.2.1
    dubbing     --keep-from, --edit     points made around the video's that are held        D.2
    words       --text                  what takes the speech's place                       E

Words, held faces, angles and tracks move points, made by a model over landmarks (`landmarks.pt`,
`text.pt`) and encoded by E_M; speech with another --pose moves S's latents (`motion.pt`).

Letters: N frames, n of them. Not in the paper: --relative.
"""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import data
import detector as detectors
import diffusion
import media
from landmarks import (BROWS, EYE_LEFT, EYE_RIGHT, IRISES, JAW, MOUTH, NOSE, POINTS, crop_box,
                       head_pose, turned)
from text import vectors

PARTS = {"jaw": (JAW,), "brows": (BROWS,), "nose": (NOSE,), "eyes": (EYE_LEFT, EYE_RIGHT, IRISES),
         "mouth": (MOUTH,), "irises": (IRISES,)}
STEEPEST = 60                   # degrees that a pose may be asked for

AT_ONCE = 32                    # frames that are encoded, or decoded


# ---- what was asked ------------------------------------------------------------------------------

def asked_pose(words):
    """What --pose says: one of the words, or three numbers."""
    if len(words) == 1 and words[0] in ("free", "predict", "still"):
        return words[0]
    try:
        pose = [float(word) for word in words]
    except ValueError:
        pose = []
    if len(pose) != 3 or not np.abs(pose).max() <= STEEPEST:
        raise media.UserError(f"--pose {' '.join(words)}: wants free, predict, still, or three "
                              f"numbers PITCH YAW ROLL in degrees, within {STEEPEST}")
    return pose


def refuse(args):
    """UserError for flags that do not go together."""
    posed = args.pose != "free" or args.pose_from
    for wrong, reason in (
            (args.pose_from and args.pose != "free", "--pose-from brings poses; leave --pose out"),
            (args.relative and not (args.drive or args.keep_from),
             "--relative belongs to --drive or --keep-from"),
            (args.drive and (posed or args.guidance != 1),
             "--drive takes all motion from the video; leave --pose, --pose-from, --guidance out"),
            (args.keep_from and not args.audio, "--keep-from wants --audio, which moves the lips"),
            (args.keep_from and posed, "--keep-from brings poses; leave --pose, --pose-from out"),
            (args.edit and not args.keep_from, "--edit belongs to --keep-from"),
            (args.clip and not args.text, "--clip belongs to --text"),
            (args.seconds is not None and not args.text, "--seconds belongs to --text"),
            (args.seconds is not None and not .2 <= args.seconds <= 600,
             f"--seconds {args.seconds}: wants 0.2 to 600"),
            (args.text and args.pose == "predict",
             "--pose predict is for speech; leave it out with --text"),
            (args.text and not all(words.strip() for words in args.text),
             "--text is empty; say what to do, such as \"please smile\"")):
        if wrong:
            raise media.UserError(reason)


# ---- poses ---------------------------------------------------------------------------------------

def poses(models, speech, portrait_pose, how):
    """Head poses (1, N, 3) in degrees: "predict" by P, "still" as the portrait, three numbers that
    are held, a track (N, 3) that is followed, or None for "free": left to the model."""
    def held(pose):
        return torch.as_tensor(np.array(pose, dtype=np.float32), device=models.device)
    if isinstance(how, str) and how == "free":
        return None
    if isinstance(how, str) and how == "predict":
        return diffusion.predict_pose(models.motion, speech[None], held(portrait_pose)[None])
    return held(portrait_pose if isinstance(how, str) else how).expand(1, len(speech), 3)


def back_and_forth(track, n, name):
    """The first n of a track (m, ...), which turns round at its ends where it is too short."""
    if len(track) < n:
        print(f"note: {name}: {len(track)} frames for {n}; played back and forth", file=sys.stderr)
    k = np.arange(n) % max(2 * len(track) - 2, 1)
    return track[np.minimum(k, 2 * len(track) - 2 - k)]


def read_poses(path):
    """A track of head poses from a CSV: pitch, yaw, roll in degrees, a line a frame. -> (N, 3)"""
    media.check_file(path)
    rows = []
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                rows += [[float(v) for v in line.split(",")]] if line.strip() else []
                if rows and (len(rows[-1]) != 3 or not np.abs(rows[-1]).max() <= STEEPEST):
                    raise ValueError
            except ValueError:
                if number > 1 or any(map(str.isdigit, line)):   # the first may name the columns
                    raise media.UserError(f"{path}: line {number} is not `pitch,yaw,roll` in "
                                          f"degrees within {STEEPEST}: {line.strip()[:60]!r}"
                                          ) from None
                rows = []
    if not rows:
        raise media.UserError(f"{path}: no line of it is `pitch,yaw,roll` in degrees")
    return np.array(rows, dtype=np.float32)


def follow_poses(args, n, finder, size):
    """The poses that --pose-from names, for n frames: (n, 3) degrees."""
    track = read_poses(args.pose_from) if Path(args.pose_from).suffix.lower() == ".csv" else \
        head_pose(watch(args.pose_from, args.detector, finder, size))
    return back_and_forth(track, n, args.pose_from)


# ---- another video -------------------------------------------------------------------------------

def watch(path, which, finder, size):
    """Points of a video's face, framed as portraits are: (N, 70, 2) px of a picture of `size`."""
    points, note = detectors.follow(media.read_video(path), path, which, finder)
    if note:
        print(f"note: {note}", file=sys.stderr)
    x, y, side = crop_box(points)
    return ((points - (x, y) + .5) * (size / side) - .5).astype(np.float32)


@torch.inference_mode()
def encode_points(models, points):
    """E_M on every frame's points, part by part: (N, 70, 2) -> (n, 3, h_m, w_m), normalised."""
    for at in range(0, len(points), AT_ONCE):
        x_m = data.draw_all(points[at:at + AT_ONCE], models.vae.config.size)
        motion = data.encode_motion(models.vae, x_m, models.device)
        yield (motion.to(models.device) - models.mean) / models.std


# ---- motion made as points ----------------------------------------------------------------------

@torch.inference_mode()
def make_points(models, maker, speech, points, pose, args, held=None):
    """Points by a model over landmarks (D.2), from speech or words: (n, 70, 2) px a window.

    points (70, 2) px of the portrait, pose (N, 3) degrees or None; held: (points (N, 70, 2) px,
    which of the 70 stay as they are there (70,) bool), or None. Words set out from the portrait.
    """
    def normalised(points):
        p = torch.as_tensor(points, device=models.device).mT[..., None] / size       # (N, 2, 70, 1)
        return (p - maker.mean) / maker.std
    size = models.vae.config.size
    if pose is not None:
        pose = torch.tensor(np.float32(pose), device=models.device)[None]
    if held:
        known, which = normalised(held[0])[None], held[1].to(models.device)
        held = known, which.view(POINTS, 1).expand(known.shape)
    for window in diffusion.sample_motion(
            maker.motion, speech[None], normalised(points[None]), pose, [args.seed], args.sampler,
            args.steps, guidance=args.guidance, held=held,
            from_reference=maker.motion.config.driver != "speech"):
        yield ((window[0] * maker.std + maker.mean)[..., 0].mT * size).cpu().numpy()


def held_but(edit):
    """Which of the 70 points stay where the parts named by `edit` are made. -> (70,) bool"""
    held = torch.ones(POINTS, dtype=torch.bool)
    for region in (region for part in edit for region in PARTS[part]):
        held[region] = False
    return held


def move(models, maker, speech, points, pose, args, held=None):
    """Motion latents of `make_points`, (n, 3, h_m, w_m), normalised; where none are held, the
    points are turned to the very poses asked for, if any are.

    S over latents nods about a third as far as it is asked to: in latents, which tell where lines
    are by the cells they cross, a turn of the head is no simple thing. In points it is a matrix.
    """
    done = 0
    for made in make_points(models, maker, speech, points, pose, args, held):
        if pose is not None and not held:
            made = turned(made, pose[done:done + len(made)])
        done += len(made)
        yield from encode_points(models, made)


@torch.inference_mode()
def read_text(maker, texts, seconds, clip=None):
    """Instructions one after another, each for `seconds`, as speech features: (N, d_s). clip: the
    folder of CLIP's weights, where the model reads its features."""
    encoder = getattr(maker.motion, "text_encoder", None)
    told = vectors(texts, encoder, clip and data.open_clip(clip)).to(maker.device)
    n = round(seconds * media.FPS)
    k = torch.arange(n * len(texts), device=maker.device)[None]
    return diffusion.in_force(told[None], k // n, k % n)[0]
