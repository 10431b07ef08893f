"""Made speech: phonemes become articulator tracks, and the tracks drive sound and lips alike.

    phonemes with times ──► lips (N, 4), with coarticulation     ──► the face (toy.py)
                        └─► pitch, formants, noise at 200 Hz     ──► sound, by a source-filter model

So sound does not cause the lips: one string of phonemes causes both, as in life. The formant voice
needs no download; `espeak` speaks real sentences where espeak-ng is installed and drives the lips
from the same table. Letters: N frames (25 Hz), M control points (200 Hz), T samples (16 kHz),
S segments. Nothing here is in the paper: it trained on recorded speech.

    python voices.py --seed 3 --seconds 4 --out voice.wav
"""
from __future__ import annotations

import ctypes
import ctypes.util
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import media

REST = np.array([0, .5, 0, 0])                           # of jaw, width, round, upper lip: 0..1
CONTROL = 200                                            # control points a second
WINDOW, HOP = 320, media.RATE // CONTROL                 # of the short-time spectrum
SILENT = ("_",)


@dataclass(frozen=True)
class Phoneme:
    """One row of the table. Times in seconds, formants in Hz for a tract of length 1."""
    seconds: float
    formants: tuple                  # F1, F2, F3
    lips: tuple                      # targets of jaw, width, round, upper
    pull: float = 1.0                # how much it imposes its lips on its neighbours
    voice: float = 1.0               # amplitude of the voiced source
    noise: tuple = (0, 1, 0)         # centre, bandwidth (Hz), amplitude
    breath: float = 0.0              # noise at the glottis
    closure: float = 0.0             # share of its time for which the tract is shut
    lips_shut: bool = False          # shut by the lips: p, b, m


VOWELS = {                               # formants, then lips
    "i": (280, 2250, 2900, .20, .88, .00, .15), "I": (400, 1950, 2550, .28, .72, .00, .10),
    "e": (530, 1850, 2500, .45, .70, .00, .15), "E": (610, 1750, 2450, .55, .70, .00, .20),
    "A": (700, 1650, 2400, .72, .72, .00, .25), "a": (740, 1150, 2450, .92, .52, .00, .20),
    "V": (620, 1220, 2400, .58, .50, .05, .15), "@": (500, 1450, 2450, .34, .50, .05, .08),
    "3": (490, 1350, 1690, .34, .40, .35, .15), "o": (500, 850, 2400, .52, .26, .70, .12),
    "O": (590, 900, 2420, .70, .30, .55, .15), "U": (440, 1050, 2250, .32, .30, .62, .10),
    "u": (310, 870, 2250, .24, .14, .95, .10),
}
PHONEMES = {
    "_": Phoneme(.3, (500, 1500, 2500), tuple(REST), 2.0, voice=0),
    **{v: Phoneme(.07 if v == "@" else .12, row[:3], row[3:]) for v, row in VOWELS.items()},
    # lips shut
    "p": Phoneme(.10, (300, 900, 2200), (0, .48, .05, 0), 3, 0, (900, 700, .30), .5, .75, True),
    "b": Phoneme(.10, (300, 900, 2200), (0, .48, .05, 0), 3, .9, (900, 700, .15), 0, .80, True),
    "m": Phoneme(.11, (270, 1000, 2200), (0, .50, .00, 0), 3, .55, closure=1.0, lips_shut=True),
    # lower lip to the teeth
    "f": Phoneme(.11, (350, 1100, 2300), (.10, .50, .00, .55), 2.4, 0, (4800, 2600, .16)),
    "v": Phoneme(.08, (320, 1100, 2300), (.10, .50, .00, .55), 2.4, .5, (4800, 2600, .07)),
    # tongue, lips free
    "t": Phoneme(.09, (320, 1700, 2600), (.16, .52, .05, .08), .5, 0, (4600, 1300, .35), .45, .65),
    "d": Phoneme(.08, (300, 1700, 2600), (.18, .52, .05, .08), .5, .9, (4400, 1300, .18), 0, .70),
    "n": Phoneme(.08, (270, 1650, 2550), (.18, .52, .03, .06), .5, .60, closure=1.0),
    "k": Phoneme(.09, (320, 1950, 2300), (.26, .52, .05, .06), .4, 0, (2000, 700, .32), .45, .65),
    "g": Phoneme(.08, (300, 1950, 2300), (.26, .52, .05, .06), .4, .9, (2000, 700, .16), 0, .70),
    "N": Phoneme(.09, (270, 1900, 2350), (.24, .52, .03, .06), .4, .55, closure=1.0),
    "s": Phoneme(.11, (330, 1650, 2600), (.10, .68, .00, .12), .9, 0, (6000, 1100, .34)),
    "z": Phoneme(.08, (310, 1650, 2600), (.10, .68, .00, .12), .9, .5, (6000, 1100, .18)),
    "S": Phoneme(.11, (330, 1850, 2500), (.18, .25, .62, .30), 1.3, 0, (3100, 800, .40)),
    "Z": Phoneme(.08, (310, 1850, 2500), (.18, .25, .62, .30), 1.3, .5, (3100, 800, .20)),
    "T": Phoneme(.10, (340, 1450, 2500), (.20, .54, .00, .12), .7, 0, (5200, 2400, .10)),
    "D": Phoneme(.06, (320, 1450, 2500), (.20, .54, .00, .12), .7, .6, (5200, 2400, .05)),
    "h": Phoneme(.07, (520, 1500, 2500), (.36, .50, .05, .08), .1, 0, (1500, 900, 0), 1.0),
    "l": Phoneme(.07, (360, 1300, 2700), (.30, .52, .05, .10), .4, .75),
    "r": Phoneme(.07, (350, 1200, 1600), (.26, .34, .45, .15), .8, .75),
    "w": Phoneme(.07, (300, 700, 2200), (.16, .12, 1.0, .08), 1.8, .75),
    "j": Phoneme(.06, (280, 2200, 2950), (.18, .80, .00, .12), .7, .75),
}
NUCLEI = [*VOWELS, "aI", "eI", "oU", "aU", "OI"]
ONSETS = [*"pbmpbmfvtdnkgszSThlrwj", "pl", "br", "st", "tS", "kw", "fl", "sp", "dZ", "D"]
CODAS = "pbmfvtdnkgNszSTlr"


@dataclass(frozen=True)
class Voice:
    """Who speaks: pitch (Hz), tract length and rate (1 is average), the rest 0..1 or so."""
    pitch: float = 120.0
    tract: float = 1.0
    rate: float = 1.0
    breath: float = .05
    loudness: float = .5
    melody: float = .15              # spread of the pitch, in octaves
    tilt: float = 1.0                # how fast the source falls with frequency


@dataclass(frozen=True)
class Speech:
    """sound (T,) float32, lips (N, 4) and stress (N,) at frame centres, segments
    [(phoneme, start, end, stress)] in seconds."""
    sound: np.ndarray
    lips: np.ndarray
    stress: np.ndarray
    segments: list
    voice: Voice | None = None


def random_voice(rng):
    """A new speaker; deep voices tend to have long tracts."""
    deep = rng.uniform(-1, 1)
    return Voice(pitch=145 * 2 ** (-.75 * deep) * np.exp(rng.normal(0, .05)),
                 tract=1 + .11 * deep + rng.normal(0, .03), rate=rng.uniform(.85, 1.2),
                 breath=rng.uniform(0, .2), loudness=rng.uniform(.25, .9),
                 melody=rng.uniform(.06, .25), tilt=rng.uniform(.8, 1.25))


# ---- what is said --------------------------------------------------------------------------------

def random_phonemes(rng, count):
    """About `count` phonemes in words and phrases. -> [(phoneme, stress)]"""
    said = [("_", 0.0)]
    while len(said) < count:
        for _ in range(rng.integers(3, 9)):                     # a phrase of words
            syllables = int(rng.choice([1, 2, 3], p=[.5, .35, .15]))
            accent = int(rng.integers(syllables)) if rng.random() < .65 else -1
            for k in range(syllables):
                stress = float(rng.uniform(.5, 1)) if k == accent else 0.0
                onset = ONSETS[rng.integers(len(ONSETS))] if rng.random() < .85 else ""
                nucleus = NUCLEI[rng.integers(len(NUCLEI))]
                coda = CODAS[rng.integers(len(CODAS))] if rng.random() < .35 else ""
                said += [(p, stress) for p in (*onset, *nucleus, *coda)]
        said.append(("_", 0.0))
    return said


def give_times(rng, said, voice, seconds):
    """Durations for phonemes, cut where the clip ends. -> [(phoneme, start, end, stress)]"""
    segments, at = [], 0.0
    for phoneme, stress in said:
        length = PHONEMES[phoneme].seconds / voice.rate * (1 + .3 * stress)
        length *= np.exp(rng.normal(0, .15 if phoneme != "_" else .55))
        length = max(length, .09 if PHONEMES[phoneme].lips_shut else .04)
        segments.append((phoneme, at, min(at + length, seconds), stress))
        at += length
        if at >= seconds:
            break
    if at < seconds:
        segments.append(("_", at, seconds, 0.0))
    return segments


def make_speech(rng, seconds, voice=None, phonemes=None, motion_rng=None, silence_share=.03):
    """Speech of `seconds`: exactly round(16000 s) samples and round(25 s) frames.
    `phonemes` says what (a list of symbols; else random); another `motion_rng` moves the lips
    differently for the same sound's phonemes and times. A share of clips is silent throughout."""
    own = np.random.default_rng(rng.integers(2 ** 63))
    motion_rng = motion_rng or own
    voice = voice or random_voice(rng)
    if rng.random() < silence_share:
        phonemes = ["_"]
    said = random_phonemes(rng, int(seconds * 16) + 8) if phonemes is None else \
        [(p, 0.0) for p in phonemes]
    segments = give_times(rng, said, voice, seconds)
    sound = synthesise(rng, segments, voice, round(seconds * media.RATE))
    return Speech(sound, *move_lips(motion_rng, segments, seconds), segments, voice)


# ---- lips ----------------------------------------------------------------------------------------

def move_lips(rng, segments, seconds):
    """Articulator tracks with coarticulation. -> lips (N, 4) float32, stress (N,) at frame centres.
    Each phoneme pulls towards its targets with a strength that decays from its middle, so that
    neighbours blend (after Cohen and Massaro, 1993); shut lips then stay shut for their time."""
    m = round(seconds * CONTROL) + 1
    time = np.arange(m) / CONTROL

    def around(start, end, reach):
        return slice(*np.searchsorted(time, (start - reach, end + reach)))
    total, weight = np.full((m, 4), 1e-3) * REST, np.full((m, 1), 1e-3)
    open_to, stress = np.ones(m), np.zeros(m)
    for phoneme, start, end, accent in segments:
        p, middle = PHONEMES[phoneme], (start + end) / 2
        target = np.array(p.lips)
        if phoneme not in SILENT:
            target = target * np.exp(rng.normal(0, .10, 4)) + rng.normal(0, .02, 4)
            target[0] *= 1 + .25 * (accent - .3) * (phoneme in VOWELS)
        shift = rng.normal(0, .006)
        near = around(start, end, .25)
        away = np.maximum(np.abs(time[near] - middle - shift) - .35 * (end - start), 0)
        pull = p.pull * np.exp(-away / .035)[:, None]
        total[near] += pull * target
        weight[near] += pull
        if phoneme in SILENT and end - start > .12:
            shut = _away_from(time[near], start + .07, end - .05, .06)
            open_to[near] = np.minimum(open_to[near], shut)
        elif p.lips_shut:
            shut = _away_from(time[near], start, start + _closed(p, start, end), .045)
            open_to[near] = np.minimum(open_to[near], shut)
        elif accent and phoneme in VOWELS:
            near = around(start, end, 1.0)
            bump = accent * np.exp(-.5 * ((time[near] - middle) / .09) ** 2)
            stress[near] = np.maximum(stress[near], bump)
    lips = total / weight
    lips[:, [0, 3]] *= open_to[:, None]
    at = (np.arange(round(seconds * media.FPS)) + .5) / media.FPS
    lips = np.stack([np.interp(at, time, lips[:, k]) for k in range(4)], 1)
    return np.clip(lips, 0, 1.1).astype(np.float32), np.interp(at, time, stress).astype(np.float32)


def _closed(phoneme, start, end):
    """Seconds for which a closure lasts: two frames for lips, so that a video can show it."""
    return max(phoneme.closure * (end - start), .08 if phoneme.lips_shut else 0)


def _away_from(time, start, end, ramp):
    """0 between start and end, rising smoothly to 1 within `ramp` seconds on both sides."""
    away = np.clip(np.maximum(start - time, time - end) / ramp, 0, 1)
    return away * away * (3 - 2 * away)


# ---- sound ---------------------------------------------------------------------------------------

def synthesise(rng, segments, voice, samples):
    """Source and filter, without a loop over samples. -> (T,) float32. A pulse train and white
    noise are cut into overlapping windows; each window's spectrum is multiplied by its phoneme's
    formants or noise band, and all are added up again."""
    m = samples // HOP + 1 + WINDOW // HOP
    tracks = _controls(rng, segments, voice, m)
    pitch = np.interp(np.arange(m * HOP) / HOP, np.arange(m), tracks["pitch"])
    phase = 2 * np.pi * np.cumsum(pitch) / media.RATE
    count = int(7400 / pitch.max())                              # harmonics below 7.4 kHz
    half = np.sin(phase / 2)
    half = np.where(np.abs(half) < 1e-6, 1e-6, half)
    pulses = np.sin((count + .5) * phase) / (2 * half) - .5      # sum of cos(k phase), k = 1..count
    hiss = rng.standard_normal(m * HOP)

    f = np.fft.rfftfreq(WINDOW, 1 / media.RATE)
    formants = _resonances(f, tracks["formants"])                # (M, F)
    source = (np.maximum(f, 60) / 120) ** -voice.tilt            # falls with frequency
    centre, width, level = tracks["noise"].T[..., None]          # (M, 1)
    band = level * np.exp(-.5 * ((f - centre) / width) ** 2)
    voiced = tracks["voice"][:, None] * formants * source
    # while the tract is shut only the low murmur of the voice gets out
    voiced *= 1 - tracks["shut"][:, None] * (1 - .5 * np.exp(-(f / 280) ** 2))
    breath = tracks["breath"][:, None] * formants * .012
    sound = _filtered(pulses, voiced) * .06 + _filtered(hiss, band * .35 + breath)
    loudness = np.interp(np.arange(len(sound)) / HOP, np.arange(m), tracks["loudness"])
    return np.tanh((sound * loudness)[WINDOW // 2:][:samples]).astype(np.float32)


def _controls(rng, segments, voice, m):
    """Every parameter of the synthesizer at M control points, smoothed as a mouth would."""
    time = (np.arange(m) - WINDOW / HOP / 2) / CONTROL + WINDOW / media.RATE / 2
    kept = [(PHONEMES[s], start, end, accent) for s, start, end, accent in segments if end > start]
    table = np.array([(start, end, accent, _closed(p, start, end), p.closure, p.voice, p.breath,
                       *p.noise, *p.formants) for p, start, end, accent in kept])
    which = np.searchsorted(table[:, 0], time, "right") - 1
    table = table[np.clip(which, 0, len(kept) - 1)]              # (M, 13)
    start, end, accent, shut, closure, voiced, breath = table[:, :7].T
    noise, formants, since = table[:, 7:10], table[:, 10:], time - start
    is_shut, is_stop = (since < shut) & (time < end), (closure > 0) & (closure < 1)
    noise[:, 2] *= ~is_stop | (since >= shut) & (since < shut + .025)        # a stop's is its burst
    drift = np.convolve(rng.standard_normal(m + 120), np.hanning(121) / 7.7, "valid")[:m]
    octaves = voice.melody * (.8 * _smooth(accent, 31) + drift - .25 * (time / 3 % 1))
    octaves += .006 * rng.standard_normal(m)                     # jitter
    return {
        "pitch": voice.pitch * 2 ** octaves,
        "formants": np.stack([_smooth(c, 13) for c in formants.T], 1) / voice.tract,
        "voice": _smooth(voiced * (time < kept[-1][2]), 7),
        "noise": np.concatenate([noise[:, :2], _smooth(noise[:, 2], 5)[:, None]], 1),
        "breath": _smooth(breath * ~(is_stop & is_shut) + voice.breath * (voiced > 0), 5),
        "shut": _smooth(np.where(closure == 1, .55, is_shut & is_stop), 5),
        "loudness": voice.loudness * np.exp(.35 * drift + .25 * _smooth(accent, 21)),
    }


def _smooth(track, points):
    """Weighted mean over neighbouring control points."""
    window = np.hanning(points + 2)[1:-1]
    padded = np.pad(track.astype(np.float64), points // 2, mode="edge")
    return np.convolve(padded, window / window.sum(), "valid")


def _resonances(f, formants):
    """Gain of a cascade of five formants at frequencies f. formants (M, 3) -> (M, F)."""
    upper = np.array([3500., 4500.]) * formants[:, 2:].mean() / 2500
    every = np.concatenate([formants, np.broadcast_to(upper, (len(formants), 2))], 1)[..., None]
    width = 50 + .035 * every
    gain = every ** 2 / np.sqrt((f ** 2 - every ** 2) ** 2 + (f * width) ** 2)
    return gain.prod(1)


def _filtered(wave, gains):
    """Multiply each short-time spectrum by its gains, and overlap-add. (T',), (M, F) -> (T',)"""
    m = len(gains) - WINDOW // HOP
    window = np.hanning(WINDOW + 1)[:-1]
    index = np.arange(m)[:, None] * HOP + np.arange(WINDOW)
    spectra = np.fft.rfft(wave[index] * window, axis=1) * gains[:m]
    pieces = np.fft.irfft(spectra, axis=1) * window
    made = np.zeros(len(wave))
    for k in range(WINDOW // HOP):                               # hops overlap in four layers
        layer = pieces[k::WINDOW // HOP].ravel()
        made[k * HOP:k * HOP + len(layer)] += layer
    return made / 1.5


def augment(sound, rng):
    """A room, an equaliser, noise and a level, each at random. (T,) -> (T,) float32."""
    n = 1 << (len(sound) + media.RATE // 2).bit_length()
    spectrum = np.fft.rfft(sound, n)
    f = np.fft.rfftfreq(n, 1 / media.RATE)
    if rng.random() < .5:                                        # echoes that die away
        t = np.arange(media.RATE // 2) / media.RATE
        room = rng.standard_normal(len(t)) * np.exp(-t / rng.uniform(.02, .09))
        room *= rng.uniform(.1, .5) / np.sqrt((room ** 2).sum())
        room[0] += 1
        spectrum = spectrum * np.fft.rfft(room, n)
    if rng.random() < .6:                                        # a smooth gain over frequency
        at = np.array([0, 200, 600, 1500, 3500, 8000])
        spectrum = spectrum * 10 ** (np.interp(f, at, rng.uniform(-8, 8, 6)) / 20)
    made = np.fft.irfft(spectrum, n)[:len(sound)]
    if rng.random() < .6:                                        # noise, white to brown
        noise = np.fft.rfft(rng.standard_normal(n)) / np.maximum(f, 40) ** rng.uniform(0, 1)
        noise = np.fft.irfft(noise, n)[:len(sound)]
        level = max(np.sqrt((made ** 2).mean()), 1e-3) * 10 ** (-rng.uniform(8, 40) / 20)
        made = made + noise * level / np.sqrt((noise ** 2).mean())
    made = made * 10 ** (rng.uniform(-12, 6) / 20)
    return np.clip(made, -1, 1).astype(np.float32)


# ---- espeak-ng -----------------------------------------------------------------------------------

IPA = dict(zip("iɪᵻyeɛæaɑɐʌəɜɚoɔɒʊuøœpbmfvtdnkɡgŋɲszʃʒçθðhxlɫrɹɾʁwjʔβ",
               "iIIueEAaaVV@33oOOUuoOpbmfvtdnkggNnszSZSTDhhllrrdrwjtb"))
_MARKS = "ˈˌːˑ̩̃ʲʰ͡-"
# espeak-ng's times, measured against its sound: the mouth is on its way before a phoneme's event,
# and the event of p, t, k is the burst, after the closure
EARLY, BEFORE_BURST, SHUT = .01, .05, .08                # seconds; SHUT is the least for p, b, m
MARGIN = .15                                             # of silence around a sentence


class _Event(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_uint), ("text", ctypes.c_int),
                ("length", ctypes.c_int), ("milliseconds", ctypes.c_int), ("sample", ctypes.c_int),
                ("user", ctypes.c_void_p), ("name", ctypes.c_char * 8)]


_library = None


def _espeak_library():
    """(library, sample rate), loaded once; UserError where there is none."""
    global _library
    if _library is None:
        try:
            import espeakng_loader
            path, folder = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
        except ImportError:
            path, folder = ctypes.util.find_library("espeak-ng"), None
        if not path:
            raise media.UserError("espeak-ng is missing: pip install -r requirements-train.txt")
        try:
            library = ctypes.cdll.LoadLibrary(str(path))
        except OSError as error:
            raise media.UserError(f"espeak-ng does not load ({error})") from error
        data = str(Path(folder).parent).encode() if folder else None
        rate = library.espeak_Initialize(2, 0, data, 0x8003)     # synchronous, phonemes in IPA
        if rate <= 0:
            raise media.UserError("espeak-ng does not start: its data files are missing")
        _library = library, rate
    return _library


def espeak(text, voice="en", seed=0):
    """A sentence spoken by espeak-ng; its phoneme times move the lips. UserError without espeak-ng,
    for an unknown voice, and for a text in which nothing can be spoken.

    A new process says the same again, bit for bit; within one, espeak-ng carries a state from call
    to call, so that repeats differ by a few samples."""
    library, rate = _espeak_library()
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise media.UserError(f"espeak-ng has no voice {voice!r}")
    pieces, heard = [], []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int,
                      ctypes.POINTER(_Event))
    def receive(wave, count, events):
        if wave and count > 0:
            pieces.append(np.ctypeslib.as_array(wave, (count,)).copy())
        for event in itertools.takewhile(lambda event: event.type, events):
            if event.type == 7:                                  # a phoneme
                heard.append((event.name.decode("utf-8", "ignore"), event.milliseconds / 1000))
        return 0
    library.espeak_SetSynthCallback(receive)
    library.espeak_Synth(text.encode(), len(text.encode()) + 1, 0, 1, 0, 1, None, None)
    library.espeak_Synchronize()
    if not pieces or not any(set(name) & set(IPA) for name, _ in heard):
        raise media.UserError(f"{text!r}: espeak-ng finds nothing to say in it")
    sound = _resample(np.concatenate(pieces).astype(np.float32) / 32768, rate)
    sound = np.pad(sound, round(MARGIN * media.RATE))
    seconds = len(sound) / media.RATE
    segments = _segments(heard, seconds)
    return Speech(sound, *move_lips(np.random.default_rng(seed), segments, seconds), segments)


def _segments(heard, seconds):
    """espeak's phoneme names and times -> segments in the table's symbols, silence around them."""
    said = [("_", 0.0, 0.0)]                                     # symbol, start, stress
    ends = [start for _, start in heard[1:]] + [seconds - MARGIN]
    for (name, start), end in zip(heard, ends):
        symbols = [IPA.get(c, "@") for c in name if c not in _MARKS and c.isalpha()] or ["_"]
        accent = .9 if "ˈ" in name else .5 if "ˌ" in name else 0.0
        for k, symbol in enumerate(symbols):
            at = start + MARGIN - EARLY + k * max(end - start, 0) / len(symbols)
            at -= BEFORE_BURST * (symbol in "ptk")
            said.append((symbol, max(at, said[-1][1]), accent))
    said.append(("_", seconds - MARGIN, 0.0))
    return _long_enough(said, seconds)


def _long_enough(said, seconds):
    """Give p, b, m their SHUT seconds, from what stands before; drop what has no time at all."""
    starts = [s[1] for s in said] + [seconds]
    for k in range(len(said) - 1, 0, -1):
        if PHONEMES[said[k][0]].lips_shut:
            starts[k] = min(starts[k], max(starts[k + 1] - SHUT, starts[k - 1] + .04))
    return [(symbol, start, end, accent) for (symbol, _, accent), start, end
            in zip(said, starts, starts[1:]) if end - start > 1e-3]


def _resample(wave, rate):
    """To 16 kHz through the spectrum of the whole."""
    count = round(len(wave) * media.RATE / rate)
    spectrum = np.fft.rfft(wave)[:count // 2 + 1]
    return (np.fft.irfft(spectrum, count) * count / len(wave)).astype(np.float32)


def main(argv=None):
    parser = media.ArgumentParser(__doc__)
    parser.add_argument("--seed", type=int, default=3, help="which voice and phonemes")
    parser.add_argument("--seconds", type=float, default=4, help="length")
    parser.add_argument("--say", metavar="TEXT", help="speak a sentence (needs espeak-ng)")
    parser.add_argument("--out", default="voice.wav", help="sound to write")
    args = parser.parse_args(argv)
    if args.seconds < .2 or args.seed < 0:
        raise media.UserError("voices.py wants --seconds of 0.2 or more, and a --seed from 0 on")
    speech = espeak(args.say) if args.say else make_speech(np.random.default_rng(args.seed),
                                                           args.seconds, silence_share=0)
    media.write_sound(args.out, speech.sound)
    print(args.out)


if __name__ == "__main__":
    media.run(main)
