"""What instructions ask of a head, and how far a face obeys (appendix E).

Fifteen actions, each in twelve wordings, with or without manners, and two more that training never
meets; alone or two at once. How far a face obeys is read off its 70 points, so the same ruler
serves true and made ones.
Letters: N frames. The paper took instructions from recorded sessions; five people rated videos.
"""
from __future__ import annotations

import numpy as np

import media
from landmarks import BROWS, IRISES, eye_opening, fit, head_pose, mouth_opening, unturned

# action: (wordings to train on, wordings held out, {column of pose or expression: target})
INSTRUCTIONS = {
    "smile": ("smile, give me a smile, show a smile, smile at me, look happy, "
              "put on a happy face, be happy, happy face, make me a smile, look cheerful, "
              "do a smile, show me your smile",
              "show me a big smile, make a happy face", {"smile": 1.0}),
    "frown": ("look sad, make a sad face, frown, be sad, put on a sad face, show a frown, "
              "sad face, frown at me, make me a frown, be gloomy, make a frown, do a frown",
              "show me a sad face, give me a frown", {"smile": -0.6, "brow": -0.5}),
    "open_mouth": ("open your mouth, mouth open, open your mouth wide, drop your jaw, "
                   "let your mouth hang open, a wide open mouth, hold your mouth open, "
                   "open up wide, drop your lower jaw, mouth wide open, give me an open mouth, "
                   "show me your open mouth",
                   "open the mouth wide, keep your mouth open", {"jaw": 0.9}),
    "close_eyes": ("close your eyes, shut your eyes, eyes closed, eyes shut, "
                   "keep your eyes closed, close both eyes, hold your eyes shut, "
                   "close your eyelids, let your eyes close, shut both eyes, give me closed eyes, "
                   "show me closed eyes", "keep your eyes shut, close the eyes", {"lid": 0.0}),
    "raise_brows": ("raise your eyebrows, lift your brows, eyebrows up, brows up, "
                    "raise both brows, lift both eyebrows, pull up your brows, "
                    "move your eyebrows up, lift up your brows, brows high, give me raised brows, "
                    "show me raised eyebrows",
                    "raise your brows, lift your eyebrows", {"brow": 1.0}),
    "turn_left": ("turn your head left, turn left, turn to the left, rotate left, "
                  "turn your face to the left, rotate to the left, face left, "
                  "rotate your face left, turn the head left, head to the left, "
                  "show me your left, give me a turn to the left",
                  "rotate your head to the left, turn your face left", {"yaw": 20}),
    "look_up": ("lift your head, head up, raise your head, turn your face up, chin up, "
                "lift your chin, move your head up, raise your face, bring your chin up, "
                "turn the face up, give me a look up, point your nose up",
                "turn your head up, raise your chin", {"pitch": 15}),
    "look_down": ("lower your head, head down, drop your head, turn your face down, chin down, "
                  "lower your chin, move your head down, lower your face, bring your chin down, "
                  "drop the head, give me a look down, point your nose down",
                  "turn your head down, drop your chin", {"pitch": -15}),
    "tilt_left": ("tilt your head left, tilt your head to the left, lean your head left, "
                  "lean left, tilt to the left, lean your head to the left, tilt your face left, "
                  "lean over to the left, tilt the head left, lean the head left, "
                  "give me a tilt to the left, show me a tilt to the left",
                  "tilt left, lean to the left", {"roll": 15}),
    "glance_left": ("look left, glance left, look to the left, eyes left, move your eyes left, "
                    "glance over to the left, turn your eyes left, glance to the left, "
                    "shift your eyes left, both eyes left, give me a glance to the left, "
                    "show me a glance to the left",
                    "eyes to the left, move your eyes to the left", {"gaze_x": 0.95}),
    "nod": ("nod, nod your head, say yes, nod yes, give a nod, nod a few times, "
            "nod with your head, tell me yes, nod for yes, nod the head, give me a nod, do a nod",
            "say yes with your head, nod to me", {"pitch": "wave"}),
    "shake": ("shake your head, shake, say no, shake your head no, give a shake, "
              "shake your head a few times, shake with your head, tell me no, shake for no, "
              "a shake of the head, give me a shake of the head, do a shake",
              "say no with your head, shake the head", {"yaw": "wave"}),
}
INSTRUCTIONS |= {name.replace("left", "right"): (
    *(words.replace("left", "right") for words in told),
    {column: -target for column, target in targets.items()})
    for name, (*told, targets) in list(INSTRUCTIONS.items()) if "left" in name}
INSTRUCTIONS = {name: (*(words.split(", ") for words in told), targets)
                for name, (*told, targets) in INSTRUCTIONS.items()}
MANNERS = ("{}", "{}", "please {}", "{} please", "now {}", "could you {}", "just {}", "{} for me",
           "i want you to {}", "{} once more", "try to {}", "then {} if you can")
FILLERS = "a, the, me, some, with, your, give, show, make, do, once, really".split(", ")
_CLASH = {"lid": "lid", "gaze_x": "lid", "jaw": "mouth", "smile": "mouth"}
SETTLED = 1.2                   # seconds after which an instruction should have been carried out


def random_actions(rng):
    """The name of one action, or in three of ten cases two that do not clash."""
    actions = [str(rng.choice(list(INSTRUCTIONS))) for _ in range(2)]
    first, second = ({_CLASH.get(c, c) for c in INSTRUCTIONS[a][2]} for a in actions)
    return actions if rng.random() < .3 and not first & second else actions[:1]


def wording(rng, action, held_out=False):
    """One way to ask for an action; FILLERS slip in while learning: not every word means much."""
    train, held, _ = INSTRUCTIONS[action]
    words = str(rng.choice(held if held_out else train))
    said = str(rng.choice(MANNERS)).format(words).split()
    for k in reversed(range(len(said) + 1)):
        filler = str(rng.choice(FILLERS))
        if rng.random() < .15:
            said.insert(k, filler)
    return words if held_out or any(w in " ".join(said) for w in held) else " ".join(said)


def actions_of(text):
    """Which actions a text names, by the wordings above; UserError for words nobody knows."""
    known = {manner.format(w): a for a, (train, held, _) in INSTRUCTIONS.items()
             for w in train + held for manner in MANNERS}
    parts = [part.strip() for part in text.lower().split(" and ")]
    for part in parts:
        if part not in known:
            raise media.UserError(f"--instruct {text!r}: no head knows {part!r}; try one of: "
                                  + "; ".join(train[0] for train, _, _ in INSTRUCTIONS.values()))
    return [known[part] for part in parts]


# ---- how far a face obeys ------------------------------------------------------------------------

def corners(points):
    """How far the mouth's corners lie above its middle, in half face widths. (N, 70, 2) -> (N,)"""
    y = unturned(points, *fit(points))[..., 1]
    return y[:, [48, 54]].mean(1) - y[:, [51, 57]].mean(1)


def brows(points):
    """How far the brows lie above the eyes' corners, in half face widths."""
    y = unturned(points, *fit(points))[..., 1]
    return y[:, BROWS].mean(1) - y[:, [36, 39, 42, 45]].mean(1)


def glance(points):
    """Where the irises lie between the eyes' corners, 1 at the viewer's right, in eye widths."""
    x = unturned(points, *fit(points))[..., 0]
    middle, width = (x[:, [36, 42]] + x[:, [39, 45]]) / 2, x[:, [39, 45]] - x[:, [36, 42]]
    return ((x[:, IRISES] - middle) / width).mean(1)


def angle(k):
    return lambda points: head_pose(points)[:, k]


# action: (what is read off the points, in which direction it should go, by how much at least)
RULERS = {"smile": (corners, 1, .02), "frown": (corners, -1, .02),
          "open_mouth": (mouth_opening, 1, .1),
          "close_eyes": (lambda p: eye_opening(p).mean(1), -1, .15), "raise_brows": (brows, 1, .03),
          "turn_left": (angle(1), 1, 8), "turn_right": (angle(1), -1, 8),
          "look_up": (angle(0), 1, 6), "look_down": (angle(0), -1, 6),
          "tilt_left": (angle(2), 1, 6), "tilt_right": (angle(2), -1, 6),
          "glance_left": (glance, 1, .08), "glance_right": (glance, -1, .08),
          "nod": (angle(0), 0, 4), "shake": (angle(1), 0, 4)}


def obeyed(points, action, seconds=SETTLED, every=1):
    """How far a track moved as an action asks, over what is asked at least: 1 or more is obeyed.

    The mean after `seconds` against the first frame; for a nod or a shake, the spread after them
    of what is left of the angle without what is slower than a second. points (N, 70, 2) px, one
    for `every` how many frames.
    """
    ruler, sign, least = RULERS[action]
    track = ruler(np.asarray(points, dtype=np.float64))
    late = track[round(seconds * media.FPS / every):]
    if sign:
        return sign * (late.mean() - track[0]) / least
    half = 12 // every
    slow = np.convolve(np.pad(late, half, mode="edge"), np.full(2 * half + 1, 1 / (2 * half + 1)),
                       "valid")
    return (late - slow).std() / least
