"""From an instruction to one vector: what takes the speech's place (appendix E).

    bytes   a small transformer over the letters, trained together with the motion model
    clip    CLIP's text encoder (Radford et al., 2021), frozen as in the paper, whose public weights
            are read from local files in Hugging Face's layout

Letters: B batch, L tokens, D width. The vector is repeated over the frames and enters A as speech
features would. Departure from the paper: the byte encoder, because the shipped weights cannot hold
CLIP's 63 million numbers.
"""
from __future__ import annotations

import functools
import gzip
import html
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

LONGEST = 120                   # bytes of an instruction
PAD = 256                       # after the 256 bytes
UNREAD = .15                    # share of the letters, and of the words, while it learns


class Block(nn.Module):
    """A transformer block, norms first: x + attention, x + feed-forward four times as wide."""

    def __init__(self, width, heads, causal, activation):
        super().__init__()
        self.heads, self.causal, self.activation = heads, causal, activation
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, real=None):
        """x (B, L, D), real (B, L) bool: tokens that may be attended to -> (B, L, D)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None if real is None else real[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, bias, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


# ---- bytes ---------------------------------------------------------------------------------------

def to_bytes(texts):
    """Lower-case letters without what surrounds them, as bytes: [str] -> (B, LONGEST) int64."""
    rows = torch.full((len(texts), LONGEST), PAD)
    for row, text in zip(rows, texts):
        letters = " ".join(text.lower().split()).encode()[:LONGEST]
        row[:len(letters)] = torch.tensor(list(letters))
    return rows


class ByteEncoder(nn.Module):
    """(B, L) bytes -> (B, D): the mean over letters of a small transformer's output. While it
    learns, some letters and some words go unread: other wordings share most, not all."""

    def __init__(self, width=128, layers=2, heads=4):
        super().__init__()
        self.letter = nn.Embedding(PAD + 1, width)
        self.position = nn.Parameter(torch.randn(LONGEST, width) * .02)
        self.blocks = nn.ModuleList(Block(width, heads, False, F.silu) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, letters):
        real = letters != PAD
        if self.training:
            word = (letters[:, 1:] == ord(" ")).cumsum(1)
            kept = torch.rand(2, *word.shape, device=real.device) > UNREAD
            real[:, 1:] &= kept[0] & kept[1].gather(1, word)
        x = self.letter(letters) + self.position[:letters.shape[1]]
        for block in self.blocks:
            x = block(x, real)
        x = self.norm(x) * real[..., None]
        return x.sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def vectors(texts, encoder, clip=None):
    """What stands for texts: (B, d_s), by a trained ByteEncoder, or by what `load_clip` gives."""
    return clip(texts) if clip else encoder(to_bytes(texts).to(encoder.position.device))


# ---- CLIP ----------------------------------------------------------------------------------------

START, END, CONTEXT = "<|startoftext|>", "<|endoftext|>", 77
WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|"
                   r"(?:[^\s\w]|_)+", re.IGNORECASE)


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


@functools.cache
def byte_letters():
    """A printable letter for each byte, in CLIP's order of its vocabulary: {byte: letter}."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + k) for k, b in enumerate(others)}


class BytePairs:
    """CLIP's tokens: bytes of a word, joined pair by pair in the order of the vocabulary file.

    path: merges.txt, or the original bpe_simple_vocab_16e6.txt.gz: after one line of header, a pair
    a line, most wanted first.
    """

    def __init__(self, path):
        lines = (gzip.open if str(path).endswith(".gz") else open)(path, "rb").read().decode()
        pairs = [tuple(line.split()) for line in lines.split("\n")[1:49152 - 256 - 2 + 1]]
        pairs = [pair for pair in pairs if len(pair) == 2]
        self.rank = {pair: k for k, pair in enumerate(pairs)}
        letters = list(byte_letters().values())
        names = letters + [c + "</w>" for c in letters] + ["".join(p) for p in pairs] + [START, END]
        self.number = {name: k for k, name in enumerate(names)}

    def word(self, word):
        """The tokens' names of one word."""
        parts = [byte_letters()[b] for b in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:]))
            best = min(pairs, key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            joined, k = [], 0
            while k < len(parts):
                both = tuple(parts[k:k + 2]) == best
                joined.append("".join(best) if both else parts[k])
                k += 1 + both
            parts = joined
        return parts

    def __call__(self, texts):
        """[str] -> (B, CONTEXT) int64, ended and padded with the end token."""
        end = self.number[END]
        rows = torch.full((len(texts), CONTEXT), end)
        for row, text in zip(rows, texts):
            text = " ".join(html.unescape(html.unescape(text)).split()).lower()
            found = [self.number[t] for w in WORDS.findall(text) for t in self.word(w)]
            found = [self.number[START], *found[:CONTEXT - 2], end]
            row[:len(found)] = torch.tensor(found)
        return rows


class ClipText(nn.Module):
    """CLIP's text encoder, ViT-B/32's sizes: tokens (B, 77) -> (B, 512)."""

    def __init__(self, vocabulary=49408, width=512, layers=12, heads=8, features=512):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(CONTEXT, width) * .01)
        self.blocks = nn.ModuleList(Block(width, heads, True, quick_gelu) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, features, bias=False)

    def forward(self, tokens):
        x = self.token(tokens) + self.position[:tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        last = tokens.argmax(1)                                 # the first end token: the largest
        return self.projection(self.norm(x)[torch.arange(len(x)), last])


_NAMES = {"text_model.embeddings.token_embedding": "token", "text_model.final_layer_norm": "norm",
          "text_projection": "projection", "self_attn.out_proj": "out", "layer_norm1": "norm1",
          "layer_norm2": "norm2", "mlp.fc1": "fc1", "mlp.fc2": "fc2",
          "text_model.encoder.layers": "blocks"}


def from_hugging_face(state):
    """The names and shapes of ClipText for a state dict of transformers' CLIPModel."""
    made = {}
    for name, value in state.items():
        if not name.startswith(("text_model.", "text_projection")) or "position_ids" in name:
            continue
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        made[name] = value.float()
    made["position"] = made.pop("text_model.embeddings.position_embedding.weight")
    for key in [k for k in made if ".self_attn.q_proj." in k]:
        made[key.replace("self_attn.q_proj", "qkv")] = torch.cat(
            [made.pop(key.replace("q_proj", f"{c}_proj")) for c in "qkv"])
    return made


def read_safetensors(path):
    """A .safetensors file: eight bytes with the header's length, JSON, then the numbers."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
             "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}
    raw = Path(path).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8:8 + size]), raw[8 + size:]
    made = {}
    for name, told in header.items():
        if name != "__metadata__":
            first, last = told["data_offsets"]
            numbers = torch.frombuffer(bytearray(body[first:last]), dtype=kinds[told["dtype"]])
            made[name] = numbers.view(told["shape"])
    return made


def load_clip(folder):
    """CLIP's text encoder from a folder with model.safetensors or pytorch_model.bin, and merges.txt
    or bpe_simple_vocab_16e6.txt.gz -> a function from B texts to (B, 512). ValueError for files
    that are missing or of another model."""
    def one_of(*names):
        for name in names:
            if (Path(folder) / name).is_file():
                return Path(folder) / name
        raise ValueError(f"{folder}: neither {' nor '.join(names)} in it")
    weights = one_of("model.safetensors", "pytorch_model.bin")
    pairs = BytePairs(one_of("merges.txt", "bpe_simple_vocab_16e6.txt.gz"))
    try:
        state = from_hugging_face(read_safetensors(weights) if weights.suffix == ".safetensors" else
                                  torch.load(weights, map_location="cpu", weights_only=True))
        vocabulary, width = state["token.weight"].shape
        layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        model = ClipText(vocabulary, width, layers, width // 64, len(state["projection.weight"]))
        model.load_state_dict(state)
    except Exception as error:                           # unpickling raises a dozen kinds
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{weights}: not CLIP in Hugging Face's layout ({reason})") from error
    model.eval().requires_grad_(False)
    return lambda texts: model(pairs(texts))
