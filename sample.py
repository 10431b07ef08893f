"""One portrait and one voice in, a talking video out.

    python sample.py --image assets/face.png --audio assets/speech.wav --out out.mp4
    python sample.py --image assets/face.png --audio assets/speech.wav --pose 0 15 0 --out b.mp4
    python sample.py --image assets/face.png --drive out.mp4 --relative --out c.mp4
    python sample.py --image assets/face.png --audio assets/speech.wav --keep-from b.mp4 --out d.mp4
    python sample.py --image assets/face.png --text "please smile" --text "turn left" --out e.mp4

    1. find the face, cut it out as the training pictures were cut       detector, landmarks
    2. z^a and z^m of the portrait                                       E_A, E_M of eq. 1
    3. speech features, head poses from them                             A and P of sec. 4.3
    4. motion latents, window by window: from speech                     S, eq. 6 or 7
       or from points: a video's, --drive                                E_M, sec. 5.2.1
       or made by S over points from speech, held or turned, or words    S, E_M, D.2, E
    5. decode each window as soon as it is made, and write it            D of eq. 2

The shipped weights were trained on drawings and animate drawings; a photograph gets a warning.
"""
from __future__ import annotations

import itertools
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import audio
import control
import detector as detectors
import diffusion
import media
import training
import vae as vaes
from landmarks import crop_box, draw, head_pose, retarget


@dataclass
class Models:
    """The trained parts, the latents' mean and std, and the kind of speech features."""
    vae: vaes.VAE
    motion: diffusion.MotionModel
    mean: torch.Tensor          # (3, 1, 1) of z^m
    std: torch.Tensor
    speech: str
    device: torch.device
    wav2vec2: str | None = None


def load_models(folder, device, wav2vec2=None, name="motion"):
    """VAE and motion model from a folder with vae.pt and motion.pt, or a `make train` folder.
    name: "motion", or of those over points, which go with any VAE, "text" or "landmarks"."""
    folder = Path(folder)
    device = training.pick_device(device)
    vae, _ = training.load_model(vaes.VAE, vaes.VAEConfig, find(folder, "vae.pt", "vae"), device)
    vae = vae.to(memory_format=torch.channels_last)
    path = find(folder, f"{name}.pt", "diffusion" if name == "motion" else name)
    motion, held = training.load_model(diffusion.MotionModel, diffusion.MotionConfig, path, device)
    as_points, words = motion.config.target == "landmarks", motion.config.driver != "speech"
    if (as_points, words) != (name != "motion", name == "text"):
        raise media.UserError(f"{path}: holds a model of another kind; train_diffusion.py makes it")
    try:
        shape = motion.config.shape if as_points else (vae.config.latent, 1, 1)
        mean, std = (torch.tensor(held[k]).view(shape).to(device) for k in ("mean", "std"))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise media.UserError(f"{path}: no mean and std of latents in it; copy it again") from error
    if not as_points and held.get("vae") != training.fingerprint(vae):
        raise media.UserError(f"{path}: was trained on another VAE's latents; train_diffusion.py "
                              "--vae makes one for this VAE")
    kind = held.get("speech", "mel")
    if wav2vec2 and kind == "mel" and name == "motion":
        raise media.UserError(f"--wav2vec2 {wav2vec2}: {path} hears log-mel; leave it out")
    return Models(vae, motion, mean, std, kind, device, wav2vec2)


def load_maker(folder, models, name):
    """The model over points, "landmarks" or "text", that goes with loaded models."""
    made = load_models(folder, models.device, models.wav2vec2, name)
    if name == "landmarks" and made.speech != models.speech:
        raise media.UserError(f"{folder}: motion.pt hears {models.speech}, landmarks.pt "
                              f"{made.speech}; train both alike")
    return made


def find(folder, name, run):
    """FOLDER/name as shipped, or FOLDER/run/name as `make train` leaves it."""
    for path in (folder / name, folder / run / name):
        if os.path.isfile(path):
            return path
    raise media.UserError(f"{folder}: no {name} in it; train one (README, Training), or " + (
        f"copy {training.SHIPPED / name}, which goes with any VAE" if run in ("text", "landmarks")
        else "leave --checkpoint out"))


# ---- steps ---------------------------------------------------------------------------------------

def frame_portrait(picture, points, size):
    """Cut the portrait as training pictures were cut. -> (size, size, 3) uint8, points (70, 2)."""
    x, y, side = crop_box(points)
    crop = detectors.cut(picture, (x, y, side), size)
    return crop, ((points - (x, y) + .5) * (size / side) - .5).astype("float32")


@torch.inference_mode()
def encode_portrait(models, picture, points):
    """z^a (1, 3, h_a, w_a) and normalised z^m (1, 3, h_m, w_m) of a framed portrait (eq. 1)."""
    x_a = media.to_float(picture)[None].to(models.device)
    x_m = media.to_float(draw(points, len(picture)))[None].to(models.device)
    z_a = models.vae.encode_appearance(x_a)[0]
    return z_a, (models.vae.encode_motion(x_m)[0] - models.mean) / models.std


def hear(models, sound):
    """The speech features that the model was trained on: (T,) -> (N, d_s)."""
    return audio.speech_features(sound, models.speech, models.wav2vec2).to(models.device)


@torch.inference_mode()
def decode(models, z_a, motion):
    """D on every frame: z_a (1, 3, h_a, w_a), motion (n, 3, h_m, w_m) -> uint8, part by part."""
    for part in (motion * models.std + models.mean).split(control.AT_ONCE):
        yield media.to_uint8(models.vae.decode(z_a.expand(len(part), -1, -1, -1), part))


# ---- command line --------------------------------------------------------------------------------

def solver_steps(text):
    if not 1 <= int(text) <= 10_000:
        raise media.UserError(f"--steps {text}: wants 1 to 10000")
    return int(text)


def add_arguments(p, steer):
    """The flags that sample.py and evaluate.py share: which models, how they sample, the pose."""
    p.add_argument("--checkpoint", default=training.SHIPPED, help="folder of weights")
    p.add_argument("--wav2vec2", metavar="FILE", help="wav2vec 2.0's weights")
    p.add_argument("--sampler", choices=diffusion.SAMPLERS, default="dpmpp_2m")
    p.add_argument("--steps", type=solver_steps, default=20, help="of the solver")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    steer.add_argument("--pose", nargs="+", default=["free"], metavar="HOW",
                       help="head poses: free (left to the model, the default), predict (from "
                       "P), still (the portrait's), or three numbers PITCH YAW ROLL in degrees: "
                       "up, to the viewer's right, clockwise")


def arguments(argv):
    p = media.ArgumentParser(__doc__)
    io = p.add_argument_group("in and out")
    io.add_argument("--image", required=True, help="portrait: any picture")
    drivers = io.add_mutually_exclusive_group(required=True)
    drivers.add_argument("--audio", help="voice: any sound, or a video with sound")
    drivers.add_argument("--drive", metavar="VIDEO", help="do what a video's face does (5.2.1)")
    drivers.add_argument("--text", action="append", metavar="WORDS", help="do what is said: "
                         '"please smile" (E); again: one after another')
    io.add_argument("--out", default="out.mp4", help="video to write (default: out.mp4)")
    io.add_argument("--sheet", metavar="PNG", help="also draw 16 of its frames as one picture")
    io.add_argument("--detector", choices=("auto", "toy", "mediapipe"), default="auto",
                    help="what finds faces: ours, or mediapipe's face mesh")
    how, steer = p.add_argument_group("how"), p.add_argument_group("control")
    add_arguments(how, steer)
    how.add_argument("--seed", type=int, default=0, help="another seed moves differently")
    steer.add_argument("--pose-from", metavar="FILE", help="head poses of a video, or of a CSV "
                         "with a line `pitch,yaw,roll` a frame")
    steer.add_argument("--relative", action="store_true", help="with --drive or --keep-from: its "
                         "motion since its first frame, on the portrait's own face")
    steer.add_argument("--keep-from", metavar="VIDEO", help="with --audio: all but mouth and jaw "
                       "as in a video (D.2)")
    steer.add_argument("--edit", nargs="+", choices=control.PARTS, metavar="PART", help="with "
                       f"--keep-from: the parts to make, of {', '.join(control.PARTS)} (default: "
                       "mouth jaw)")
    steer.add_argument("--seconds", type=float, metavar="S", help="of each --text (default: 4)")
    steer.add_argument("--clip", metavar="FOLDER", help="with --text: CLIP's weights, where the "
                       "model was trained with them")
    steer.add_argument("--guidance", type=float, default=1.0, metavar="W", help="how far to lean "
                         "on speech or words: 1 is the paper, more exaggerates")
    args = p.parse_args(argv)
    args.pose = control.asked_pose(args.pose)
    if args.seed < 0:
        raise media.UserError(f"--seed {args.seed}: must not be negative")
    if not 0 <= args.guidance <= 10:
        raise media.UserError(f"--guidance {args.guidance}: wants 0 to 10")
    control.refuse(args)
    if args.sheet and Path(args.sheet).suffix.lower() not in (".png", ".jpg"):
        raise media.UserError(f"--sheet {args.sheet}: a picture's name ends in .png or .jpg")
    outputs = [path for path in (args.out, media.partial(args.out), args.sheet)
               if path and os.path.exists(path)]
    inputs = filter(None, (args.image, args.audio, args.drive, args.pose_from, args.keep_from))
    for given, made in itertools.product(inputs, outputs):
        if os.path.exists(given) and os.path.samefile(given, made):
            raise media.UserError(f"{made}: is an input too; choose another name")
    return args


def point_maker(args, models):
    """The model over points that the flags want: words move them, a held face and angles too."""
    posed = args.pose_from or not isinstance(args.pose, str)
    name = "text" if args.text else "landmarks" if args.keep_from or posed else None
    made = name and load_maker(args.checkpoint, models, name)
    if name == "text" and (made.motion.config.driver == "clip") != bool(args.clip):
        raise media.UserError(f"{args.checkpoint}: text.pt reads " + (
            "bytes; leave --clip out" if args.clip else
            "CLIP's features; name its folder with --clip"))
    return made


def speak(models, maker, args, finder, speech, points, reference):
    """Motion for speech or instructions, window by window: (n, 3, h_m, w_m), normalised."""
    size, how = models.vae.config.size, args.pose
    if args.keep_from:
        video = control.watch(args.keep_from, args.detector, finder, size)
        video = retarget(points, video) if args.relative else video
        video = control.back_and_forth(video, len(speech), args.keep_from)
        held = video, control.held_but(args.edit or ("mouth", "jaw"))
        return control.move(models, maker, speech, points, head_pose(video), args, held)
    if args.pose_from:
        how = control.follow_poses(args, len(speech), finder, size)
    pose = control.poses(models, speech, head_pose(points), how)
    if maker:
        pose = None if pose is None else pose[0].cpu().numpy()
        return control.move(models, maker, speech, points, pose, args)
    windows = diffusion.sample_motion(models.motion, speech[None], reference, pose, [args.seed],
                                      args.sampler, args.steps, guidance=args.guidance)
    return (window[0] for window in windows)


def main(argv=None, quiet=False):
    began = time.monotonic()
    args = arguments(argv)
    if args.sheet:
        media.check_writable(args.sheet)
    picture = media.read_image(args.image)
    sound = media.read_sound(args.audio) if args.audio else \
        media.read_sound_if_any(args.drive) if args.drive else None
    models = load_models(args.checkpoint, args.device, args.wav2vec2)
    maker = point_maker(args, models)
    finder = None if args.detector == "mediapipe" else \
        detectors.load(find(Path(args.checkpoint), "detector.pt", "detector"), models.device)

    points, note = detectors.locate(picture, args.image, args.detector, finder)
    if note:
        print(f"note: {note}", file=sys.stderr)
    size = models.vae.config.size
    portrait, points = frame_portrait(picture, points, size)
    z_a, reference = encode_portrait(models, portrait, points)
    if args.drive:
        driver = control.watch(args.drive, args.detector, finder, size)
        count, windows = len(driver), control.encode_points(
            models, retarget(points, driver) if args.relative else driver)
    else:
        speech = hear(models, sound) if args.audio else \
            control.read_text(maker, args.text, args.seconds or 4, args.clip)
        count, windows = len(speech), speak(models, maker, args, finder, speech, points, reference)

    shown, wanted = [], np.linspace(0, count - 1, min(16, count)).astype(int)
    with media.VideoWriter(args.out, size, size, sound) as video, \
            tqdm(total=count, desc="frames", unit="frame", leave=False, disable=quiet) as bar:
        for window in windows:
            for frames in decode(models, z_a, window):
                shown += [f for k, f in enumerate(frames, video.frames) if k in wanted]
                video.write(frames)
                bar.update(len(frames))
    spent = time.monotonic() - began
    seconds = count / media.FPS if sound is None else len(sound) / media.RATE
    if args.sheet:
        media.write_image(args.sheet, media.grid(np.stack(shown), 8))
    if quiet:
        return
    print(f"{args.out}\n{count} frames, {seconds:.2f} s long, made in {spent:.1f} s: "
          f"{spent / seconds:.2f} times real time")


if __name__ == "__main__":
    media.run(main)
