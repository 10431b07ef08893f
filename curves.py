"""What a training run writes down, log.csv, and its picture, curve.png.

    python curves.py runs                                  how far each run of `make train` came
    python curves.py runs --out results/toy_curves.csv     the same, and its logs in one thin file

One row a step: `step`, `minutes`, and what the loop measures. A thin file holds several runs, told
apart by its column `run`; `--compare` of the training scripts draws it in grey under a run of one's
own, and the first command reads it too.
"""
from __future__ import annotations

import contextlib
import csv
import math
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import media

COLOURS = ("#d1495b", "#00798c", "#edae49", "#30638e", "#66a182", "#8d5a97", "#444444")
PALE = "#b8b8b8"
RUNS = {"detector": "unseen", "vae": "unseen", "diffusion": "lip_r"}   # and what unseen heads show


class Log:
    """`log.csv`: a row a step. A resumed run drops the rows after its checkpoint."""

    def __init__(self, path, columns, step=0):
        self.path, self.columns = Path(path), ["step", "minutes", *columns]
        rows = [r for r in read_log(path) if r["step"] < step] if step else []
        write_rows(path, self.columns, rows)
        self.file, self.since = open(path, "a", newline=""), (time.monotonic(), 0, 0.0)

    def write(self, items, **values):
        """A row; `items` is how many pictures or frames the step took."""
        start, before, waited = self.since
        self.since = start, before + items, waited + values.get("wait", 0)
        row = [values.get(c, "") for c in self.columns]
        with media.writing(self.path):
            csv.writer(self.file).writerow(f"{v:.12g}" if isinstance(v, float) else v for v in row)

    def flush(self):
        with media.writing(self.path):
            self.file.flush()

    def close(self):                                    # on a full disk the error before counts
        with contextlib.suppress(OSError):
            self.file.close()

    def pace(self, what):
        """How fast the steps since the last call were, in words."""
        (start, items, waited), now = self.since, time.monotonic()
        self.since, seconds = (now, 0, 0.0), now - start
        return f"{items / seconds:.0f} {what} a second, {waited / seconds:.0%} of the time for data"


def write_rows(path, columns, rows):
    with media.replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def read_log(path, run=None):
    """Rows of a log.csv as dicts of floats, those of one `run` where it holds several; an unwritten
    or torn cell is nan."""
    if not Path(path).is_file():
        return []
    with open(path, newline="", errors="replace") as file:
        rows = [row for row in csv.DictReader(file) if row.get("run", run) == run]
    return [{name: _number(text) for name, text in row.items()} for row in rows]


def _number(text):
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def check_compare(path, run):
    """UserError unless the file holds curves of this run."""
    if path and not any("step" in row for row in read_log(path, run)):
        raise media.UserError(f"--compare {path}: no curves of {run} in it; wants a log.csv or "
                              "what `python curves.py` writes")


# ---- charts --------------------------------------------------------------------------------------

def draw_curves(path, png, columns, compare=None, run=None):
    """A small chart for each column of a log.csv, over steps, with those of `compare` in grey."""
    logs = [read_log(path), read_log(compare, run) if compare else []]
    lines = {}
    for name in columns:
        both = [np.array([(row["step"], row[name]) for row in rows
                          if math.isfinite(row.get(name, math.nan))]) for rows in logs]
        if len(both[0]) > 1:
            lines[name] = [line for line in both if len(line) > 1]
    if lines:
        media.write_image(png, charts(lines))


def charts(lines, smooth=.02):
    """One small chart a name, two in a row: {name: [(n, 2) steps and values, ...]} -> (H, W, 3).

    The first line is coloured, others are grey. Values are smoothed over a share of the run; the
    axis is logarithmic where they span much.
    """
    width, height = 420, 220
    rows = -(-len(lines) // 2)
    sheet = Image.new("RGB", (width * min(2, len(lines)), height * rows), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (name, drawn) in enumerate(lines.items()):
        corner = (k % 2 * width, k // 2 * height)
        drawn = [(line[:, 0], _smoothed(line[:, 1], smooth)) for line in drawn]
        _chart(pen, corner, (width, height), name, drawn, COLOURS[k % len(COLOURS)])
    return np.asarray(sheet)


def _smoothed(values, share):
    n = max(1, int(len(values) * share))
    total = np.cumsum(np.concatenate([[0.0], values]))
    first = np.maximum(np.arange(1, len(values) + 1) - n, 0)
    return (total[1:] - total[first]) / (np.arange(1, len(values) + 1) - first)


def _chart(pen, corner, size, name, lines, colour):
    x0, y0, w, h = corner[0] + 46, corner[1] + 22, size[0] - 62, size[1] - 46
    every = np.concatenate([values for _, values in lines])
    is_log = every.min() > 0 and every.max() / every.min() > 8
    lines = [(steps, np.log10(values) if is_log else values) for steps, values in lines]
    every = np.log10(every) if is_log else every
    low, high = every.min(), max(every.max(), every.min() + 1e-9)
    last = max(steps[-1] for steps, _ in lines)
    for share in (0, .5, 1):
        y, at = y0 + h * (1 - share), low + share * (high - low)
        pen.line([x0, y, x0 + w, y], "#dddddd")
        pen.text((corner[0] + 2, y - 6), f"{10 ** at if is_log else at:.3g}", "#555555")
    for k in reversed(range(len(lines))):
        steps, values = lines[k]
        points = np.stack([x0 + w * steps / max(last, 1),
                           y0 + h * (1 - (values - low) / (high - low))], 1)
        pen.line(points.ravel().tolist(), PALE if k else colour, 2)
    pen.text((x0, corner[1] + 4), name + (" (log)" if is_log else ""), "black")
    pen.text((x0, y0 + h + 6), f"step 0 .. {int(last)}", "#555555")


# ---- curves that ship ----------------------------------------------------------------------------

def thin(rows, count=200):
    """At most `count` rows: means over equal stretches, the last of their steps and minutes."""
    kept = []
    for part in np.array_split(np.array(rows, dtype=object), min(count, len(rows))) if rows else []:
        row = dict(part[-1])
        for name in row.keys() - {"step", "minutes"}:
            values = [r[name] for r in part if math.isfinite(r[name])]
            row[name] = f"{np.mean(values):.5g}" if values else ""
        kept.append(row)
    return kept


def show(run, rows, shares=(1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)):
    """What to expect when: the loss, and the last measurement on unseen heads."""
    for share in shares:
        so_far = [r for r in rows if r["minutes"] <= share * rows[-1]["minutes"]]

        def last(name):
            known = [r[name] for r in so_far if math.isfinite(r.get(name, math.nan))]
            return known[-1] if known else math.nan
        step, minutes, loss, measured = map(last, ("step", "minutes", "loss", RUNS[run]))
        if math.isfinite(loss):                                  # else it still made its data
            print(f"{run:10} step {step:6.0f}  {minutes:5.1f} min  loss {loss:7.3f}  {RUNS[run]} "
                  f"{measured:.3f}")


def main(argv=None):
    p = media.ArgumentParser(__doc__)
    p.add_argument("path", help="a `make train` folder, or a thin file")
    p.add_argument("--out", help="thin file to write")
    args = p.parse_args(argv)
    thinned, columns = [], {"run": None, "step": None, "minutes": None}
    for run in RUNS:
        path = Path(args.path)
        rows = read_log(path / run / "log.csv") if path.is_dir() else read_log(path, run)
        if rows:
            show(run, rows)
        for row in thin(rows):
            thinned.append(row | {"run": run})
            columns |= dict.fromkeys(row)
    if not thinned:
        raise media.UserError(f"{args.path}: no log.csv in {', '.join(RUNS)}; train first")
    if args.out:
        write_rows(args.out, list(columns), thinned)


if __name__ == "__main__":
    media.run(main)
