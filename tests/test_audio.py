"""Speech features: aligned with the frames, for log-mel and for wav2vec 2.0."""
import numpy as np
import pytest
import torch

import audio
import media


def click(at, seconds=2.0):
    """Silence with one click at a time in seconds."""
    wave = np.zeros(round(seconds * media.RATE), dtype=np.float32)
    wave[round(at * media.RATE)] = .9
    return wave


@pytest.mark.parametrize("frame", [0, 7, 31, 49])
def test_a_click_is_heard_in_its_own_frame(frame):
    """A click in the middle of frame i changes row i most, and no row further than the next one."""
    made = audio.log_mel(click((frame + .5) / 25)) - audio.log_mel(np.zeros(2 * media.RATE))
    energy = made.abs().sum(1)
    assert energy.argmax() == frame
    assert all(energy[k] == 0 for k in range(50) if abs(k - frame) > 1)


def test_the_four_spectra_of_a_frame_are_in_order():
    """A click in the third quarter of a frame is loudest in the third of its stacked spectra."""
    made = audio.log_mel(click((10 + .625) / 25))[10].view(4, 80).sum(1)
    assert made.argmax() == 2


@pytest.mark.parametrize("samples", [639, 640, 959, 961, 16000, 16001, 70007])
def test_rows_are_round_25_times_seconds(samples):
    """N = round(25 T / 16000) rows of 320, finite, for odd lengths too."""
    made = audio.log_mel(np.random.default_rng(0).normal(0, .1, samples).astype(np.float32))
    assert made.shape == (round(25 * samples / 16000), 320) and made.isfinite().all()


def test_silence_stays_recognisable():
    """Silence is -1 everywhere whatever surrounds it; a tone lights the band of its frequency."""
    t = np.arange(media.RATE) / media.RATE
    tone = .5 * np.sin(2 * np.pi * 1000 * t)
    wave = np.concatenate([np.zeros(media.RATE), tone]).astype(np.float32)
    made = audio.log_mel(wave)
    torch.testing.assert_close(made[:20], torch.full((20, 320), -1.0))
    band = made[40].view(4, 80)[0].argmax()
    centre = audio.mel_filters()[:, band].argmax() * 8000 / 256
    assert abs(centre - 1000) < 60


def tiny_wav2vec2(path):
    """A small random wav2vec 2.0 saved in the real layout."""
    torchaudio = pytest.importorskip("torchaudio")
    torch.manual_seed(0)
    layers = [(8, 10, 5)] + [(8, 3, 2)] * 4 + [(8, 2, 2)] * 2
    model = torchaudio.models.wav2vec2_model(
        "group_norm", layers, False, 64, 0., 16, 4, 2, 1, 0., 32, 0., 0., False, 0., None).eval()
    torch.save(model.state_dict(), path)
    return model


def test_wav2vec2_is_read_from_a_file_and_brought_to_25_hz(tmp_path):
    """Sizes are inferred from the state dict; row i is the features at the middle of frame i."""
    model = tiny_wav2vec2(tmp_path / "w.pth")
    wave = np.random.default_rng(0).normal(0, .1, 3 * media.RATE + 123).astype(np.float32)
    made = audio.speech_features(wave, "wav2vec2", tmp_path / "w.pth")
    assert made.shape == (75, 64)
    padded = torch.nn.functional.pad(torch.from_numpy(wave), (200, 600))
    heard = model.extract_features((padded - padded.mean())[None])[0][-1][0].detach()
    torch.testing.assert_close(made[10], heard[21], atol=1e-5, rtol=1e-4)    # 10.5 * 640 / 320


def test_wav2vec2_of_long_sound_is_heard_in_chunks(tmp_path, monkeypatch):
    """Chunks with context give exactly N rows, nearly those of the whole."""
    tiny_wav2vec2(tmp_path / "w.pth")
    model = audio.load_wav2vec2(tmp_path / "w.pth")
    wave = np.random.default_rng(0).normal(0, .1, 7 * media.RATE).astype(np.float32)
    whole = audio.wav2vec2(wave, model)
    monkeypatch.setattr(audio, "CHUNK", 2 * media.RATE)
    parts = audio.wav2vec2(wave, model)
    assert parts.shape == whole.shape
    assert np.corrcoef(parts.flatten(), whole.flatten())[0, 1] > .95


def test_missing_and_foreign_weights_are_one_clear_line(tmp_path):
    """No file, and a file of something else, end in an error that names the file."""
    with pytest.raises(media.UserError, match="none.pth"):
        audio.speech_features(click(.5), "wav2vec2", tmp_path / "none.pth")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(media.UserError, match="other.pth"):
        audio.speech_features(click(.5), "wav2vec2", tmp_path / "other.pth")


def test_torchaudio_that_does_not_import_is_one_clear_line(tmp_path, monkeypatch):
    """When torchaudio is missing or broken, the error says what to install."""
    (tmp_path / "w.pth").write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, "torchaudio", None)
    with pytest.raises(media.UserError, match="requirements.txt"):
        audio.load_wav2vec2(tmp_path / "w.pth")
