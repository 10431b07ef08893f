"""What the training loops share: processes, optimisers, EMA, budget and checkpoints.

No Trainer: each loop stays readable from top to bottom in its own script and calls these. The same
command runs in one process or under `torchrun` (gloo on a CPU, nccl on GPUs).

Departures from the paper: it trains with Adam alone; the `toy` presets may use Muon (a step along
the nearest orthogonal matrix of the momentum), which on two cores saves two thirds of the time.
"""
from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import pickle
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import media

SHIPPED = Path(__file__).resolve().parent / "checkpoints" / "toy"


# ---- device and processes ------------------------------------------------------------------------

@dataclass(frozen=True)
class Processes:
    """This process among all: rank, world size, and its device. Rank 0 writes the files."""
    rank: int
    world: int
    device: torch.device

    @property
    def leads(self):
        return self.rank == 0


def start_processes(device="auto"):
    """Join the process group that torchrun announces, or stay alone."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(rank, world, device)


def pick_device(name="auto"):
    """cuda, mps, cpu in this order for "auto"; UserError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else \
            "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise media.UserError(f"--device {name}: not available here; try --device cpu") from error


def pick_dtype(name, device):
    """bf16 for "auto" where the hardware is fast at it, else fp32. Returns the autocast dtype."""
    if name == "auto":
        cpu = [getattr(torch.cpu, f"_is_{n}_supported", bool) for n in ("amx_tile", "avx512_bf16")]
        fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else \
            device.type == "cpu" and any(supported() for supported in cpu)
        name = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[name]


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)


def distribute(model, processes):
    """The model, its gradients averaged over the processes."""
    return DistributedDataParallel(model) if processes.world > 1 else model


def agree(values, processes):
    """Rank 0's numbers, on every process: clocks and signals differ, decisions must not."""
    if processes.world > 1:
        tensor = torch.tensor(values, dtype=torch.float64, device=processes.device)
        dist.broadcast(tensor, 0)
        values = tensor.tolist()
    return values


def total(tensor, processes):
    """The sum of a tensor over all processes."""
    if processes.world > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def averaged(terms, processes):
    """A dict of scalars as floats, each the mean over all processes."""
    values = torch.tensor([float(v) for v in terms.values()], dtype=torch.float64)
    if processes.world > 1:
        values = total(values.to(processes.device), processes) / processes.world
    return dict(zip(terms, values.tolist()))


@contextlib.contextmanager
def together(processes, last):
    """UserError, on every process that is left, when another one has died."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise media.UserError(f"process {processes.rank}: another process of this run has ended; "
                              f"the same command goes on from {last}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def generator(*key, device="cpu"):
    """A torch generator keyed by whole numbers, such as (seed, step, global sample index)."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(state[0]) << 32 | int(state[1]))


# ---- optimisers ----------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum whose matrix steps are orthogonalised, for hidden kernels (out, in, ...).

    The step is lr * 0.2 sqrt(max(rows, columns)) * UV^T of the Nesterov momentum's SVD.
    """

    def __init__(self, parameters, lr=2e-3, momentum=.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                matrix = p.grad.lerp(buffer, group["momentum"]).reshape(len(p), -1)
                size = .2 * math.sqrt(max(matrix.shape))
                update = orthogonalise(matrix).view(p.shape).to(p.dtype)
                p.add_(update, alpha=-group["lr"] * size)


def orthogonalise(matrix, steps=5):
    """Nearest semi-orthogonal matrix, roughly: Newton-Schulz. (rows, columns) -> same.

    Every iterate is p(G) X for a polynomial p of the small Gram matrix G = X X^T, so the steps
    work on G alone and the wide X is multiplied twice in all.
    """
    a, b, c = 3.4445, -4.7750, 2.0315     # a quintic that pulls singular values to about 1
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T                                  # of the current iterate p x
    for k in range(steps):
        q = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        q.diagonal().add_(a)                        # q = a I + b G + c G^2
        p = q @ p if k else q
        if k < steps - 1:
            gram = q @ gram @ q
    x = p @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def make_optimisers(model, kind, lr, betas=(.9, .99), muon_lr=2e-3):
    """The optimisers of a model: [Adam], or [Muon, Adam] with Muon on its hidden kernels.

    Hidden: matrices and convolutions with at least 32 channels on both sides, one group a kernel
    (not depthwise, not an embedding), unless the module's name is in `model.not_hidden`.
    """
    hidden, rest = [], []
    skip = getattr(model, "not_hidden", ())
    for name, p in model.named_parameters():
        is_hidden = kind == "muon" and p.ndim >= 2 and min(p.shape[:2]) >= 32 \
            and not any(name.startswith(s) for s in skip)
        (hidden if is_hidden else rest).append(p)
    chosen = [torch.optim.Adam(rest, lr=lr, betas=betas)]
    if hidden:
        chosen.insert(0, Muon(hidden, lr=muon_lr))
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


# ---- budget and interruption ---------------------------------------------------------------------

class Budget:
    """How long a run lasts: `steps`, or `minutes` summed over all its resumed parts."""

    def __init__(self, steps=None, minutes=None, spent=0.0):
        if (steps is None) == (minutes is None) or (steps or minutes) <= 0:
            raise media.UserError("give either --steps or --minutes, above zero")
        self.steps, self.minutes = steps, minutes
        self.start = time.monotonic() - 60 * spent

    def spent(self):
        return (time.monotonic() - self.start) / 60             # minutes

    def share(self, step):                                      # of what there is, 0..1
        return min(1.0, step / self.steps if self.steps else self.spent() / self.minutes)


@contextlib.contextmanager
def stop_on_signals():
    """Yields a list, empty until SIGINT or SIGTERM arrives: the loop then saves and ends. A second
    signal ends at once."""
    wanted = []

    def note(number, _):
        if wanted:
            raise KeyboardInterrupt
        wanted.append(number)
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wanted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ahead(make, first, device, depth=3):
    """Yields make(first), make(first + 1), ... Beside a GPU a thread prepares the coming ones; on a
    CPU it would only take the cores from the training."""
    if device.type != "cuda":
        yield from map(make, itertools.count(first))
    pool = ThreadPoolExecutor(1)
    try:
        waiting = [pool.submit(make, first + k) for k in range(depth)]
        for step in itertools.count(first + depth):
            yield waiting.pop(0).result()
            waiting.append(pool.submit(make, step))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def progress(name, shown=True):
    """A bar of the percents of the budget."""
    return tqdm(total=100, desc=name, disable=not shown, miniters=1,
                bar_format="{desc} {n:.1f}% |{bar}| {elapsed}<{remaining} {postfix}")


# ---- checkpoints ---------------------------------------------------------------------------------

def save(path, state):
    """torch.save of plain types, beside and renamed; a failed save keeps the old file."""
    with media.replacing(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:                           # how torch reports a full disk
            raise OSError(f"cannot be saved: {error}".split("\n")[0]) from error


def ship(path, state, **told):
    """Save what others use, and beside it a JSON that says how it was made."""
    save(path, state)
    command = " ".join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]])
    with media.replacing(Path(path).with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps({"command": command} | told, indent=1) + "\n")


def fingerprint(model):
    """A few letters that tell these weights, in fp16, from all others."""
    parts = (v.detach().half().cpu().numpy().tobytes() for v in model.state_dict().values())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def load(path, device="cpu"):
    """Read a checkpoint of plain types and tensors; nothing in it can run."""
    if not Path(path).is_file():
        raise media.UserError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__} is in it")
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0][:120]
        raise media.UserError(f"{path}: not a checkpoint of this project, or cut short "
                              f"({reason})") from error
    return state


def load_weights(model, weights, path):
    """Fill a model; UserError when the file is of another shape."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise media.UserError(f"{path}: its weights do not fit this model ({reason})") from error
    return model


def load_model(kind, config, path, device="cpu"):
    """A shipped model from dict(config, weights), ready to use: (model in fp32, the dict)."""
    held = load(path)
    try:
        model = kind(config(**held["config"]))
        weights = {k: v.float() if v.is_floating_point() else v for k, v in held["weights"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise media.UserError(f"{path}: not the weights of a {kind.__name__} ({error})") from error
    model = load_weights(model, weights, path).to(device)
    return model.eval().requires_grad_(False), held


def load_optimisers(optimisers, states, path):
    """Fill optimisers, which keep their learning rates; UserError when the run had others."""
    try:
        for optimiser, state in zip(optimisers, states, strict=True):
            rates = [group["base_lr"] for group in optimiser.param_groups]
            optimiser.load_state_dict(state)
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["base_lr"] = rate
    except ValueError as error:
        raise media.UserError(f"{path}: a run with another --optimiser; use --fresh") from error
