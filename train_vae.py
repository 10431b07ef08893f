"""Trains the VAE (sec. 4.2): frame j from the appearance of frame i and the motion of j.

    python train_vae.py                                  the toy preset on rendered heads
    python train_vae.py --data runs/toys --minutes 60    clips at rest
    torchrun --nproc_per_node 8 train_vae.py --preset small --data clips

The same command again goes on where it stopped. OUT gets last.pt (everything), vae.pt (the EMA in
fp16), log.csv, curve.png and grid.png (portrait, landmark picture, result, truth of unseen heads).

Departures from the paper: the `toy` preset has a recipe of its own (Muon); regions of the face are
weighted; beside L1 stands a square; the adversary starts in the last quarter, its discriminator a
little earlier; glasses and beards are more frequent than among held-out heads.
"""
from __future__ import annotations

import collections
import contextlib
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import curves
import data
import media
import optim
import toy
import training
import vae as vaes
from landmarks import EYE_LEFT, EYE_RIGHT, MOUTH, draw, region_box

# B.1: Adam at this rate, constant; the rest is ours
PAPER = {"optimiser": "adam", "lr": 4.5e-6, "betas": (.5, .9), "schedule": "constant", "batch": 8,
         "warmup": 200}
RECIPES = {"toy": {"optimiser": "muon", "lr": 1e-3, "betas": (.9, .99), "schedule": "trapezoid",
                   "batch": 8, "warmup": 200}, "small": PAPER, "base": PAPER, "large": PAPER}
# how much of the loss each region gets beside the whole picture's 1
REGIONS = {"face": (slice(0, 70), .8), "mouth": (MOUTH, .2),
           "eye_left": (EYE_LEFT, .18), "eye_right": (EYE_RIGHT, .18),
           "brow_left": (slice(17, 22), .05), "brow_right": (slice(22, 27), .05)}
ADVERSARY_AT, DISCRIMINATOR_AT = .75, .70       # shares of the budget
ADVERSARY_WEIGHT, SQUARE_WEIGHT = .1, 10.0
COLUMNS = ["loss", "l1", "perceptual", "kl", "adversary", "discriminator", "real", "fake",
           "psnr", "unseen", "lr", "wait"]


def arguments(argv):
    p = media.ArgumentParser(__doc__)
    what = p.add_argument_group("what to train, on what")
    what.add_argument("--preset", choices=vaes.PRESETS, default="toy", help="size of the model")
    what.add_argument("--data", metavar="FOLDER", help="clips at rest instead of rendered heads")
    what.add_argument("--identities", type=int, default=4000, help="rendered heads")
    what.add_argument("--frames", type=int, default=8, help="pictures of each")
    what.add_argument("--overfit", action="store_true", help="learn one clip by heart, 300 steps: "
                      "what cannot do that cannot learn")
    what.add_argument("--adversary", choices=("nonsaturating", "literal", "hinge", "none"),
                      default="nonsaturating", help="form of eq. 3 for the generator")
    what.add_argument("--kl", type=float, default=1e-6, help="weight of the KL term")
    what.add_argument("--lpips", metavar="FOLDER", help="where VGG16's and LPIPS's weights are")
    training.add_loop_arguments(p, "runs/vae", "render")
    args = p.parse_args(argv)
    args.out = args.out or ("runs/overfit" if args.overfit else "runs/vae")
    if args.overfit:
        args.adversary = "none"
        args.steps = 300 if args.steps is None and args.minutes is None else args.steps
    training.settle(args, RECIPES[args.preset], minutes=60.0)
    curves.check_compare(args.compare, "vae")
    return args, RECIPES[args.preset]


def region_weights(landmarks, size):
    """The weight map of a batch. landmarks (B, 70, 2) -> (B, 1, size, size)."""
    points = landmarks.cpu().numpy()
    boxes = np.stack([region_box(points, region) for region, _ in REGIONS.values()], 1)
    shares = torch.tensor([share for _, share in REGIONS.values()])
    return vaes.weight_map(torch.from_numpy(boxes).to(landmarks.device), shares, size)


def latent_noise(config, seed, step, samples):
    """One draw a picture, keyed by its global index: (B, latent, h, w) for z_a and z_m."""
    def one(k, factor):
        side = config.size // factor
        draws = training.generator(seed, step, k, factor)
        return torch.randn(config.latent, side, side, generator=draws)
    return [torch.stack([one(k, f) for k in samples])
            for f in (config.appearance_factor, config.motion_factor)]


class Pairs:
    """Pairs of frames: PSNR of the second from the first, and the picture that shows what it means.

    pictures (n, 2, H, W, 3) uint8, points of the second (n, 70, 2).
    """

    def __init__(self, pictures, points):
        self.reference, self.target = (media.to_float(pictures[:, k]) for k in (0, 1))
        self.x_m = media.to_float(np.stack([draw(p, pictures.shape[-2]) for p in points]))

    @classmethod
    def unseen(cls, size, count=32):
        """Heads that training never meets."""
        made = [toy.make_portraits(toy.HELD_OUT + 500_000 + k, 2, size) for k in range(count)]
        return cls(np.stack([m[0] for m in made]), [m[1][1] for m in made])

    @classmethod
    def seen(cls, pictures, points):
        """The frames of one clip, each from the one before: (F, H, W, 3), (F, 70, 2)."""
        return cls(np.stack([np.roll(pictures, 1, 0), pictures], 1), points)

    @torch.no_grad()
    def reconstruct(self, model, device):
        parts = [model(a.to(device), m.to(device))[0].cpu()
                 for a, m in zip(self.reference.split(8), self.x_m.split(8))]
        return torch.cat(parts).clamp(-1, 1)

    def psnr(self, x_hat):
        return float(np.mean([vaes.psnr(a, b) for a, b in zip(x_hat, self.target)]))

    def grid(self, x_hat, count=16):
        rows = torch.stack([self.reference, self.x_m, x_hat, self.target], 1)[:count]
        return media.grid(media.to_uint8(rows.flatten(0, 1)), 8)


def perceptual_term(folder, device, precision, tell):
    """LPIPS, or None where its weights are not at hand; UserError where they are none."""
    try:
        lpips = vaes.find_lpips(folder)
    except Exception as error:                          # unpickling raises a dozen kinds
        raise media.UserError(f"{folder or 'torch hub'}: not the public weights of VGG16 and LPIPS "
                              f"({' '.join(str(error).split())[:100]}); copy them again") from error
    if folder and lpips is None:
        raise media.UserError(f"--lpips {folder}: wants {' and '.join(vaes.LPIPS.FILES)}")
    if tell:
        print("perceptual term: " + ("LPIPS" if lpips else "differences of neighbouring pixels (no "
              f"{' and '.join(vaes.LPIPS.FILES)} in torch hub's cache)"))
    return lpips and lpips.to(device, precision)


@training.together()
def main(argv=None):
    # ---- arguments, device, processes ----
    args, recipe = arguments(argv)
    processes = training.start_processes(args.device)
    device, dtype = processes.device, training.pick_dtype(args.dtype, processes.device)
    precision = torch.promote_types(dtype, torch.float32)                 # of weights and data
    samples = processes.samples(args.batch, args.accumulate)
    out, last = Path(args.out), Path(args.out) / "last.pt"
    config = vaes.PRESETS[args.preset]

    # ---- model, EMA, optimisers ----
    torch.manual_seed(args.seed)
    layout = {"dtype": precision, "memory_format": torch.channels_last}
    model = vaes.VAE(config).to(device, **layout)
    judge = vaes.Discriminator(config.width // 2).to(device, **layout)
    perceptual = perceptual_term(args.lpips, device, precision, processes.leads)
    optimisers = optim.make_optimisers(model, args.optimiser, args.lr, recipe["betas"])
    judge_optimisers = optim.make_optimisers(judge, "adam", args.lr / 2, (.5, .9))

    # ---- start or go on ----
    if args.init:
        start, _ = training.load_model(vaes.VAE, vaes.VAEConfig, args.init)
        training.load_weights(model, start.state_dict(), args.init)
    ema = optim.Ema(model)
    step, spent, _ = training.resume(
        last, {"model": model, "judge": judge}, optimisers + judge_optimisers, ema,
        same={"preset": args.preset, "seed": args.seed}, fresh=args.fresh)
    budget = training.Budget(args.steps, args.minutes)
    net, judge_net = (training.distribute(m, processes) for m in (model, judge))

    # ---- data ----
    dataset = data.clip_frames(args.data, config.size) if args.data else data.toy_frames(
        args.seed, 1 if args.overfit else args.identities, args.frames, config.size, args.workers)

    def prepare(at):
        dataset.grow(at)
        drawn = data.batch(dataset, args.seed, at, samples)
        drawn["noise_a"], drawn["noise_m"] = latent_noise(config, args.seed, at, samples)
        return drawn
    batches = training.ahead(prepare, step, device)
    shadow = vaes.VAE(config).to(device, memory_format=torch.channels_last).eval()

    def report():
        """Measure the EMA, draw, and save."""
        shadow.load_state_dict(ema.weights)
        x_hat = pairs.reconstruct(shadow, device)
        unseen = optim.check_finite(pairs.psnr(x_hat), step, last)
        log.write(0, step=step, minutes=budget.spent(), unseen=unseen)
        log.flush()
        state = {"preset": args.preset, "config": asdict(config), "model": model.state_dict(),
                 "judge": judge.state_dict(), "ema": ema.weights, "step": step,
                 "minutes": budget.spent(), "seed": args.seed,
                 "optimisers": [o.state_dict() for o in optimisers + judge_optimisers]}
        training.save(last, state)
        training.ship(out / "vae.pt", {"config": asdict(config), "weights": ema.half()},
                      seed=args.seed, steps=step, minutes=round(budget.spent(), 1))
        media.write_image(out / "grid.png", pairs.grid(x_hat))
        curves.draw_curves(out / "log.csv", out / "curve.png", COLUMNS[:6] + ["psnr", "unseen"],
                           args.compare, "vae")
        tqdm.write(f"step {step}: {budget.spent():.1f} min, PSNR on "
                   f"{'its own clip' if args.overfit else 'unseen heads'} "
                   f"{unseen:.2f} dB; {log.pace('pictures')}")

    # ---- the loop ----
    with training.progress("VAE", processes.leads) as bar, training.stop_on_signals() as stop, \
            contextlib.closing(dataset), contextlib.closing(batches):
        dataset.grow(step)
        budget.begin(spent)                                 # what is made again was paid for
        if args.fresh:
            last.unlink(missing_ok=True)
        log = curves.Log(out / "log.csv", COLUMNS, step) if processes.leads else None
        if args.overfit:
            del dataset.pictures[1:], dataset.landmarks[1:]
            pairs = Pairs.seen(dataset.pictures[0], dataset.landmarks[0])
        elif processes.leads:
            pairs = Pairs.unseen(config.size)
        adversary_on = args.adversary == "none" or budget.share(step) >= ADVERSARY_AT
        while True:
            share, stopping = training.agree([budget.share(step), float(bool(stop))], processes)
            done = share >= 1 or stopping
            turning = share >= ADVERSARY_AT and not adversary_on          # PSNR before and after
            adversary_on |= turning
            if processes.leads and (done or turning or (step and step % args.every == 0)):
                report()
            if done:
                break
            waited = time.monotonic()
            drawn = {k: v.to(device, precision) for k, v in next(batches).items()}
            waited = time.monotonic() - waited
            factor = optim.rate_factor(recipe["schedule"], step, share, args.warmup)
            optim.set_rate(optimisers + judge_optimisers, factor)
            has_judge = args.adversary != "none" and share >= DISCRIMINATOR_AT
            terms, fakes = collections.defaultdict(float), []            # what the log gets

            # 1) generator: E_A, E_M, D
            judge.requires_grad_(False)
            for k in range(args.accumulate):
                net.require_backward_grad_sync = k == args.accumulate - 1    # DDP: once a step
                part = {n: v.chunk(args.accumulate)[k] for n, v in drawn.items()}
                weight = region_weights(part["landmarks"], config.size)
                with training.autocast(device, dtype):
                    x_hat, divergence = net(part["reference"], part["x_m"], part["noise_a"],
                                            part["noise_m"])
                target = part["target"]
                pixel = vaes.l1(x_hat, target, weight)
                felt = perceptual(x_hat, target).mean() if perceptual else \
                    vaes.gradient_l1(x_hat, target, weight)
                square = vaes.l2(x_hat, target, weight)
                reconstruction = pixel + SQUARE_WEIGHT * square + felt
                loss = reconstruction + args.kl * divergence              # eq. 4
                parts = {"l1": pixel, "perceptual": felt, "kl": divergence}
                if has_judge and adversary_on:
                    with training.autocast(device, dtype):
                        fooled = vaes.generator_loss(judge(x_hat), args.adversary)
                    if k == 0:                                            # the first part speaks
                        balance = vaes.adaptive_weight(                   # for the whole batch
                            reconstruction, fooled, model.last_layer,
                            lambda g: training.total(g, processes) / processes.world)
                    loss = loss + ADVERSARY_WEIGHT * balance * fooled     # eq. 3 and 4
                    parts["adversary"] = fooled
                (loss / args.accumulate).backward()
                fakes.append(x_hat.detach())
                for name, value in (parts | {"loss": loss}).items():
                    terms[name] += value.detach() / args.accumulate
            optim.update(model, optimisers, step, last, ema=ema)

            # 2) discriminator
            if has_judge:
                judge.requires_grad_(True)
                with training.autocast(device, dtype):
                    both = judge_net(torch.cat([drawn["target"], *fakes]))
                real, fake = both.chunk(2)
                verdict = vaes.discriminator_loss(real, fake, args.adversary)
                verdict.backward()
                optim.update(judge, judge_optimisers, step, last, most=math.inf)
                terms |= {"discriminator": verdict.detach(), "real": real.detach().mean(),
                          "fake": fake.detach().mean()}

            # once a step: log
            terms["psnr"] = vaes.psnr(torch.cat(fakes), drawn["target"])
            terms = training.averaged(terms, processes)
            step += 1
            if processes.leads:
                log.write(args.batch, step=step - 1, minutes=budget.spent(), lr=args.lr * factor,
                          wait=waited, **terms)
                bar.set_postfix(step=step, loss=f"{terms['loss']:.3f}", refresh=False)
                bar.update(100 * budget.share(step) - bar.n)
    if processes.leads:
        log.close()
        print(out / "vae.pt")


if __name__ == "__main__":
    media.run(main)
