"""One portrait and one voice in, a talking video out.

    python sample.py --image assets/face.png --audio assets/speech.wav --out out.mp4

    1. find the face, cut it out as the training pictures were cut       detector, landmarks
    2. z^a and z^m of the portrait                                       E_A, E_M of eq. 1
    3. speech features, head poses from them                             A and P of sec. 4.3
    4. motion latents, window by window                                  S, eq. 6 or 7
    5. decode each window as soon as it is sampled, and write it         D of eq. 2

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
import detector as detectors
import diffusion
import media
import training
import vae as vaes
from landmarks import crop_box, draw, head_pose

DECODE_AT_ONCE = 32             # frames


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


def load_models(folder, device, wav2vec2=None):
    """VAE and motion model from a folder with vae.pt and motion.pt, or a `make train` folder."""
    folder = Path(folder)
    device = training.pick_device(device)
    vae, _ = training.load_model(vaes.VAE, vaes.VAEConfig, find(folder, "vae.pt", "vae"), device)
    vae = vae.to(memory_format=torch.channels_last)
    path = find(folder, "motion.pt", "diffusion")
    motion, held = training.load_model(diffusion.MotionModel, diffusion.MotionConfig, path, device)
    try:
        mean, std = (torch.tensor(held[k]).view(vae.config.latent, 1, 1).to(device)
                     for k in ("mean", "std"))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise media.UserError(f"{path}: its latents' mean and std are missing; copy or train it "
                              "again") from error
    if held.get("vae") != training.fingerprint(vae):
        raise media.UserError(f"{path}: was trained on another VAE's latents; train_diffusion.py "
                              "--vae makes one for this VAE")
    kind = held.get("speech", "mel")
    if wav2vec2 and kind == "mel":
        raise media.UserError(f"--wav2vec2 {wav2vec2}: {path} hears log-mel, which needs no such "
                              "weights")
    return Models(vae, motion, mean, std, kind, device, wav2vec2)


def find(folder, name, run):
    """FOLDER/name as shipped, or FOLDER/run/name as `make train` leaves it."""
    for path in (folder / name, folder / run / name):
        if os.path.isfile(path):
            return path
    raise media.UserError(f"{folder}: no {name} in it; train one, or leave --checkpoint out")


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
    for part in (motion * models.std + models.mean).split(DECODE_AT_ONCE):
        yield media.to_uint8(models.vae.decode(z_a.expand(len(part), -1, -1, -1), part))


def poses(models, speech, portrait_pose, how):
    """Head poses (1, N, 3) in degrees: predicted by P, the portrait's own, or None: left free."""
    if how == "free":
        return None
    start = torch.as_tensor(portrait_pose, dtype=torch.float32, device=models.device)[None]
    if how == "still":
        return start[:, None].expand(1, len(speech), 3)
    return diffusion.predict_pose(models.motion, speech[None], start)


# ---- command line --------------------------------------------------------------------------------

def solver_steps(text):
    if not 1 <= int(text) <= 10_000:
        raise media.UserError(f"--steps {text}: wants 1 to 10000")
    return int(text)


def add_arguments(p):
    """The flags that sample.py and evaluate.py share: which models, and how they are asked."""
    p.add_argument("--checkpoint", default=training.SHIPPED, help="folder of weights")
    p.add_argument("--wav2vec2", metavar="FILE", help="wav2vec 2.0's weights")
    p.add_argument("--sampler", choices=diffusion.SAMPLERS, default="dpmpp_2m")
    p.add_argument("--steps", type=solver_steps, default=20, help="of the solver")
    p.add_argument("--pose", choices=("free", "predict", "still"), default="free",
                   help="head poses: left to the model, from P, or the portrait's own")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")


def arguments(argv):
    p = media.ArgumentParser(description=__doc__.split("\n")[0])
    io = p.add_argument_group("in and out")
    io.add_argument("--image", required=True, help="portrait: any picture")
    io.add_argument("--audio", required=True, help="voice: any sound, or a video with sound")
    io.add_argument("--out", default="out.mp4", help="video to write (default: out.mp4)")
    io.add_argument("--sheet", metavar="PNG", help="also draw 16 of its frames as one picture")
    io.add_argument("--detector", choices=("auto", "toy", "mediapipe"), default="auto",
                    help="what finds the face: ours, or mediapipe's face mesh")
    how = p.add_argument_group("how")
    add_arguments(how)
    how.add_argument("--seed", type=int, default=0, help="another seed moves differently")
    args = p.parse_args(argv)
    if args.seed < 0:
        raise media.UserError(f"--seed {args.seed}: must not be negative")
    if args.sheet and Path(args.sheet).suffix.lower() not in (".png", ".jpg"):
        raise media.UserError(f"--sheet {args.sheet}: a picture's name ends in .png or .jpg")
    outputs = [path for path in (args.out, media.partial(args.out), args.sheet)
               if path and os.path.exists(path)]
    for given, made in itertools.product((args.image, args.audio), outputs):
        if os.path.exists(given) and os.path.samefile(given, made):
            raise media.UserError(f"{made}: is an input too; choose another name")
    return args


def main(argv=None, quiet=False):
    began = time.monotonic()
    args = arguments(argv)
    if args.sheet:
        media.check_writable(args.sheet)
    picture = media.read_image(args.image)
    sound = media.read_sound(args.audio)
    models = load_models(args.checkpoint, args.device, args.wav2vec2)
    finder = None if args.detector == "mediapipe" else \
        detectors.load(find(Path(args.checkpoint), "detector.pt", "detector"), models.device)

    points, note = detectors.locate(picture, args.image, args.detector, finder)
    if note:
        print(f"note: {note}", file=sys.stderr)
    size = models.vae.config.size
    portrait, points = frame_portrait(picture, points, size)
    z_a, reference = encode_portrait(models, portrait, points)
    speech = hear(models, sound)
    pose = poses(models, speech, head_pose(points), args.pose)

    shown, wanted = [], np.linspace(0, len(speech) - 1, min(16, len(speech))).astype(int)
    with media.VideoWriter(args.out, size, size, sound) as video, \
            tqdm(total=len(speech), desc="frames", unit="frame", leave=False, disable=quiet) as bar:
        for window in diffusion.sample_motion(models.motion, speech[None], reference, pose,
                                              [args.seed], args.sampler, args.steps):
            for frames in decode(models, z_a, window[0]):
                shown += [f for k, f in enumerate(frames, video.frames) if k in wanted]
                video.write(frames)
                bar.update(len(frames))
    spent, seconds = time.monotonic() - began, len(sound) / media.RATE
    if args.sheet:
        media.write_image(args.sheet, media.grid(np.stack(shown), 8))
    if quiet:
        return
    print(f"{args.out}\n{len(speech)} frames, {seconds:.2f} s of speech, made in {spent:.1f} s: "
          f"{spent / seconds:.2f} times real time")


if __name__ == "__main__":
    media.run(main)
