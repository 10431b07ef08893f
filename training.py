"""What the training loops share: processes, flags, budget, checkpoints and going on from them.

No Trainer: each loop stays readable from top to bottom in its own script and calls these. The same
command runs in one process or under `torchrun` (gloo on a CPU, nccl on GPUs).
"""
from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
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

    def samples(self, batch, parts=1):
        """The numbers of this process's samples in a batch that is also cut into `parts`."""
        if batch % (self.world * parts):
            raise media.UserError(f"--batch {batch}: wants a multiple of {self.world} processes "
                                  f"times --accumulate {parts}")
        size = batch // self.world
        return range(self.rank * size, (self.rank + 1) * size)


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
        device = torch.zeros(1, device=name).device
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"{device.type} computes nothing")
        return device
    except (RuntimeError, AssertionError) as error:
        raise media.UserError(f"--device {name}: not available here; try --device cpu") from error


def pick_dtype(name, device):
    """bf16 for "auto" where the hardware is fast at it, else fp32. Returns the autocast dtype."""
    if name == "auto":
        cpu = [getattr(torch.cpu, f"_is_{n}_supported", None) for n in ("amx_tile", "avx512_bf16")]
        fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else \
            device.type == "cpu" and any(supported and supported() for supported in cpu)
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
def together():
    """One line, on every process that is left, when another one has died. Decorates `main`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        print(f"error: process {os.environ.get('RANK', 0)}: another process of this run has ended; "
              "the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(2)                 # gloo's threads cannot be ended in an orderly way any more
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def generator(*key):
    """A torch generator keyed by whole numbers, such as (seed, step, global sample index)."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


# ---- flags ---------------------------------------------------------------------------------------

def add_arguments(p, out, workers, dtypes=("auto", "bf16", "fp32")):
    """The flags that the loops share. Returns their group."""
    run = p.add_argument_group("the run")
    run.add_argument("--out", help=f"folder of the run (default: {out}); again: go on")
    run.add_argument("--fresh", action="store_true", help="start over in OUT")
    run.add_argument("--steps", type=int, help="budget in steps (resumes bit by bit)")
    run.add_argument("--minutes", type=float, help="budget in minutes, all parts together")
    run.add_argument("--every", type=int, default=500, help="steps between checkpoints and grids")
    run.add_argument("--batch", type=int, help="samples a step, over all processes")
    run.add_argument("--lr", type=float, help="Adam's learning rate; Muon's grows with it")
    run.add_argument("--seed", type=int, default=0, help="of weights, data and draws")
    run.add_argument("--workers", type=int, help=f"processes that {workers}")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    run.add_argument("--dtype", choices=dtypes, default="auto")
    return run


def add_loop_arguments(p, out, workers):
    """The flags of the VAE's and the diffusion model's loop."""
    run = add_arguments(p, out, workers, ("auto", "bf16", "fp32", "fp64"))
    run.add_argument("--init", metavar="FILE", help="start from these weights")
    run.add_argument("--compare", metavar="FILE", help="draw curve.png over these curves, such as "
                     "results/toy_curves.csv")
    run.add_argument("--accumulate", type=int, help="parts a batch is cut into")
    run.add_argument("--optimiser", choices=("muon", "adam"), help="default: the preset's")
    run.add_argument("--warmup", type=int, help="steps of rising learning rate")


def settle(args, recipe, minutes):
    """Fill in the recipe and the default budget; UserError for what makes no sense."""
    for name, value in ({"accumulate": 1} | recipe).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.steps is None and args.minutes is None:
        args.minutes = minutes
    Budget(args.steps, args.minutes)
    if min(args.batch, args.accumulate, args.every) <= 0 or not 0 < args.lr <= 1 or \
            min(args.seed, args.warmup) < 0:
        raise media.UserError("--batch, --accumulate and --every must be above zero, --lr above 0 "
                              "and at most 1, --seed and --warmup not negative")


# ---- budget and interruption ---------------------------------------------------------------------

class Budget:
    """How long a run lasts: `steps`, or `minutes` summed over all its resumed parts."""

    def __init__(self, steps=None, minutes=None):
        if (steps is None) == (minutes is None) or not (minutes if steps is None else steps) > 0:
            raise media.UserError("give either --steps or --minutes, above zero")
        self.steps, self.minutes = steps, minutes
        self.start = time.monotonic()

    def begin(self, spent):
        """Set the clock of a resumed run, which has made its data again, to what was spent."""
        if spent:
            self.start = time.monotonic() - 60 * spent

    def spent(self):
        return (time.monotonic() - self.start) / 60             # minutes

    def share(self, step):                                      # of what there is, 0..1
        return min(1.0, step / self.steps if self.steps else self.spent() / self.minutes)


@contextlib.contextmanager
def stop_on_signals():
    """Yields a list, empty until SIGINT or SIGTERM arrives: the loop then saves and ends. Another
    signal ends at once, but not within 2 s: torchrun passes on what its processes have had too."""
    wanted = []

    def note(*_):
        wanted.append(time.monotonic())
        if wanted[-1] - wanted[0] > 2:
            raise KeyboardInterrupt
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
        yield from map(make, itertools.count(first))            # without end
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
    for left in Path(path).parent.glob(f".{Path(path).stem}.[0-9]*{Path(path).suffix}"):
        left.unlink()                           # by a process that was killed while it saved


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
    if not os.path.isfile(path):
        raise media.UserError(f"{path}: no such checkpoint; train one first")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__} is in it")
    except Exception as error:                           # unpickling raises a dozen kinds
        reason = str(error).split("\n")[0][:120]
        raise media.UserError(f"{path}: not a checkpoint of this project, or cut short "
                              f"({reason}); copy or train it again") from error
    return state


def load_weights(model, weights, path):
    """Fill a model; UserError when the file is of another shape."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise media.UserError(f"{path}: its weights do not fit this model ({reason}); copy or "
                              "train it again") from error
    return model


def load_model(kind, config, path, device="cpu"):
    """A shipped model from dict(config, weights), ready to use: (model in fp32, the dict)."""
    held = load(path)
    try:
        model = kind(config(**held["config"]))
        weights = {k: v.float() if v.is_floating_point() else v for k, v in held["weights"].items()}
    except Exception as error:                           # sizes of a foreign config can be anything
        reason = " ".join(str(error).split())[:120]
        raise media.UserError(f"{path}: not the weights of a {kind.__name__} ({reason}); copy or "
                              "train it again") from error
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


def resume(last, parts, optimisers, ema, same, fresh=False):
    """Fill all from a checkpoint, if there is one: (step, minutes, the checkpoint or {}).

    parts: {key in the checkpoint: model}; `same`: what the checkpoint must agree on. With `fresh`
    the checkpoint is not looked at.
    """
    if fresh or not os.path.exists(last):
        return 0, 0.0, {}
    held = load(last)
    if {key: held.get(key) for key in same} != same:
        raise media.UserError(f"{last}: of another {' or '.join(same)}; --fresh or a new --out")
    for key, model in parts.items():
        load_weights(model, held[key], last)
    load_optimisers(optimisers, held["optimisers"], last)
    ema.weights = {name: held["ema"][name].to(v) for name, v in ema.weights.items()}
    return held["step"], held["minutes"], held
