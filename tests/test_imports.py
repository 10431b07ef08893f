"""The house: who may import whom, how long files may be, and what must not be needed."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# every module may import those before it in its line of the plan, and nothing else of the house
MAY = {"media": "", "audio": "media", "landmarks": "", "voices": "media audio",
       "faces": "landmarks", "painter": "landmarks faces",
       "toy": "media audio landmarks voices faces painter", "optim": "media", "training": "media"}
MAY["curves"] = "media"
MAY["actions"] = "media landmarks"
MAY["toy"] += " actions"
MAY["text"] = ""
MAY["detector_pictures"] = " ".join(MAY)
MAY["detector"] = " ".join(MAY)
MAY["data"] = " ".join(MAY)
MAY |= {"vae": "", "conformer": "", "diffusion": "conformer text"}
BELOW = ("train_vae", "train_diffusion", "control", "sample", "metrics", "evaluate_control",
         "evaluate")
for _name in BELOW:
    MAY[_name] = " ".join(MAY)
MODULES = sorted(ROOT.glob("*.py"))


def imports(path):
    """Names of the modules that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_point_up(path):
    """Each module imports only those above it; a training script never another script."""
    own = {m.stem for m in MODULES}
    allowed = set(MAY[path.stem].split())
    if path.stem == "train_diffusion":
        allowed -= {"train_vae"}
    assert set(imports(path)) & own <= allowed


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_files_stay_short(path):
    """At most 500 lines a file, 100 columns a line."""
    lines = path.read_text().splitlines()
    assert len(lines) <= 500 and max(map(len, lines)) <= 100


def test_training_shares_stay_small():
    """training.py holds what loops share, not loops: at most 400 lines."""
    assert len((ROOT / "training.py").read_text().splitlines()) <= 400


def test_only_media_knows_codecs_and_only_inside_functions():
    """`av` is imported by media.py alone, never at module level; torchaudio by audio.py alone."""
    for path in MODULES:
        names = set(imports(path))
        assert "av" not in names or path.stem == "media"
        assert "torchaudio" not in names or path.stem == "audio"
        top = {a.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import)
               for a in n.names}
        assert not top & {"av", "torchaudio", "mediapipe"}


def test_the_core_is_a_weekend():
    """What a student must read, and the whole, stay within their lengths (lines with something on)."""
    def length(*names):
        return sum(len([line for line in (ROOT / f"{n}.py").read_text().splitlines() if line.strip()])
                   for n in names)
    assert length("vae", "conformer", "diffusion", "train_vae", "train_diffusion", "sample") <= 1800
    assert length(*(m.stem for m in MODULES)) <= 6100                      # "about 5,000", and control


def test_training_runs_where_av_is_missing(tmp_path):
    """Two steps of the VAE on rendered heads with `av` and `torchaudio` blocked."""
    code = ("import sys; sys.modules['av'] = sys.modules['torchaudio'] = None; import train_vae; "
            f"train_vae.main(['--identities', '2', '--frames', '2', '--steps', '2', '--batch', '2',"
            f" '--workers', '0', '--out', {str(tmp_path)!r}])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "vae.pt").is_file()
