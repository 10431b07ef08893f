"""The detector: what it looks at, what it answers, that it learns; and mediapipe beside it."""
import builtins
from dataclasses import asdict

import numpy as np
import pytest
import torch

import curves
import detector
import media
import optim
import toy
import training
from detector import MEDIAPIPE_70, Detector, cut, find, find_all, find_in_crops, locate, whole
from detector_pictures import augment, faceless, make_batch, pool_item
from landmarks import crop_box


@pytest.fixture(scope="module")
def pool():
    return [pool_item(seed) for seed in range(2)]


def dots(points, size=(128, 128), radius=3):
    """A black picture with a white spot at each point."""
    y, x = np.mgrid[:size[0], :size[1]]
    near = np.min([(x - px) ** 2 + (y - py) ** 2 for px, py in points], 0)
    return np.repeat((255 * np.exp(-near / radius ** 2))[..., None], 3, 2).astype(np.uint8)


def brightest(picture):
    """Centre of a spot, (x, y)."""
    weight = picture[..., 0].astype(np.float64) ** 2
    y, x = np.mgrid[:picture.shape[0], :picture.shape[1]]
    return np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()


class Stub(torch.nn.Module):
    """A 'network' that answers with a fixed face of its 128 x 128 input, and keeps what it saw."""

    def __init__(self, points, sure=9.0):
        super().__init__()
        self.points = torch.nn.Parameter(torch.tensor(points, dtype=torch.float32))
        self.sure, self.seen = sure, []

    def forward(self, pictures):
        self.seen.append(pictures)
        return self.points.expand(len(pictures), -1, -1), torch.full((len(pictures),), self.sure)


FACE = np.random.default_rng(0).uniform(40, 88, (70, 2))


def test_shapes_ranges_and_size():
    """(B, 3, 128, 128) -> (B, 70, 2) inside the picture at first, (B,); at most 2.0 M numbers."""
    torch.manual_seed(0)
    model = Detector()
    points, sure, heat = model(torch.rand(2, 3, 128, 128) * 2 - 1, with_heat=True)
    assert points.shape == (2, 70, 2) and sure.shape == (2,) and heat.shape == (2, 70, 32 * 32)
    assert points.min() >= 0 and points.max() <= 127
    assert sum(p.numel() for p in model.parameters()) <= 2_000_000


class OneCell(torch.nn.Module):
    """A heat map that is hot in row 5, column 9 alone."""

    def forward(self, x):
        heat = torch.zeros(len(x), 70, 32, 32)
        heat[:, :, 5, 9] = 200
        return heat


def test_soft_argmax_lies_where_the_heat_is():
    """All heat in one cell puts the point on that cell's centre, in pixels of the input."""
    model = Detector()
    model.heat = OneCell()
    points = model(torch.zeros(1, 3, 128, 128))[0]
    wanted = torch.tensor([4 * 9 + 1.5, 4 * 5 + 1.5]).expand(1, 70, 2)
    torch.testing.assert_close(points, wanted)


@pytest.mark.parametrize("box", [(30.0, 20.0, 64.0), (10.3, 5.7, 100.5), (-40.2, -13.0, 300.0)])
def test_cut_and_its_inverse_agree(box):
    """A spot at p is seen at q with p = x0 + (q + 1/2) side / size, also beyond the edge."""
    at = np.array([61.0, 47.0])
    seen = brightest(cut(dots([at], (150, 170), 5), box, 128))
    np.testing.assert_allclose(np.array(box[:2]) + (seen + .5) * box[2] / 128, at, atol=.06)


def test_the_edge_goes_on_outside():
    """Outside the picture a crop repeats its border instead of turning black."""
    crop = cut(np.full((40, 60, 3), 77, np.uint8), whole(np.zeros((40, 60, 3))), 128)
    assert crop.shape == (128, 128, 3) and (crop == 77).all()


def test_find_maps_back_through_every_look():
    """Each look's points go back exactly: through the letterbox first, then through the crops."""
    for shape in ((300, 200), (128, 128), (90, 400)):
        picture = np.zeros((*shape, 3), np.uint8)
        box = whole(picture)
        for looks in (1, 2, 3):
            stub = Stub(FACE)
            points, sure = find(stub, picture, looks)
            expected = np.array(box[:2]) + (FACE + .5) * box[2] / 128
            np.testing.assert_allclose(points, expected, atol=1e-3)
            assert len(stub.seen) == looks and sure > .99
            box = crop_box(expected)
        assert points.shape == (70, 2)


def test_the_second_look_sees_the_face_framed(pool):
    """A small face in a wide picture fills the crop that the second look gets."""
    small = (FACE - 64) * .3 + 64
    stub = Stub(small)
    find(stub, np.asarray(dots(small)), looks=2)
    bright = [(p[0, 0] > 0).float().mean().item() for p in stub.seen]
    assert bright[1] > 4 * bright[0]


def test_large_pictures_are_shrunk_and_points_grow_back():
    """A picture beyond LARGEST is reduced by a whole factor; points are in its own pixels."""
    side = 2 * detector.LARGEST
    points, _ = find(Stub(FACE), np.zeros((side, side // 4, 3), np.uint8), looks=1)
    expected = (FACE + .5) * side / 128 - .5 - (3 * side / 8, 0)
    np.testing.assert_allclose(points, expected, atol=.02)


def test_find_in_crops_takes_both_kinds():
    """uint8 frames and float tensors give the same points, in pixels of the crop."""
    torch.manual_seed(0)
    model = Detector().eval()
    frames = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)
    a, b = find_in_crops(model, frames), find_in_crops(model, media.to_float(frames))
    assert a.shape == (3, 70, 2) and a.dtype == np.float32
    np.testing.assert_array_equal(a, b)


def test_mediapipe_table():
    """70 different indices of the refined mesh, with the chin and the irises where they belong."""
    assert len(MEDIAPIPE_70) == len(set(MEDIAPIPE_70)) == 70
    assert min(MEDIAPIPE_70) >= 0 and max(MEDIAPIPE_70) < 478 and MEDIAPIPE_70[68:] == (468, 473)
    assert MEDIAPIPE_70[8] == 152                                    # the chin


def test_augmentation_moves_points_with_the_picture():
    """A spot stays under its point through turn, scale and shift."""
    at = torch.tensor([[[40.0, 52.0]]]).repeat(24, 35, 1)
    at = torch.cat([at, at], 1)
    pictures = media.to_float(dots([(40, 52)], radius=4))[None].repeat(24, 1, 1, 1)
    moved, points = augment(pictures, at, training.generator(3))
    low = moved.flatten(1).median(1).values[:, None, None, None]
    found = np.stack([brightest(np.clip(p, 0, None)) for p in
                      ((moved - low - .25).clamp(min=0) * 100).movedim(1, -1).numpy()])
    assert np.abs(points.numpy()[:, 0] - (40, 52)).max() > 5
    assert np.median(np.linalg.norm(found - points.numpy()[:, 0], axis=1)) < .5


def test_batches_are_keyed(pool):
    """The same (seed, step) gives the same batch; a quarter of it holds no face and no points."""
    one, two = make_batch(pool, 0, 5, 8), make_batch(pool, 0, 5, 8)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(one[0], make_batch(pool, 0, 6, 8)[0])
    pictures, _, counts, face = one
    assert pictures.abs().max() <= 1 and (face[:2] == 0).all() and (counts[:2] == 0).all()
    assert (face[2:] != 0).all() and counts[2:].mean() > .5


def test_faceless_pictures_hide_the_heads(pool):
    """No faceless picture is a head as drawn."""
    heads = media.to_float(pool[0][0]).repeat(4, 1, 1, 1)
    bare = media.to_float(pool[0][2]).repeat(12, 1, 1, 1)
    made = faceless(bare, heads, training.generator(0))
    assert made.shape == heads.shape and made.abs().max() <= 1
    assert (made - heads).abs().mean((1, 2, 3)).min() > .05


def test_it_learns_one_batch_by_heart(pool):
    """Sixty steps on six heads take the error below a quarter, and tell them from faceless."""
    torch.manual_seed(0)
    model, batch = Detector(), make_batch(pool, 0, 1, 8)
    optimisers, errors = optim.make_optimisers(model, "muon", 2e-3), []
    for _ in range(60):
        px, heat, sure = detector.loss_terms(model, *batch)
        model.zero_grad(set_to_none=True)
        (px + .3 * heat + sure).backward()
        for optimiser in optimisers:
            optimiser.step()
        errors.append(px.item())
    assert np.mean(errors[-3:]) < errors[0] / 4 and sure.item() < .2


def test_the_command_leaves_every_file(tmp_path, monkeypatch, capsys):
    """Three steps: the error is printed, and weights, log, curves and found points are there."""
    monkeypatch.setattr(detector, "held_out_frames", lambda: pool_item(0)[:2])
    detector.main(["--identities", "2", "--batch", "4", "--workers", "0", "--device", "cpu",
                   "--steps", "3", "--out", str(tmp_path)])
    assert "detector_px" in capsys.readouterr().out
    rows = curves.read_log(tmp_path / "log.csv")
    assert [r["step"] for r in rows] == [0, 1, 2, 3] and rows[-1]["unseen"] > 0
    for name in ("last.pt", "detector.pt", "curve.png", "grid.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert (tmp_path / "detector.pt").stat().st_size < 4e6


def test_weights_travel_in_half_precision(tmp_path):
    """Saved as fp16 and read back, the network finds the same points to a tenth of a pixel."""
    torch.manual_seed(0)
    model = Detector().eval()
    path = tmp_path / "detector.pt"
    half = optim.Ema(model).half()
    training.save(path, {"config": asdict(model.config), "weights": half})
    assert all(v.dtype == torch.float16 for v in half.values())
    x = torch.rand(1, 3, 128, 128) * 2 - 1
    torch.testing.assert_close(detector.load(path)(x), model(x), atol=.1, rtol=0)


def test_a_wrong_file_is_named(tmp_path):
    """A checkpoint that is no detector is one clear error with its name in it."""
    path = tmp_path / "vae.pt"
    training.save(path, {"config": {"width": 3}, "weights": {}})
    with pytest.raises(media.UserError, match="vae.pt"):
        detector.load(path)
    with pytest.raises(media.UserError, match="nothing.pt"):
        detector.load(tmp_path / "nothing.pt")


def without_mediapipe(monkeypatch):
    real = builtins.__import__

    def blocked(name, *rest):
        if name.startswith("mediapipe"):
            raise ImportError(name)
        return real(name, *rest)
    monkeypatch.setattr(builtins, "__import__", blocked)


PICTURE = np.zeros((96, 128, 3), np.uint8)


def test_every_face_of_a_picture_is_found_the_largest_first():
    """Big and small, or four at once; one head, however far away, is one; none is none."""
    model, head = detector.load(), lambda k, side: toy.portrait(toy.HELD_OUT + k, side)
    small = np.pad(head(8, 150), ((75, 75), (0, 0), (0, 0)), mode="edge")
    picture = np.concatenate([small, head(7, 300)], 1)
    (big, _), (other, _) = find_all(model, picture)
    assert big[:, 0].mean() > 200 > other[:, 0].mean() and other[:, 1].min() > 60
    assert locate(picture, "us.png", "toy", model)[1] == "us.png: 2 faces; the largest speaks"
    four = np.concatenate([np.concatenate([head(k, 200), head(k + 1, 200)], 1) for k in (1, 3)])
    assert len(find_all(model, four)) == 4
    far = np.pad(toy.portrait(toy.HELD_OUT + 9, 100), ((150, 250), (300, 100), (0, 0)), mode="edge")
    assert len(find_all(model, far)) == 1
    assert find_all(model, np.full((300, 400, 3), 90, np.uint8)) == []


def test_a_cut_face_is_refused_and_a_tight_one_is_not():
    """The picture may end where the points end, but not within the face."""
    model, picture = detector.load(), toy.portrait(toy.HELD_OUT + 1, 256)
    points, _ = locate(picture, "a.png", "toy", model)
    (x0, y0), (x1, y1) = points.min(0).astype(int) - 2, points.max(0).astype(int) + 3
    assert locate(picture[y0:y1, x0:x1], "a.png", "toy", model)[1] is None
    half = (x0 + x1) // 2
    for cut_one in (picture[:, half - 10:], picture[:, :half + 10], picture[:y1 - 30]):
        with pytest.raises(media.UserError, match="a.png: the picture's border cuts the face"):
            locate(cut_one, "a.png", "toy", model)


@pytest.fixture
def one_window(monkeypatch):
    """The stub answers wherever it looks: let it look at the whole picture alone."""
    monkeypatch.setattr(detector, "windows", lambda picture: [whole(picture)])


def test_locate_takes_ours_when_sure(monkeypatch, one_window):
    """A sure answer of our own needs neither mediapipe nor a note."""
    without_mediapipe(monkeypatch)
    for choice in ("auto", "toy"):
        points, note = locate(PICTURE, "me.png", choice, Stub(FACE))
        assert points.shape == (70, 2) and note is None


def test_locate_asks_mediapipe_when_unsure(monkeypatch, one_window):
    """An unsure answer goes to mediapipe, and the note says what the weights were trained on."""
    monkeypatch.setattr(detector, "mediapipe_points", lambda picture: (FACE, 1))
    points, note = locate(PICTURE, "me.png", "auto", Stub(FACE, -9.0))
    assert points is FACE and "trained on drawings" in note
    assert locate(PICTURE, "me.png", "mediapipe")[0] is FACE


def test_a_photograph_that_ours_is_sure_of_gets_a_note(monkeypatch, one_window):
    """Noise is not drawn: mediapipe is asked first; without it our answer comes with the note."""
    grain = np.random.default_rng(0).integers(0, 255, PICTURE.shape, dtype=np.uint8)
    assert not detector.is_drawing(grain, FACE) and detector.is_drawing(PICTURE, FACE)
    without_mediapipe(monkeypatch)
    points, note = locate(grain, "me.png", "auto", Stub(FACE))
    assert points is not FACE and "photograph" in note and "trained on drawings" in note
    monkeypatch.setattr(detector, "mediapipe_points", lambda picture: (FACE, 1))
    assert locate(grain, "me.png", "auto", Stub(FACE))[0] is FACE


@pytest.mark.parametrize("choice, installed, advice", [
    ("auto", False, "pip install -r requirements-real.txt"),
    ("mediapipe", False, "pip install -r requirements-real.txt"),
    ("auto", True, "frontal face"), ("toy", True, "--detector auto")])
def test_locate_says_what_to_do(monkeypatch, one_window, choice, installed, advice):
    """No face: one error that names the picture, what was found, and what would help."""
    if installed:
        monkeypatch.setattr(detector, "mediapipe_points", lambda picture: (None, 0))
    else:
        without_mediapipe(monkeypatch)
    with pytest.raises(media.UserError) as error:
        locate(PICTURE, "me.png", choice, Stub(FACE, -9.0))
    text = str(error.value)
    assert text.startswith("me.png: no face found (128x96 pixels") and advice in text


@pytest.mark.parametrize("arguments", [["--steps", "-1"], ["--minutes", "0"], ["--batch", "0"],
                                       ["--identities", "0"], ["--nonsense"]])
def test_bad_arguments(arguments, tmp_path):
    """What cannot be trained is refused before anything is rendered or written."""
    with pytest.raises(media.UserError):
        detector.main([*arguments, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
