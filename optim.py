"""How weights move: Adam and Muon, learning rates, and the running average of the weights.

Departures from the paper: it trains with Adam alone; the `toy` presets use Muon, a step along the
nearest orthogonal matrix of the momentum.
"""
from __future__ import annotations

import collections
import math

import torch

import media


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix steps are orthogonalised, for hidden kernels (out, in, ...).

    The step is lr * 0.2 sqrt(max(rows, columns)) * UV^T of the Nesterov momentum's SVD, found in
    `dtype`, or in the kernel's own; kernels of one shape go together.
    """

    def __init__(self, parameters, lr=2e-3, momentum=.95, dtype=None):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = collections.defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    matrix = p.grad.lerp(buffer, group["momentum"]).reshape(len(p), -1)
                    alike[matrix.shape].append((p, matrix))
            for shape, held in alike.items():
                updates = orthogonalise(torch.stack([matrix for _, matrix in held]), self.dtype)
                for (p, _), update in zip(held, updates):
                    p.add_(update.reshape(p.shape).to(p.dtype),
                           alpha=-group["lr"] * .2 * math.sqrt(max(shape)))


def orthogonalise(matrices, dtype=None, steps=5):
    """Nearest semi-orthogonal matrices, roughly: Newton-Schulz. (n, rows, columns) -> same."""
    a, b, c = 3.4445, -4.7750, 2.0315     # a quintic that pulls singular values to about 1
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).to(dtype or matrices.dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        q = b * gram + c * (gram @ gram)
        q.diagonal(dim1=1, dim2=2).add_(a)                      # q = a I + b G + c G^2
        x = q @ x
    return x if wide else x.mT


def make_optimisers(model, kind, lr, betas=(.9, .99), muon=2.0, dtype=None):
    """The optimisers of a model: [Adam], or [Muon, Adam] with Muon on its hidden kernels.

    Hidden: matrices and convolutions with at least 32 channels on both sides, unless their name
    begins with one in `model.adam_only`. Muon's rate is `muon` times Adam's, `dtype` its own.
    """
    hidden, rest = [], []
    skip = getattr(model, "adam_only", ())
    for name, p in model.named_parameters():
        is_hidden = kind == "muon" and p.ndim >= 2 and min(p.shape[:2]) >= 32 \
            and not any(name.startswith(s) for s in skip)
        (hidden if is_hidden else rest).append(p)
    chosen = [torch.optim.Adam(rest, lr=lr, betas=betas)]
    if hidden:
        chosen.insert(0, Muon(hidden, lr=muon * lr, dtype=dtype))
    for optimiser in chosen:
        for group in optimiser.param_groups:
            group["base_lr"] = group["lr"]
    return chosen


def set_rate(optimisers, factor):                               # times every base learning rate
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["base_lr"] * factor


def rate_factor(schedule, step, share, warmup):
    """The schedule's factor at a step; `share` in [0, 1] is how much of the budget is spent.

    "constant" (the paper's VAE), "inverse_sqrt" (its diffusion model), or "trapezoid": constant,
    then linear to zero over the last third. All warm up over `warmup` steps.
    """
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if schedule == "inverse_sqrt":
        return min(warm, math.sqrt(max(warmup, 1) / (step + 1)))
    return warm * (min(1.0, 3 * (1 - share)) if schedule == "trapezoid" else 1.0)


def update(model, optimisers, step, last, most=1.0, ema=None):
    """Clip the gradient to norm `most`, step, clear it, average the weights. Returns the norm;
    UserError where it is not a number."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    check_finite(norm, step, last)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()
    if ema:
        ema.update(model, step)
    return norm.item()


def check_finite(value, step, last):
    """The value; UserError, before anything is saved, where it is not a number."""
    if not math.isfinite(value):
        raise media.UserError(f"step {step}: the loss is not a number any more; {last} holds the "
                              "last good weights, if any were saved; try half the --lr")
    return value


class Ema:
    """A running average of a model's weights: `weights` is a state dict."""

    def __init__(self, model, decay=.995):
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model, step):
        decay = min(self.decay, (1 + step) / (10 + step))       # the first steps count for little
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)

    def half(self):                                             # what ships
        return {k: v.half().cpu() if v.is_floating_point() else v.cpu()
                for k, v in self.weights.items()}
