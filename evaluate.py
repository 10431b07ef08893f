"""Every number of this project, on held-out Toy Heads, in one command.

    python evaluate.py                            the shipped weights, a table
    python evaluate.py --quick                    the same in about a minute, on fewer clips
    python evaluate.py --checkpoint runs --json runs/evaluation.json
    python evaluate.py control                    every way to steer
    python evaluate.py samplers                   every sampler at 1 to 150 steps

64 clips of 4 s of 64 identities that no training ever meets; what needs many seeds is measured on
16 of them with 8 seeds, the table of samplers on 4. Beside most values: the same number for the
truth, for a trivial baseline (the portrait held still; for lips the loudness), and "shuffled", for
the truth of another clip; with a bootstrap 95 % interval over clips. Points of generated frames are
found by our own detector; `akd_floor` is its error on true frames. Letters: N frames, K points.
"""
from __future__ import annotations

import collections
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import control
import data
import detector as detectors
import diffusion
import evaluate_control
import media
import sample
import toy
import voices
from landmarks import (EYE_LEFT, EYE_RIGHT, MOUTH, head_pose, mouth_opening, point_error,
                       region_box)
from metrics import (LEAST_SPREAD, SECONDS, SIZE, blink_rate, held_out, loudness, pearson, psnr,
                     psnr_in, redraw, score, speak)

SAMPLER_STEPS = (1, 2, 5, 10, 20, 50, 150)


@dataclass(frozen=True)
class Plan:
    """How much is scored: clips, every which frame of them, cross-driving, seeds."""
    clips: int = 64
    stride: int = 2
    drivers: int = 16
    rounds: int = 5
    cross_frames: int = 20
    seeded_clips: int = 16
    seeds: int = 8
    long_seconds: float = 300.0


PLANS = {"default": Plan(), "full": Plan(stride=1, drivers=64, cross_frames=100),
         "quick": Plan(8, 8, 4, 2, 6, 2, 8, 30.0)}


# ---- what is measured ----------------------------------------------------------------------------

def score_truth(plan, clips, finder):
    """The detector and the pose fit, on true frames."""
    found = [detectors.find_in_crops(finder, frames[::plan.stride])
             for _, frames in tqdm(clips, "truth", leave=False)]
    true = [clip.landmarks[::plan.stride] for clip, _ in clips]
    px = [point_error(f, t).mean() for f, t in zip(found, true)]
    still = [point_error(np.repeat(t[:1], len(t), 0), t).mean() for t in true]
    fit = [np.abs(clip.pose - clip.true_pose).mean() for clip, _ in clips]
    since = [np.abs((c.pose - c.pose[0]) - (c.true_pose - c.true_pose[0])).mean() for c, _ in clips]
    return {"detector_px": score(px, baseline=np.mean(still)), "pose_fit_abs": score(fit),
            "pose_fit_rel": score(since)}, px


def score_self(plan, clips, models, finder, floor):
    """The VAE redraws every clip from its first frame and its true points."""
    rows = collections.defaultdict(list)
    for clip, frames in tqdm(clips, "self-reconstruction", leave=False):
        z_a, _ = sample.encode_portrait(models, frames[0], clip.landmarks[0])
        at = np.arange(1, len(frames), plan.stride)
        true, points = frames[at], clip.landmarks[at]
        made = redraw(models, z_a, points)
        found = detectors.find_in_crops(finder, made)
        rows["self"].append(psnr(made, true))
        rows["copy"].append(psnr(frames[:1], true))
        copied = np.repeat(frames[:1], len(at), 0)
        for name, regions in (("eyes", (EYE_LEFT, EYE_RIGHT)), ("mouth", (MOUTH,))):
            boxes = np.stack([region_box(points, region) for region in regions], 1)
            rows[name].append(psnr_in(made, true, boxes))
            rows[name + "_copy"].append(psnr_in(copied, true, boxes))
        rows["akd"].append(point_error(found, points).mean())
        rows["still"].append(point_error(np.repeat(clip.landmarks[:1], len(at), 0), points).mean())
        moves = mouth_opening(points)
        rows["lips"].append(pearson(mouth_opening(found), moves) if moves.std() > LEAST_SPREAD
                            else np.nan)
    r = {k: np.array(v) for k, v in rows.items()}
    return {"psnr_self": score(r["self"], baseline=r["copy"].mean()),
            "psnr_gain": score(r["self"] - r["copy"], baseline=0.0),
            "psnr_eyes": score(r["eyes"], baseline=r["eyes_copy"].mean()),
            "psnr_mouth": score(r["mouth"], baseline=r["mouth_copy"].mean()),
            "akd_self": score(r["akd"], truth=np.mean(floor), baseline=r["still"].mean()),
            "akd_floor": score(floor), "lip_r_ceiling": score(r["lips"], truth=1.0, baseline=0.0)}


def draw_sheet(path, clips, models, count=32):
    """Held-out identities: portrait, result, truth, at the frame that turns furthest."""
    shown = []
    for clip, frames in clips[:count]:
        k = int(np.abs(clip.pose - clip.pose[0]).sum(1).argmax())
        z_a, _ = sample.encode_portrait(models, frames[0], clip.landmarks[0])
        shown += [frames[0], redraw(models, z_a, clip.landmarks[k:k + 1])[0], frames[k]]
    media.write_image(path, media.grid(np.stack(shown), 12))


def silent_frames(clip):
    """Frames that lie at least 0.2 s from any phoneme. -> (N,) bool."""
    at = (np.arange(len(clip)) + .5) / media.FPS
    silent = np.ones(len(clip), dtype=bool)
    for phoneme, start, end, _ in clip.speech.segments:
        if phoneme not in voices.SILENT:
            silent &= (at < start - .2) | (at > end + .2)
    return silent


def twin(k):
    """Correlation of mouth opening between clip k and a second motion of the same phonemes."""
    clip = toy.make_clip(k, SECONDS, SIZE, held_out=True)
    speech = voices.make_speech(np.random.default_rng((toy.HELD_OUT + k, 1)), SECONDS,
                                motion_rng=np.random.default_rng((toy.HELD_OUT + k, 7)))
    motion = replace(clip.motion, expression=clip.motion.expression.copy())
    motion.expression[:, :4] = speech.lips[:len(motion)]
    other = toy.ToyClip(clip.identity, motion, speech, size=SIZE, jitter=clip.jitter)
    return pearson(mouth_opening(clip.landmarks), mouth_opening(other.landmarks))


def score_speech(plan, clips, models, finder, how, sampler, steps):
    """The motion model: lips, poses, blinks, silence and diversity, from sound alone."""
    truth = [mouth_opening(clip.landmarks) for clip, _ in clips]
    moving = [t.std() > LEAST_SPREAD for t in truth]
    rows = collections.defaultdict(list)
    for k, (clip, frames) in enumerate(tqdm(clips, "speech to motion", leave=False)):
        many = k < plan.seeded_clips
        stride = 1 if many else plan.stride
        found, asked = speak(models, finder, frames[0], clip.landmarks[0], clip.sound, how,
                             range(plan.seeds if many else 1), (sampler, steps), stride)
        opening, true = mouth_opening(found), truth[k][::stride]
        if moving[k]:
            rows["r"].append(pearson(opening[0], true))
            rows["gain"].append(opening[0].std() / true.std())
            rows["loud"].append(pearson(loudness(clip.sound, len(clip)), truth[k]))
            rows["shuffled"].append(pearson(opening[0], truth[(k + 1) % len(clips)][::stride]))
        if not many:
            continue
        seen = detectors.find_in_crops(finder, frames)
        if moving[k]:
            mean = opening.mean(0)
            rows["mean8"].append(pearson(mean, true))
            rows["loud8"].append(rows["loud"][-1])
            rows["shuffled8"].append(pearson(mean, truth[(k + 1) % len(clips)]))
        rows["pose"].append(head_pose(found))                                # (S, N, 3)
        rows["true_pose"].append(head_pose(seen))
        if asked is not None:
            rows["mae"].append(np.abs(head_pose(found) - asked).mean())
            rows["still_mae"].append(np.abs(clip.pose[0] - asked).mean())
        rows["blinks"].append(np.mean([blink_rate(track) for track in found]))
        rows["true_blinks"].append(blink_rate(seen))
        silent = silent_frames(clip)
        if silent.any():
            rows["silence"].append((opening[:, silent].mean() - mouth_opening(seen)[silent].mean()))
        spread = found.std(0)                                                # (N, K, 2)
        rows["diversity"].append(np.sqrt((spread ** 2).sum(-1)).mean())
    twins = [twin(k) for k in tqdm(range(len(clips)), "twins", leave=False) if moving[k]]
    beside, beside8 = ({"baseline": score(rows["loud" + n])["value"],
                        "shuffled": score(rows["shuffled" + n])["value"]} for n in ("", "8"))
    numbers = {"lip_r": score(rows["r"], **beside), "lip_r_mean8": score(rows["mean8"], **beside8),
               "lip_gain": score(rows["gain"], truth=1.0, baseline=0.0),
               "lip_r_twin": score(twins), "pose_mae": score(rows["mae"])}
    if rows["mae"]:
        numbers["pose_mae"]["baseline"] = np.mean(rows["still_mae"])
    for axis, name in enumerate(("pitch", "yaw", "roll")):
        made = [np.var(t[..., axis], axis=1).mean() for t in rows["pose"]]   # within clips
        true = np.mean([np.var(t[:, axis]) for t in rows["true_pose"]])
        spread = {k: np.sqrt(v / true) for k, v in score(made).items()}
        numbers[f"pose_spread_{name}"] = spread | {"truth": 1.0, "baseline": 0.0}
    numbers["blinks_per_minute"] = score(rows["blinks"], truth=np.mean(rows["true_blinks"]),
                                         baseline=0.0)
    numbers["silence_opening"] = score(rows["silence"], truth=0.0)
    numbers["seed_diversity"] = score(rows["diversity"], baseline=0.0)
    return numbers


def score_long(plan, clips, models, finder, how, sampler, steps):
    """`seam`: movement of the points at window joins over that elsewhere, in a long speech."""
    clip, frames = clips[0]
    speech = voices.make_speech(np.random.default_rng((toy.HELD_OUT, 11)), plan.long_seconds)
    z_a, reference = sample.encode_portrait(models, frames[0], clip.landmarks[0])
    features = sample.hear(models, speech.sound)
    pose = control.poses(models, features, clip.pose[0], how)
    with torch.inference_mode():
        made = diffusion.sample_motion(models.motion, features[None], reference, pose, [0], sampler,
                                       steps)
        windows = [w[0] for w in tqdm(made, "long speech", leave=False)]
    joins = np.cumsum([len(w) for w in windows])[:-1]
    motion = torch.cat(windows)
    others = np.setdiff1d(np.arange(3, len(motion), 23), joins)

    def movement(ends):
        pairs = motion[np.stack([ends - 1, ends], 1).ravel()]
        made = np.concatenate(list(sample.decode(models, z_a, pairs)))
        p = detectors.find_in_crops(finder, made).reshape(-1, 2, 70, 2)
        return np.sqrt(((p[:, 1] - p[:, 0]) ** 2).sum(-1)).mean(-1)
    at_joins = movement(joins) if len(joins) else np.array([np.nan])
    return {"seam": score(at_joins / movement(others).mean(), truth=1.0)}


def score_speed(args, frame):
    """`rtf`: wall time over the length of 10 s of speech, as a command and in a process
    that runs already; `first_bar`: seconds until the command shows progress."""
    sound = voices.make_speech(np.random.default_rng((toy.HELD_OUT, 12)), 10.0).sound
    with tempfile.TemporaryDirectory() as folder:
        image, wav, out = (str(Path(folder) / n) for n in ("a.png", "a.wav", "a.mp4"))
        media.write_image(image, frame)
        media.write_sound(wav, sound)
        flags = ["--image", image, "--audio", wav, "--out", out]
        flags += ["--pose", *map(str, np.atleast_1d(args.pose))]
        for name in ("checkpoint", "device", "sampler", "steps", "wav2vec2"):
            flags += [f"--{name}", str(getattr(args, name))] if getattr(args, name) else []
        began, told, bar = time.monotonic(), b"", None
        command = [sys.executable, str(Path(__file__).with_name("sample.py")), *flags]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as made:
            while piece := made.stderr.read1():
                told += piece
                bar = bar or b"frames:" in told and time.monotonic() - began
        if made.returncode:
            raise media.UserError(f"sample.py ended with: {told.decode().strip()[-300:]}")
        cold = (time.monotonic() - began) / 10
        began = time.monotonic()
        sample.main(flags, quiet=True)
        return {"rtf": cold, "rtf_warm": (time.monotonic() - began) / 10, "first_bar": bar}


# ---- a table of samplers -------------------------------------------------------------------------

def frechet(a, b):
    """Fréchet distance of the Gaussians of two sets of vectors, (n, d) and (m, d)."""
    (mean_a, mean_b), (cov_a, cov_b) = ([f(x) for x in (a, b)]
                                        for f in (lambda x: x.mean(0), lambda x: np.cov(x.T)))
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root


def score_samplers(models, finder, clips, how):
    """Rows of `lip_r_mean8`, distance of motion statistics and seconds, for each sampler and number
    of steps, on a window of each clip with 8 seeds.

    Motion statistics are a Gaussian over the 16 largest principal axes of the true latents and
    over their movement from frame to frame; the distance is Fréchet's, to the same clips' truth.
    """
    n, seeds = min(models.motion.config.window, len(clips[0][0])), 8
    prepared, true, opening = [], [], []
    for clip, frames in clips:
        z_a, reference = sample.encode_portrait(models, frames[0], clip.landmarks[0])
        speech = sample.hear(models, clip.sound)[:n]
        prepared.append((z_a, reference, speech, control.poses(models, speech, clip.pose[0], how)))
        track = torch.cat(list(control.encode_points(models, clip.landmarks[:n])))
        true.append(track.flatten(1).cpu().double().numpy())
        opening.append(mouth_opening(clip.landmarks[:n]))
    axes = np.linalg.svd(np.concatenate(true) - np.concatenate(true).mean(0), False)[2][:16].T

    def statistics(tracks):                                     # [(n, D)] -> (frames, 32)
        seen = [track @ axes for track in tracks]
        return np.concatenate([np.hstack([t[1:], np.diff(t, axis=0)]) for t in seen])
    z_a, reference, speech, pose = zip(*prepared)
    pose = None if pose[0] is None else torch.cat(pose).repeat_interleave(seeds, 0)
    given = (torch.stack(speech).repeat_interleave(seeds, 0),
             torch.cat(reference).repeat_interleave(seeds, 0), pose)
    rows, numbers = [], list(range(seeds)) * len(clips)
    settings = [(name, steps) for name in diffusion.SAMPLERS for steps in SAMPLER_STEPS]
    for name, steps in tqdm(settings, "samplers", leave=False):
        began = time.monotonic()
        motion = next(diffusion.sample_motion(models.motion, *given, numbers, name, steps))
        seconds = (time.monotonic() - began) / len(motion)
        tracks = motion.flatten(2).cpu().double().numpy()                    # (clips * seeds, n, D)
        curves = []
        for k, track in enumerate(motion[:, ::4]):
            made = np.concatenate(list(sample.decode(models, z_a[k // seeds], track)))
            curves.append(mouth_opening(detectors.find_in_crops(finder, made)))
        curves = np.stack(curves).reshape(len(clips), seeds, -1).mean(1)
        r = [pearson(curve, o[::4]) for curve, o in zip(curves, opening) if o.std() > LEAST_SPREAD]
        rows.append({"sampler": name, "steps": steps, "lip_r_mean8": float(np.mean(r)),
                     "distance": float(frechet(statistics(tracks), statistics(true))),
                     "seconds": seconds})
    return {"rows": rows, "seconds_of_speech": n / media.FPS}


# ---- command line --------------------------------------------------------------------------------

def show(numbers):
    """The table on screen."""
    columns = ("value", "low", "high", "truth", "baseline", "shuffled")
    print(f"{'':20}" + "".join(f"{c:>10}" for c in columns))
    for name, held in numbers.items():
        held = held if isinstance(held, dict) else {"value": held}
        cells = [f"{held[c]:10.3f}" if held.get(c) is not None else " " * 10 for c in columns]
        print(f"{name:20}" + "".join(cells))


def show_tables(tables):
    """{title: {row: numbers}}"""
    for title, rows in tables.items():
        print(f"\n{title}")
        for name, row in rows.items():
            print(f"{name:20}" + "".join(f"{value:10.3f}" for value in row))


def show_about(args, plan, began):
    """What the numbers were measured on, printed and given back."""
    about = {"toy_version": toy.TOY_VERSION, "plan": plan,
             "minutes": (time.monotonic() - began) / 60}
    about |= {k: str(getattr(args, k)) for k in ("checkpoint", "sampler", "steps", "pose")}
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    return about


def main(argv=None):
    p = media.ArgumentParser(__doc__)
    p.add_argument("table", nargs="?", choices=("control", "samplers"), help="these instead")
    sample.add_arguments(p, p)
    p.add_argument("--json", metavar="FILE", help="write the numbers, by name")
    p.add_argument("--sheet", metavar="PNG", help="draw 32 held-out heads beside their truth")
    p.add_argument("--quick", action="store_true", help="fewer clips, about a minute")
    p.add_argument("--full", action="store_true", help="every frame, all drivers (B.2)")
    p.add_argument("--workers", type=int, default=None, help="processes that render the truth")
    args = p.parse_args(argv)
    args.pose = control.asked_pose(args.pose)
    if args.table and args.sheet or args.table == "control" and args.pose != "free":
        raise media.UserError("--sheet goes with no table, --pose not with control; leave it out")
    if not isinstance(args.pose, str):
        raise media.UserError("--pose: angles are measured by `python evaluate.py control`")
    began = time.monotonic()
    for path in filter(None, (args.json, args.sheet)):
        media.check_writable(path)
    name = "quick" if args.quick else "full" if args.full else "default"
    plan = PLANS[name]
    models = sample.load_models(args.checkpoint, args.device, args.wav2vec2)
    if models.vae.config.size != SIZE:
        raise media.UserError(f"{args.checkpoint}: the held-out heads are {SIZE}x{SIZE}, this VAE "
                              f"wants {models.vae.config.size}x{models.vae.config.size}")
    finder = detectors.load(sample.find(Path(args.checkpoint), "detector.pt", "detector"),
                            models.device)
    count = min(plan.clips, 4) if args.table == "samplers" else plan.clips
    solver = (args.sampler, args.steps)
    if args.table == "control":
        others = {name: sample.load_maker(args.checkpoint, models, name)
                  for name in ("landmarks", "text")}
        if others["text"].motion.config.driver == "clip":
            raise media.UserError(f"{args.checkpoint}: text.pt reads CLIP's features; only one "
                                  "that reads bytes is measured")
    clips = data.in_parallel(held_out, range(count), args.workers, "rendering the truth")
    if args.table == "samplers":
        numbers = score_samplers(models, finder, clips, args.pose)
        names = ("lip_r_mean8", "distance", "seconds")
        show_tables({f"{', '.join(names)} for {numbers['seconds_of_speech']} s": {
            f"{r['sampler']} {r['steps']}": [r[k] for k in names] for r in numbers["rows"]}})
        return write(args.json, numbers | {"toy_version": toy.TOY_VERSION})
    if args.table == "control":
        numbers, tables = evaluate_control.score_all(plan, clips, models, finder, solver, others)
    else:
        speed, tables = score_speed(args, clips[0][1][0]), {}
        numbers, floor = score_truth(plan, clips, finder)
        numbers |= score_self(plan, clips, models, finder, floor)
        numbers |= evaluate_control.score_cross(plan, clips, models, finder)
        numbers |= score_speech(plan, clips, models, finder, args.pose, *solver)
        numbers |= score_long(plan, clips, models, finder, args.pose, *solver) | speed
    if args.sheet:
        draw_sheet(args.sheet, clips, models)
    show(numbers)
    show_tables(tables)
    write(args.json, show_about(args, name, began) | numbers | {"tables": tables})


def write(path, numbers):
    if path:
        with media.replacing(path) as temporary:
            Path(temporary).write_text(json.dumps(numbers, indent=1, default=float))


if __name__ == "__main__":
    media.run(main)
