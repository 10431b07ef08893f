"""Trains the speech-to-motion model S, A and P together (sec. 4.3, eq. 8) on a VAE's latents.

    python train_diffusion.py                            the toy preset, the shipped VAE
    python train_diffusion.py --vae runs/vae/vae.pt --minutes 60
    torchrun --nproc_per_node 8 train_diffusion.py --preset small --vae v.pt --data footage

Clips are encoded by E_M once, when they join the pool; a step takes random sub-sequences of them
(the paper's pseudo-sentences). The same command again goes on where it stopped. OUT gets last.pt
(everything), motion.pt (the EMA in fp16), log.csv, curve.png and grid.png: unseen heads speaking,
the truth through the VAE above what the model makes of the sound.

Departures from the paper: sub-sequences of the `toy` preset are shorter than its 125-250 frames.
"""
from __future__ import annotations

import collections
import contextlib
import functools
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import audio
import curves
import data
import diffusion
import media
import toy
import training
import vae as vaes
from landmarks import EYE_LEFT, EYE_RIGHT, MOUTH, draw, mouth_opening, region_box

PAPER = {"optimiser": "adam", "lr": 1e-4, "betas": (.9, .999), "schedule": "inverse_sqrt",
         "batch": 16, "frames": (125, 250), "warmup": 8000}
RECIPES = {"toy": {"optimiser": "muon", "lr": 1e-3, "betas": (.9, .99), "schedule": "trapezoid",
                   "batch": 8, "frames": (64, 96), "warmup": 200},
           "small": PAPER, "base": PAPER, "large": PAPER}
# how much of the loss each region gets beside the whole latent's 1; the VAE weights them too
REGIONS, REGION_SHARE = (EYE_LEFT, EYE_RIGHT, MOUTH), .5
FIRST_CLIPS, CLIPS_A_STEP, CLIP_SECONDS = 48, .15, 4.8
COLUMNS = ["loss", "motion", "pose", "norm", "lip_r", "lip_gain", "lr", "wait"]


def arguments(argv):
    p = media.ArgumentParser(description=__doc__.split("\n")[0])
    what = p.add_argument_group("what to train, and where")
    what.add_argument("--preset", choices=diffusion.PRESETS, default="toy", help="size")
    what.add_argument("--vae", default=training.SHIPPED / "vae.pt", help="default: the shipped")
    what.add_argument("--out", default="runs/diffusion", help="folder of the run; again: go on")
    what.add_argument("--fresh", action="store_true", help="start over in OUT")
    what.add_argument("--init", metavar="FILE", help="start from these weights (a motion.pt)")
    what.add_argument("--compare", metavar="FILE", help="draw curve.png over these curves, such as "
                      "results/toy_curves.csv")
    pool = p.add_argument_group("data")
    pool.add_argument("--data", metavar="FOLDER", help="clips at rest instead of rendered heads")
    pool.add_argument("--clips", type=int, default=1600, help="rendered clips, made along the way")
    pool.add_argument("--speech", choices=audio.FEATURES, default="mel", help="speech features")
    pool.add_argument("--wav2vec2", metavar="FILE", help="weights for --speech wav2vec2")
    pool.add_argument("--workers", type=int, default=None, help="processes that make clips")
    pool.add_argument("--seed", type=int, default=0, help="of weights, data and draws")
    run = p.add_argument_group("training")
    run.add_argument("--steps", type=int, help="budget in steps (resumes bit by bit)")
    run.add_argument("--minutes", type=float, help="budget in minutes, all parts together "
                     "(default: 45)")
    run.add_argument("--batch", type=int, help="sub-sequences a step, over all processes")
    run.add_argument("--accumulate", type=int, default=1, help="parts a batch is cut into")
    run.add_argument("--lr", type=float, help="Adam's learning rate")
    run.add_argument("--optimiser", choices=("muon", "adam"), help="default: the preset's")
    run.add_argument("--warmup", type=int, help="steps of rising learning rate")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    run.add_argument("--dtype", choices=("auto", "bf16", "fp32", "fp64"), default="auto")
    run.add_argument("--every", type=int, default=500, help="steps between checkpoints and grids")
    args = p.parse_args(argv)
    recipe = RECIPES[args.preset]
    for name in ("batch", "lr", "optimiser", "warmup"):
        if getattr(args, name) is None:
            setattr(args, name, recipe[name])
    if args.steps is None and args.minutes is None:
        args.minutes = 45.0
    if min(args.batch, args.accumulate, args.every, args.clips, args.lr) <= 0 or args.seed < 0:
        raise media.UserError("--batch, --accumulate, --every, --clips and --lr must be above "
                              "zero, --seed not negative")
    training.Budget(args.steps, args.minutes)
    curves.check_compare(args.compare, "diffusion")
    return args, recipe


@torch.no_grad()
def encode_motion(vae, landmarks, device):
    """Posterior means of z^m (sec. 4.2). landmarks (N, 70, 2) -> (N, 3, h_m, w_m) on the CPU."""
    made = []
    for part in np.array_split(landmarks, max(1, len(landmarks) // 16)):
        x_m = media.to_float(np.stack([draw(p, vae.config.size) for p in part]))
        made.append(vae.encode_motion(x_m.to(device))[0].cpu())
    return torch.cat(made)


def region_weights(landmarks, config):
    """How much each place of z^m counts. (N, 70, 2) -> (N, 1, h_m, w_m)"""
    boxes = np.stack([region_box(landmarks, region) for region in REGIONS], 1)      # (N, R, 4) px
    cells = (boxes + .5) / config.motion_factor - .5 + (-.5, -.5, .5, .5)           # all they touch
    shares = torch.full((len(REGIONS),), REGION_SHARE)
    return vaes.weight_map(torch.tensor(cells, dtype=torch.float32), shares,
                           config.size // config.motion_factor)


class Motions:
    """Encoded clips: motion (N, 3, h, w) in fp16, pose (N, 3), speech (N, d_s). `mean` and `std` of
    the latents, per channel, come from the first clips and stay."""

    def __init__(self, source, vae, device, mean=None, std=None):
        self.source, self.vae, self.device, self.items = source, vae, device, []
        self.mean, self.std = (None if v is None else v.cpu() for v in (mean, std))

    def grow(self, step):
        """Gain what the pool must hold before this step."""
        for item in self.source.grow(step):
            self.items.append(item | {"motion": encode_motion(self.vae, item["landmarks"],
                                                              self.device).half()})
        if self.mean is None:
            every = torch.cat([item["motion"] for item in self.items]).float()
            self.mean, self.std = every.mean((0, 2, 3)), every.std((0, 2, 3))

    def normalise(self, motion):
        """(z - mean) / std per channel, float32."""
        shape = (-1, 1, 1)
        return (motion.float() - self.mean.view(shape)) / self.std.view(shape)

    def example(self, rng, frames):
        """A random sub-sequence with a random reference frame of its clip (sec. 4.3)."""
        item = self.items[rng.integers(len(self.items))]
        longest = min(len(item["speech"]), len(item["motion"]))
        n = min(longest, int(rng.integers(frames[0], frames[1] + 1)))
        first = int(rng.integers(longest - n + 1))
        kept = slice(first, first + n)
        i = int(rng.integers(longest))
        return {"motion": self.normalise(item["motion"][kept]),
                "weight": region_weights(item["landmarks"][kept], self.vae.config),
                "reference": self.normalise(item["motion"][i]),
                "pose": torch.tensor(item["pose"][kept]),
                "reference_pose": torch.tensor(item["pose"][i]),
                "speech": torch.tensor(item["speech"][kept])}


def collate(examples):
    """Stack sub-sequences of different lengths: zeros behind, and mask (B, N) of what is real."""
    longest = max(len(e["motion"]) for e in examples)

    def stack(name):
        if name.startswith("reference"):
            return torch.stack([e[name] for e in examples])
        return torch.nn.utils.rnn.pad_sequence([e[name] for e in examples], batch_first=True)
    made = {name: stack(name) for name in examples[0]}
    lengths = torch.tensor([len(e["motion"]) for e in examples])
    return made | {"mask": torch.arange(longest) < lengths[:, None]}


class Unseen:
    """Eight clips that training never meets, spoken by the model as it learns."""

    def __init__(self, vae, motions, kind, wav2vec2, device, count=8):
        self.vae, self.motions, self.device = vae, motions, device
        clips = [toy.make_clip(toy.HELD_OUT + 500_000 + k, 4.0, vae.config.size)
                 for k in range(count)]
        latents = [encode_motion(vae, c.landmarks, device) for c in clips]
        self.motion = torch.stack([motions.normalise(z) for z in latents])       # (8, N, 3, h, w)
        self.speech = torch.stack([audio.speech_features(c.sound, kind, wav2vec2) for c in clips])
        self.pose = torch.tensor(np.stack([c.pose[0] for c in clips]))
        first = media.to_float(np.stack([c.frame(0) for c in clips])).to(device)
        with torch.no_grad():
            self.z_a = vae.encode_appearance(first)[0]
        self.opening = np.stack([mouth_opening(c.landmarks) for c in clips])
        self.reader = read_opening(motions)

    @torch.no_grad()
    def speak(self, model):
        """Motion of all from their sound, (8, N, 3, h, w), the mean lip correlation, the gain."""
        speech, pose = self.speech.to(self.device), self.pose.to(self.device)
        windows = diffusion.sample_motion(
            model, speech, self.motion[:, 0].to(self.device),
            diffusion.predict_pose(model, speech, pose), list(range(len(speech))))
        made = torch.cat(list(windows), 1).cpu()
        opening = (made.flatten(2) @ self.reader[:-1] + self.reader[-1]).numpy()
        r = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(opening, self.opening)])
        return made, r, opening.std(1).mean() / self.opening.std(1).mean()

    @torch.no_grad()
    def grid(self, made, frames=8, heads=3):
        """Truth through the VAE above the model's frames, three heads over four seconds."""
        at = torch.linspace(0, made.shape[1] - 1, frames).long()
        rows = []
        for k in range(min(heads, len(made))):
            for motion in (self.motion[k, at], made[k, at]):
                scale, shift = (v.view(-1, 1, 1) for v in (self.motions.std, self.motions.mean))
                z_m = (motion * scale + shift).to(self.device)           # on the CPU until here
                x_hat = self.vae.decode(self.z_a[k:k + 1].expand(frames, -1, -1, -1), z_m)
                rows.append(media.to_uint8(x_hat))
        return media.grid(np.concatenate(rows), frames)


def read_opening(motions):
    """Least squares from a latent to the mouth opening, a ruler for the curve only: (D + 1,)."""
    items = motions.items[:FIRST_CLIPS]
    z = torch.cat([motions.normalise(item["motion"]).flatten(1) for item in items])
    z = torch.cat([z, torch.ones(len(z), 1)], 1).double()
    opening = np.concatenate([mouth_opening(item["landmarks"]) for item in items])
    gram = z.T @ z + 10 * torch.eye(z.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, z.T @ torch.tensor(opening, dtype=torch.float64)).float()


class Clips:
    """The clips of a folder, all there from the start, in the form of a GrowingPool."""

    def __init__(self, folder, *wanted):
        self.paths, self.wanted, self.done = data.clip_paths(folder), wanted, False

    def grow(self, step):
        paths, self.done = ([] if self.done else self.paths), True
        for k in tqdm(range(len(paths)), "clips", leave=False):
            yield data.clip_motion(k, self.paths, *self.wanted)

    def close(self):
        pass


def main(argv=None):
    # ---- arguments, device, processes ----
    args, recipe = arguments(argv)
    processes = training.start_processes(args.device)
    device, dtype = processes.device, training.pick_dtype(args.dtype, processes.device)
    precision = torch.promote_types(dtype, torch.float32)                 # of weights and data
    if args.batch % (processes.world * args.accumulate):
        raise media.UserError(f"--batch {args.batch}: wants a multiple of {processes.world} "
                              f"processes times --accumulate {args.accumulate}")
    out, last = Path(args.out), Path(args.out) / "last.pt"
    vae, _ = training.load_model(vaes.VAE, vaes.VAEConfig, args.vae, device)
    vae, vae_is = vae.to(memory_format=torch.channels_last), training.fingerprint(vae)
    side = vae.config.size // vae.config.motion_factor
    config = diffusion.preset(args.preset, motion_size=side,
                              speech_features=audio.FEATURES[args.speech])

    # ---- model, EMA, optimisers ----
    torch.manual_seed(args.seed)
    model = diffusion.MotionModel(config).to(device, precision)
    optimisers = training.make_optimisers(model, args.optimiser, args.lr, recipe["betas"])
    step, spent, held = 0, 0.0, {}

    # ---- resume ----
    if args.init:
        start, told = training.load_model(diffusion.MotionModel, diffusion.MotionConfig, args.init)
        training.load_weights(model, start.state_dict(), args.init)
        held = {name: torch.tensor(told[name]) for name in ("mean", "std") if name in told}
    ema = training.Ema(model, .998)
    if args.fresh and processes.leads:
        last.unlink(missing_ok=True)
    if last.exists() and not args.fresh:
        held = training.load(last, device)
        if (held.get("preset"), held.get("vae")) != (args.preset, vae_is):
            raise media.UserError(f"{last}: a run of another preset or VAE; use --fresh or another "
                                  "--out")
        training.load_weights(model, held["model"], last)
        training.load_optimisers(optimisers, held["optimisers"], last)
        ema.weights, step, spent = held["ema"], held["step"], held["minutes"]
    budget = training.Budget(args.steps, args.minutes, spent)
    objective = diffusion.Objective(model)
    net = training.distribute(objective, processes)

    # ---- data ----
    make = functools.partial(data.toy_motion, seed=args.seed, seconds=CLIP_SECONDS,
                             size=vae.config.size, kind=args.speech, weights=args.wav2vec2)
    source = Clips(args.data, vae.config.size, args.speech, args.wav2vec2) if args.data else \
        data.GrowingPool(make, min(FIRST_CLIPS, args.clips), CLIPS_A_STEP, args.clips,
                         args.workers)
    motions = Motions(source, vae, device, held.get("mean"), held.get("std"))
    share = range(args.batch * processes.rank // processes.world,
                  args.batch * (processes.rank + 1) // processes.world)

    def prepare(at):
        motions.grow(at)
        keys = [np.random.default_rng((args.seed, at, k)) for k in share]
        drawn = collate([motions.example(key, recipe["frames"]) for key in keys])
        lengths = drawn["mask"].sum(1).tolist()
        return drawn | diffusion.draw_batch(args.seed, at, share, lengths, config)
    batches = training.ahead(prepare, step, device)
    first = next(batches)                                   # the pool is there: measure its latents
    unseen = Unseen(vae, motions, args.speech, args.wav2vec2, device) if processes.leads else None
    log = curves.Log(out / "log.csv", COLUMNS, step) if processes.leads else None
    shadow = diffusion.MotionModel(config).to(device).eval()

    def report():
        """Save, draw, and let the EMA speak on unseen heads."""
        statistics = {"mean": motions.mean, "std": motions.std}
        training.save(last, statistics | {
            "preset": args.preset, "vae": vae_is, "config": asdict(config),
            "model": model.state_dict(),
            "ema": ema.weights, "step": step, "minutes": budget.spent(), "seed": args.seed,
            "optimisers": [o.state_dict() for o in optimisers]})
        training.ship(out / "motion.pt", {
            "config": asdict(config), "weights": ema.half(), "speech": args.speech, "vae": vae_is,
            "mean": motions.mean.tolist(), "std": motions.std.tolist()},
            seed=args.seed, steps=step, minutes=round(budget.spent(), 1))
        shadow.load_state_dict(ema.weights)
        made, r, gain = unseen.speak(shadow)
        media.write_image(out / "grid.png", unseen.grid(made))
        log.write(0, step=step, minutes=budget.spent(), lip_r=float(r), lip_gain=float(gain))
        log.flush()
        curves.draw_curves(out / "log.csv", out / "curve.png", COLUMNS[:6], args.compare,
                           "diffusion")
        tqdm.write(f"step {step}: {budget.spent():.1f} min, {len(motions.items)} clips, lips of "
                   f"unseen heads r {r:.3f}, gain {gain:.2f} (read off the latents); "
                   f"{log.pace('frames')}")

    # ---- the loop ----
    with training.progress("motion", processes.leads) as bar, training.stop_on_signals() as stop, \
            contextlib.closing(source), contextlib.closing(batches), \
            training.together(processes, last):
        while True:
            used, stopping = training.agree([budget.share(step), float(bool(stop))], processes)
            done = used >= 1 or stopping
            if processes.leads and (done or (step and step % args.every == 0)):
                report()
            if done:
                break
            waited = time.monotonic()
            drawn, first = first or next(batches), None
            drawn = {k: v.to(device, precision if v.is_floating_point() else None)
                     for k, v in drawn.items()}
            waited = time.monotonic() - waited
            factor = training.rate_factor(recipe["schedule"], step, used, args.warmup)
            training.set_rate(optimisers, factor)
            torch.manual_seed(training.generator(args.seed, step, processes.rank).initial_seed())
            frames = torch.stack([mask.sum() for mask in objective.counted(drawn)])
            frames = training.total(frames, processes).clamp(min=1)       # of the whole batch
            terms = collections.defaultdict(float)
            for optimiser in optimisers:
                optimiser.zero_grad(set_to_none=True)
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
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not torch.isfinite(norm):
                raise media.UserError(f"step {step}: the loss is not a number any more; {last} "
                                      "holds the last good weights; lower --lr")
            for optimiser in optimisers:
                optimiser.step()
            ema.update(model, step)

            # once a step: log
            step += 1
            terms = training.averaged(terms, processes)
            if processes.leads:
                log.write(int(frames[1]), step=step - 1, minutes=budget.spent(), norm=norm.item(),
                          lr=args.lr * factor, wait=waited, **terms)
                bar.set_postfix(step=step, loss=f"{terms['loss']:.3f}", refresh=False)
                bar.update(100 * budget.share(step) - bar.n)
    if processes.leads:
        log.close()
        print(out / "motion.pt")


if __name__ == "__main__":
    media.run(main)
