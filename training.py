"""What the training loops share: processes, optimisers, EMA, budget, checkpoints, logs and curves.

No Trainer: each loop stays readable from top to bottom in its own script and calls these. The same
command runs in one process or under `torchrun` (gloo on a CPU, nccl on GPUs).

Departures from the paper: it trains with Adam alone; the `toy` presets may use Muon (a step along
the nearest orthogonal matrix of the momentum), which on two cores saves two thirds of the time.
"""
from __future__ import annotations

import csv
import hashlib
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


def end_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


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
    cpu = [getattr(torch.cpu, f"_is_{n}_supported", bool) for n in ("amx_tile", "avx512_bf16")]
    fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else \
        device.type == "cpu" and any(supported() for supported in cpu)
    return torch.bfloat16 if name == "bf16" or (name == "auto" and fast) else torch.float32


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def distribute(model, processes):
    """Wrap a model for gradient averaging when there is more than one process."""
    if processes.world == 1:
        return model
    gpu = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=gpu)


def agree(values, processes):
    """Rank 0's numbers, on every process: clocks and signals differ, decisions must not."""
    if processes.world == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=processes.device)
    dist.broadcast(tensor, 0)
    return tensor.tolist()


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
    gram, p = x @ x.T, torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(steps):
        now = p @ gram @ p                          # the Gram matrix of the current iterate p x
        p = a * p + (b * now + c * now @ now) @ p
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


def set_rate(optimisers, factor):
    """Multiply every base learning rate by the schedule's factor."""
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
    """A running average of a model's weights: `weights` is a state dict in fp32."""

    def __init__(self, model, decay=.995):
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model, step):
        decay = min(self.decay, (1 + step) / (10 + step))       # the first steps count for little
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)

    def half(self):
        """What ships: fp16 weights on the CPU."""
        return {k: v.half().cpu() if v.is_floating_point() else v.cpu()
                for k, v in self.weights.items()}


# ---- budget and interruption ---------------------------------------------------------------------

class Budget:
    """How long a run lasts: `steps`, or `minutes` summed over all its resumed parts."""

    def __init__(self, steps=None, minutes=None, spent=0.0):
        if (steps is None) == (minutes is None):
            raise media.UserError("give either --steps or --minutes")
        if (steps or minutes) <= 0:
            raise media.UserError("--steps and --minutes must be above zero")
        self.steps, self.minutes = steps, minutes
        self.start = time.monotonic() - 60 * spent

    def spent(self):
        """Minutes so far."""
        return (time.monotonic() - self.start) / 60

    def share(self, step):
        """How much is used up, 0..1."""
        return min(1.0, step / self.steps if self.steps else self.spent() / self.minutes)


class Stop:
    """True once SIGINT or SIGTERM arrived: the loop saves and ends. A second ends at once."""

    def __init__(self):
        self.wanted, self.before = False, {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True

    def __bool__(self):
        return self.wanted


class Ahead:
    """make(step) for step after step. Beside a GPU a thread prepares the coming steps; on a CPU
    it would only take the cores from the training."""

    def __init__(self, make, first, device):
        self.make, self.next, self.waiting = make, first, []
        self.depth = 3 if device.type == "cuda" else 0
        self.pool = ThreadPoolExecutor(1)

    def __call__(self, step):
        """The value of `step`; steps must come in order."""
        if not self.depth:
            return self.make(step)
        while self.next < step + self.depth:
            self.waiting.append(self.pool.submit(self.make, self.next))
            self.next += 1
        return self.waiting.pop(0).result()

    def close(self):
        self.pool.shutdown(wait=False, cancel_futures=True)


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
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def load(path, device="cpu"):
    """Read a checkpoint of plain types and tensors; nothing in it can run."""
    if not Path(path).is_file():
        raise media.UserError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0][:120]
        raise media.UserError(f"{path}: not a checkpoint of this project, or cut short "
                              f"({reason})") from error
    if not isinstance(state, dict):
        raise media.UserError(f"{path}: not a checkpoint of this project")
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
    """Fill optimisers; UserError when the run had others."""
    try:
        for optimiser, state in zip(optimisers, states, strict=True):
            optimiser.load_state_dict(state)
    except ValueError as error:
        raise media.UserError(f"{path}: a run with another --optimiser; use --fresh") from error


# ---- logs and curves -----------------------------------------------------------------------------

class Log:
    """`log.csv`: a row a step. A resumed run drops the rows after its checkpoint."""

    def __init__(self, path, columns, step=0):
        self.path, self.columns = Path(path), ["step", "minutes", *columns]
        rows = [r for r in read_log(path) if r["step"] < step] if step else []
        with media.replacing(path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self.file = open(path, "a", newline="")
        self.flush, self.close = self.file.flush, self.file.close

    def write(self, **values):
        row = [values.get(c, "") for c in self.columns]
        csv.writer(self.file).writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row])



def read_log(path):
    """Rows of a log.csv as dicts of floats; an unwritten or torn cell is nan."""
    if not Path(path).is_file():
        return []

    def number(text):
        try:
            return float(text)
        except (TypeError, ValueError):
            return math.nan
    with open(path, newline="") as file:
        return [{k: number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def draw_curves(log_path, png, columns):
    """A small smoothed chart for each column of a log.csv, over steps."""
    rows = read_log(log_path)
    steps = np.array([row["step"] for row in rows])
    series = {}
    for name in columns:
        values = np.array([row.get(name, math.nan) for row in rows])
        kept = np.isfinite(values)
        if kept.sum() >= 2:
            series[name] = steps[kept], values[kept]
    if series:
        media.write_image(png, media.charts(series))
