"""The disentangling VAE: appearance from one frame, motion from another (sec. 4.2, eq. 1-4).

    x^a(i) portrait         ── E_A ──► z^a(i) (B, 3, h_a, w_a) ─┐
                                                                ├─► D ──► x̂^a(j) (B, 3, H, W)
    x^m(j) landmark picture ── E_M ──► z^m(j) (B, 3, h_m, w_m) ─┘

i and j are two frames of one clip, so what differs between them can only come from x^m(j), which
shows no appearance. Letters: B batch, H W picture, h w latent, C channels. Pictures are in [-1, 1].

Departures from the paper, or choices where it is silent:
1. "Perceptual" is LPIPS where VGG16's weights are at hand, else differences of neighbouring pixels.
   Beside L1 there is a square: see `l2`.
2. Lips, eyes and brows are under 4 % of the pixels: a weight map makes them, and the whole face,
   count for more (`weight_map`).
3. Eq. 3's generator is non-saturating by default; the literal one and the hinge are options.
4. The `toy` preset keeps z^a at a quarter and z^m at an eighth of a 128² picture: three channels
   at an eighth of a small picture lose the face.
5. A posterior mean starts as the picture itself, shrunken: detail is packed in from there.
6. D attends to itself one level below z^a: what it needs here may lie elsewhere in the portrait.
7. Eq. 4 has no weights. Ours: KL 1e-6, a mean over elements, so that this is nearly a plain
   autoencoder (column `kl` of the log); the adversary's adaptive weight (Esser et al., 2021).
"""
from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class VAEConfig:
    """Sizes. Level k lies at 1 / (patch 2^k) of the picture and is width * min(2^k, 4) wide."""
    size: int = 128              # H = W
    appearance_factor: int = 4   # h_a = size / appearance_factor
    motion_factor: int = 8       # h_m = size / motion_factor
    latent: int = 3              # channels of z^a and z^m, as many as a picture has
    patch: int = 4               # squares folded into channels at the encoders' door
    width: int = 64              # the paper's d_hidden
    layers: int = 2              # the paper's n_layer: residual blocks a level
    depth: int = 2               # levels that D goes down below z^a, and up again

    def channels(self, factor):
        return self.width * min(factor // self.patch, 4)


PAPER = {"size": 256, "appearance_factor": 8, "motion_factor": 16}
PRESETS = {
    "toy": VAEConfig(depth=1),
    "small": VAEConfig(**PAPER, width=128, layers=2),       # B.1: 80M parameters
    "base": VAEConfig(**PAPER, width=256, layers=4),        # B.1: 700M
    "large": VAEConfig(**PAPER, width=512, layers=8),       # B.1: 1.7B
}


# ---- the networks --------------------------------------------------------------------------------

class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position; free of charge in channels_last memory."""

    def forward(self, x):                                     # (B, C, h, w)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """SiLU, conv, norm, SiLU, conv, added to its input; the last conv starts at zero."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = ChannelNorm(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x):                                     # (B, C, h, w)
        return x + self.second(F.silu(self.norm(self.first(F.silu(x)))))


class Attention(nn.Module):
    """Self-attention over the side x side positions of a level; what it adds starts at zero."""

    def __init__(self, channels, side, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = ChannelNorm(channels)
        self.position = nn.Parameter(torch.randn(1, channels, side, side) * .3)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):                                     # (B, C, h, w)
        qkv = self.qkv(self.norm(x) + self.position).flatten(2).mT             # (B, h w, 3C)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, h w, .)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, h w, C)
        y = y.mT.unflatten(2, x.shape[2:]).contiguous(memory_format=torch.channels_last)
        return x + self.out(y)


def blocks(channels, count):
    return nn.Sequential(*[ResidualBlock(channels) for _ in range(count)])


def down(before, after):
    """Half the size."""
    return nn.Conv2d(before, after, 3, stride=2, padding=1)


class Up(nn.Module):
    """Twice the size, by pixel shuffle."""

    def __init__(self, before, after, kernel=1):
        super().__init__()
        self.widen = nn.Conv2d(before, 4 * after, kernel, padding=kernel // 2)

    def forward(self, x):                                     # (B, before, h, w)
        return F.pixel_shuffle(self.widen(x), 2)              # (B, after, 2h, 2w)


class Encoder(nn.Module):
    """E_A and E_M: the same residual blocks, another downsampling factor (sec. 4.2).

    forward: (B, 3, H, W) -> mean and log-variance, each (B, latent, H / factor, W / factor).
    """

    def __init__(self, config, factor):
        super().__init__()
        c, at = config, config.patch
        self.patch, self.factor = c.patch, factor
        self.door = nn.Conv2d(3 * c.patch ** 2, c.channels(at), 3, padding=1)
        levels = [blocks(c.channels(at), c.layers)]
        while at < factor:
            before, after = c.channels(at), c.channels(2 * at)
            levels += [down(before, after), blocks(after, c.layers)]
            at *= 2
        self.levels = nn.Sequential(*levels)
        self.head = nn.Conv2d(c.channels(at), 2 * c.latent, 3, padding=1)
        nn.init.constant_(self.head.bias[c.latent:], -5.0)    # start nearly without noise

    def forward(self, x):
        shrunken = F.avg_pool2d(x, self.factor)               # (B, 3, h, w)
        x = self.door(F.pixel_unshuffle(x, self.patch))       # (B, C, H/4, W/4)
        both = self.head(F.silu(self.levels(x)))              # autocast may have made them bf16
        mean, logvar = both.to(self.head.weight.dtype).chunk(2, dim=1)
        return shrunken + mean, logvar


class Decoder(nn.Module):
    """D of eq. 2: z^m brought to z^a's size, concatenated, projected, decoded.

    Goes down and up again with skips, so that what is far apart can meet, then shuffles up to the
    picture. forward: z_a (B, latent, h_a, w_a), z_m (B, latent, h_m, w_m) -> (B, 3, H, W).
    """

    def __init__(self, config):
        super().__init__()
        c, top = config, config.appearance_factor
        factors = [top * 2 ** k for k in range(c.depth + 1)]              # toy: 4, 8
        widths = [c.channels(f) for f in factors]
        self.project = nn.Conv2d(2 * c.latent, widths[0], 3, padding=1)
        self.going_down = nn.ModuleList(blocks(w, c.layers) for w in widths)
        self.downs = nn.ModuleList(down(a, b) for a, b in zip(widths, widths[1:]))
        self.ups = nn.ModuleList(Up(b, a) for a, b in zip(widths, widths[1:]))
        self.merges = nn.ModuleList(nn.Conv2d(2 * w, w, 1) for w in widths[:-1])
        self.going_up = nn.ModuleList(blocks(w, c.layers) for w in widths[:-1])
        for stack in (self.going_down, self.going_up):
            if len(stack) > 1:
                stack[1].append(Attention(widths[1], c.size // factors[1]))
        levels, width = [], widths[0]
        while top > 2:                                                   # light levels near the end
            levels += [Up(width, width // 2, kernel=3), ResidualBlock(width // 2)]
            width, top = width // 2, top // 2
        self.picture = nn.Sequential(*levels, nn.SiLU(), Up(width, 3, kernel=3))

    def forward(self, z_a, z_m):
        z_m = F.interpolate(z_m, z_a.shape[-2:], mode="bilinear")         # (B, latent, h_a, w_a)
        x = self.project(torch.cat([z_a, z_m], 1))                        # (B, C, h_a, w_a)
        skips = []
        for level, shrink in zip(self.going_down, self.downs):
            x = level(x)
            skips.append(x)
            x = shrink(x)
        x = self.going_down[-1](x)
        for k in reversed(range(len(skips))):
            x = self.merges[k](torch.cat([skips[k], self.ups[k](x)], 1))
            x = self.going_up[k](x)
        return self.picture(x).to(self.project.weight.dtype)              # (B, 3, H, W)


class VAE(nn.Module):
    """E_A, E_M and D. `forward` is eq. 1 and 2; each encoder gives (mean, logvar)."""

    adam_only = ("appearance_encoder.door", "motion_encoder.door", "appearance_encoder.head",
                  "motion_encoder.head", "decoder.project", "decoder.picture")

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.appearance_encoder = Encoder(config, config.appearance_factor)
        self.motion_encoder = Encoder(config, config.motion_factor)
        self.decoder = Decoder(config)

    @property
    def last_layer(self):
        """The weight at which the adaptive weight compares gradients."""
        return self.decoder.picture[-1].widen.weight

    def encode_appearance(self, x_a):
        """E_A of eq. 1: portrait (B, 3, H, W) -> (mean, logvar) of z^a."""
        return self.appearance_encoder(x_a)

    def encode_motion(self, x_m):
        """E_M of eq. 1: landmark picture (B, 3, H, W) -> (mean, logvar) of z^m."""
        return self.motion_encoder(x_m)

    def decode(self, z_a, z_m):
        """D of eq. 2 -> (B, 3, H, W)."""
        return self.decoder(z_a, z_m)

    def forward(self, x_a, x_m, noise_a=None, noise_m=None):
        """x_a of frame i, x_m of frame j -> (x̂ of j, KL). Without noise the means are used."""
        a, m = self.encode_appearance(x_a), self.encode_motion(x_m)       # eq. 1
        z_a = a[0] if noise_a is None else reparameterise(*a, noise_a)
        z_m = m[0] if noise_m is None else reparameterise(*m, noise_m)
        return self.decode(z_a, z_m), kl(*a) + kl(*m)                     # eq. 2


def reparameterise(mean, logvar, noise):
    """A draw from N(mean, e^logvar), noise ~ N(0, 1) of the same shape."""
    return mean + noise * (logvar.clamp(-20, 10) / 2).exp()


def kl(mean, logvar):
    """KL( N(mean, e^logvar) || N(0, 1) ), L_kl of eq. 4, averaged over all latent elements."""
    logvar = logvar.clamp(-20, 10)
    return .5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()


# ---- reconstruction ------------------------------------------------------------------------------

def weight_map(boxes, shares, size):
    """w = 1 + sum_r share_r mask_r / mean(mask_r): a region counts by its share, not by its size.

    boxes (B, R, 4) pixels x0, y0, x1, y1; shares (R,) -> (B, 1, size, size). Not in the paper.
    """
    at = torch.arange(size, device=boxes.device)
    x0, y0, x1, y1 = boxes[..., None].unbind(2)                           # (B, R, 1)
    inside_x, inside_y = (at >= x0) & (at <= x1), (at >= y0) & (at <= y1)
    masks = (inside_y[..., :, None] & inside_x[..., None, :]).float()     # (B, R, size, size)
    area = masks.mean((2, 3), keepdim=True).clamp(min=2e-4)
    share = shares.to(boxes.device)[:, None, None] / area
    return 1 + (share * masks).sum(1, keepdim=True)


def l1(x_hat, x, weight):
    """Weighted mean absolute difference, picture by picture: a batch may be cut anywhere."""
    return picture_mean(weight * (x_hat - x).abs(), weight)


def l2(x_hat, x, weight):
    """Weighted mean square. A thin line whose place is uncertain is worth nothing to L1, whose best
    guess is the median: glasses would be left out for long."""
    return picture_mean(weight * (x_hat - x).square(), weight)


def gradient_l1(x_hat, x, weight):
    """L1 of the differences of neighbouring pixels: edges count. The built-in perceptual term."""
    d = x_hat - x
    across = weight[..., 1:] * (d[..., 1:] - d[..., :-1]).abs()
    along = weight[..., 1:, :] * (d[..., 1:, :] - d[..., :-1, :]).abs()
    return picture_mean(across, weight) + picture_mean(along, weight)


def picture_mean(values, weight):
    """Mean over each picture, over its mean weight, then over the batch: (B, C, h, w) -> scalar."""
    return (values.mean((1, 2, 3)) / weight.mean((1, 2, 3))).mean()


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al., 2018) on VGG16's five stages, written out.

    forward: two (B, 3, H, W) in [-1, 1] -> (B,). The weights are two public files: torchvision's
    VGG16 (`vgg16-397923af.pth`) and the linear layers of LPIPS 0.1 (`lpips_vgg.pth`).
    """
    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    FILES = ("vgg16-397923af.pth", "lpips_vgg.pth")

    def __init__(self, stages=STAGES):
        super().__init__()
        self.stages, before = nn.ModuleList(), 3
        for k, widths in enumerate(stages):
            layers = [nn.MaxPool2d(2)] if k else []
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            self.stages.append(nn.Sequential(*layers))
        self.linear = nn.ParameterList(torch.zeros(1, w[-1], 1, 1) for w in stages)
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(1, 3, 1, 1))

    def forward(self, x, y):
        distance = 0
        x, y = ((v - self.shift) / self.scale for v in (x, y))
        for stage, linear in zip(self.stages, self.linear):
            x, y = stage(x), stage(y)                                     # (B, C, h, w)
            unit_x, unit_y = (v / (v.norm(dim=1, keepdim=True) + 1e-10) for v in (x, y))
            distance = distance + ((unit_x - unit_y) ** 2 * linear).sum(1).mean((1, 2))
        return distance

    def load(self, vgg, linear):
        """Fill from the two public state dicts; KeyError or RuntimeError when they do not fit."""
        convs = [m for m in self.stages.modules() if isinstance(m, nn.Conv2d)]
        keys = sorted({int(k.split(".")[1]) for k in vgg if k.startswith("features.")})
        with torch.no_grad():
            for conv, k in zip(convs, keys, strict=True):
                conv.weight.copy_(vgg[f"features.{k}.weight"])
                conv.bias.copy_(vgg[f"features.{k}.bias"])
            for k, weight in enumerate(self.linear):
                weight.copy_(linear[f"lin{k}.model.1.weight"])
        return self.requires_grad_(False).eval()


def find_lpips(folder=None):
    """LPIPS with its public weights from `folder` or torch hub's cache; None where they are not."""
    folder = Path(folder) if folder else Path(torch.hub.get_dir()) / "checkpoints"
    paths = [folder / name for name in LPIPS.FILES]
    if not all(os.path.isfile(p) for p in paths):
        return None
    return LPIPS().load(*(torch.load(p, map_location="cpu", weights_only=True) for p in paths))


# ---- the adversary, eq. 3 ------------------------------------------------------------------------

class Discriminator(nn.Module):
    """PatchGAN f_dis: one logit for each patch. (B, 3, H, W) -> (B, 1, H/8, W/8)."""

    def __init__(self, width=64):
        super().__init__()
        layers, before = [], 3
        for k in range(3):
            after = width * 2 ** k
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1)]
            layers += [ChannelNorm(after)] if k else []
            layers += [nn.LeakyReLU(.2)]
            before = after
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, 1, 3, padding=1))

    def forward(self, x):
        return self.layers(x).to(self.layers[0].weight.dtype)


def adversarial_value(real, fake):
    """L_dis of eq. 3 from logits: log f(x) + log(1 - f(x̂)), which f_dis maximises."""
    return F.logsigmoid(real).mean() + F.logsigmoid(-fake).mean()         # eq. 3


def discriminator_loss(real, fake, kind="nonsaturating"):
    """What the discriminator minimises."""
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return -adversarial_value(real, fake)


def generator_loss(fake, kind="nonsaturating"):
    """What the VAE minimises: eq. 3's second term ("literal"), or -log f(x̂), or the hinge's."""
    if kind == "literal":
        return F.logsigmoid(-fake).mean()                                 # eq. 3
    return -F.logsigmoid(fake).mean() if kind == "nonsaturating" else -fake.mean()


def adaptive_weight(reconstruction, adversarial, last_layer, average=lambda gradient: gradient):
    """|d rec / d w| / |d adv / d w| at the last layer w: times this, both would pull equally hard
    (Esser et al., 2021). `average` takes the mean of a gradient over processes."""
    of_rec, of_adv = (average(torch.autograd.grad(loss, last_layer, retain_graph=True)[0])
                      for loss in (reconstruction, adversarial))
    return (of_rec.norm() / (of_adv.norm() + 1e-4)).clamp(max=1e4)


def psnr(x_hat, x):
    """10 log10(4 / MSE) for pictures in [-1, 1]; a float in dB."""
    return 10 * math.log10(4 / max(F.mse_loss(x_hat, x).item(), 1e-12))
