"""Speech to motion: the VP-SDE, its samplers, and the model S, A, P (sec. 4.3, eq. 5-8).

    speech z^s ── A ──(+ pose x^p)──► S(z_t, t, ·, z^m(i)) ──► ẑ_0      one motion latent a frame
                  └── P ──► x̂^p                                        head poses

Letters: B batch, N frames, D width, d_s speech features, h w latent. Motion (B, N, 3, h, w) is made
of posterior means, normalised per channel; poses are degrees (pitch, yaw, roll).

Departures from the paper, or choices where it is silent:
1. beta is linear from 0.1 to 20, as in Song et al. (2021).
2. The reference is attended to as h w tokens: attention to one repeated vector is a linear map.
   In the `toy` preset (`direct`) it also enters S at its door and adds a learnt share of itself
   to ẑ_0: whose face it is makes up two thirds of the latents' variance. And z_t goes around the
   Conformer, gated by t: blocks that end in a LayerNorm let nothing pass as it is.
3. Speech is dropped in some training samples, pose in half: sample.py leaves it free by default.
   Some made heads are steered: they turn far, without a reason in the speech. Their pose is always
   given, and P does not learn from them.
4. Long speech is sampled in windows. The last frames of one are the clean beginning of the next:
   they enter the network unharmed, with a flag, and do not count in the loss; z_t stays as it is.
   Each window looks a few frames ahead, and the next one takes over from those.
5. The square of eq. 8 has a weight for each place: eyes and lips are small, and blinks come last.
   Its pose term counts in units of 10 degrees, and both terms are means over frames. Points drift
   at small t, and tremble: so errors among them count by 1/sigma^2, their second differences too.
6. P sees the portrait's pose too and predicts the turn from it.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from conformer import Conformer
from text import ByteEncoder

LAST, LAST_TOLD = 1e-3, .05      # where solvers end: ẑ_0 there is the result; and with words
DROP_SPEECH, DROP_POSE, HAS_PREFIX, ONLY_NOISE = .1, .5, .5, .3     # shares of training samples
LONG_AGO = 50                    # frames after which it is no longer told since how many
FADE = 6                         # frames over which a window takes over from the one before
HEAVIEST = 50                    # how much an error among points counts at most, at small t
POSE_UNIT = 10.0                 # degrees that count as 1 in the network and in the pose loss


# ---- the SDE, eq. 5 ------------------------------------------------------------------------------

def like(coefficient, z):
    """Shape (B,) coefficients to be multiplied with z (B, ...): (B, 1, ...), on z's device."""
    coefficient = coefficient.view(-1, *[1] * (z.ndim - 1))
    assert coefficient.shape[0] in (1, len(z)), "one coefficient a sample"
    return coefficient.to(z.dtype).to(z.device)


@dataclass(frozen=True)
class VPSDE:
    """dz = -1/2 beta z dt + sqrt(beta) dw, eq. 5, with beta(t) = beta_0 + t (beta_1 - beta_0)."""
    beta_0: float = .1
    beta_1: float = 20.0

    def beta(self, t):
        return self.beta_0 + t * (self.beta_1 - self.beta_0)

    def marginal(self, t):
        """alpha, sigma of p(z_t | z_0) = N(alpha z_0, sigma^2), the solution of eq. 5."""
        log_alpha = -t ** 2 * (self.beta_1 - self.beta_0) / 4 - t * self.beta_0 / 2
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def half_log_snr(self, t):
        """log(alpha / sigma), which falls from about +4.5 to -5."""
        alpha, sigma = self.marginal(t)
        return alpha.log() - sigma.log()

    def time_of(self, half_log_snr):
        """Inverse of `half_log_snr`."""
        log_alpha = -F.softplus(-2 * half_log_snr) / 2
        rise = self.beta_1 - self.beta_0
        return (-self.beta_0 + (self.beta_0 ** 2 - 4 * rise * log_alpha).sqrt()) / rise

    def perturb(self, z_0, t, noise):
        """Draw z_t ~ p(z_t | z_0). z_0, noise (B, N, ...); t (B,)."""
        alpha, sigma = self.marginal(t)
        return like(alpha, z_0) * z_0 + like(sigma, z_0) * noise

    def score(self, z_hat_0, z_t, t):
        """grad log p_t(z_t) from the network's ẑ_0: (alpha ẑ_0 - z_t) / sigma^2."""
        alpha, sigma = self.marginal(t)
        return (like(alpha, z_t) * z_hat_0 - z_t) / like(sigma, z_t) ** 2

    def time_grid(self, steps, last=LAST):
        """steps + 1 times from 1 to the last, uniform in log-SNR, float64 on the CPU."""
        ends = self.half_log_snr(torch.tensor([1.0, last], dtype=torch.float64))
        times = self.time_of(torch.linspace(*ends.tolist(), steps + 1, dtype=torch.float64))
        times[0], times[-1] = 1.0, last
        return times


# ---- samplers: from z_1 to z at the last of the times --------------------------------------------
# denoise(z, t (1,)) -> ẑ_0; one function a sampler; noise(z) draws what only eq. 6 needs

def euler_maruyama(denoise, z, times, sde, noise=torch.randn_like):
    """Eq. 6, the reverse SDE: weak order 1."""
    for t, t_next in zip(times[:-1, None], times[1:, None]):
        drift = -(z / 2 + sde.score(denoise(z, t), z, t)) * like(sde.beta(t), z)
        spread = (sde.beta(t) * (t - t_next)).sqrt()
        z = z + drift * like(t_next - t, z) + like(spread, z) * noise(z)      # eq. 6
    return z


def slope(denoise, z, t, sde):
    """dz/dt of eq. 7, the probability flow."""
    return -(z + sde.score(denoise(z, t), z, t)) * like(sde.beta(t), z) / 2   # eq. 7


def euler(denoise, z, times, sde, noise=None):
    """Eq. 7 by Euler's method: order 1."""
    for t, t_next in zip(times[:-1, None], times[1:, None]):
        z = z + slope(denoise, z, t, sde) * like(t_next - t, z)
    return z


def heun(denoise, z, times, sde, noise=None):
    """Eq. 7 by Heun's method: order 2, two evaluations a step."""
    for t, t_next in zip(times[:-1, None], times[1:, None]):
        step, first = like(t_next - t, z), slope(denoise, z, t, sde)
        z = z + step * (first + slope(denoise, z + step * first, t_next, sde)) / 2
    return z


def dpmpp_2m(denoise, z, times, sde, noise=None):
    """Eq. 7 by DPM-Solver++ 2M (Lu et al., 2022): exact in the linear part, order 2 in ẑ_0."""
    before, h_before = None, None
    for t, t_next in zip(times[:-1, None], times[1:, None]):
        h = sde.half_log_snr(t_next) - sde.half_log_snr(t)                    # > 0
        z_hat_0 = denoise(z, t)
        blend = z_hat_0
        if before is not None:                                                # extrapolate ẑ_0
            blend = z_hat_0 + like(h / (2 * h_before), z) * (z_hat_0 - before)
        (_, sigma), (alpha_next, sigma_next) = sde.marginal(t), sde.marginal(t_next)
        z = like(sigma_next / sigma, z) * z - like(alpha_next * torch.expm1(-h), z) * blend
        before, h_before = z_hat_0, h
    return z


SAMPLERS = {"euler_maruyama": euler_maruyama, "euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def solve(denoise, z_1, sampler="dpmpp_2m", steps=20, sde=VPSDE(), noise=torch.randn_like,
          last=LAST):
    """Reverse diffusion: z_1 ~ N(0, 1) -> ẑ_0 at the last time.

    Times and coefficients are float64 on the CPU (mps has none) and are rounded when z meets them.
    """
    times = sde.time_grid(steps, last)
    z = SAMPLERS[sampler](denoise, z_1, times, sde, noise)
    return denoise(z, times[-1:])


def hold(denoise, known, held, z_1, sde=VPSDE()):
    """A `denoise` whose ẑ_0 has the known values wherever they are held, and where it starts (D.2).

    known, held (bool), z_1: as ẑ_0. Where k is known, E[z_0 | z_t] = k, and eq. 7 is the flow of a
    point mass: started at alpha_1 k + sigma_1 eps it passes through alpha_t k + sigma_t eps, which
    every sampler follows without z_t being overwritten (a multistep one would lose its history),
    and its ẑ_0 is k at the end. The rest sees a noisy k of the right spread at every t, but answers
    as if nothing else were known of it: approximate.
    """
    alpha, sigma = sde.marginal(torch.ones(1, dtype=torch.float64))
    start = torch.where(held, like(alpha, z_1) * known + like(sigma, z_1) * z_1, z_1)
    return lambda z, t: torch.where(held, known, denoise(z, t)), start


# ---- the model -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class MotionConfig:
    """Sizes of S, A and P, and how long speech is cut for sampling."""
    motion_size: int = 16        # h = w of z^m
    motion_channels: int = 3
    speech_features: int = 320   # d_s
    width: int = 192             # D, the paper's d_hidden
    layers: int = 4              # Conformer blocks, the paper's n_layer
    heads: int = 4
    times: int = 2               # how much wider the feed-forwards are inside
    kernel: int = 15             # of the convolution modules, frames
    token_width: int = 32        # of a reference token
    speech_layers: int = 3       # of A
    pose_width: int = 64         # of P
    dropout: float = 0.0
    direct: bool = False         # the reference and z_t also go around the Conformer
    window: int = 96             # frames sampled at once
    prefix: int = 16             # of them, given: the last ones of the window before
    ahead: int = 8               # of them, made again by the next, which knows what is said there
    target: str = "latents"      # or "landmarks": 70 points in the place of z^m (D.2)
    driver: str = "speech"       # or in its place an instruction (E): "bytes", "clip"

    def __post_init__(self):
        if not 0 <= self.prefix + self.ahead < self.window or min(self.prefix - 1, self.ahead) < 0:
            raise ValueError("a window must be longer than its prefix and its look ahead")

    @property
    def shape(self):
        """Of one frame's motion: z^m (3, h, w), or points as (2, 70, 1)."""
        side = self.motion_size
        return (2, 70, 1) if self.target == "landmarks" else (self.motion_channels, side, side)

    @property
    def values(self):
        """Numbers in one frame's motion."""
        return math.prod(self.shape)


_PAPER = {"speech_features": 768, "heads": 8, "times": 4, "kernel": 31, "dropout": .1,
          "window": 250, "prefix": 25, "ahead": 12}
PRESETS = {
    "toy": MotionConfig(direct=True),
    "small": MotionConfig(**_PAPER, width=512, layers=6, token_width=512, pose_width=512),
    "base": MotionConfig(**_PAPER, width=1280, layers=12, token_width=1280, pose_width=1280),
    "large": MotionConfig(**_PAPER, width=2048, layers=12, token_width=2048, pose_width=2048),
}       # parameters: 4.1M; 56M, 629M, 1.61B (B.1: 180M, 600M, 1.2B, wav2vec 2.0 perhaps counted in)


class SpeechEncoder(nn.Module):
    """A: features of a fixed extractor, adapted by a few convolutions. (B, N, d_s) -> (B, N, D)."""

    def __init__(self, config):
        super().__init__()
        d = config.width
        self.door = nn.Linear(config.speech_features, d)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(config.speech_layers))
        self.convolutions = nn.ModuleList(nn.Conv1d(d, d, 5, padding=2) for _ in self.norms)

    def forward(self, speech, mask=None):
        x = self.door(speech)                                                 # (B, N, D)
        for norm, convolution in zip(self.norms, self.convolutions):
            h = F.silu(norm(x))
            h = h if mask is None else h * mask[..., None]
            x = x + convolution(h.mT).mT
        return x


class PosePredictor(nn.Module):
    """P: convolutions over A's output and the portrait's pose -> that turned, (B, N, 3) degrees."""

    def __init__(self, config):
        super().__init__()
        w = config.pose_width
        self.door = nn.Linear(config.width + 3, w)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(w, w, 5, padding=2 * d, dilation=d) for d in (1, 2, 4))
        self.out = nn.Linear(w, 3)

    def forward(self, speech, portrait_pose, mask=None):
        start = portrait_pose[:, None].expand(-1, speech.shape[1], -1) / POSE_UNIT
        x = self.door(torch.cat([speech, start.to(speech.dtype)], -1))        # (B, N, w)
        for convolution in self.convolutions:
            x = x if mask is None else x * mask[..., None]
            x = x + convolution(F.silu(x).mT).mT
        turned = self.out(F.silu(x)).to(portrait_pose.dtype)                  # from bf16, maybe
        return portrait_pose[:, None] + POSE_UNIT * turned


class MotionModel(nn.Module):
    """S with A and P."""

    adam_only = ("position", "pose_predictor", "text_encoder.letter", "text_encoder.position")

    def __init__(self, config):
        super().__init__()
        self.config, d = config, config.width
        self.speech_encoder, self.pose_predictor = SpeechEncoder(config), PosePredictor(config)
        if config.driver == "bytes":
            self.text_encoder = ByteEncoder(config.speech_features)
        self.pose = nn.Linear(3, d)
        self.no_pose, self.no_speech = (nn.Parameter(torch.randn(d) * .02) for _ in range(2))
        channels, places = config.shape[0], math.prod(config.shape[1:])
        self.token = nn.Linear(channels, config.token_width)
        self.position = nn.Parameter(torch.randn(places, config.token_width) * .5)
        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.door = nn.Linear(config.values + 1, d)
        if config.direct:
            self.reference_door = nn.Linear(config.values, d)
            self.share = nn.Parameter(torch.zeros(config.values))
            self.around = nn.Linear(d, d)
            nn.init.zeros_(self.around.weight)
        self.conformer = Conformer(config.layers, d, config.heads, config.times, config.kernel,
                                   config.token_width, config.dropout)
        self.out = nn.Linear(d, config.values)
        nn.init.zeros_(self.out.weight)

    def condition(self, speech, pose=None, mask=None, keep_speech=None, keep_pose=None):
        """A's output, and the same with the pose added by a linear layer, conditions dropped.

        speech (B, N, d_s), pose (B, N, 3) or None, keep_* (B,) bool -> two (B, N, D).
        """
        encoded = self.speech_encoder(speech, mask)                           # (B, N, D)
        heard = encoded
        if keep_speech is not None:
            heard = torch.where(keep_speech[:, None, None], heard, self.no_speech.to(heard.dtype))
        moved = self.no_pose.expand(encoded.shape)
        if pose is not None:
            asked = self.pose((pose / POSE_UNIT).to(heard.dtype))
            moved = asked if keep_pose is None else \
                torch.where(keep_pose[:, None, None], asked, moved.to(asked.dtype))
        return encoded, heard + moved

    def tokens(self, reference):
        """The reference's positions as tokens: z^m(i) (B, 3, h, w) -> (B, h w, E)."""
        return self.token(reference.flatten(2).mT) + self.position

    def enter(self, z_t, t, reference, prefix=None):
        """The Conformer's input and the embedded time: (B, N, D), (B, D).

        reference (B, 3, h, w); prefix: (clean motion (B, N, 3, h, w), given frames (B, N) bool).
        """
        x, flag = z_t.flatten(2), z_t.new_zeros(*z_t.shape[:2], 1)            # (B, N, 3hw)
        if prefix is not None:
            clean, given = prefix
            x = torch.where(given[..., None], clean.flatten(2), x)
            flag = given[..., None].to(x.dtype)
        x = self.door(torch.cat([x, flag], -1))                               # (B, N, D)
        if self.config.direct:
            x = x + self.reference_door(reference.flatten(1))[:, None]
        return x, self.time(embed_time(t, self.config.width))

    def denoise(self, z_t, t, condition, reference, prefix=None, mask=None):
        """S of eq. 8: ẑ_0 (B, N, 3, h, w) from z_t, t (B,), `condition`, reference (B, 3, h, w)."""
        x, time = self.enter(z_t, t, reference, prefix)
        y = self.conformer(x, time, condition, self.tokens(reference), mask)  # (B, N, D)
        if self.config.direct:
            y = y + self.around(time)[:, None] * x
        z_hat_0 = self.out(y).to(z_t.dtype)                                   # (B, N, 3hw)
        if self.config.direct:
            z_hat_0 = z_hat_0 + (self.share * reference.flatten(1))[:, None]
        return z_hat_0.view(z_t.shape)


def embed_time(t, width):
    """Sinusoids of 1000 t, so that t in [0, 1] turns them as steps would. (...) -> (..., D)."""
    f = torch.exp(torch.arange(width // 2, device=t.device) * (-math.log(10_000) / (width // 2)))
    angle = 1000 * t[..., None] * f                                           # (..., D/2)
    return torch.cat([angle.sin(), angle.cos()], -1)


def in_force(vectors, said, since):
    """What takes the speech's place (E): of T instructions (B, T, d_s) the one in force in each
    frame, and, so that a nod has its time, since how many; both (B, N) -> (B, N, d_s)."""
    held = vectors.gather(1, said[..., None].expand(-1, -1, vectors.shape[-1]))
    return held + embed_time(since.clamp(max=LONG_AGO) / 1000, vectors.shape[-1])


# ---- training, eq. 8 -----------------------------------------------------------------------------

def draw(seed, step, k, n, config):
    """All that is random for sample k of a step: noise, time, prefix length, dropped conditions.

    Words change a face for seconds, which is seen in z_t long before a lip is: even z_1, with .0066
    of z_0 in it, tells left from right in three cases of four; who learns that need not read. So
    many of their times are 1, with noise alone, and a frame is given, as the portrait's is.
    """
    rng = np.random.default_rng((seed, step, k, 1))
    key = torch.Generator().manual_seed(int(rng.integers(2 ** 63)))
    longest, words = min(2 * config.prefix, n - 1), config.driver != "speech"
    has_prefix = rng.random() < HAS_PREFIX and longest > 0
    prefix = int(rng.integers(1, longest + 1)) if has_prefix else words * min(longest, 1)
    t = 1 - (1 - LAST) * rng.random() * (not words or rng.random() >= ONLY_NOISE)
    return {"noise": torch.randn(n, *config.shape, generator=key),
            "t": torch.tensor(t, dtype=torch.float32), "given": torch.arange(n) < prefix,
            "keep_speech": torch.tensor(rng.random() >= DROP_SPEECH),
            "keep_pose": torch.tensor(rng.random() >= DROP_POSE)}


def draw_batch(seed, step, samples, lengths, config):
    """`draw` for several samples, padded to the longest and stacked."""
    drawn = [draw(seed, step, k, n, config) for k, n in zip(samples, lengths)]
    padded = ("noise", "given")
    return {name: nn.utils.rnn.pad_sequence([d[name] for d in drawn], batch_first=True)
            if name in padded else torch.stack([d[name] for d in drawn]) for name in drawn[0]}


class Objective(nn.Module):
    """Eq. 8 for one batch, with S, A and P inside, so that DDP can wrap it."""

    def __init__(self, model, sde=VPSDE()):
        super().__init__()
        self.model, self.sde = model, sde

    def forward(self, batch):
        """batch: motion (B, N, 3, h, w), weight (B, N, 1, h, w), reference (B, 3, h, w), pose
        (B, N, 3), reference_pose (B, 3), speech (B, N, d_s) or letters (B, T, L), said and since
        (B, N), steered (B,) bool, mask (B, N), and what `draw_batch` gives -> {"motion", "pose"},
        each a sum over the frames that `counted` counts: a batch may be cut anywhere."""
        b, model = batch, self.model
        speech = b.get("speech")
        if speech is None:
            told = model.text_encoder(b["letters"].flatten(0, 1)).unflatten(0, (len(b["mask"]), -1))
            speech = in_force(told, b["said"], b["since"])
        z_t = self.sde.perturb(b["motion"], b["t"], b["noise"])               # eq. 5
        z_t = torch.where((b["t"] < 1)[:, None, None, None, None], z_t, b["noise"])
        encoded, condition = model.condition(speech, b["pose"], b["mask"], b["keep_speech"],
                                             b["keep_pose"] | b["steered"])
        z_hat_0 = model.denoise(z_t, b["t"], condition, b["reference"],
                                (b["motion"], b["given"]), b["mask"])
        pose = model.pose_predictor(encoded, b["reference_pose"], b["mask"])
        miss = (z_hat_0 - b["motion"]) * self.counted(b)[0][..., None, None, None]
        square = miss.square()                            # (B, N, 3, h, w), 0 where not counted
        if model.config.target == "landmarks":
            second = miss.diff(n=2, dim=1).square()
            square = square + F.pad(second, (0, 0) * 3 + (miss.shape[1] - second.shape[1], 0))
            square = square * like(self.sde.marginal(b["t"])[1].pow(-2).clamp(max=HEAVIEST), square)
        error = (b["weight"] * square).mean((2, 3, 4)) / b["weight"].mean((2, 3, 4)).clamp(min=1)
        turned = ((pose - b["pose"]) / POSE_UNIT).square().mean(2)            # (B, N)
        return {name: (values * counts).sum() for name, values, counts
                in zip(("motion", "pose"), (error, turned), self.counted(b))}

    @staticmethod
    def counted(batch):
        """The frames that each loss counts, two (B, N) bool: given ones are not predicted, nor
        poses that no speech explains."""
        return batch["mask"] & ~batch["given"], batch["mask"] & ~batch["steered"][:, None]


# ---- sampling ------------------------------------------------------------------------------------

@torch.inference_mode()
def predict_pose(model, speech, portrait_pose):
    """P on a whole speech: (B, N, d_s), portrait's pose (B, 3) -> (B, N, 3) degrees."""
    return model.pose_predictor(model.speech_encoder(speech), portrait_pose)


def windows(n, config):
    """How n frames are cut: [(first frame sampled, first kept, end of kept, end of sampled)]."""
    cuts, kept = [], 0
    while kept < n:
        first = max(0, kept - config.prefix)
        end = min(n, first + config.window)
        stop = end if end == n else end - config.ahead
        cuts.append((first, kept, stop, end))
        kept = stop
    return cuts


@torch.inference_mode()
def sample_motion(model, speech, reference, pose=None, seeds=(0,), sampler="dpmpp_2m", steps=20,
                  sde=VPSDE(), guidance=1.0, held=None, from_reference=False):
    """Motion for speech of any length, a window at a time.

    speech (B, N, d_s), reference (B, 3, h, w) normalised, pose (B, N, 3) degrees or None: free;
    one seed a row of the batch. Yields (B, n, 3, h, w), normalised, until N frames are out.
    guidance: ẑ_0 goes this far from what no speech gives to what the speech gives; 1 is the paper.
    held: (known motion, which of its values are held (bool)), both (B, N, 3, h, w), see `hold`.
    from_reference: frame 0 is the reference, and the motion goes on from there.
    A window begins where the one before would have gone on, and leaves that over FADE frames, or it
    would jerk. Words end at LAST_TOLD, from where on brows and glances would go too far.
    """
    assert len(seeds) == len(speech), "one seed a row"
    c, last = model.config, LAST if model.config.driver == "speech" else LAST_TOLD
    before = goes_on = reference.new_zeros(len(reference), 0, *reference.shape[1:])
    for k, (first, kept, stop, end) in enumerate(windows(speech.shape[1], c)):
        shape = (end - first, *c.shape)
        keys = [torch.Generator().manual_seed(_key(seed, k)) for seed in seeds]

        def noise(_=None):
            drawn = torch.stack([torch.randn(shape, generator=key) for key in keys])
            return drawn.to(speech.device)
        z_1, given = noise(), torch.arange(end - first, device=speech.device) < kept - first
        clean = F.pad(before, (0, 0) * 3 + (0, end - kept))                   # (B, n, 3, h, w)
        if from_reference and k == 0:
            clean[:, 0], given[0] = reference, True
        prefix = clean, given[None].expand(len(seeds), -1)
        turned = None if pose is None else pose[:, first:end]
        _, condition = model.condition(speech[:, first:end], turned)
        if guidance != 1:
            silent = torch.zeros(len(seeds), dtype=torch.bool, device=speech.device)
            _, unheard = model.condition(speech[:, first:end], turned, keep_speech=silent)

        def denoise(z, t):
            t = t.float().to(z.device).expand(len(z))
            z_hat_0 = model.denoise(z, t, condition, reference, prefix)
            if guidance != 1:
                z_hat_0 = model.denoise(z, t, unheard, reference, prefix).lerp(z_hat_0, guidance)
            return z_hat_0
        answer = denoise
        if held:
            answer, z_1 = hold(denoise, *(v[:, first:end] for v in held), z_1, sde)
        made = solve(answer, z_1, sampler, steps, sde, noise, last)[:, kept - first:]
        for f, old in enumerate(goes_on.unbind(1)[:made.shape[1]]):
            made[:, f] = old.lerp(made[:, f], (f + 1) / (goes_on.shape[1] + 1))
        if from_reference and k == 0:
            made[:, 0] = reference
        made, goes_on = made[:, :stop - kept], made[:, stop - kept:][:, :FADE]
        before = torch.cat([before, made], 1)[:, -c.prefix:]
        yield made


def _key(seed, window):
    return int(np.random.SeedSequence((seed, window)).generate_state(1, np.uint64)[0]) >> 1
