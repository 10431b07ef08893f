"""The Conformer backbone of the diffusion model, with its three conditions (sec. 4.3).

The block of Gulati et al. (2020) with cross-attention added: half a feed-forward, self-attention,
cross-attention, a convolution module, half a feed-forward, LayerNorm. Conditions enter every block
as the paper says:

    time      embedded and added to the block's input
    speech    added to the block's hidden features frame by frame
    reference attended to: its spatial positions are keys and values

Letters: B batch, N frames, D width, H heads, L reference tokens, E width of a token.

Departures from the paper, or choices where it is silent:
1. The convolution module has a LayerNorm where the original has a BatchNorm: a frame's result does
   not depend on its batch, and padding cannot leak into statistics.
2. Relative positions are a learnt bias for each head and distance, clipped at REACH frames, so any
   length works, longer than trained on too.
3. Where in the block the reference is asked is not said: after self-attention, as in Transformers.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

REACH = 64                                  # frames; everything further away looks equally far


class FeedForward(nn.Sequential):
    """(B, N, D) -> (B, N, D), `times` as wide inside."""

    def __init__(self, width, times, dropout):
        super().__init__(nn.LayerNorm(width), nn.Linear(width, times * width), nn.SiLU(),
                         nn.Dropout(dropout), nn.Linear(times * width, width), nn.Dropout(dropout))


class SelfAttention(nn.Module):
    """Attention over frames with relative positions. Padded frames are never attended to."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, 2 * REACH + 1))

    def forward(self, x, mask=None):
        """x (B, N, D), mask (B, N) bool, True where frames are real -> (B, N, D)."""
        n = x.shape[1]
        q, k, v = split(self.qkv(self.norm(x)), 3, self.heads)               # (B, H, N, D/H)
        frame = torch.arange(n, device=x.device)
        distance = (frame[None] - frame[:, None]).clamp(-REACH, REACH) + REACH
        bias = self.bias[:, distance].to(q.dtype)[None]                      # (1, H, N, N)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None], float("-inf"))     # (B, H, N, N)
        drop = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=drop)
        return F.dropout(self.out(join(y)), self.dropout, self.training)


class CrossAttention(nn.Module):
    """Frames ask, the reference's spatial tokens answer."""

    def __init__(self, width, heads, token_width, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm, self.token_norm = nn.LayerNorm(width), nn.LayerNorm(token_width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(token_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, tokens):
        """x (B, N, D), tokens (B, L, E) -> (B, N, D)."""
        q, = split(self.q(self.norm(x)), 1, self.heads)                      # (B, H, N, D/H)
        k, v = split(self.kv(self.token_norm(tokens)), 2, self.heads)        # (B, H, L, D/H)
        y = F.scaled_dot_product_attention(q, k, v)
        return F.dropout(self.out(join(y)), self.dropout, self.training)


class Convolution(nn.Module):
    """Pointwise, GLU, depthwise over time, norm, SiLU, pointwise."""

    def __init__(self, width, kernel, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.inner_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        """x (B, N, D), mask (B, N) -> (B, N, D); padding is zeroed before time is mixed."""
        x = F.glu(self.widen(self.norm(x)), -1)                              # (B, N, D)
        if mask is not None:
            x = x * mask[..., None]
        x = self.depthwise(x.mT).mT                                          # (B, N, D)
        return self.dropout(self.out(F.silu(self.inner_norm(x))))


class ConformerBlock(nn.Module):
    """One block with its conditions; see the file's docstring for the order."""

    def __init__(self, width, heads, times, kernel, token_width, dropout):
        super().__init__()
        self.time = nn.Linear(width, width)
        self.speech = nn.Linear(width, width)
        self.first = FeedForward(width, times, dropout)
        self.attention = SelfAttention(width, heads, dropout)
        self.cross = CrossAttention(width, heads, token_width, dropout)
        self.convolution = Convolution(width, kernel, dropout)
        self.second = FeedForward(width, times, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x, time, speech, tokens, mask=None):
        """x, speech (B, N, D), time (B, D), tokens (B, L, E), mask (B, N) -> (B, N, D)."""
        x = x + self.time(time)[:, None] + self.speech(speech)               # (B, N, D)
        x = x + self.first(x) / 2
        x = x + self.attention(x, mask)
        x = x + self.cross(x, tokens)
        x = x + self.convolution(x, mask)
        return self.norm(x + self.second(x) / 2)


class Conformer(nn.Module):
    """A stack of blocks, `sizes` as theirs.

    forward: x (B, N, D), time (B, D), speech (B, N, D), tokens (B, L, E), mask (B, N) bool or None
    -> (B, N, D).
    """

    def __init__(self, layers, *sizes):
        super().__init__()
        self.blocks = nn.ModuleList(ConformerBlock(*sizes) for _ in range(layers))

    def forward(self, x, time, speech, tokens, mask=None):
        for block in self.blocks:
            x = block(x, time, speech, tokens, mask)
        return x


def split(x, parts, heads):
    """(B, N, parts D) -> `parts` tensors (B, H, N, D/H)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def join(x):
    """(B, H, N, D/H) -> (B, N, D)."""
    return x.transpose(1, 2).flatten(2)
