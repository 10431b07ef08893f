"""Logs of training runs, their charts, and the curves that ship."""
import numpy as np
import pytest
from PIL import Image

import curves
import media


def test_a_resumed_log_drops_the_rows_after_its_checkpoint(tmp_path):
    """Rows from the step of the checkpoint on are written again, not twice."""
    path = tmp_path / "log.csv"
    log = curves.Log(path, ["loss"])
    for step in range(5):
        log.write(1, step=step, minutes=0.0, loss=1.0 / (step + 1))
    log.close()
    log = curves.Log(path, ["loss"], step=3)
    log.write(1, step=3, minutes=0.0, loss=9.0)
    log.close()
    assert [r["step"] for r in curves.read_log(path)] == [0, 1, 2, 3]
    assert curves.read_log(path)[-1]["loss"] == 9


def test_the_pace_of_a_run(tmp_path, monkeypatch):
    """Ten steps of 8 pictures in 2 s, of which each waited .02 s; the next call counts anew."""
    now = iter([100.0, 102.0, 103.0])
    monkeypatch.setattr(curves.time, "monotonic", lambda: next(now))
    log = curves.Log(tmp_path / "log.csv", ["wait"])
    for step in range(10):
        log.write(8, step=step, minutes=0.0, wait=.02)
    assert log.pace("pictures") == "40 pictures a second, 10% of the time for data"
    assert log.pace("pictures") == "0 pictures a second, 0% of the time for data"


def test_curves_are_drawn_where_the_values_are(tmp_path):
    """A falling loss is a coloured line from the upper left to the lower right of its chart."""
    path = tmp_path / "log.csv"
    log = curves.Log(path, ["loss"])
    for step in range(100):
        log.write(1, step=step, minutes=0.0, loss=2.0 - step / 100)
    log.close()
    curves.draw_curves(path, tmp_path / "curve.png", ["loss"])
    picture = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB")).astype(int)
    rows, columns = np.nonzero(np.abs(picture - (0xd1, 0x49, 0x5b)).sum(-1) < 30)
    assert len(rows) > 100 and np.corrcoef(rows, columns)[0, 1] > .95


def write(path, values, shift=0):
    log = curves.Log(path, ["loss"])
    for step, value in enumerate(values):
        log.write(1, step=step, minutes=step / 60, loss=float(value) + shift)
    log.close()


def test_another_run_lies_in_grey_under_ones_own(tmp_path):
    """--compare: a run twice as high is drawn in grey above the coloured line."""
    write(tmp_path / "a.csv", np.full(50, 1.0))
    write(tmp_path / "b.csv", np.full(100, 2.0))
    curves.draw_curves(tmp_path / "a.csv", tmp_path / "c.png", ["loss"], tmp_path / "b.csv")
    picture = np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).astype(int)
    at = {name: np.nonzero(np.abs(picture - colour).sum(-1) < 9)
          for name, colour in (("own", (0xd1, 0x49, 0x5b)), ("other", (0xb8, 0xb8, 0xb8)))}
    assert at["other"][0].mean() < at["own"][0].mean() - 100
    assert np.ptp(at["other"][1]) > 1.9 * np.ptp(at["own"][1])           # as many steps as it had


def test_the_logs_of_a_folder_become_one_small_file(tmp_path):
    """`python curves.py` keeps the course of each run in at most 200 rows, told apart by `run`."""
    for name, count, shift in (("vae", 1000, 0), ("diffusion", 50, 5)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "log.csv", np.linspace(1, 0, count), shift)
    curves.main([str(tmp_path), "--out", str(tmp_path / "c.csv")])
    vae, motion = (curves.read_log(tmp_path / "c.csv", run) for run in ("vae", "diffusion"))
    assert len(vae) == 200 and len(motion) == 50
    assert vae[0]["loss"] == pytest.approx(1, abs=.01) and vae[-1]["step"] == 999
    assert motion[0]["loss"] == pytest.approx(6, abs=.01)


def test_what_to_expect_is_printed(tmp_path, capsys):
    """A folder and its thin file print the loss at shares of the time, and the last measurement."""
    (tmp_path / "vae").mkdir()
    log = curves.Log(tmp_path / "vae" / "log.csv", ["loss", "unseen"])
    for step in range(65):
        log.write(1, step=step, minutes=float(step), loss=100.0 - step)
        if step == 15:
            log.write(0, step=step, minutes=float(step), unseen=21.5)
    log.close()
    curves.main([str(tmp_path), "--out", str(tmp_path / "c.csv")])
    told = capsys.readouterr().out.splitlines()
    curves.main([str(tmp_path / "c.csv")])
    assert told == capsys.readouterr().out.splitlines() and len(told) == 6
    assert told[3].split() == ["vae", "step", "16", "16.0", "min", "loss", "84.000", "unseen", "21.500"]
    assert told[0].split()[-1] == "nan" and told[5].split()[2] == "64"


def test_comparing_with_nothing_is_one_line(tmp_path):
    """A file that is missing, empty, or of another run is named before training starts."""
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "other.csv").write_text("run,step,loss\nvae,0,1\n")
    for name in ("none.csv", "empty.csv", "other.csv"):
        with pytest.raises(media.UserError, match=name):
            curves.check_compare(tmp_path / name, "diffusion")
    curves.check_compare(tmp_path / "other.csv", "vae")
    with pytest.raises(media.UserError, match="train first"):
        curves.main([str(tmp_path), "--out", str(tmp_path / "c.csv")])
