"""Made speech: one string of phonemes causes sound and lips, and both are what the table says."""
import time

import numpy as np
import pytest

import audio
import media
import voices


def speak(seed, seconds=4.0, **options):
    """A clip that is not silent."""
    return voices.make_speech(np.random.default_rng(seed), seconds,
                              **{"silence_share": 0} | options)


def frames_in(speech, start, end):
    """Frames whose centres lie within [start, end) seconds."""
    at = (np.arange(len(speech.lips)) + .5) / media.FPS
    return np.flatnonzero((at >= start) & (at < end))


def jaw_at(speech, seconds):
    at = (np.arange(len(speech.lips)) + .5) / media.FPS
    return np.interp(seconds, at, speech.lips[:, 0])


def loudness(speech):
    """Log RMS of each frame; the floor stands for a quiet room."""
    pieces = speech.sound.reshape(-1, audio.SAMPLES)
    return np.log(np.sqrt((pieces ** 2).mean(1)) + 1e-3)


def correlation(a, b):
    return np.corrcoef(a, b)[0, 1]


def resonances(sound, order=18):
    """Formants of a steady sound by linear prediction, in Hz, lowest first."""
    x = np.append(sound[0], sound[1:] - .97 * sound[:-1]) * np.hamming(len(sound))
    r = np.correlate(x, x, "full")[len(x) - 1:len(x) + order]
    toeplitz = r[np.abs(np.subtract.outer(np.arange(order), np.arange(order)))]
    roots = np.roots(np.append(1, -np.linalg.solve(toeplitz, r[1:])))
    roots = roots[roots.imag > 0]
    hz, width = np.angle(roots) * 8000 / np.pi, -np.log(np.abs(roots)) * 16000 / np.pi
    return np.sort(hz[(width < 500) & (hz > 150)])


# ---- shapes and repeats --------------------------------------------------------------------------

@pytest.mark.parametrize("seconds", [.04, .37, 1.013, 2.36, 3.999])
def test_lengths_are_exact(seconds):
    """round(16000 s) samples and round(25 s) frames, float32, finite, in [-1, 1]."""
    made = speak(3, seconds)
    n = round(25 * seconds)
    assert made.sound.shape == (round(16000 * seconds),) and np.abs(made.sound).max() <= 1
    assert made.lips.shape == (n, 4) and made.stress.shape == (n,)
    for track in (made.sound, made.lips, made.stress):
        assert track.dtype == np.float32 and np.isfinite(track).all()
    assert made.segments[0][1] == 0 and made.segments[-1][2] == pytest.approx(seconds)
    assert all(a[2] == b[1] for a, b in zip(made.segments, made.segments[1:]))


def test_a_seed_is_a_clip_bit_for_bit():
    """The same seed gives the same sound and lips, and another seed another sound."""
    a, b, c = speak(5, 1.0), speak(5, 1.0), speak(6, 1.0)
    np.testing.assert_array_equal(a.sound, b.sound)
    np.testing.assert_array_equal(a.lips, b.lips)
    assert not np.array_equal(a.sound, c.sound)


def test_voices_differ():
    """Pitches from 80 to 300 Hz, and tracts, rates and levels that vary."""
    made = [voices.random_voice(np.random.default_rng(k)) for k in range(200)]
    pitch = np.array([v.pitch for v in made])
    assert 75 < pitch.min() < 100 and 220 < pitch.max() < 300
    for name in ("tract", "rate", "breath", "loudness", "melody"):
        assert np.std([getattr(v, name) for v in made]) > .03, name


# ---- lips ----------------------------------------------------------------------------------------

def test_p_b_m_close_the_lips():
    """Each p, b and m shuts jaw and upper lip for two frames (80 ms), between wide vowels too."""
    seen = 0
    for symbol in "pbm":
        for vowel in "aiu":
            made = speak(seen, 2.0, phonemes=["_", *[vowel, symbol] * 4, vowel, "_"])
            for phoneme, start, _, _ in made.segments:
                if phoneme == symbol and start < 1.9:
                    shut = frames_in(made, start, start + .08)
                    assert len(shut) == 2 and made.lips[shut][:, [0, 3]].max() < .05
                    seen += 1
            assert made.lips[:, 0].max() > .1                   # and they open in between
    assert seen > 30


def test_f_and_v_nearly_close_them_and_vowels_open_as_the_table_says():
    """Jaw in the middle of a sound: f, v under 0.25; vowels in the order of the table."""
    def jaw(symbol, around="@"):
        made = [speak(k, 1.2, phonemes=["_", around, symbol, around, symbol, around, "_"])
                for k in range(12)]
        return np.mean([jaw_at(s, (a + b) / 2) for s in made
                        for p, a, b, _ in s.segments if p == symbol and b < 1.2])
    assert max(jaw("f"), jaw("v")) < .25
    found = {v: jaw(v, "t") for v in voices.VOWELS}
    assert correlation(list(found.values()),
                       [voices.PHONEMES[v].lips[0] for v in found]) > .95
    assert found["a"] > 2 * found["i"]


def test_neighbours_shape_a_consonant():
    """Coarticulation: the lips of t are rounder between u than between i."""
    def rounding(vowel):
        made = speak(1, 1.0, phonemes=["_", *[vowel, "t"] * 3, vowel, "_"])
        return np.mean([made.lips[frames_in(made, a, b), 2].mean()
                        for p, a, b, _ in made.segments if p == "t" and b < .9])
    assert rounding("u") > rounding("i") + .3


def test_pauses_close_the_mouth():
    """Within every pause of 0.3 s and more, 0.1 s from its ends, the jaw is shut."""
    seen = 0
    for k in range(20):
        made = speak(k)
        for phoneme, start, end, _ in made.segments:
            if phoneme == "_" and end - start > .3:
                inside = frames_in(made, start + .1, end - .1)
                assert made.lips[inside, 0].max(initial=0) < .02
                seen += len(inside)
    assert seen > 50


def test_silence_is_silent_and_shut():
    """silence_share 1 gives no sound, and lips at rest throughout."""
    made = speak(3, 3.0, silence_share=1.0)
    assert np.abs(made.sound).max() < 1e-6 and made.stress.max() == 0
    np.testing.assert_allclose(made.lips, np.tile(voices.REST, (75, 1)), atol=1e-6)


def test_some_clips_are_silent(monkeypatch):
    """About 3 % of clips hold no phoneme (300 of them: 9, within chance)."""
    monkeypatch.setattr(voices, "synthesise", lambda *_: None)
    clips = [voices.make_speech(np.random.default_rng(k), 2.5) for k in range(300)]
    assert 2 <= sum(all(s[0] == "_" for s in c.segments) for c in clips) <= 19


def test_twins_move_alike_but_not_the_same():
    """Another motion_rng: same sound and times, jaws that correlate at 0.9 to 0.9999."""
    found = []
    for k in range(12):
        a, b = speak(k), speak(k, motion_rng=np.random.default_rng((k, 1)))
        np.testing.assert_array_equal(a.sound, b.sound)
        assert a.segments == b.segments
        found.append(correlation(a.lips[:, 0], b.lips[:, 0]))
    assert min(found) > .9 and max(found) < .9999, found


def test_stress_is_a_curve_of_accents():
    """0 to 1, high in accented vowels, and 0 in a clip without accents."""
    made = speak(2, 6.0)
    accented = [(a + b) / 2 for p, a, b, s in made.segments if s > .5 and p in voices.VOWELS]
    at = (np.arange(len(made.stress)) + .5) / media.FPS
    assert 0 <= made.stress.min() and made.stress.max() <= 1 and len(accented) > 3
    assert np.interp(accented, at, made.stress).min() > .45
    assert speak(2, 1.0, phonemes=["_", "a", "t", "a"]).stress.max() == 0


# ---- sound ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("vowel", voices.VOWELS)
def test_formants_lie_where_the_table_says(vowel):
    """F1, F2, F3 of a long vowel, found by linear prediction, within 5 % of the table."""
    flat = voices.Voice(pitch=90, melody=0, breath=0)
    made = speak(0, .8, voice=flat, phonemes=["_", *[vowel] * 12])
    start = next(a for p, a, _, _ in made.segments if p == vowel) + .05
    steady = made.sound[round(start * media.RATE):-800]
    np.testing.assert_allclose(resonances(steady)[:3], voices.PHONEMES[vowel].formants, rtol=.05)


def test_a_longer_tract_lowers_the_formants():
    """Tract length 1.1 divides F2 by 1.1."""
    found = [resonances(speak(0, .8, voice=voices.Voice(pitch=90, tract=tract, melody=0, breath=0),
                              phonemes=["_", *["e"] * 12]).sound[6400:-800])[1]
             for tract in (1.0, 1.1)]
    assert found[0] / found[1] == pytest.approx(1.1, rel=.03)


@pytest.mark.parametrize("pitch", [90, 150, 240])
def test_the_voice_has_its_pitch(pitch):
    """The strongest period of a vowel is that of the voice, within 4 %."""
    made = speak(0, 1.0, voice=voices.Voice(pitch=pitch, melody=0, breath=0),
                 phonemes=["_", *["a"] * 12])
    x = made.sound[8000:12000]
    r = np.correlate(x, x, "full")[len(x) - 1:]
    period = 40 + r[40:260].argmax()
    assert media.RATE / period == pytest.approx(pitch, rel=.04)


def test_stops_are_closed_then_burst_and_s_hisses():
    """Inside p it is 20 dB quieter than in its vowels; s has its energy above 4 kHz."""
    made = speak(4, 1.2, phonemes=["_", "a", "p", "a", "p", "a", "s", "a", "_"])

    def level(start, end):
        piece = made.sound[round(start * media.RATE):round(end * media.RATE)]
        return 20 * np.log10(np.sqrt((piece ** 2).mean()) + 1e-9)
    vowels = [level(a + .02, b - .02) for p, a, b, _ in made.segments if p == "a" and b < 1.2]
    shut = [level(a + .03, a + .06) for p, a, b, _ in made.segments if p == "p"]
    assert max(shut) < min(vowels) - 20
    a, b = next((a, b) for p, a, b, _ in made.segments if p == "s")
    power = np.abs(np.fft.rfft(made.sound[round((a + .02) * 16000):round((b - .02) * 16000)])) ** 2
    high = np.fft.rfftfreq(2 * len(power) - 1, 1 / 16000) > 4000
    assert power[high].sum() > .8 * power.sum()


def test_loudness_does_not_give_the_lips_away():
    """Log loudness and jaw correlate at 0.4 to 0.75 over clips, as in life."""
    clips = [speak((7, k)) for k in range(24)]
    found = np.mean([correlation(loudness(s), s.lips[:, 0]) for s in clips])
    assert .4 < found < .75


def test_sound_and_lips_are_in_step():
    """Loudness and jaw agree best with no shift, to within one frame."""
    clips = [speak((8, k)) for k in range(24)]

    def agreement(shift):
        return np.mean([correlation(loudness(s)[3:-3], np.roll(s.lips[:, 0], shift)[3:-3])
                        for s in clips])
    assert max(range(-3, 4), key=agreement) == 0


def test_lips_can_be_read_off_the_sound():
    """Ridge regression from eleven frames of log-mel to the jaw: r of 0.85 on new voices."""
    def example(k):
        made = speak((11, k))
        mel = np.pad(audio.log_mel(made.sound).numpy(), ((5, 5), (0, 0)), mode="edge")
        mel = mel.reshape(len(mel), 4, 80).mean(1)              # lighter: one spectrum a frame
        return np.concatenate([mel[d:d + 100] for d in range(11)], 1), made.lips[:, 0]
    x, y = map(np.stack, zip(*map(example, range(75))))         # (75, 100, 880), (75, 100)
    train_x, train_y = x[:60].reshape(-1, 880), y[:60].ravel()
    mean, middle = train_x.mean(0), train_y.mean()
    gram = (train_x - mean).T @ (train_x - mean) + 30 * np.eye(880)
    weights = np.linalg.solve(gram, (train_x - mean).T @ (train_y - middle))
    found = [correlation((a - mean) @ weights, b) for a, b in zip(x[60:], y[60:])]
    assert np.mean(found) > .85, np.mean(found)


def test_it_is_fast():
    """At most 0.05 s of processor time a second of speech: the best of six goes."""
    best = np.inf
    for _ in range(6):
        start = time.process_time()
        speak(1, 8.0)
        best = min(best, (time.process_time() - start) / 8)
    assert best < .05, best


def test_augmentation_changes_the_sound_and_nothing_else():
    """Same length and type, other samples, at most 1, in step with the clean sound; keyed."""
    clean = speak(1, 2.013).sound
    for k in range(20):
        made = voices.augment(clean, np.random.default_rng(k))
        assert made.shape == clean.shape and made.dtype == np.float32
        assert np.isfinite(made).all() and np.abs(made).max() <= 1
        assert not np.array_equal(made, clean)
        np.testing.assert_array_equal(made, voices.augment(clean, np.random.default_rng(k)))
        lags = np.fft.irfft(np.fft.rfft(made, 65536) * np.fft.rfft(clean, 65536).conj())
        assert min(lags.argmax(), 65536 - lags.argmax()) < 80   # 5 ms
    levels = [voices.augment(clean, np.random.default_rng(k)).std() for k in range(20)]
    assert max(levels) > 2 * min(levels)


# ---- commands and espeak-ng ----------------------------------------------------------------------

def test_the_command_writes_a_sound(tmp_path):
    """python voices.py --seconds 1 writes a wav that reads back as a second of sound."""
    voices.main(["--seed", "3", "--seconds", "1", "--out", str(tmp_path / "v.wav")])
    assert len(media.read_sound(tmp_path / "v.wav")) == media.RATE


@pytest.mark.parametrize("flags", [["--seconds", "0"], ["--seed", "-1"]])
def test_bad_flags_take_one_line(flags, tmp_path):
    """No length, no negative seed; nothing is written."""
    with pytest.raises(media.UserError, match=flags[0]):
        voices.main([*flags, "--out", str(tmp_path / "v.wav")])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def espeak():
    pytest.importorskip("espeakng_loader")
    return voices.espeak


def test_espeak_reports_times(espeak):
    """Segments follow one another from 0 to the end, with positive lengths and accents."""
    made = espeak("Bob made papa mop, and then she sang.")
    seconds = len(made.sound) / media.RATE
    assert len(made.lips) == len(made.stress) == round(25 * seconds)
    assert made.segments[0][1] == 0 and made.segments[-1][2] == pytest.approx(seconds)
    assert all(s[2] > s[1] for s in made.segments)
    assert all(a[2] <= b[1] + 1e-9 for a, b in zip(made.segments, made.segments[1:]))
    assert {s[0] for s in made.segments} <= set(voices.PHONEMES)
    assert sum(s[0] in "pbm" for s in made.segments) >= 6 and made.stress.max() > .5


def test_espeak_closes_the_lips_on_papa_and_opens_them_between(espeak):
    """Every p is shut for a frame at least, and every stressed a is open."""
    made = espeak("papa papa")
    closed = [(a, b) for p, a, b, _ in made.segments if p == "p"]
    assert len(closed) == 4
    for start, end in closed:
        assert made.lips[frames_in(made, start, end), 0].min() < .02
    for phoneme, start, end, accent in made.segments:
        if phoneme == "a" and accent > .5:
            assert made.lips[frames_in(made, start, end), 0].max() > .4


def test_espeaks_lips_shut_while_its_sound_does(espeak):
    """A p's closure holds the silent gap before its burst, not the vowel after it."""
    made = espeak("papa papa")
    power = (made.sound[:len(made.sound) // 160 * 160].reshape(-1, 160) ** 2).mean(1)   # 10 ms
    gaps = [k for k in range(25, len(power) - 25) if power[k] < 1e-7]
    assert len(gaps) >= 6
    assert jaw_at(made, (np.array(gaps) + .5) / 100).max() < .1


def test_espeak_refuses_in_one_line(espeak):
    """Nothing to say, and a voice nobody has."""
    for text, voice, found in (("", "en", "nothing to say"), (" ... ", "en", "nothing to say"),
                               ("hello", "xx-none", "no voice 'xx-none'")):
        with pytest.raises(media.UserError, match=found):
            espeak(text, voice)


def test_a_missing_espeak_is_one_clear_line(monkeypatch):
    """Neither the wheel nor a system library: the error says what to install."""
    monkeypatch.setattr(voices, "_library", None)
    monkeypatch.setitem(__import__("sys").modules, "espeakng_loader", None)
    monkeypatch.setattr(voices.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(media.UserError, match="requirements-train.txt"):
        voices.espeak("hello")
