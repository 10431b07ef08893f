"""The 70 points: pose signs and fit, x^m, framing, mouth and eyes."""
import numpy as np
import pytest

import landmarks
import toy
from landmarks import (IRIS_COLOUR, IRISES, MEAN_FACE, RIGID, angles, crop_box, draw, eye_opening,
                       head_pose, mouth_opening, point_error, retarget, rotation, turned,
                       visible)

POSES = np.array([[0, 0, 0], [20, 0, 0], [0, 25, 0], [0, 0, 15], [-12, 30, -20], [15, -40, 8]])


def project(pose, scale=40.0):
    """The mean face in a pose, as pixels of a 128 x 128 picture."""
    flat = (MEAN_FACE @ rotation(pose).T)[:, :2]
    return (flat * (scale, -scale) + 64).astype(np.float32)


def test_rotation_is_the_stated_product():
    """R = Rz(-roll) Ry(yaw) Rx(-pitch), and it is a rotation."""
    def about(axis, degrees):
        a, m = np.radians(degrees), np.eye(3)
        i, j = [k for k in range(3) if k != axis]
        sign = -1 if axis == 1 else 1
        m[[i, i, j, j], [i, j, i, j]] = np.cos(a), -sign * np.sin(a), sign * np.sin(a), np.cos(a)
        return m
    for pitch, yaw, roll in POSES:
        stated = about(2, -roll) @ about(1, yaw) @ about(0, -pitch)
        np.testing.assert_allclose(rotation((pitch, yaw, roll)), stated, atol=1e-12)
        np.testing.assert_allclose(stated @ stated.T, np.eye(3), atol=1e-12)


def test_angles_undo_rotation():
    """angles(rotation(pose)) is the pose, for any batch."""
    np.testing.assert_allclose(angles(rotation(POSES)), POSES, atol=1e-4)


@pytest.mark.parametrize("pose, point, direction", [
    ((0, 20, 0), 30, (1, 0)),           # yaw > 0: the nose's tip moves to the viewer's right
    ((20, 0, 0), 30, (0, -1)),          # pitch > 0: it moves up
    ((0, 0, 20), 27, (1, 0)),           # roll > 0: what is above the middle leans right, clockwise
])
def test_pose_signs_on_points(pose, point, direction):
    """Each angle moves its point where DESIGN says, in pixels (y down)."""
    moved = project(pose)[point] - project((0, 0, 0))[point]
    assert moved @ direction > 2


def test_head_pose_is_exact_on_the_mean_face():
    """The closed form finds the pose of the mean face itself, whatever the scale and place."""
    for scale in (10.0, 55.0):
        found = head_pose(np.stack([project(p, scale) + (7, -30) for p in POSES]))
        np.testing.assert_allclose(found, POSES, atol=2e-3)


def test_head_pose_ignores_lips_and_lids():
    """Talking and blinking are no head motion: only rigid points are read."""
    points = project((5, 10, -3))
    moved = points.copy()
    others = np.setdiff1d(np.arange(70), RIGID)
    moved[others] += np.random.default_rng(0).normal(0, 9, (len(others), 2)).astype(np.float32)
    np.testing.assert_allclose(head_pose(moved), head_pose(points))


def test_x_m_has_its_colours_at_known_points():
    """Each contour is drawn in its own colour through its points; elsewhere x^m is black."""
    points = project((0, 0, 0))
    picture = draw(points, 128)
    assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
    for point, colour in ((4, (255, 0, 0)), (19, (255, 255, 0)), (24, (255, 255, 0)),
                          (28, (0, 0, 255)), (37, (0, 255, 0)), (44, (0, 255, 0)),
                          (57, (255, 0, 255)), (68, IRIS_COLOUR), (69, IRIS_COLOUR)):
        x, y = np.round(points[point]).astype(int)
        near = picture[y - 1:y + 2, x - 1:x + 2].reshape(-1, 3).astype(int)
        assert np.abs(near - colour).sum(1).min() < 160, (point, colour)
    assert not picture[:8].any() and not picture[46:52, 63:66].any()     # the brows do not meet


def test_jaw_is_open():
    """No line joins the two ends of the jaw."""
    points = project((0, 0, 0))
    points[17:] = 1000                                  # everything else leaves the picture
    y = int(round((points[0, 1] + points[16, 1]) / 2))
    assert not draw(points, 128)[y - 2:y + 3, 60:68].any()


def test_iris_of_a_closed_eye_is_neither_drawn_nor_counted():
    """Under 15 % open an iris is hidden: no white in x^m, no error, whatever its place."""
    points = project((0, 0, 0))
    assert (draw(points, 128) == 255).all(-1).any() and visible(points).all()
    for first in (36, 42):
        middle = points[first:first + 6, 1].mean()
        points[first:first + 6, 1] = middle
    assert (eye_opening(points) < landmarks.OPEN_EYE).all()
    assert not (draw(points, 128) == 255).all(-1).any()
    wrong = points.copy()
    wrong[IRISES] += 50
    assert visible(points).sum() == 68 and point_error(wrong, points) == 0


@pytest.mark.parametrize("shift", [(-100, 0), (0, 300), (1e4, -1e4)])
def test_points_outside_are_clipped(shift):
    """A face that leaves the picture is drawn as far as it is inside, without an error."""
    assert draw(project((0, 20, 0)) + shift, 128).shape == (128, 128, 3)


def test_crop_follows_scale_and_place():
    """crop_box of scaled and moved points is the box scaled and moved: fixed multiples."""
    points = project((0, 0, 0)).astype(np.float64)
    x, y, side = crop_box(points)
    np.testing.assert_allclose(crop_box(points * 3 + (11, -5)), (3 * x + 11, 3 * y - 5, 3 * side))
    low, high = points[:27].min(0), points[:27].max(0)
    assert side == pytest.approx(1.9 * (high - low).mean())
    assert x < low[0] and y < low[1] and x + side > high[0] and y + side > high[1]


def test_crop_of_a_clip_is_its_median():
    """One crop serves a clip: a frame that jumps away does not move it."""
    clip = np.repeat(project((0, 0, 0))[None], 9, 0)
    still = crop_box(clip)
    clip[4] += 500
    assert crop_box(clip) == still == crop_box(clip[0])


def test_openings_are_ratios():
    """Mouth opening is |62-66| / |36-45|; both openings ignore scale, turn and place."""
    points = project((0, 0, 0)).astype(np.float64)
    points[66, 1] += 12
    hand = np.linalg.norm(points[62] - points[66]) / np.linalg.norm(points[36] - points[45])
    assert mouth_opening(points) == pytest.approx(hand)
    a = np.radians(33)
    turned = 2.5 * points @ np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) + 9
    assert mouth_opening(turned) == pytest.approx(hand)
    np.testing.assert_allclose(eye_opening(turned), eye_opening(points))
    assert mouth_opening(np.stack([points] * 3)[None]).shape == (1, 3)


def test_a_driver_moves_itself():
    """`retarget` onto the driver's own first frame gives the driver back; a still driver, a still
    portrait."""
    driver = toy.make_clip(3, 2.0).landmarks
    np.testing.assert_allclose(retarget(driver[0], driver), driver, atol=1e-3)
    still = retarget(driver[0], np.repeat(driver[7:8], 3, 0))
    np.testing.assert_allclose(still, np.repeat(driver[:1], 3, 0), atol=1e-3)


@pytest.mark.parametrize("seed", [4, 6, 8])
def test_another_face_does_what_the_driver_does(seed):
    """Points of identity B doing A's motion, from B's first frame and A's points: within .4 px of
    the renderer's on average, where A's own points are further off than 1 px."""
    driver, other = toy.make_clip(seed, 3.0), toy.make_clip(seed + 1, 3.0)
    true = toy.ToyClip(other.identity, driver.motion, jitter=driver.jitter).landmarks
    made = retarget(true[0], driver.landmarks)
    assert point_error(made, true).mean() < .4 < 1 < point_error(driver.landmarks, true).mean()


@pytest.mark.parametrize("seed", [4, 6, 8])
def test_a_face_is_turned_about_the_neck(seed):
    """`turned`: to its own pose it stays; to others, 20 degrees off, it has them to a degree and lies
    within 1.5 px of where the renderer draws it, which its own points miss by 4 and more."""
    clip = toy.make_clip(seed, .2)
    face, asked = clip.landmarks[0], np.array([(20, 0, 0), (-20, 0, 0), (0, 20, 0), (0, 0, 20.)])
    np.testing.assert_allclose(turned(face, head_pose(face)), face, atol=1e-3)
    made = turned(face, asked)
    assert np.abs(head_pose(made) - asked).max() < 1
    wide = [np.repeat(track[:1], 5, 0) for track in (clip.motion.expression, clip.motion.sway)]
    motion = toy.Motion(np.concatenate([clip.motion.pose[:1], asked]), *wide)
    true = toy.ToyClip(clip.identity, motion, jitter=clip.jitter).landmarks
    made = turned(true[0], asked)
    off, still = (point_error(points, true[1:]).mean() for points in (made, true[:1]))
    assert off < 1.5 and still > 4
