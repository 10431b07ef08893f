"""What the loops share: Muon, EMA, schedules, budget, checkpoints."""
import os
import signal
import time

import pytest
import torch

import media
import optim
import training


def test_orthogonalise_brings_singular_values_near_one():
    """Newton-Schulz keeps the singular vectors and brings every singular value near 1."""
    matrix = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    for m in (matrix, matrix.T):
        values = torch.linalg.svdvals(optim.orthogonalise(m[None])[0].float())
        assert values.min() > .5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.T @ optim.orthogonalise(matrix[None])[0].float() @ v.T
    assert (turned - torch.diag(turned.diag())).abs().max() < .1


def test_muon_takes_hidden_kernels_and_adam_the_rest():
    """Kernels with at least 32 channels on both sides go to Muon; biases, small and named ones not."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.Conv2d(32, 64, 3),
                                torch.nn.Linear(64, 64))
    model.adam_only = ("2.",)
    muon, adam = optim.make_optimisers(model, "muon", 1e-3)
    assert [p.shape for g in muon.param_groups for p in g["params"]] == [(64, 32, 3, 3)]
    assert len(adam.param_groups[0]["params"]) == 5


def test_muon_descends():
    """Muon brings a quadratic down by ten times in sixty steps."""
    torch.manual_seed(0)
    layer, goal = torch.nn.Linear(40, 40, bias=False), torch.randn(40, 40) / 6
    muon = optim.Muon(layer.parameters(), lr=.05)
    losses = []
    for _ in range(60):
        loss = ((layer.weight - goal) ** 2).sum()
        muon.zero_grad()
        loss.backward()
        muon.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


def test_ema_is_the_running_average():
    """weights <- d weights + (1 - d) new, with d growing to its limit as (1 + n) / (10 + n)."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = optim.Ema(model, .9)
    torch.nn.init.ones_(model.weight)
    ema.update(model, 0)
    assert ema.weights["weight"].item() == pytest.approx(.9)
    ema.update(model, 10 ** 6)
    assert ema.weights["weight"].item() == pytest.approx(.91)
    assert ema.half()["weight"].dtype == torch.float16


def test_schedules():
    """Warm-up rises linearly; trapezoid falls to zero over the last third; 1e-4 falls as 1/sqrt."""
    assert optim.rate_factor("constant", 0, 0, 10) == pytest.approx(.1)
    assert optim.rate_factor("trapezoid", 99, .5, 10) == 1
    assert optim.rate_factor("trapezoid", 99, 5 / 6, 10) == pytest.approx(.5)
    assert optim.rate_factor("trapezoid", 99, 1, 10) == 0
    assert optim.rate_factor("inverse_sqrt", 399, 0, 100) == pytest.approx(.5)


def test_budget_counts_steps_or_minutes():
    """A budget is in steps or in minutes over all parts of a run, and never in both or neither."""
    assert training.Budget(steps=10).share(5) == .5
    resumed = training.Budget(minutes=2)
    resumed.begin(1)
    assert resumed.share(0) == pytest.approx(.5, abs=.01)
    for wrong in ({}, {"steps": 1, "minutes": 1}, {"steps": -1}, {"steps": 0}, {"minutes": 0},
                  {"minutes": float("nan")}):
        with pytest.raises(media.UserError):
            training.Budget(**wrong)


def test_keyed_generators():
    """The same key draws the same, another key something else."""
    draw = [torch.randn(4, generator=training.generator(*key)) for key in [(1, 2), (1, 2), (2, 1)]]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_a_signal_asks_to_stop_and_handlers_come_back(monkeypatch):
    """SIGTERM inside `with stop_on_signals()` is noted, and torchrun's echo of it; one that comes
    later ends at once; outside the old handler is back."""
    before, now = signal.getsignal(signal.SIGTERM), 100.0
    monkeypatch.setattr(training.time, "monotonic", lambda: now)
    with training.stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        now = 103.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(.05)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ahead_keeps_the_order(device):
    """Values come in the order of their steps, beside a GPU too, where they are made in advance."""
    made = []
    batches = training.ahead(lambda k: made.append(k) or k * k, 3, torch.device(device))
    assert [next(batches) for _ in range(6)] == [k * k for k in range(3, 9)]
    time.sleep(.1)
    batches.close()
    assert (len(made) > 6) == (device == "cuda")


class Harmful:
    """Pickles as a call that would make a file."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_checkpoints_hold_plain_types_and_run_nothing(tmp_path, monkeypatch):
    """A checkpoint comes back as it was; a cut one, a foreign one and one with code are refused."""
    path = tmp_path / "a.pt"
    training.save(path, {"step": 3, "weights": {"w": torch.ones(2)}})
    assert training.load(path)["step"] == 3
    whole = path.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    torch.save(Harmful(), tmp_path / "harmful.pt")
    monkeypatch.chdir(tmp_path)
    for name in ("cut.pt", "text.pt", "harmful.pt", "none.pt"):
        with pytest.raises(media.UserError, match=name):
            training.load(tmp_path / name)
    assert not (tmp_path / "harmed").exists()


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    """When the disk fills while saving, the old checkpoint is still there, and nothing beside it."""
    path = tmp_path / "a.pt"
    training.save(path, {"step": 1})

    def full(state, target):
        target.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(media.UserError, match="a.pt"):
        training.save(path, {"step": 2})
    monkeypatch.undo()
    assert training.load(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_weights_that_do_not_fit_are_named(tmp_path):
    """Weights of another shape end in one error that names the file."""
    with pytest.raises(media.UserError, match="x.pt"):
        training.load_weights(torch.nn.Linear(2, 2), {"weight": torch.ones(3, 3)}, "x.pt")


def test_a_run_goes_on_only_with_what_it_began_with(tmp_path):
    """Weights, EMA and step come back, in the new run's dtype; another seed or preset is refused."""
    def make(dtype):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 2).to(dtype=dtype)
        return model, optim.make_optimisers(model, "adam", 1e-3), optim.Ema(model)
    model, chosen, ema = make(torch.float64)
    last = tmp_path / "last.pt"
    training.save(last, {"model": {k: v + 1 for k, v in model.state_dict().items()}, "seed": 3,
                         "preset": "toy", "ema": ema.weights, "step": 7, "minutes": 2.5,
                         "optimisers": [o.state_dict() for o in chosen]})
    other, chosen, ema = make(torch.float32)
    step, minutes, held = training.resume(last, {"model": other}, chosen, ema, {"seed": 3})
    assert (step, minutes, held["preset"]) == (7, 2.5, "toy")
    torch.testing.assert_close(other.weight, model.weight.float() + 1)
    assert all(v.dtype == torch.float32 for v in ema.weights.values())
    with pytest.raises(media.UserError, match="another seed or preset"):
        training.resume(last, {"model": other}, chosen, ema, {"seed": 4, "preset": "toy"})
    assert training.resume(last, {}, chosen, ema, {"seed": 4}, fresh=True) == (0, 0.0, {})
    assert last.exists()                                  # until the new run's data are there


def test_an_update_clips_steps_and_clears_and_refuses_what_is_no_number(tmp_path):
    """Plain descent along the gradient cut to norm 1; a NaN gradient moves nothing."""
    model = torch.nn.Linear(1, 2, bias=False)
    before, descent = model.weight.detach().clone(), torch.optim.SGD(model.parameters(), 1.0)
    model.weight.grad = torch.tensor([[3.0], [4.0]])
    assert optim.update(model, [descent], 0, "last.pt") == pytest.approx(5)
    torch.testing.assert_close(before - model.weight, torch.tensor([[.6], [.8]]))
    assert model.weight.grad is None
    model.weight.grad = torch.full((2, 1), float("nan"))
    with pytest.raises(media.UserError, match="step 9.*not a number.*last.pt"):
        optim.update(model, [descent], 9, "last.pt")
    assert model.weight.isfinite().all()


def test_samples_of_a_process():
    """Twelve samples on three processes in two parts; a batch that cannot be cut is refused."""
    assert training.Processes(1, 3, "cpu").samples(12, 2) == range(4, 8)
    with pytest.raises(media.UserError, match="--batch 10"):
        training.Processes(0, 3, "cpu").samples(10)
