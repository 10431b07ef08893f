"""Trains the speech-to-motion model S, A and P together (sec. 4.3, eq. 8) on a VAE's latents.

    python train_diffusion.py --vae runs/vae/vae.pt      the toy preset; default: the shipped VAE
    python train_diffusion.py --target landmarks --init checkpoints/toy/motion.pt    points (D.2)
    python train_diffusion.py --driver text --init checkpoints/toy/landmarks.pt      words (E)
    torchrun --nproc_per_node 8 train_diffusion.py --preset small --vae v.pt --data clips

Clips are made and encoded by E_M before the first step, because two cores do one thing at a time
best; a step takes random sub-sequences of them (the paper's pseudo-sentences). The same command
again goes on where it stopped. OUT gets last.pt (everything), motion.pt, text.pt or landmarks.pt
(the EMA in fp16), log.csv, curve.png, grid.png: unseen heads, the truth through the VAE above what
the model makes of the sound or the instruction.

Departures from the paper: words move points, as D.2's speech does, and not latents, in which a nod
is hard to learn; their reference is a clip's first frame, because the others show what was asked.
The `toy` preset trains with Muon on sub-sequences shorter than 125-250 frames. Dropout, there
of letters alone, is drawn by process and not by global sample.
"""
from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import audio
import curves
import data
import diffusion
import media
import optim
import toy
import training
import vae as vaes
from actions import INSTRUCTIONS, obeyed
from landmarks import EYE_LEFT, EYE_RIGHT, IRISES, MOUTH, mouth_opening, region_box
from text import to_bytes, vectors

# B.1: Adam, rate, inverse square root, batch and frames; the rest is ours
PAPER = {"optimiser": "adam", "lr": 1e-4, "betas": (.9, .999), "schedule": "inverse_sqrt",
         "batch": 16, "frames": (125, 250), "seconds": 12.0, "warmup": 8000}
RECIPES = {"toy": {"optimiser": "muon", "lr": 1e-3, "betas": (.9, .99), "schedule": "trapezoid",
                   "batch": 8, "frames": (64, 96), "seconds": 4.0, "warmup": 200},
           "small": PAPER, "base": PAPER, "large": PAPER}
# how much of the loss each region gets beside the whole latent's 1; the VAE weights them too
REGIONS, REGION_WEIGHTS = (EYE_LEFT, EYE_RIGHT, MOUTH), (.75, .75, 1.25)
MEASURED = 64                    # clips that give the latents' mean and spread
TEXT_WIDTH = {"bytes": 128, "clip": 512}
COLUMNS = ["loss", "motion", "pose", "norm", "lip_r", "lip_gain", "lr", "wait"]


def arguments(argv):
    p = media.ArgumentParser(__doc__)
    what = p.add_argument_group("what to train, on what")
    what.add_argument("--preset", choices=diffusion.PRESETS, default="toy", help="size")
    what.add_argument("--vae", default=training.SHIPPED / "vae.pt", help="default: the shipped")
    what.add_argument("--data", metavar="FOLDER", help="clips at rest instead of rendered heads")
    what.add_argument("--clips", type=int, help="rendered clips, made before the first step; fewer "
                      "are learnt by heart (default: 4500, or 16000 told what to do)")
    what.add_argument("--driver", choices=("speech", "text"), default="speech",
                      help="what moves the head: a voice, or an instruction")
    what.add_argument("--text-encoder", choices=("bytes", "clip"), default="bytes",
                      help="of --driver text: one that learns along, or CLIP's, frozen")
    what.add_argument("--clip", metavar="FOLDER", help="CLIP's weights and vocabulary")
    what.add_argument("--target", choices=("latents", "landmarks"),
                      help="what is made: z^m, or the 70 points; words make points alone")
    what.add_argument("--speech", choices=audio.FEATURES, default="mel", help="speech features")
    what.add_argument("--wav2vec2", metavar="FILE", help="weights for --speech wav2vec2")
    training.add_loop_arguments(p, "runs/diffusion, runs/text or runs/landmarks", "make clips")
    args = p.parse_args(argv)
    args.target = args.target or ("landmarks" if args.driver == "text" else "latents")
    if args.driver == "text" and (args.target == "latents" or args.data or args.wav2vec2
                                  or args.speech != "mel"):
        raise media.UserError("--driver text makes points, from rendered heads that are silent; "
                              "leave --target, --data, --speech and --wav2vec2 out")
    if (args.text_encoder == "clip") != bool(args.clip):
        raise media.UserError("--text-encoder clip and --clip FOLDER belong together")
    args.name = "text" if args.driver == "text" else \
        "motion" if args.target == "latents" else "landmarks"
    args.out = args.out or f"runs/{'diffusion' if args.name == 'motion' else args.name}"
    training.settle(args, RECIPES[args.preset], minutes=70.0)
    args.clips = (16_000 if args.driver == "text" else 4500) if args.clips is None else args.clips
    if args.clips < 1:
        raise media.UserError("--clips must be above zero")
    curves.check_compare(args.compare, "diffusion")
    return args, RECIPES[args.preset]


def region_weights(landmarks, config):
    """How much each place of z^m counts. (N, 70, 2) -> (N, 1, h_m, w_m)"""
    boxes = np.stack([region_box(landmarks, region) for region in REGIONS], 1)      # (N, R, 4) px
    cells = (boxes + .5) / config.motion_factor - .5 + (-.5, -.5, .5, .5)           # all they touch
    return vaes.weight_map(torch.tensor(cells, dtype=torch.float32), torch.tensor(REGION_WEIGHTS),
                           config.size // config.motion_factor)


def point_weights(landmarks):
    """The same for points: (N, 70, 2) -> (N, 1, 70, 1)"""
    weight = torch.ones(1, 1, 70, 1)
    for region, share in zip((*REGIONS, IRISES), (*REGION_WEIGHTS, .25)):
        weight[:, :, region] += share * 70 / len(range(*region.indices(70)))
    return weight.expand(len(landmarks), -1, -1, -1)


@functools.lru_cache(1)
def open_vae(path):
    return training.load_model(vaes.VAE, vaes.VAEConfig, path)[0].to(
        memory_format=torch.channels_last)


def make_encoded(k, make, path, dtype):
    """Clip k with its motion in the place of x_m: E_M runs in the processes that render."""
    item, cpu = make(k), torch.device("cpu")
    with training.autocast(cpu, dtype):
        return item | {"motion": data.encode_motion(open_vae(path), item.pop("x_m"), cpu)}


class Motions:
    """Encoded clips: motion (N, 3, h, w) in fp16, pose (N, 3), speech (N, d_s), or instructions.
    `mean` and `std` of the latents, (3, 1, 1), come from the first clips. With `as_points`,
    motion is the 70 points as shares of the picture's side, (N, 2, 70, 1)."""

    def __init__(self, vae, device, dtype, as_points=False, clip=None, mean=None, std=None):
        self.vae, self.device, self.dtype, self.clip = vae, device, dtype, clip
        self.as_points, self.items = as_points, []
        self.mean, self.std = (v if v is None else self.shaped(v.cpu()) for v in (mean, std))

    def fill(self, items):
        """Encode what `data.toy_motion` and the like give, and keep it."""
        for item in items:
            x_m = item.pop("x_m", None)
            motion = item["motion"] if "motion" in item else self.encode(item["landmarks"], x_m)
            if "texts" in item:
                times = (torch.tensor(item[k])[None] for k in ("said", "since"))
                texts = item.pop("texts")
                item |= {"letters": to_bytes(texts).numpy()} if not self.clip else {
                    "speech": diffusion.in_force(self.clip(texts)[None], *times)[0].numpy()}
            self.items.append(item | {"motion": motion.half()})
        if self.mean is None:
            every = torch.cat([item["motion"] for item in self.items[:MEASURED]]).float()
            axes = 0 if self.as_points else (0, 2, 3)
            self.mean, self.std = (self.shaped(v) for v in (every.mean(axes), every.std(axes)))

    def shaped(self, statistic):
        """Per channel (3, 1, 1), or per coordinate of a point (2, 70, 1)."""
        return statistic.view(2, 70, 1) if self.as_points else statistic.view(-1, 1, 1)

    def encode(self, landmarks, x_m):
        """(N, 70, 2) px and the pictures drawn from them -> motion, not normalised."""
        if self.as_points:
            return torch.tensor(landmarks).mT[..., None] / self.vae.config.size
        with training.autocast(self.device, self.dtype):
            return data.encode_motion(self.vae, x_m, self.device)

    def normalise(self, motion):
        """(z - mean) / std, float32."""
        return (motion.float() - self.mean) / self.std

    def example(self, rng, frames):
        """A random sub-sequence with a random reference frame of its clip (sec. 4.3)."""
        item = self.items[rng.integers(len(self.items))]
        longest = min(len(item.get("speech", item["motion"])), len(item["motion"]))
        n = min(longest, int(rng.integers(frames[0], frames[1] + 1)))
        first, told = int(rng.integers(longest - n + 1)), "said" in item
        if told and rng.random() < .5:
            first = 0                               # as after a portrait
        kept = slice(first, first + n)
        i = 0 if told else int(rng.integers(longest))
        points = item["landmarks"][kept]
        weight = point_weights(points) if self.as_points else \
            region_weights(points, self.vae.config)
        made = {"motion": self.normalise(item["motion"][kept]), "weight": weight,
                "reference": self.normalise(item["motion"][i]),
                "reference_pose": torch.tensor(item["pose"][i])}
        made |= {k: torch.tensor(item[k]) for k in ("steered", "letters") if k in item}
        made |= {k: torch.tensor(item[k][kept]) for k in ("speech", "said", "since") if k in item}
        return made | {"pose": torch.tensor(item["pose"][kept])}


def collate(examples):
    """Stack sub-sequences of different lengths: zeros behind, and mask (B, N) of what is real."""
    longest = max(len(e["motion"]) for e in examples)

    def stack(name):
        if name.startswith(("reference", "letters", "steered")):
            return torch.stack([e[name] for e in examples])
        return torch.nn.utils.rnn.pad_sequence([e[name] for e in examples], batch_first=True)
    made = {name: stack(name) for name in examples[0]}
    lengths = torch.tensor([len(e["motion"]) for e in examples])
    return made | {"mask": torch.arange(longest) < lengths[:, None]}


class Unseen:
    """Clips that training never meets, spoken, or obeyed, by the model as it learns."""

    def __init__(self, args, vae, motions, device, count=8):
        self.vae, self.motions, self.device, self.told = vae, motions, device, None
        size, first = vae.config.size, toy.HELD_OUT + 500_000
        if args.driver == "text":
            self.actions = list(INSTRUCTIONS)[:count]
            clips = [toy.instruct(500_000 + k, 4.0, True, [action], size)
                     for k, action in enumerate(self.actions)]
            self.told = [c.text for c in clips]
        else:
            clips = [toy.make_clip(first + k, 4.0, size) for k in range(count)]
            self.speech = torch.stack([audio.speech_features(c.sound, args.speech, args.wav2vec2)
                                       for c in clips])
        motion = [motions.encode(c.landmarks, data.draw_all(c.landmarks, size)) for c in clips]
        self.motion = torch.stack([motions.normalise(z) for z in motion])        # (8, N, 3, h, w)
        portraits = media.to_float(np.stack([c.frame(0) for c in clips])).to(device)
        with torch.no_grad():
            self.z_a = vae.encode_appearance(portraits)[0]
        self.landmarks = np.stack([c.landmarks for c in clips])
        self.reader = None if motions.as_points else read_points(motions)

    @torch.no_grad()
    def speak(self, model):
        """Motion of all, (8, N, 3, h, w), and two numbers: the mean lip correlation and the gain;
        or, under the same names, the share of instructions obeyed and how far, over the truth."""
        if self.told:
            told = vectors(self.told, getattr(model, "text_encoder", None), self.motions.clip)
            frames = torch.arange(self.motion.shape[1], device=told.device).expand(len(told), -1)
            speech = diffusion.in_force(told[:, None], 0 * frames, frames).to(self.device)
        else:
            speech = self.speech.to(self.device)
        windows = diffusion.sample_motion(model, speech, self.motion[:, 0].to(self.device),
                                          seeds=list(range(len(speech))),
                                          from_reference=bool(self.told))
        made = torch.cat(list(windows), 1).cpu()
        points = self.points(made)
        if self.told:
            far, true = (np.array([obeyed(p, a) for p, a in zip(tracks, self.actions)])
                         for tracks in (points, self.landmarks))
            return made, (far >= 1).mean(), far.mean() / true.mean()
        opening, true = mouth_opening(points), mouth_opening(self.landmarks)
        r = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(opening, true)])
        return made, r, opening.std(1).mean() / true.std(1).mean()

    def points(self, made):
        """The 70 points, in pixels, of normalised motion: (B, N, 3, h, w) -> (B, N, 70, 2)."""
        if self.motions.as_points:
            made = made * self.motions.std + self.motions.mean
            return (made[..., 0].mT * self.vae.config.size).numpy()
        found = made.flatten(2) @ self.reader[:-1] + self.reader[-1]
        return found.unflatten(-1, (70, 2)).numpy()

    @torch.no_grad()
    def grid(self, made, frames=8, heads=3):
        """Truth through the VAE above the model's frames, three heads over four seconds."""
        at = torch.linspace(0, made.shape[1] - 1, frames).long()
        rows = []
        for k in range(min(heads, len(made))):
            for motion in (self.motion[k, at], made[k, at]):
                z_m = motion * self.motions.std + self.motions.mean
                if self.motions.as_points:
                    x_m = data.draw_all(self.points(motion[None])[0], self.vae.config.size)
                    z_m = data.encode_motion(self.vae, x_m, self.device)
                z_a = self.z_a[k:k + 1].expand(frames, -1, -1, -1)
                rows.append(media.to_uint8(self.vae.decode(z_a, z_m.to(self.device))))
        return media.grid(np.concatenate(rows), frames)


def read_points(motions):
    """Least squares from a latent to the 70 points, a ruler for the curve only: (D + 1, 140)."""
    items = [item for item in motions.items if not item["steered"]][:3 * MEASURED]
    z = torch.cat([motions.normalise(item["motion"]).flatten(1) for item in items])
    z = torch.cat([z, torch.ones(len(z), 1)], 1).double()
    points = np.concatenate([item["landmarks"] for item in items]).reshape(len(z), -1)
    gram = z.T @ z + 10 * torch.eye(z.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, z.T @ torch.tensor(points, dtype=torch.float64)).float()


@training.together()
def main(argv=None):
    # ---- arguments, device, processes ----
    args, recipe = arguments(argv)
    processes = training.start_processes(args.device)
    device, dtype = processes.device, training.pick_dtype(args.dtype, processes.device)
    precision = torch.promote_types(dtype, torch.float32)                 # of weights and data
    samples = processes.samples(args.batch, args.accumulate)
    out, last = Path(args.out), Path(args.out) / "last.pt"
    vae, _ = training.load_model(vaes.VAE, vaes.VAEConfig, args.vae, device)
    vae, vae_is = vae.to(memory_format=torch.channels_last), training.fingerprint(vae)
    side = vae.config.size // vae.config.motion_factor
    config = dataclasses.replace(diffusion.PRESETS[args.preset], motion_size=side,
                                 target=args.target, speech_features=audio.FEATURES[args.speech])
    if args.driver == "text":                       # an instruction holds for seconds: few layers
        config = dataclasses.replace(config, driver=args.text_encoder, speech_layers=1,
                                     speech_features=TEXT_WIDTH[args.text_encoder])

    # ---- model, EMA, optimisers ----
    torch.manual_seed(args.seed)
    model = diffusion.MotionModel(config).to(device, precision)
    optimisers = optim.make_optimisers(model, args.optimiser, args.lr, recipe["betas"], dtype=dtype)

    # ---- start or go on ----
    statistics = {}
    if args.init:
        start, told = training.load_model(diffusion.MotionModel, diffusion.MotionConfig, args.init)
        alike = (start.config.driver, start.config.target) == (config.driver, config.target)
        own, given = model.state_dict(), start.state_dict()
        if not alike:                               # what S knows of heads serves other drivers too
            fits = {name: value for name, value in given.items()
                    if name in own and own[name].shape == value.shape}
            if len(fits) < len(own) / 2:
                raise media.UserError(f"{args.init}: a model of another size than --preset "
                                      f"{args.preset}; leave --init out")
            given = own | fits
        training.load_weights(model, given, args.init)
        if alike and (args.target == "landmarks" or told.get("vae") == vae_is):
            statistics = {name: torch.tensor(told[name]) for name in ("mean", "std")}
    ema = optim.Ema(model, .998)
    step, spent, held = training.resume(
        last, {"model": model}, optimisers, ema,
        same={"preset": args.preset, "seed": args.seed, "vae": vae_is, "name": args.name},
        fresh=args.fresh)
    statistics |= {name: held[name] for name in ("mean", "std") if held}
    budget = training.Budget(args.steps, args.minutes)
    objective = diffusion.Objective(model)
    net = training.distribute(objective, processes)

    # ---- data ----
    as_points, clips = args.target == "landmarks", args.clips
    same = {"seed": args.seed, "size": vae.config.size}
    heard = {"kind": args.speech, "weights": args.wav2vec2} | same
    make = functools.partial(data.toy_motion, seconds=recipe["seconds"], drawn=not as_points,
                             **heard)
    if args.driver == "text":
        make = functools.partial(data.toy_text, seconds=recipe["seconds"], **same)
    if args.data:
        paths = data.clip_paths(args.data)
        make, clips = functools.partial(data.clip_motion, paths=paths, **heard), len(paths)
    if device.type == "cpu" and not as_points:
        make = functools.partial(make_encoded, make=make, path=args.vae, dtype=dtype)
    source = data.GrowingPool(make, clips, 0, clips, args.workers)
    clip = data.open_clip(args.clip) if args.clip else None
    motions = Motions(vae, device, dtype, as_points, clip, **statistics)

    def prepare(at):
        keys = [np.random.default_rng((args.seed, at, k)) for k in samples]
        drawn = collate([motions.example(key, recipe["frames"]) for key in keys])
        lengths = drawn["mask"].sum(1).tolist()
        return drawn | diffusion.draw_batch(args.seed, at, samples, lengths, config)
    batches = training.ahead(prepare, step, device)
    shadow = diffusion.MotionModel(config).to(device).eval()

    def report():
        """Let the EMA speak on unseen heads, draw, and save."""
        shadow.load_state_dict(ema.weights)
        made, r, gain = unseen.speak(shadow)
        told = "lips of unseen heads r" if args.driver == "speech" else "unseen heads obeyed"
        optim.check_finite(made.abs().max(), step, last)
        log.write(0, step=step, minutes=budget.spent(), lip_r=float(r), lip_gain=float(gain))
        log.flush()
        statistics = {"mean": motions.mean, "std": motions.std}
        training.save(last, statistics | {
            "preset": args.preset, "vae": vae_is, "name": args.name,
            "config": dataclasses.asdict(config),
            "model": model.state_dict(), "ema": ema.weights, "step": step,
            "minutes": budget.spent(), "seed": args.seed,
            "optimisers": [o.state_dict() for o in optimisers]})
        training.ship(out / f"{args.name}.pt", {
            "config": dataclasses.asdict(config), "weights": ema.half(), "speech": args.speech,
            "vae": vae_is,
            "mean": motions.mean.flatten().tolist(), "std": motions.std.flatten().tolist()},
            seed=args.seed, steps=step, minutes=round(budget.spent(), 1))
        media.write_image(out / "grid.png", unseen.grid(made))
        curves.draw_curves(out / "log.csv", out / "curve.png", COLUMNS[:6], args.compare,
                           "diffusion")
        tqdm.write(f"step {step}: {budget.spent():.1f} min, {told} {r:.3f}, gain {gain:.2f} "
                   f"(read off what is made); {log.pace('frames')}")

    began = time.monotonic()
    with contextlib.closing(source):
        motions.fill(source.grow(0))
    if processes.leads:
        tqdm.write(f"{clips} clips made and encoded in {(time.monotonic() - began) / 60:.1f} "
                   "minutes, which count in --minutes the first time")

    # ---- the loop ----
    with training.progress("motion", processes.leads) as bar, training.stop_on_signals() as stop, \
            contextlib.closing(batches):
        budget.begin(spent)
        if processes.leads:
            unseen = Unseen(args, vae, motions, device)
        if not step and training.agree([budget.share(0)], processes)[0] >= 1:
            raise media.UserError("--minutes: clips took all; give more, or fewer --clips")
        if args.fresh:
            last.unlink(missing_ok=True)
        log = curves.Log(out / "log.csv", COLUMNS, step) if processes.leads else None
        while True:
            used, stopping = training.agree([budget.share(step), float(bool(stop))], processes)
            done = step and used >= 1 or stopping
            if processes.leads and (done or (step and step % args.every == 0)):
                report()
            if done:
                break
            waited = time.monotonic()
            drawn = {k: v.to(device, precision if v.is_floating_point() else None)
                     for k, v in next(batches).items()}
            waited = time.monotonic() - waited
            factor = optim.rate_factor(recipe["schedule"], step, used, args.warmup)
            optim.set_rate(optimisers, factor)
            torch.manual_seed(training.generator(args.seed, step, processes.rank).initial_seed())
            frames = torch.stack([m.sum() for m in (*objective.counted(drawn), drawn["mask"])])
            frames = training.total(frames, processes).clamp(min=1)       # of the whole batch
            terms = collections.defaultdict(float)
            for k in range(args.accumulate):
                net.require_backward_grad_sync = k == args.accumulate - 1    # DDP: once a step
                part = {n: v.chunk(args.accumulate)[k] for n, v in drawn.items()}
                with training.autocast(device, dtype):
                    sums = net(part)
                # eq. 8; times the number of processes, because DDP takes the mean over them
                motion, pose = (s * processes.world / n for s, n in zip(sums.values(), frames))
                (motion + pose).backward()
                for name, value in (("loss", motion + pose), ("motion", motion), ("pose", pose)):
                    terms[name] += value.detach()
            norm = optim.update(model, optimisers, step, last, ema=ema)

            # once a step: log
            step += 1
            terms = training.averaged(terms, processes)
            if processes.leads:
                log.write(int(frames[2]), step=step - 1, minutes=budget.spent(), norm=norm,
                          lr=args.lr * factor, wait=waited, **terms)
                bar.set_postfix(step=step, loss=f"{terms['loss']:.3f}", refresh=False)
                bar.update(100 * budget.share(step) - bar.n)
    if processes.leads:
        log.close()
        print(out / f"{args.name}.pt")


if __name__ == "__main__":
    media.run(main)
