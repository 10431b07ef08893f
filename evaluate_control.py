"""How well each way to steer works, on held-out heads: the numbers of `python evaluate.py control`.

    poses      the angles that are asked for, and whether a still head speaks and blinks     D.1
    video      another head's points, as they are and relative to its first frame           5.2.1
    dubbing    points that are held, and lips that follow the new voice                      D.2
    words      whether the head does what it is told, in wordings it never met               E
    guidance   lips, their gain and diversity, by how far speech is leaned on
    portraits  closed eyes, open mouths, turned and tilted heads                             5.2.2

Letters: S seeds, N frames, n of them.
"""
from __future__ import annotations

import argparse
import collections

import numpy as np
import torch
from tqdm import tqdm

import control
import detector as detectors
import sample
import toy
from actions import INSTRUCTIONS, obeyed
from landmarks import (BROWS, EYE_LEFT, EYE_RIGHT, MOUTH, head_pose, mouth_opening,
                       point_error, region_box, retarget, visible)
from metrics import LEAST_SPREAD, SIZE, blink_rate, pearson, psnr, redraw, score, speak

TURNS = [(p, y, 0) for p in (-20, 0, 20) for y in (-20, 0, 20)] + [(0, 0, -20), (0, 0, 20)]
WEIGHTS = (0.0, .5, 1.0, 1.5, 2.0, 3.0)          # of guidance
EVERY = 2                                        # which frames are looked at where few will do
SAID = 3.2                                       # seconds that each instruction is given


def steer(models, maker, portrait, points, speech, pose, seed, solver, every=1, held=None):
    """Frames of a portrait that moves through points, as sample.py makes them, to be looked at by
    the detector: (n, 128, 128, 3)."""
    flags = argparse.Namespace(seed=seed, sampler=solver[0], steps=solver[1], guidance=1.0)
    z_a, _ = sample.encode_portrait(models, portrait, points)
    made = torch.cat(list(control.move(models, maker, speech, points, pose, flags, held)))
    return np.concatenate(list(sample.decode(models, z_a, made[::every])))


def lips(tracks, clip, every=1):
    """Correlation of the mean mouth opening of several seeds with a clip's; nan if it is still."""
    true = mouth_opening(clip.landmarks)
    return pearson(mouth_opening(tracks).mean(0), true[::every]) if true.std() > LEAST_SPREAD \
        else np.nan


# ---- poses ---------------------------------------------------------------------------------------

def score_poses(clips, models, keeper, finder, solver, truth):
    """A grid of poses as sample.py makes them, through points, and as S alone over latents does;
    blinks of heads held still either way. truth: blinks a minute of true heads."""
    errors, alone, limit = [], [], []
    for clip, frames in tqdm(clips[:4], "poses asked for", leave=False):
        portrait, points, sound = frames[0], clip.landmarks[0], clip.sound[:16_000]
        speech = sample.hear(models, sound)
        for pose in TURNS:
            found = detectors.find_in_crops(finder, steer(models, keeper, portrait, points, speech,
                                                          [pose] * len(speech), 0, solver))
            errors.append(np.abs(head_pose(found) - pose).mean())
            found, _ = speak(models, finder, portrait, points, sound, pose, [0], solver)
            alone.append(np.abs(head_pose(found[0]) - pose).mean())
        face = (np.repeat(v[:1], len(TURNS), 0) for v in (clip.motion.expression, clip.motion.sway))
        turned = toy.ToyClip(clip.identity, toy.Motion(np.array(TURNS, dtype=float), *face),
                             size=SIZE, jitter=clip.jitter)
        true = head_pose(detectors.find_in_crops(finder, turned.frames()))
        limit.append(np.abs(true - TURNS).mean())
    rows = {k: [] for k in ("free", "still", "blinks", "posed")}
    for k, (clip, frames) in enumerate(tqdm(clips, "still heads", leave=False)):
        given = models, finder, frames[0], clip.landmarks[0], clip.sound
        rows["free"].append(lips(speak(*given, "free", range(4), solver, 4)[0], clip, 4))
        found, _ = speak(*given, "still", range(4), solver, EVERY)
        rows["still"].append(lips(found, clip, EVERY))
        rows["blinks"].append(np.mean([blink_rate(track, EVERY) for track in found]))
        found = detectors.find_in_crops(finder, steer(
            models, keeper, *given[2:4], sample.hear(models, clip.sound),
            [clip.pose[0]] * len(clip), k, solver, EVERY))           # noise decides who blinks when
        rows["posed"].append(blink_rate(found, EVERY))
    floor, never = np.mean(limit), float(np.abs(TURNS).mean())
    return {"pose_control_mae": score(errors, truth=floor, baseline=never),
            "pose_latents_mae": score(alone, truth=floor, baseline=never),
            "lip_r_posed": score(rows["still"], truth=np.nanmean(rows["free"])),
            "blinks_still": score(rows["blinks"], truth=truth),
            "blinks_posed": score(rows["posed"], truth=truth)}


# ---- another video -------------------------------------------------------------------------------

def score_cross(plan, clips, models, finder):
    """One clip's motion on another's portrait, against the driver and the renderer (B.2); and the
    same with --relative on a portrait in the pose and expression of the driver's first frame."""
    rng, rows = np.random.default_rng(0), collections.defaultdict(list)
    pairs = [(d, int((d + rng.integers(1, len(clips))) % len(clips)))
             for _ in range(plan.rounds) for d in range(min(plan.drivers, len(clips)))]
    for d, t in tqdm(pairs, "cross-reenactment", leave=False):
        driver, (target, frames) = clips[d][0], clips[t]
        at = np.linspace(0, len(driver) - 1, min(plan.cross_frames, len(driver))).astype(int)
        wanted = toy.ToyClip(target.identity, driver.motion, size=SIZE, jitter=driver.jitter)
        drawn, true, points = wanted.frames(at), wanted.landmarks[at], driver.landmarks[at]
        for name, portrait, own, motion in (
                ("raw", frames[0], target.landmarks[0], points),
                ("relative", drawn[0], true[0], retarget(true[0], points))):
            z_a, _ = sample.encode_portrait(models, portrait, own)
            made = redraw(models, z_a, motion)
            found = detectors.find_in_crops(finder, made)
            rows["driver", name].append(point_error(found, points).mean())
            rows["true", name].append(point_error(found, true).mean())
            rows["psnr", name].append(psnr(made, drawn))
        rows["still"].append(point_error(target.landmarks[:1], true).mean())
        rows["leak"].append(point_error(points, true).mean())
        rows["copied"].append(psnr(frames[:1], drawn))
    return {"akd_cross": score(rows["driver", "raw"]),
            "akd_cross_true": score(rows["true", "raw"], baseline=np.mean(rows["still"])),
            "psnr_cross_true": score(rows["psnr", "raw"], baseline=np.mean(rows["copied"])),
            "akd_cross_true_relative": score(rows["true", "relative"],
                                             baseline=np.mean(rows["leak"])),
            "psnr_cross_true_relative": score(rows["psnr", "relative"])}


# ---- dubbing -------------------------------------------------------------------------------------

def score_keeping(clips, models, keeper, finder, solver):
    """A head's own video with another's voice: held points stay, lips follow the new voice. Beside
    how far off they are: the same where D redraws the whole video ("truth")."""
    rows = {k: [] for k in ("off", "redrawn", "kept", "free")}
    for k, (clip, frames) in enumerate(tqdm(clips, "dubbing", leave=False)):
        voice, portrait, points = clips[(k + 1) % len(clips)][0], frames[0], clip.landmarks
        speech = sample.hear(models, voice.sound)
        z_a, _ = sample.encode_portrait(models, portrait, points[0])
        held = points, control.held_but(("mouth", "jaw"))
        found = np.stack([detectors.find_in_crops(finder, steer(
            models, keeper, portrait, points[0], speech, clip.pose, seed, solver, EVERY, held))
            for seed in range(4)])
        redrawn = detectors.find_in_crops(finder, redraw(models, z_a, points[::EVERY]))
        for name, track in (("off", found), ("redrawn", redrawn)):
            off = np.sqrt(((track - points[::EVERY]) ** 2).sum(-1))          # (..., n, 70)
            rows[name].append(off[..., held[1].numpy() & visible(points[::EVERY])].mean())
        rows["kept"].append(lips(found, voice, EVERY))
        free, _ = speak(models, finder, portrait, points[0], voice.sound, "free", range(4), solver,
                        EVERY)
        rows["free"].append(lips(free, voice, EVERY))
    return {"keep_err_px": score(rows["off"], truth=np.mean(rows["redrawn"])),
            "lip_r_kept": score(rows["kept"], truth=np.nanmean(rows["free"]))}


# ---- words ---------------------------------------------------------------------------------------

def back_again(models, frame, points, portrait, to):
    """PSNR of a frame led back to the portrait's points by the VAE, outside eyes, brows, mouth."""
    z_a, _ = sample.encode_portrait(models, frame, points)
    made = redraw(models, z_a, to[None])[0]
    outside = np.ones((SIZE, SIZE), dtype=bool)
    for region in (BROWS, EYE_LEFT, EYE_RIGHT, MOUTH):
        x0, y0, x1, y1 = region_box(to, region).astype(int).clip(0, SIZE)
        outside[y0:y1 + 1, x0:x1 + 1] = False
    return psnr(made[outside], portrait[outside])


def score_text(models, teller, finder, solver, heads=10):
    """Every instruction in its held-out wordings on unseen heads; "shuffled" asks of each video
    what another was told. -> numbers, {action: (obeyed, obeyed by another)}.

    Identity: the last frame led back to the portrait (E.2: 10 portraits, 10 instructions), beside
    the portrait itself led back ("truth"), and another head's picture ("shuffled").
    """
    names = list(INSTRUCTIONS)
    clips = [toy.make_clip(300 + k, .2, SIZE, held_out=True) for k in range(heads)]
    portraits = [clip.frame(0) for clip in clips]
    kept, far = [], {}
    itself, another = (np.mean([back_again(
        models, portraits[k - by], clips[k - by].landmarks[0], portraits[k], clips[k].landmarks[0])
        for k in range(heads)]) for by in (0, 1))
    for name in tqdm(names, "instructions", leave=False):
        for k, (clip, portrait) in enumerate(zip(clips, portraits)):
            told = control.read_text(teller, [INSTRUCTIONS[name][1][k % 2]], SAID)
            made = steer(models, teller, portrait, clip.landmarks[0], told, None, k, solver, EVERY)
            found = detectors.find_in_crops(finder, made)
            far[name, k] = {a: obeyed(found, a, every=EVERY) >= 1 for a in names}
            if names.index(name) < 10:
                kept.append(back_again(models, made[-1], found[-1], portrait, clip.landmarks[0]))
    table = {a: (float(np.mean([far[a, k][a] for k in range(heads)])),
                 float(np.mean([far[b, k][a] for b in names if b != a for k in range(heads)])))
             for a in names}
    right, wrong = np.array(list(table.values())).T
    return {"text_accuracy": score(right), "text_accuracy_shuffled": score(wrong),
            "text_identity": score(kept, truth=itself, shuffled=another)}, table


# ---- guidance, odd portraits ---------------------------------------------------------------------

def score_guidance(clips, models, finder, solver):
    """{weight: (correlation of the lips' mean over four seeds, lip_gain, seed_diversity)}"""
    table = {}
    for weight in tqdm(WEIGHTS, "guidance", leave=False):
        rows = []
        for clip, frames in clips:
            found, _ = speak(models, finder, frames[0], clip.landmarks[0], clip.sound, "free",
                             range(4), solver, 4, weight)
            opening, true = mouth_opening(found), mouth_opening(clip.landmarks)[::4]
            spread = np.sqrt((found.std(0) ** 2).sum(-1)).mean()
            gain = opening.std(1).mean() / true.std() if true.std() > LEAST_SPREAD else np.nan
            rows.append((lips(found, clip, 4), gain, spread))
        table[weight] = tuple(float(v) for v in np.nanmean(rows, 0))
    return table


def odd_portraits(clip):
    """Portraits of a clip's identity that speech rarely shows: {name: ToyClip of one frame}."""
    shut, straight = {"lid_left": 0.0, "lid_right": 0.0}, (0, 0, 0)
    made = {}
    for name, pose, changes in (("frontal", straight, {}), ("eyes closed", straight, shut),
                                ("mouth open", straight, {"jaw": .9}), ("yaw 25", (0, 25, 0), {}),
                                ("yaw -25", (0, -25, 0), {}), ("tilted", (0, 0, 15), {})):
        face = toy.NEUTRAL.copy()
        face[[toy.AT[part] for part in changes]] = list(changes.values())
        still = toy.Motion(np.array([pose], dtype=float), face[None], np.zeros((1, 2)))
        made[name] = toy.ToyClip(clip.identity, still, size=SIZE)
    return made


def score_odd(clips, models, finder, solver):
    """Lips and blinks of odd portraits over those of frontal ones; a table by kind."""
    rows = {}
    for clip, _ in tqdm(clips, "odd portraits", leave=False):
        for name, still in odd_portraits(clip).items():
            found, _ = speak(models, finder, still.frame(0), still.landmarks[0], clip.sound, "free",
                             range(4), solver, EVERY)
            blinks = np.mean([blink_rate(track, EVERY) for track in found])
            rows.setdefault(name, []).append((lips(found, clip, EVERY), blinks))
    table = {name: tuple(float(v) for v in np.nanmean(r, 0)) for name, r in rows.items()}
    r, blinks = np.array([table[name] for name in table if name != "frontal"]).T
    straight = table["frontal"]
    return {"lip_r_odd": score(r / straight[0], truth=1.0),
            "blinks_odd": score(blinks / max(straight[1], 1e-6), truth=1.0)}, table


# ---- all of it -----------------------------------------------------------------------------------

def score_all(plan, clips, models, finder, solver, others):
    """Every number and table. others: the models of "landmarks" and "text"."""
    some = clips[:max(2, plan.seeded_clips // 2)]
    truth = np.mean([blink_rate(clip.landmarks[::EVERY], EVERY) for clip, _ in clips])
    numbers = score_poses(clips[:plan.seeded_clips], models, others["landmarks"], finder, solver,
                          truth)
    numbers |= score_cross(plan, clips, models, finder)
    numbers |= score_keeping(some, models, others["landmarks"], finder, solver)
    told, by_word = score_text(models, others["text"], finder, solver)
    odd, by_portrait = score_odd(some, models, finder, solver)
    return numbers | told | odd, {
        "instructions (obeyed, obeyed when told something else)": by_word,
        "guidance (lip_r, lip_gain, seed_diversity)":
            {str(w): row for w, row in score_guidance(some, models, finder, solver).items()},
        "portraits (lip_r, blinks a minute)": by_portrait}
