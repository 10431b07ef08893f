"""Speech features at 25 a second, aligned with the video's frames (the paper's z^s, sec. 4.3).

Frame i of the video is the sound's samples [640 i, 640 (i + 1)); row i of the features describes
the same forty milliseconds. Letters: T samples at 16 kHz, N = round(25 T / 16000) frames.

Departures from the paper: it uses wav2vec 2.0; so do we on request (`kind="wav2vec2"`), but the
default is a log-mel spectrum, which needs neither weights nor torchaudio.
"""
from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import media

BANDS, STACK = 80, 4                                     # mel bands; spectra stacked in one frame
FEATURES = {"mel": BANDS * STACK, "wav2vec2": 768}       # kind: d_s
SAMPLES = media.RATE // media.FPS                        # of one frame: 640
STEP, WINDOW = SAMPLES // STACK, 400                     # 10 ms apart, 25 ms long
WAV2VEC2_FILE = "wav2vec2_fairseq_base_ls960.pth"        # its name in torch hub's cache
CHUNK, CONTEXT = 20 * media.RATE, 2 * media.RATE         # wav2vec 2.0 hears 20 s at a time


def frames_of(samples):
    """How many frames a sound of so many samples has."""
    return round(media.FPS * samples / media.RATE)


def speech_features(wave, kind="mel", weights=None):
    """Features of a sound: (T,) float32 -> (N, FEATURES[kind]) float32. `weights` is a local file
    for wav2vec 2.0; without it torch hub's cache is searched."""
    if kind == "mel":
        return log_mel(wave)
    if kind == "wav2vec2":
        return wav2vec2(wave, load_wav2vec2(weights))
    raise media.UserError(f"speech features {kind!r}: choose one of {', '.join(FEATURES)}")


# ---- log-mel -------------------------------------------------------------------------------------

def log_mel(wave):
    """80 log-mel bands at 100 Hz, four neighbours stacked: (T,) -> (N, 320), about -1..1.5.
    Spectrum j is centred on samples [160 j, 160 (j + 1)). Levels are absolute: silence is -1."""
    wave = torch.as_tensor(wave, dtype=torch.float32)
    n = frames_of(len(wave))
    before = (WINDOW - STEP) // 2
    needed = n * SAMPLES + WINDOW
    padded = F.pad(wave, (before, max(0, needed - before - len(wave))))[:needed]
    pieces = padded.unfold(0, WINDOW, STEP)[:n * STACK]                      # (4N, 400)
    window, filters = torch.hann_window(WINDOW), mel_filters()
    power = [(torch.fft.rfft(part * window, 512).abs() ** 2) @ filters for part in
             pieces.split(4000)]                                             # 40 s at a time
    mel = torch.cat(power).clamp(min=1e-5).log()                             # (4N, 80)
    return ((mel - np.log(1e-5)) / 6 - 1).reshape(n, STACK * BANDS)


@functools.cache
def mel_filters(low=50.0, high=7600.0):
    """Triangles evenly spaced on the mel scale 2595 log10(1 + f / 700): (257, 80)."""
    mel = torch.linspace(*(2595 * np.log10(1 + f / 700) for f in (low, high)), BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)                                   # (82,) Hz
    f = torch.linspace(0, media.RATE / 2, 257)[:, None]
    rising = (f - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - f) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


# ---- wav2vec 2.0 ---------------------------------------------------------------------------------

def wav2vec2(wave, model):
    """The last layer of wav2vec 2.0, brought from 50 Hz to the video's frames: (T,) -> (N, d).
    Long sound is heard in chunks with two seconds of context on both sides: memory stays flat."""
    wave = torch.as_tensor(wave, dtype=torch.float32)
    made = []
    for first in range(0, max(len(wave), 1), CHUNK):
        begin, end = max(0, first - CONTEXT), min(len(wave), first + CHUNK + CONTEXT)
        n = frames_of(min(first + CHUNK, len(wave))) - frames_of(first)
        piece = F.pad(wave[begin:end], (200, 600))
        with torch.inference_mode():
            heard = model.extract_features((piece - piece.mean())[None])[0][-1][0]   # (M, d)
        # vector j sees samples [320 j, 320 j + 400) of the padded piece: its centre is 320 j
        centres = (first - begin + (torch.arange(n) + .5) * SAMPLES) / 320
        low = centres.floor().long().clamp(max=len(heard) - 1)
        high = (low + 1).clamp(max=len(heard) - 1)
        made.append(torch.lerp(heard[low], heard[high], (centres - low)[:, None]))
    return torch.cat(made)


@functools.lru_cache(maxsize=1)
def load_wav2vec2(weights=None):
    """torchaudio's wav2vec 2.0 from a state dict; its sizes are read off the weights."""
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / WAV2VEC2_FILE
    if not path.is_file():
        raise media.UserError(f"{path}: no wav2vec 2.0 weights there; get {WAV2VEC2_FILE} from "
                              "download.pytorch.org/torchaudio/models and name it with --wav2vec2")
    try:
        import torchaudio
    except (ImportError, OSError) as error:
        raise media.UserError("torchaudio does not import; install the version that belongs to "
                              f"your torch: pip install -r requirements.txt ({error})") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {k.removeprefix("model."): v for k, v in state.items() if not k.startswith("aux")}
        model = torchaudio.models.wav2vec2_model(**_sizes(state))
        model.load_state_dict(state)
    except Exception as error:                           # torch raises a dozen kinds for a bad file
        reason = " ".join(str(error).split())[:120]
        raise media.UserError(f"{path}: not torchaudio's wav2vec 2.0 base ({reason})") from error
    return model.eval().requires_grad_(False)


def _sizes(state):
    """Arguments of torchaudio's `wav2vec2_model` for a state dict in its layout."""
    def count(prefix):
        return 1 + max(int(k[len(prefix):].split(".")[0]) for k in state if k.startswith(prefix))
    extractor = "feature_extractor.conv_layers."
    convs = [state[f"{extractor}{k}.conv.weight"] for k in range(count(extractor))]
    strides = [5] + [2] * (len(convs) - 1)
    width = state["encoder.feature_projection.projection.weight"].shape[0]
    position = state["encoder.transformer.pos_conv_embed.conv.weight_v"] \
        if "encoder.transformer.pos_conv_embed.conv.weight_v" in state else \
        state["encoder.transformer.pos_conv_embed.conv.parametrizations.weight.original1"]
    hidden = state["encoder.transformer.layers.0.feed_forward.intermediate_dense.weight"].shape[0]
    return {
        "extractor_mode": "group_norm", "aux_num_out": None,
        "extractor_conv_layer_config":
            [(c.shape[0], c.shape[2], stride) for c, stride in zip(convs, strides)],
        "extractor_conv_bias": f"{extractor}0.conv.bias" in state,
        "encoder_embed_dim": width, "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": position.shape[2],
        "encoder_pos_conv_groups": width // position.shape[1],
        "encoder_num_layers": count("encoder.transformer.layers."),
        "encoder_num_heads": max(1, width // 64), "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": hidden, "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0, "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0}
