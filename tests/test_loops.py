"""The three training loops: stopped, killed, split over processes, cut into parts, out of room.

Small models, eight steps on one thread a process; the VAE's last two are with its adversary.
"""
import dataclasses
import functools
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import curves
import training
import vae

pytest.importorskip("resource", reason="the loops are stopped by the signals and limits of Unix")
ROOT = Path(__file__).resolve().parent.parent
LOOPS = ("detector", "vae", "diffusion")
# processes forked from one that has imported torch start four seconds sooner than new ones
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo"])
# the process of a rank sends itself a signal in the middle of a step
SIGNAL = """
import optim, os, signal
real = optim.rate_factor
def rate_factor(schedule, step, *rest):
    if step == {step} and os.environ["RANK"] == "{rank}":
        os.kill(os.getpid(), signal.{name})
    return real(schedule, step, *rest)
optim.rate_factor = rate_factor
"""
# a learning rate beyond all bounds from step 4 on
EXPLODE = """
import optim
real = optim.rate_factor
optim.rate_factor = lambda schedule, step, *rest: 1e30 if step > 3 else real(schedule, step, *rest)
"""
# kill -9 while the checkpoint of step 6 is being written
KILLED_SAVING = """
import os, signal, torch
real = torch.save
def save(state, path):
    if state.get("step") == 6:
        path.write_bytes(b"half of a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)
    return real(state, path)
torch.save = save
"""
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))"
FINE = ["--dtype", "fp64", "--warmup", "2"]
FLAGS = {"vae": ["--identities", "3", "--frames", "3", *FINE],
         "diffusion": ["--vae", "VAE", "--clips", "4", *FINE],
         "detector": ["--identities", "4"]}
STEPS = ["--steps", "8"]
LIMIT = 240                             # seconds for a run


@functools.cache
def small_vae():
    """A file with a small VAE that has learnt nothing: all that the loop of diffusion asks for."""
    torch.manual_seed(0)
    config = vae.VAEConfig(width=32, layers=1, depth=1)
    path = Path(tempfile.mkdtemp()) / "vae.pt"
    training.save(path, {"config": dataclasses.asdict(config),
                         "weights": vae.VAE(config).state_dict()})
    return path


def one_process(script, flags, settings, prepare, told=None):
    """What a process does: run a loop with a small model, its stderr into the pipe `told`.
    `prepare` is code that is executed before."""
    import detector
    import diffusion
    import media
    import train_diffusion
    import train_vae
    os.environ.update(settings)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if told:
        os.dup2(told.fileno(), 2)
        told.close()
    torch.set_num_threads(1)
    vae.PRESETS["toy"] = vae.VAEConfig(width=32, layers=1, depth=1)
    diffusion.PRESETS["toy"] = diffusion.MotionConfig(width=32, layers=1, token_width=32,
                                                      pose_width=32, direct=True)
    train_vae.Pairs.unseen.__func__.__defaults__ = (2,)
    train_diffusion.Unseen.__init__.__defaults__ = (2,)
    train_diffusion.Unseen.grid.__defaults__ = (2, 2)
    train_diffusion.RECIPES["toy"] |= {"frames": (20, 48), "seconds": 2.0}    # some are padded
    detector.held_out_frames.__defaults__ = (4, 1, 1.0)
    exec(prepare, {})
    scripts = {"vae": train_vae, "diffusion": train_diffusion, "detector": detector}
    media.run(scripts[script].main, [str(flag) for flag in flags])


def train(script, out, *flags, world=1, prepare="", expect=(0,), torchrun=False):
    """Run a loop on `world` processes, started here or by torchrun; `expect` are the exit statuses.
    Returns what each wrote to stderr."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    own = [small_vae() if flag == "VAE" else flag for flag in FLAGS[script]]
    flags = [*own, "--out", out, "--workers", "0", "--device", "cpu", "--batch", "6", "--every", "2",
             *flags]
    if torchrun:
        code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}; " \
               f"import test_loops; test_loops.one_process({script!r}, sys.argv[1:], {{}}, {prepare!r})"
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", world,
                 "--master_port", port, "--no-python", sys.executable, "-c", code, *flags]
        done = subprocess.run([str(w) for w in words], cwd=ROOT, timeout=LIMIT, text=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        status, told = [done.returncode], [done.stderr]
    else:
        pipes, started, told = [FORKS.Pipe(duplex=False) for _ in range(world)], [], []
        for rank, (_, end) in enumerate(pipes):
            settings = {"WORLD_SIZE": str(world), "RANK": str(rank), "MASTER_ADDR": "localhost",
                        "MASTER_PORT": str(port)}
            started.append(FORKS.Process(target=one_process,
                                         args=(script, flags, settings, prepare, end)))
            started[-1].start()
            end.close()
        late = threading.Timer(LIMIT, lambda: [process.kill() for process in started])
        late.start()
        for process, (begin, _) in zip(started, pipes):
            with open(begin.fileno(), closefd=False) as text:
                told.append(text.read())
            process.join()
        assert late.is_alive(), f"not done after {LIMIT} s"
        late.cancel()
        status = [process.exitcode for process in started]
    assert status == list(expect) * (len(status) // len(expect)), told
    return told


def losses_of(run):
    """The loss of each step: rows that hold only a measurement have none."""
    losses = [row["loss"] for row in curves.read_log(run / "log.csv")]
    return [loss for loss in losses if loss == loss]


def apart(one, two):
    """The largest difference between two runs: of losses, of weights."""
    losses = [losses_of(run) for run in (one, two)]
    held = [training.load(run / "last.pt") for run in (one, two)]
    assert len(losses[0]) == len(losses[1]) == 8 and held[0]["step"] == held[1]["step"] == 8
    weights = max((held[0][part][name] - held[1][part][name]).abs().max().item()
                  for part in ("model", "judge", "ema") if part in held[0] for name in held[0][part])
    return np.abs(np.subtract(*losses)).max(), weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """script -> folder of a run of eight steps on one process, never stopped."""
    made = {}

    def of(script):
        if script not in made:
            made[script] = tmp_path_factory.mktemp("whole") / script
            train(script, made[script], *STEPS)
        return made[script]
    return of


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(script, folder) -> the folder now holds a run that SIGTERM stopped in its third step."""
    made = {}

    def into(script, folder):
        if script not in made:
            made[script] = tmp_path_factory.mktemp("stopped") / script
            train(script, made[script], *STEPS, prepare=SIGNAL.format(step=2, rank=0, name="SIGTERM"))
        shutil.copytree(made[script], folder, dirs_exist_ok=True)
        assert training.load(folder / "last.pt")["step"] == 3
    return into


@pytest.mark.parametrize("script", LOOPS)
def test_a_run_that_was_stopped_or_killed_equals_one_that_was_not(script, whole, stopped, tmp_path):
    """Bit for bit: SIGTERM in step 2 (saves), kill -9 in step 7 (goes back to step 6; the motion's
    while it saves that: back to step 4), then the end."""
    saving = script == "diffusion"
    stopped(script, tmp_path)
    train(script, tmp_path, *STEPS, expect=[-9],
          prepare=KILLED_SAVING if saving else SIGNAL.format(step=7, rank=0, name="SIGKILL"))
    assert training.load(tmp_path / "last.pt")["step"] == (4 if saving else 6)
    assert len(list(tmp_path.glob(".*"))) == saving
    train(script, tmp_path, *STEPS)
    assert apart(whole(script), tmp_path) == (0, 0) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("script", ["vae", "diffusion"])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_one(script, world, whole, tmp_path):
    """Two (by torchrun) and three processes do what one does: losses, weights within 1e-9."""
    train(script, tmp_path, *STEPS, world=world, torchrun=world == 2)
    assert max(apart(whole(script), tmp_path)) < 1e-9


@pytest.mark.parametrize("script", ["vae", "diffusion"])
def test_a_batch_cut_into_parts_equals_a_whole_one(script, whole, tmp_path):
    """--accumulate 3 changes nothing over 1e-9, the adversary off (its weight: the first part's)."""
    off, one = ["--adversary", "none"] if script == "vae" else [], whole(script)
    if off:
        one = tmp_path / "one"
        train(script, one, *STEPS, *off)
    train(script, tmp_path / "parts", *STEPS, *off, "--accumulate", "3")
    assert max(apart(one, tmp_path / "parts")) < 1e-9


@pytest.mark.parametrize("script, before, after", [("vae", 2, 1), ("diffusion", 1, 2)])
def test_a_checkpoint_goes_on_with_more_or_fewer_processes(script, before, after, whole, tmp_path):
    """Seven steps on two processes, the last on one, and the other way round."""
    train(script, tmp_path, *STEPS, world=before, prepare=SIGNAL.format(step=6, rank=0, name="SIGINT"))
    assert training.load(tmp_path / "last.pt")["step"] == 7
    train(script, tmp_path, *STEPS, world=after)
    assert max(apart(whole(script), tmp_path)) < 1e-9


@pytest.mark.parametrize("script, dies", [("diffusion", 1), ("vae", 0)])
def test_when_one_process_dies_the_others_say_so_and_the_run_goes_on(script, dies, whole, tmp_path):
    """One rank is killed in step 5: the other ends in one line; the same command ends as if it had
    not. Rank 0 is the one that saves and that the others meet at."""
    told = train(script, tmp_path, *STEPS, world=2, expect=[2, -9] if dies else [-9, 2],
                 prepare=SIGNAL.format(step=5, rank=dies, name="SIGKILL"))[1 - dies]
    line = told.strip().splitlines()[-1]
    assert line.startswith(f"error: process {1 - dies}: another process"), told
    assert "Traceback" not in told
    assert training.load(tmp_path / "last.pt")["step"] == 4
    train(script, tmp_path, *STEPS, world=2)
    assert max(apart(whole(script), tmp_path)) < 1e-9


@pytest.mark.parametrize("script", LOOPS)
@pytest.mark.parametrize("culprit", ["last.pt", "log.csv"])
def test_a_full_disk_keeps_the_last_checkpoint(script, culprit, stopped, tmp_path):
    """When files cannot grow past 100 kB, or the log by another row, the run ends in one line and
    last.pt stays what it was."""
    stopped(script, tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    room = 100_000 if culprit == "last.pt" else (tmp_path / "log.csv").stat().st_size + 20
    told, = train(script, tmp_path, *STEPS, expect=[2], prepare=FULL.format(room=room))
    assert told.strip().splitlines()[-1].startswith(f"error: {tmp_path / culprit}"), told
    assert "Traceback" not in told and (tmp_path / "last.pt").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("script, every", [("detector", 1), ("vae", 2), ("vae", 1), ("diffusion", 1)])
def test_a_loss_that_is_not_a_number_is_not_saved(script, every, whole, stopped, tmp_path):
    """A learning rate beyond all bounds in step 4 ends in a message, in step 5 or when the weights
    are to be saved before it; the checkpoint of step 4 stays what it was, and goes on."""
    stopped(script, tmp_path)
    told, = train(script, tmp_path, *STEPS, "--every", every, prepare=EXPLODE, expect=[2])
    line = told.strip().splitlines()[-1]
    assert line.startswith("error: step 5: ") and "not a number" in line, told
    held = training.load(tmp_path / "last.pt")
    assert held["step"] == 4 and all(v.isfinite().all() for v in held["model"].values())
    train(script, tmp_path, *STEPS)
    assert apart(whole(script), tmp_path) == (0, 0)
