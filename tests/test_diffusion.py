"""The VP-SDE, its samplers and the motion model, against closed forms."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import diffusion
from diffusion import LAST, VPSDE

SDE = VPSDE()
MEAN, SPREAD = .7, .5                     # data ~ N(MEAN, SPREAD^2): everything is known exactly
TINY = diffusion.MotionConfig(motion_size=4, speech_features=10, width=16, layers=2, heads=2,
                              kernel=5, token_width=8, pose_width=8, direct=True, window=24, prefix=6,
                              ahead=2)


def of(values):
    return torch.as_tensor(values, dtype=torch.float64)


def spread_at(t):
    """Standard deviation of z_t for Gaussian data."""
    alpha, sigma = SDE.marginal(of(t))
    return (alpha ** 2 * SPREAD ** 2 + sigma ** 2).sqrt()


def perfect(z, t):
    """E[z_0 | z_t] for Gaussian data: the network that a perfect training would give."""
    alpha, _ = (diffusion.like(v, z) for v in SDE.marginal(t))
    gain = alpha * SPREAD ** 2 / diffusion.like(spread_at(t), z) ** 2
    return MEAN + gain * (z - alpha * MEAN)


def flow_map(z_1, t):
    """Where eq. 7 carries z_1 exactly: alpha_t m + s_t / s_1 (z_1 - alpha_1 m)."""
    alpha, alpha_1 = SDE.marginal(of(t))[0], SDE.marginal(of(1.0))[0]
    return alpha * MEAN + spread_at(t) / spread_at(1.0) * (z_1 - alpha_1 * MEAN)


# ---- the SDE -------------------------------------------------------------------------------------

def test_marginals_are_those_of_the_simulated_sde():
    """Eq. 5 simulated in 1,000 steps has the mean and the spread that `marginal` says."""
    key, n = torch.Generator().manual_seed(0), 1000
    z = torch.full((20_000,), 1.5, dtype=torch.float64)
    for k in range(n):
        t = of((k + .5) / n)
        noise = torch.randn(z.shape, generator=key, dtype=torch.float64)
        z = z - SDE.beta(t) * z / 2 / n + (SDE.beta(t) / n).sqrt() * noise           # eq. 5
        if k + 1 in (100, 300, 1000):
            alpha, sigma = SDE.marginal(of((k + 1) / n))
            assert abs(z.mean() - 1.5 * alpha) < .03 and abs(z.std() - sigma) < .02


def test_variance_is_preserved():
    """alpha^2 + sigma^2 = 1; nothing is left of the data at t = 1, nothing of the noise at 0."""
    alpha, sigma = SDE.marginal(torch.linspace(0, 1, 11, dtype=torch.float64))
    torch.testing.assert_close(alpha ** 2 + sigma ** 2, torch.ones(11, dtype=torch.float64))
    assert alpha[-1] < .01 and sigma[0] == 0


def test_log_snr_and_its_inverse():
    """time_of(half_log_snr(t)) = t; the grid is uniform in log-SNR from 1 to 1e-3."""
    t = torch.linspace(.001, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(SDE.time_of(SDE.half_log_snr(t)), t)
    times = SDE.time_grid(20)
    assert times[0] == 1 and times[-1] == LAST and len(times) == 21
    steps = SDE.half_log_snr(times).diff()
    torch.testing.assert_close(steps, steps[:1].expand(20), atol=1e-6, rtol=1e-6)


def test_score_from_z0_is_the_score_of_a_gaussian():
    """With the exact ẑ_0, (alpha ẑ_0 - z) / sigma^2 is the gradient of log N(alpha m, s_t^2)."""
    z = torch.randn(4, 3, dtype=torch.float64)
    for t in (.05, .4, .9):
        alpha, _ = SDE.marginal(of(t))
        at = of([t])
        torch.testing.assert_close(SDE.score(perfect(z, at), z, at),
                                   -(z - alpha * MEAN) / spread_at(t) ** 2)


def test_coefficients_meet_only_their_own_sample():
    """(4,) coefficients on motion (4, 50, 16) scale samples; another count is refused."""
    z = torch.ones(4, 50, 16)
    made = diffusion.like(torch.arange(4.), z) * z
    assert made.shape == z.shape and (made[2] == 2).all()
    with pytest.raises(AssertionError):
        diffusion.like(torch.arange(3.), z)


# ---- the samplers --------------------------------------------------------------------------------

@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_ode_samplers_follow_the_exact_flow(name, order):
    """At t = 1e-3 each lands on the Gaussian's flow map, and its error falls with its order."""
    z_1 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    wanted, errors = flow_map(z_1, LAST), []
    for steps in (80, 160, 320):
        made = diffusion.SAMPLERS[name](perfect, z_1, SDE.time_grid(steps), SDE)
        errors.append((made - wanted).abs().max().item())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert errors[-1] < (.02 if order == 1 else .001) and (abs(orders - order) < .3).all()


def test_euler_maruyama_has_the_mean_and_variance_of_its_recursion():
    """For Gaussian data eq. 6's steps are z <- a z + b + c noise: mean and variance are known."""
    times, key = SDE.time_grid(60), torch.Generator().manual_seed(0)

    def noise(z):
        return torch.randn(z.shape, generator=key, dtype=z.dtype)
    z = torch.randn(40_000, 1, generator=key, dtype=torch.float64)
    made = diffusion.euler_maruyama(perfect, z, times, SDE, noise)
    mean, variance = 0.0, 1.0
    for t, t_next in zip(times[:-1], times[1:]):
        alpha, s, beta, h = SDE.marginal(t)[0], spread_at(t), SDE.beta(t), t - t_next
        a = 1 + h * beta * (.5 - 1 / s ** 2)
        mean = a * mean + h * beta * alpha * MEAN / s ** 2
        variance = a ** 2 * variance + beta * h
    assert abs(made.mean() - mean) < .02 and abs(made.var() - variance) < .02
    assert abs(mean - MEAN) < .05 and abs(variance ** .5 - SPREAD) < .1


@pytest.mark.parametrize("name", diffusion.SAMPLERS)
def test_solve_draws_from_the_data(name):
    """From noise, every sampler returns ẑ_0 with the data's mean and spread."""
    torch.manual_seed(0)
    made = diffusion.solve(perfect, torch.randn(8000, 1, dtype=torch.float64), name, 60)
    assert abs(made.mean() - MEAN) < .05 and abs(made.std() - SPREAD) < .1


def test_solve_ends_with_z0():
    """What is returned is ẑ_0 at the last time, not z there."""
    z_1, end = torch.randn(5, 1, dtype=torch.float64), of([LAST])
    z = diffusion.dpmpp_2m(perfect, z_1, SDE.time_grid(8), SDE)
    torch.testing.assert_close(diffusion.solve(perfect, z_1, steps=8), perfect(z, end))


@pytest.mark.parametrize("name", diffusion.SAMPLERS)
def test_coefficients_are_float64_on_the_cpu(name):
    """Wherever z is, times are CPU float64 (mps has no float64) and z keeps its own type."""
    def denoise(z, t):
        assert t.device.type == "cpu" and t.dtype == torch.float64
        return z / 2
    made = diffusion.solve(denoise, torch.ones(2, 3, device="meta"), name, 3)
    assert made.device.type == "meta" and made.dtype == torch.float32


# ---- the model -----------------------------------------------------------------------------------

class Whole(diffusion.MotionModel):
    """With ẑ_0 in one call, every condition given anew."""

    def forward(self, z_t, t, speech, reference, pose=None, prefix=None, mask=None):
        _, condition = self.condition(speech, pose, mask)
        return self.denoise(z_t, t, condition, reference, prefix, mask)


def tiny():
    torch.manual_seed(0)
    model = Whole(TINY)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(.05 * torch.randn_like(p))
    return model.eval()


def batch(b=2, n=12):
    torch.manual_seed(1)
    return {"z_t": torch.randn(b, n, 3, 4, 4), "t": torch.rand(b), "speech": torch.randn(b, n, 10),
            "reference": torch.randn(b, 3, 4, 4), "pose": 10 * torch.randn(b, n, 3)}


def test_the_reference_also_takes_the_direct_way():
    """Where S adds nothing, ẑ_0 is the learnt share of the reference in every frame; without its
    share, the reference still enters at the door; without `direct`, neither: the paper's S."""
    model, given = tiny(), batch()
    with torch.no_grad():
        model.out.weight.zero_(), model.out.bias.zero_()
        model.share.copy_(torch.arange(48.0))
        share = torch.arange(48.0).view(3, 4, 4)
        wanted = (share * given["reference"])[:, None].expand(2, 12, 3, 4, 4)
        torch.testing.assert_close(model(**given), wanted)
        x, _ = model.enter(given["z_t"], given["t"], given["reference"])
        nothing, _ = model.enter(given["z_t"], given["t"], 0 * given["reference"])
        wanted = given["reference"].flatten(1) @ model.reference_door.weight.T
        torch.testing.assert_close(x - nothing, wanted[:, None].expand(x.shape))
    paper = Whole(dataclasses.replace(TINY, direct=False))
    assert not {"share", "reference_door.weight", "around.weight"} & set(paper.state_dict())
    torch.nn.init.zeros_(paper.out.bias)
    assert not paper(**given).any()                              # the weight is zero already


def test_z_t_goes_around_the_conformer_as_far_as_time_lets_it():
    """ẑ_0 = out(conformer + gate x) + share: the gate is a linear function of the embedded time."""
    model, given = tiny(), batch()
    with torch.no_grad():
        x, time = model.enter(given["z_t"], given["t"], given["reference"])
        gate = time @ model.around.weight.T + model.around.bias
        with_gate = model(**given)
        model.around.weight.zero_(), model.around.bias.zero_()
        passed = (gate[:, None] * x) @ model.out.weight.T
        torch.testing.assert_close(with_gate - model(**given), passed.view(given["z_t"].shape))
    assert passed.std() > .01


@pytest.mark.parametrize("name", ["z_t", "t", "speech", "reference", "pose"])
def test_the_result_depends_on(name):
    """ẑ_0 changes with the noisy motion, with time, speech, reference and pose."""
    model, given = tiny(), batch()
    other = given | {name: given[name] + torch.randn_like(given[name])}
    assert (model(**given) - model(**other)).abs().max() > 1e-4


def test_times_embed_differently():
    """t = 0.1 and t = 0.9 are far apart, and so are neighbouring percents."""
    made = diffusion.embed_time(torch.tensor([.1, .9, .91]), 64)
    assert made.shape == (3, 64)
    assert (made[0] - made[1]).norm() > 3 and (made[1] - made[2]).norm() > 1


def test_padding_changes_no_valid_frame():
    """What stands behind the mask reaches neither ẑ_0 nor the predicted pose."""
    model, given = tiny(), batch()
    mask = torch.arange(12) < torch.tensor([[12], [7]])
    other = {k: v.clone() for k, v in given.items()}
    for name in ("z_t", "speech", "pose"):
        other[name][1, 7:] += 3
    a, b = (model(**g, mask=mask) for g in (given, other))
    torch.testing.assert_close(a[mask], b[mask])
    start = given["pose"][:, 0]
    a, b = (model.pose_predictor(model.speech_encoder(g["speech"], mask), start, mask)
            for g in (given, other))
    torch.testing.assert_close(a[mask], b[mask])


def test_a_padded_sample_is_what_it_is_alone():
    """Seven frames padded to twelve give ẑ_0 and poses of the seven frames by themselves."""
    model, given = tiny(), batch(1)
    mask = (torch.arange(12) < 7)[None]
    short = {k: v[:, :7] if k in ("z_t", "speech", "pose") else v for k, v in given.items()}
    made = model(**given, mask=mask)[:, :7]
    torch.testing.assert_close(made, model(**short), atol=1e-5, rtol=1e-4)
    alone = model.speech_encoder(short["speech"])
    encoded = model.speech_encoder(given["speech"], mask)
    torch.testing.assert_close(encoded[:, :7], alone, atol=1e-5, rtol=1e-4)
    start = given["pose"][:, 0]
    poses = model.pose_predictor(encoded, start, mask)[:, :7]
    torch.testing.assert_close(poses, model.pose_predictor(alone, start), atol=1e-4, rtol=1e-4)


def test_dropped_conditions_are_replaced_by_learnt_ones():
    """Where speech or pose is dropped, its values no longer matter and the learnt vector does."""
    model, given = tiny(), batch()
    no, yes = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    for keep, name, null in (((no, yes), "speech", "no_speech"), ((yes, no), "pose", "no_pose")):
        def condition(g):
            return model.condition(g["speech"], g["pose"], None, *keep)[1]
        other = given | {name: given[name] + 1}
        torch.testing.assert_close(condition(given), condition(other))
        before = condition(given)
        with torch.no_grad():
            getattr(model, null).add_(1)
        assert (condition(given) - before).abs().min() > .9
    free = model.condition(given["speech"])[1]
    dropped = model.condition(given["speech"], given["pose"], None, yes, no)[1]
    torch.testing.assert_close(free, dropped)


def test_prefix_frames_enter_clean_and_flagged():
    """Given frames of z_t are ignored, those of the prefix count; z_t itself is not changed."""
    model, given = tiny(), batch()
    clean, flags = torch.randn(2, 12, 3, 4, 4), (torch.arange(12) < 4).expand(2, -1)
    before = given["z_t"].clone()
    a = model(**given, prefix=(clean, flags))
    assert torch.equal(given["z_t"], before)
    noisy = given | {"z_t": before + 9 * flags[..., None, None, None]}
    torch.testing.assert_close(a, model(**noisy, prefix=(clean, flags)))
    assert (a - model(**given, prefix=(clean + 1, flags))).abs().max() > 1e-4
    x, _ = model.enter(before, given["t"], given["reference"], (clean, flags))
    y, _ = model.enter(torch.where(flags[..., None, None, None], clean, before), given["t"],
                       given["reference"])
    assert (x - y)[:, :4].abs().max() > 1e-4 and torch.equal(x[:, 4:], y[:, 4:])


def test_poses_are_offsets_from_the_portraits():
    """A portrait turned by ten degrees more starts from there: P adds to it."""
    model, given = tiny(), batch()
    torch.nn.init.zeros_(model.pose_predictor.out.weight)
    torch.nn.init.zeros_(model.pose_predictor.out.bias)
    start = torch.tensor([[10., -5., 2.], [0., 0., 0.]])
    made = diffusion.predict_pose(model, given["speech"], start)
    torch.testing.assert_close(made, start[:, None].expand(-1, 12, -1))


def training_batch(b=4, n=16, samples=None):
    torch.manual_seed(2)
    held = {"motion": torch.randn(b, n, 3, 4, 4), "reference": torch.randn(b, 3, 4, 4),
            "weight": torch.ones(b, n, 1, 4, 4),
            "pose": 10 * torch.randn(b, n, 3), "reference_pose": torch.randn(b, 3),
            "speech": torch.randn(b, n, 10), "mask": torch.ones(b, n, dtype=torch.bool),
            "steered": torch.zeros(b, dtype=torch.bool)}
    return held | diffusion.draw_batch(0, 5, samples or range(b), [n] * b, TINY)


def test_the_loss_is_eq_8():
    """Mean squares of ẑ_0 - z_0 over frames that are real and not given, and of the poses."""
    model, held = tiny(), training_batch()
    held["mask"][0, 12:] = False
    assert held["given"].any()
    objective = diffusion.Objective(model)
    losses = {name: s / counts.sum() for (name, s), counts
              in zip(objective(held).items(), objective.counted(held))}
    z_t = SDE.perturb(held["motion"], held["t"], held["noise"])
    _, condition = model.condition(held["speech"], held["pose"], held["mask"], held["keep_speech"],
                                   held["keep_pose"])
    z_hat = model.denoise(z_t, held["t"], condition, held["reference"],
                          (held["motion"], held["given"]), held["mask"])
    counted = held["mask"] & ~held["given"]
    wanted = (z_hat - held["motion"]).square()[counted].mean()
    torch.testing.assert_close(losses["motion"], wanted)
    held["weight"][..., 1, 2] = 5                                    # one place counts five times
    weighted = (held["weight"] * (z_hat - held["motion"]).square())[counted].mean() / (20 / 16)
    torch.testing.assert_close(objective(held)["motion"] / counted.sum(), weighted)
    pose = model.pose_predictor(model.speech_encoder(held["speech"], held["mask"]),
                                held["reference_pose"], held["mask"])
    wanted = (((pose - held["pose"]) / 10)[held["mask"]] ** 2).mean()
    torch.testing.assert_close(losses["pose"], wanted)


def test_steered_heads_keep_their_pose_and_teach_p_nothing():
    """With every pose dropped, a steered sample's still counts in ẑ_0, and P's loss leaves it out."""
    model, held = tiny(), training_batch()
    held["keep_pose"][:], objective = False, diffusion.Objective(model)
    before = objective(held)
    held["steered"][1] = True
    after = objective(held)
    assert objective.counted(held)[1].sum() == 3 * 16
    assert after["pose"] < before["pose"] and after["motion"] != before["motion"]
    held["pose"][0] += 20                               # of a sample that is not steered: dropped
    torch.testing.assert_close(objective(held)["motion"], after["motion"])
    held["pose"][1] += 20
    assert (objective(held)["motion"] - after["motion"]).abs() > 1e-4


def test_draws_belong_to_the_sample_and_not_to_the_split():
    """Samples 2 and 3 of a step draw the same on one process as on the second of two."""
    whole = diffusion.draw_batch(7, 3, range(4), [9] * 4, TINY)
    half = diffusion.draw_batch(7, 3, range(2, 4), [9] * 2, TINY)
    for name in whole:
        assert torch.equal(whole[name][2:], half[name])
    other = diffusion.draw_batch(7, 4, range(4), [9] * 4, TINY)
    assert not torch.equal(whole["noise"], other["noise"])


def test_conditions_are_dropped_and_prefixes_given_at_their_shares():
    """Over 2,000 samples: speech dropped in 10 %, pose and a prefix in half of them."""
    drawn = [diffusion.draw(0, s, 0, 8, TINY) for s in range(2000)]
    shares = {k: np.mean([bool(d[k].any()) for d in drawn])
              for k in ("keep_speech", "keep_pose", "given")}
    assert abs(shares["keep_speech"] - .9) < .03 and abs(shares["keep_pose"] - .5) < .04
    assert abs(shares["given"] - .5) < .04
    t = np.array([float(d["t"]) for d in drawn])
    assert t.min() >= LAST and abs(t.mean() - .5) < .03


def test_it_learns_one_batch():
    """Eighty steps on one batch bring the loss of eq. 8 down to less than a half."""
    torch.manual_seed(0)
    objective, held = diffusion.Objective(diffusion.MotionModel(TINY)), training_batch()
    optimiser, losses = torch.optim.Adam(objective.parameters(), 5e-3), []
    for _ in range(80):
        optimiser.zero_grad()
        loss = sum(objective(held).values()) / held["mask"].sum()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("n", [1, 7, 24, 25, 61, 300])
def test_windows_cover_every_frame_once(n):
    """Kept parts follow one another without gap; each window but the first sees its prefix."""
    cuts = diffusion.windows(n, TINY)
    assert [c[1] for c in cuts] == [0] + [c[2] for c in cuts[:-1]] and cuts[-1][2] == n
    for first, kept, stop, end in cuts:
        assert end - first <= TINY.window and first <= kept < stop <= end
        assert kept == 0 or kept - first == TINY.prefix
        assert end == n or end - stop == TINY.ahead


def test_sampled_windows_hand_over_their_last_frames(monkeypatch):
    """N frames come out, and each window's prefix is exactly the end of what came before."""
    model, seen = tiny(), []
    real = diffusion.MotionModel.denoise

    def spy(self, z_t, t, condition, reference, prefix=None, mask=None):
        seen.append(prefix)
        return real(self, z_t, t, condition, reference, prefix, mask)
    monkeypatch.setattr(diffusion.MotionModel, "denoise", spy)
    torch.manual_seed(0)
    speech, reference = torch.randn(2, 50, 10), torch.randn(2, 3, 4, 4)
    parts = list(diffusion.sample_motion(model, speech, reference, None, [0, 1], steps=2))
    made = torch.cat(parts, 1)
    assert made.shape == (2, 50, 3, 4, 4)
    clean, given = seen[3]                                        # the second window's first call
    assert not seen[0][1].any() and given[0].sum() == TINY.prefix
    end = parts[0].shape[1]
    torch.testing.assert_close(clean[:, :TINY.prefix], made[:, end - TINY.prefix:end])


def test_a_window_takes_over_gradually(monkeypatch):
    """Where windows disagree (k in the k-th), the motion goes from one to the next in equal steps
    through the frames that the earlier one had thrown away."""
    count = itertools.count()
    monkeypatch.setattr(diffusion, "solve", lambda denoise, z_1, *_: z_1 * 0 + next(count))
    speech, reference = torch.randn(1, 50, 10), torch.randn(1, 3, 4, 4)
    parts = list(diffusion.sample_motion(tiny(), speech, reference))
    made, joins = torch.cat(parts, 1)[0, :, 0, 0, 0], np.cumsum([p.shape[1] for p in parts])[:-1]
    over = min(diffusion.FADE, TINY.ahead)
    assert len(joins) == 2 and over > 1
    for k, join in enumerate(joins):
        torch.testing.assert_close(made[join - 1:join + over + 1], k + torch.linspace(0, 1, over + 2))
    assert made.diff().count_nonzero() == 2 * (over + 1)                  # and nowhere else


@pytest.mark.parametrize("n", [1, 7, 300])
def test_speech_of_any_length_gives_as_many_frames(n):
    """One frame, less than a window, nineteen windows: N frames of speech give N of motion."""
    speech, reference = torch.randn(1, n, 10), torch.randn(1, 3, 4, 4)
    made = torch.cat(list(diffusion.sample_motion(tiny(), speech, reference, steps=2)), 1)
    assert made.shape == (1, n, 3, 4, 4) and made.isfinite().all()


def test_each_window_hears_its_own_frames(monkeypatch):
    """Every window is given the speech and the poses of the very frames it samples."""
    model, seen = tiny(), []
    real = diffusion.MotionModel.condition
    monkeypatch.setattr(diffusion.MotionModel, "condition", lambda self, speech, pose: (
        seen.append((speech, pose)), real(self, speech, pose))[1])
    speech, pose = torch.randn(1, 60, 10), torch.randn(1, 60, 3)
    list(diffusion.sample_motion(model, speech, torch.randn(1, 3, 4, 4), pose, steps=1))
    cuts = diffusion.windows(60, TINY)
    assert len(seen) == len(cuts) > 2
    for (heard, turned), (first, _, _, end) in zip(seen, cuts):
        assert torch.equal(heard, speech[:, first:end]) and torch.equal(turned, pose[:, first:end])


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_maruyama"])
def test_seeds_decide(sampler):
    """The same seed moves the same, whatever is beside it in the batch; another moves otherwise."""
    model, speech, reference = tiny(), torch.randn(1, 30, 10), torch.randn(1, 3, 4, 4)

    def sample(seeds):
        b = len(seeds)
        return torch.cat(list(diffusion.sample_motion(
            model, speech.expand(b, -1, -1), reference.expand(b, -1, -1, -1), None, seeds, sampler,
            steps=3)), 1)
    pair = sample([3, 4])
    torch.testing.assert_close(pair[:1], sample([3]), atol=1e-5, rtol=1e-4)
    assert (pair[0] - pair[1]).abs().max() > 1e-3


def test_presets_are_built_and_counted():
    """Each preset is built without memory; the README's table shows these counts."""
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in diffusion.MotionModel(c).parameters())
                  for name, c in diffusion.PRESETS.items()}
    assert counts == {"toy": 4_146_579, "small": 55_817_011, "base": 628_654_435,
                      "large": 1_605_100_387}


# ---- control -------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
def test_held_values_stay_and_pass_through_their_noisy_selves(sampler):
    """Held entries end exactly at their known values. On the way DPM-Solver++, which is exact where
    ẑ_0 is constant, is at alpha k + sigma eps; the free entries do not notice."""
    key = torch.Generator().manual_seed(0)
    z_1 = torch.randn(2, 5, 3, 2, 2, generator=key, dtype=torch.float64)
    known = torch.randn(z_1.shape, generator=key, dtype=torch.float64)
    held = torch.rand(z_1.shape, generator=key) < .5
    seen = []

    def denoise(z, t):
        seen.append((z, t))
        return perfect(z, t)

    def quiet(z):
        return torch.zeros_like(z)
    answer, start = diffusion.hold(denoise, known, held, z_1)
    made = diffusion.solve(answer, start, sampler, 20, noise=quiet)
    assert torch.equal(made[held], known[held])
    if sampler == "dpmpp_2m":
        for z, t in seen:
            alpha, sigma = (diffusion.like(v, z) for v in SDE.marginal(t))
            torch.testing.assert_close(z[held], (alpha * known + sigma * z_1)[held])
    free = diffusion.solve(perfect, z_1, sampler, 20, noise=quiet)
    torch.testing.assert_close(made[~held], free[~held])


def test_guidance_goes_from_no_speech_to_speech_and_beyond():
    """W = 1 is plain sampling, W = 0 does not hear the speech, and ẑ_0 is linear in W."""
    model, given = tiny(), batch(1, 30)
    given["speech"] *= 5

    def sample(speech, **how):
        return torch.cat(list(diffusion.sample_motion(
            model, speech, given["reference"], steps=1, **how)), 1)
    plain = sample(given["speech"])
    assert torch.equal(plain, sample(given["speech"], guidance=1.0))
    deaf = sample(given["speech"], guidance=0.0)
    torch.testing.assert_close(deaf, sample(given["speech"] + 3, guidance=0.0))
    assert (plain - deaf).abs().max() > 1e-4
    answers = {}
    _, condition = model.condition(given["speech"][:, :24])
    heard, unheard = (model.condition(given["speech"][:, :24], keep_speech=torch.tensor([k]))[1]
                      for k in (True, False))
    torch.testing.assert_close(condition, heard)
    real = model.denoise

    def spy(z, t, told, *rest):
        answers[torch.equal(told, heard)] = real(z, t, told, *rest)
        return answers[torch.equal(told, heard)]
    model.denoise = spy
    asked = []

    def solve(denoise, z_1, *rest):
        asked.append(denoise(z_1, torch.tensor([.5])))
        return asked[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "solve", solve)
        next(diffusion.sample_motion(model, given["speech"], given["reference"], guidance=2.5))
    torch.testing.assert_close(asked[0], answers[False] + 2.5 * (answers[True] - answers[False]))


def test_points_can_stand_where_latents_do():
    """A model of 70 points makes (B, N, 2, 70, 1), holds what is held, and its presets stay."""
    config = dataclasses.replace(TINY, target="landmarks")
    torch.manual_seed(0)
    model = diffusion.MotionModel(config)
    reference, known = torch.randn(1, 2, 70, 1), torch.randn(1, 30, 2, 70, 1)
    held = (torch.arange(70) < 48).view(70, 1).expand(known.shape)
    windows = diffusion.sample_motion(model, torch.randn(1, 30, 10), reference, steps=2,
                                      held=(known, held))
    made = torch.cat(list(windows), 1)
    assert made.shape == known.shape
    torch.testing.assert_close(made[held], known[held])
    assert diffusion.draw(0, 0, 0, 9, config)["noise"].shape == (9, 2, 70, 1)


@pytest.mark.parametrize("driver, late, last", [("speech", .1, 0), ("bytes", .37, .3)])
def test_words_are_learnt_where_nothing_else_tells(driver, late, last):
    """Above t = .9 lies a tenth of speech's times; of words' three tenths are 1, and a tenth of the
    others lie there."""
    config = diffusion.MotionConfig(driver=driver, speech_features=10, motion_size=2)
    times = torch.stack([diffusion.draw(0, 0, k, 4, config)["t"] for k in range(2000)])
    assert diffusion.LAST <= times.min() and times.max() <= 1
    assert (times > .9).float().mean().item() == pytest.approx(late, abs=.04)
    assert (times == 1).float().mean().item() == pytest.approx(last, abs=.04)
    given = np.array([diffusion.draw(0, 0, k, 4, config)["given"].sum() for k in range(200)])
    assert ((given > 0).all() if last else .3 < (given > 0).mean() < .7) and given.max() == 3


def test_at_the_last_time_nothing_of_the_motion_is_seen(monkeypatch):
    """z_1 is the noise itself in training, as it is in sampling; at t < 1 it is eq. 5."""
    model, held = tiny(), training_batch()
    held["t"][:] = torch.tensor([1, 1, .5, .9])
    seen, denoise = [], model.denoise
    monkeypatch.setattr(model, "denoise", lambda z, *rest: seen.append(z) or denoise(z, *rest))
    diffusion.Objective(model)(held)
    torch.testing.assert_close(seen[0][:2], held["noise"][:2], rtol=0, atol=0)
    torch.testing.assert_close(seen[0][2:], SDE.perturb(held["motion"], held["t"], held["noise"])[2:])


def test_errors_among_points_count_by_time_and_as_they_change():
    """ẑ_0 that is .1 off everywhere costs .01 / sigma^2, but at most HEAVIEST times as much; one
    that is off by +-.1 from frame to frame costs .16 more for its second differences, but for those
    of the first two frames. Latents have eq. 8 alone."""
    def losses(target, offset):
        torch.manual_seed(0)
        config = dataclasses.replace(TINY, target=target)
        held, shape = training_batch(3), config.shape
        held |= {"motion": torch.randn(3, 16, *shape), "reference": torch.randn(3, *shape),
                 "noise": torch.randn(3, 16, *shape), "t": torch.tensor([LAST, .3, 1.0]),
                 "weight": torch.ones(3, 16, 1, *shape[1:]), "given": torch.zeros(3, 16).bool()}
        model = diffusion.MotionModel(config).eval()
        model.denoise = lambda *given: given[-2][0] + offset
        return [diffusion.Objective(model)({k: v[i:i + 1] for k, v in held.items()})["motion"] / 16
                for i in range(3)]
    by_time = torch.tensor([diffusion.HEAVIEST, 1 / SDE.marginal(torch.tensor(.3))[1] ** 2, 1])
    torch.testing.assert_close(torch.stack(losses("landmarks", .1)), .01 * by_time)
    uneasy = .1 * (-1.0) ** torch.arange(16).view(1, 16, 1, 1, 1)
    torch.testing.assert_close(torch.stack(losses("landmarks", uneasy)),
                               (.01 + .16 * 14 / 16) * by_time)
    for offset in (.1, uneasy):
        torch.testing.assert_close(torch.stack(losses("latents", offset)), torch.full((3,), .01))


@pytest.mark.parametrize("driver, last", [("speech", LAST), ("bytes", diffusion.LAST_TOLD)])
def test_words_end_where_points_are_still_noisy(monkeypatch, driver, last):
    """The last ẑ_0 is the network's at LAST_TOLD with words, at LAST with speech."""
    model, seen = diffusion.MotionModel(dataclasses.replace(TINY, driver=driver)).eval(), []
    monkeypatch.setattr(model, "denoise", lambda z, t, *_: (seen.append(t[0].item()), z)[1])
    list(diffusion.sample_motion(model, torch.randn(1, 12, 10), torch.randn(1, 3, 4, 4), steps=3))
    assert seen[0] == 1 and seen[-1] == pytest.approx(last) == min(seen)
