"""The three training loops: stopped, killed, split over processes, cut into parts, out of room.

Small models, eight steps on one thread a process; the VAE's last two are with its adversary.
"""
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import curves
import training

ROOT = Path(__file__).resolve().parent.parent
LOOPS = ("detector", "vae", "diffusion")
# runs a script with a small model; PREPARE holds what else is to be done before
RUN = f"""
import os, resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
torch.set_num_threads(1)
import detector, diffusion, media, train_diffusion, train_vae, training, vae
vae.PRESETS["toy"] = vae.VAEConfig(width=32, layers=1, depth=1)
diffusion.PRESETS["toy"] = diffusion.MotionConfig(width=32, layers=1, token_width=32, pose_width=32)
train_vae.Judged.unseen.__func__.__defaults__ = train_diffusion.Unseen.__init__.__defaults__ = (2,)
exec(os.environ.get("PREPARE", ""))
scripts = {{"vae": train_vae, "diffusion": train_diffusion, "detector": detector}}
media.run(scripts[sys.argv[1]].main, sys.argv[2:])
"""
# the process of a rank sends itself a signal in the middle of a step
SIGNAL = """
real = training.rate_factor
def rate_factor(schedule, step, *rest):
    if step == {step} and os.environ["RANK"] == "{rank}":
        os.kill(os.getpid(), signal.{name})
    return real(schedule, step, *rest)
training.rate_factor = rate_factor
"""
FINE = ["--dtype", "fp64", "--warmup", "2"]
FLAGS = {"vae": ["--identities", "3", "--frames", "3", *FINE],
         "diffusion": ["--vae", training.SHIPPED / "vae.pt", "--clips", "3", *FINE],
         "detector": ["--identities", "4"]}
STEPS = ["--steps", "8"]


def train(script, out, *flags, world=1, prepare="", expect=(0,)):
    """Run a loop on `world` processes; `expect` are their exit statuses. Returns their stderr."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-c", RUN, script, *FLAGS[script], "--out", out, "--workers", "0",
             "--device", "cpu", "--batch", "6", "--every", "2", *flags]
    settings = {"WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port,
                "PREPARE": prepare}
    started = []
    for rank in range(world):
        env = os.environ | {k: str(v) for k, v in (settings | {"RANK": rank}).items()}
        started.append(subprocess.Popen([str(w) for w in words], cwd=ROOT, env=env, text=True,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    told = [process.communicate(timeout=240)[1] for process in started]
    assert tuple(p.returncode for p in started) == tuple(expect) * (world // len(expect)), told
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


@pytest.mark.parametrize("script", LOOPS)
def test_a_run_that_was_stopped_or_killed_equals_one_that_was_not(script, whole, tmp_path):
    """Bit for bit: SIGTERM in step 2 (saves), kill -9 in step 7 (goes back to step 6), then the end."""
    train(script, tmp_path, *STEPS, prepare=SIGNAL.format(step=2, rank=0, name="SIGTERM"))
    assert training.load(tmp_path / "last.pt")["step"] == 3
    train(script, tmp_path, *STEPS, prepare=SIGNAL.format(step=7, rank=0, name="SIGKILL"), expect=[-9])
    assert training.load(tmp_path / "last.pt")["step"] == 6
    train(script, tmp_path, *STEPS)
    assert apart(whole(script), tmp_path) == (0, 0)


@pytest.mark.parametrize("script", ["vae", "diffusion"])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_one(script, world, whole, tmp_path):
    """Two and three processes do what one does: losses and weights within 1e-9."""
    train(script, tmp_path, *STEPS, world=world)
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


@pytest.mark.parametrize("worlds", [(2, 1), (1, 2)])
def test_a_checkpoint_goes_on_with_more_or_fewer_processes(worlds, whole, tmp_path):
    """Seven steps of the VAE on two processes, the last on one, and the other way round."""
    before, after = worlds
    train("vae", tmp_path, *STEPS, world=before, prepare=SIGNAL.format(step=6, rank=0, name="SIGINT"))
    assert training.load(tmp_path / "last.pt")["step"] == 7
    train("vae", tmp_path, *STEPS, world=after)
    assert max(apart(whole("vae"), tmp_path)) < 1e-9


def test_when_one_process_dies_the_others_say_so_and_the_run_goes_on(whole, tmp_path):
    """Rank 1 is killed in step 5: rank 0 ends in one line; the same command ends as if it had not."""
    told = train("diffusion", tmp_path, *STEPS, world=2, expect=[2, -9],
                 prepare=SIGNAL.format(step=5, rank=1, name="SIGKILL"))
    line = told[0].strip().splitlines()[-1]
    assert line.startswith("error: process 0: another process") and "Traceback" not in told[0]
    assert training.load(tmp_path / "last.pt")["step"] == 4
    train("diffusion", tmp_path, *STEPS, world=2)
    assert max(apart(whole("diffusion"), tmp_path)) < 1e-9


@pytest.mark.parametrize("script", LOOPS)
def test_a_full_disk_keeps_the_last_checkpoint(script, tmp_path):
    """When files cannot grow past 100 kB, the run ends in one line and last.pt stays what it was."""
    train(script, tmp_path, *STEPS, prepare=SIGNAL.format(step=1, rank=0, name="SIGTERM"))
    before = (tmp_path / "last.pt").read_bytes()
    told, = train(script, tmp_path, *STEPS, expect=[2],
                  prepare="resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))")
    assert told.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'last.pt'}")
    assert "Traceback" not in told and (tmp_path / "last.pt").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("script", LOOPS)
def test_a_loss_that_is_not_a_number_is_not_saved(script, tmp_path):
    """A learning rate of 1e300 ends in a message; the checkpoint before it is kept, and goes on."""
    train(script, tmp_path, *STEPS, prepare=SIGNAL.format(step=1, rank=0, name="SIGTERM"))
    before = (tmp_path / "last.pt").read_bytes()
    told, = train(script, tmp_path, *STEPS, "--lr", "1e300", expect=[2])
    assert "not a number" in told.strip().splitlines()[-1]
    assert (tmp_path / "last.pt").read_bytes() == before
    train(script, tmp_path, *STEPS)
    assert len(losses_of(tmp_path)) == 8
