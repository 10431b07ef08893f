"""Fills what `faces` places: backgrounds and clothes once a clip, the head frame by frame.

Order, back to front: wall, back hair, neck, clothes, ears, head and light, beard, mouth, nose,
eyes, brows, front hair, mask, glasses, hat. Coordinates are pixels of the enlarged canvas.
"""
from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from faces import (IRIS, SCALE, SKULL, SKULL_CENTRE, View, expressive_points, mix, on_skull, rgb,
                   smooth)


class Painter:
    """Draws one identity in N poses and expressions. `landmarks` (N, 70, 2): small picture's px."""

    def __init__(self, identity, pose, expression, shift, size=128, jitter=(0, 0, 1), mask=False,
                 first=False):
        self.identity, self.size = identity, size
        points = expressive_points(identity, expression)                     # (N, 70, 3)
        self.view = View(pose, shift, size * SCALE, points, jitter, first)
        self.expression = np.asarray(expression)
        pixels = self.view.pixels(points)
        self.landmarks = ((pixels + .5) / SCALE - .5).astype(np.float32)
        self.unit = self.view.zoom                                           # canvas pixels a unit
        self.colours = _palette(identity)
        self.shapes = self._shapes(pixels)
        if mask:                                                            # a surgical mask
            self.shapes["mask"] = np.concatenate([pixels[:, 2:15], pixels[:, 29:30]], 1)
        self.wall, self.cloth = self._wall(), self._cloth()

    # ---- once a clip -----------------------------------------------------------------------------

    def _wall(self):
        """The background: a gradient with a pattern, as an image."""
        i, size = self.identity, self.size * SCALE
        rng = np.random.default_rng(i.seed)
        top, low = i.colours["wall"], mix(i.colours["wall"], i.colours["wall2"], .55)
        ramp = np.linspace(0, 1, size)[:, None] * np.ones((1, size))
        if rng.random() < .5:
            ramp = (ramp + np.linspace(0, rng.uniform(-1, 1), size)[None]) / 2
        image = Image.fromarray(mix(top, low, np.clip(ramp, 0, 1)[..., None]).astype(np.uint8))
        pen, tone = ImageDraw.Draw(image), rgb(mix(low, (255, 255, 255), .22))
        step = size * rng.uniform(.13, .22)
        lines = np.arange(0, size + step, step)
        if i.background == 1:
            slope = rng.uniform(-.6, .6) * size
            for x in np.arange(-size, 2 * size, step):
                pen.polygon([x, 0, x + step * .45, 0, x + step * .45 + slope, size,
                             x + slope, size], tone)
        elif i.background == 2:
            for row, y in enumerate(lines):
                for x in lines + (step / 2 if row % 2 else 0):
                    pen.ellipse(_around((x, y), step * .22), tone)
        elif i.background == 3:
            x = np.linspace(0, size, 40)
            pen.ellipse(_around((size * rng.uniform(.1, .9), size * .22), size * .11), tone)
            for k, share in enumerate((.2, .45)):
                wave = np.sin(x / size * rng.uniform(4, 9) + 6 * rng.random())
                y = size * (.55 + .17 * k) + size * .07 * wave
                pen.polygon([*_flat(np.stack([x, y], 1)), size, size, 0, size],
                            rgb(mix(low, i.colours["cloth2"], share)))
        elif i.background == 4:
            x, w = size * rng.uniform(-.05, .6), size * rng.uniform(.3, .45)
            pane, bar = rgb(mix(top, (255, 255, 255), .55)), rgb(mix(low, (60, 40, 30), .4))
            pen.rectangle([x, size * .07, x + w, size * .62], pane, bar, round(size * .018))
            pen.line([x + w / 2, size * .07, x + w / 2, size * .62], bar, round(size * .014))
            pen.line([x, size * .33, x + w, size * .33], bar, round(size * .014))
        elif i.background == 5:
            for row, y in enumerate(lines):
                for x in lines[row % 2::2]:
                    pen.rectangle([x, y, x + step - 1, y + step - 1], tone)
        return image

    def _cloth(self):
        """Shoulders and clothes, which do not move: (picture, corner, mask), cropped."""
        i, size = self.identity, self.size * SCALE
        width, neck = 1.75 + .18 * i.shape["width"], .46 + .07 * i.shape["neck"]
        side = smooth(np.array([(neck, -1.32), (neck + .2, -1.45), (width * .75, -1.62),
                                (width, -1.95), (width + .12, -2.6), (width + .2, -9)]))
        outline = self.view.still(np.concatenate([side * (-1, 1), side[::-1]])[:, :2])
        low = -1.66 - .13 * (i.collar == 1)
        dip = self.view.still(smooth(np.array([(-neck, -1.30), (-neck * .6, -1.58), (0, low),
                                               (neck * .6, -1.58), (neck, -1.30)])))
        mask = Image.new("L", (size, size))
        ImageDraw.Draw(mask).polygon(_flat(outline), 255)
        ImageDraw.Draw(mask).polygon(_flat(np.concatenate([dip, dip[::-1] - (0, size)])), 0)
        picture = Image.new("RGB", (size, size), rgb(i.colours["cloth"]))
        tone = rgb(mix(i.colours["cloth"], i.colours["cloth2"], .6))
        pen, step = ImageDraw.Draw(picture), size / 14
        for k in range(15):
            if i.clothes == 1:
                pen.rectangle([0, k * step, size, k * step + step * .45], tone)
            elif i.clothes == 2:
                for x in range(15):
                    pen.ellipse(_around(((x + k % 2 / 2) * step, k * step), step * .24), tone)
            elif i.clothes == 3:
                pen.rectangle([k * step, 0, k * step + step * .3, size], tone)
                pen.rectangle([0, k * step, size, k * step + step * .3], tone)
        edge = rgb(mix(i.colours["cloth"], (0, 0, 0), .28))
        pen.line(_flat(dip), edge if i.collar else tone, round(self.unit * .09), joint="curve")
        if i.collar == 2:                                               # buttons
            for y in (-1.78, -1.95):
                pen.ellipse(_around(self.view.still([(0, y)])[0], self.unit * .035), edge)
        top = min(max(int(min(outline[:, 1].min(), dip[:, 1].min())) - 1, 0), size - 1)
        box = (0, top, size, size)
        return picture.crop(box), (0, top), mask.crop(box)

    # ---- geometry of all frames ------------------------------------------------------------------

    def _shapes(self, p):
        """Every moving polygon of every frame, by name: (N, V, 2) pixels. p (N, 70, 2) pixels."""
        i, v, s = self.identity, self.view, self.identity.shape
        skull = v.ellipsoid(SKULL_CENTRE, SKULL * (1 + .05 * s["width"], 1, 1))
        jaw = smooth(p[:, :17])
        shapes = {"skull": skull, "jaw": jaw, "face": np.concatenate([jaw, skull[:, 2:23]], 1)}
        ear = np.array([(1.0, .20, -.36), (1.1, .26, -.44), (1.17, .18, -.48), (1.16, 0, -.46),
                        (1.1, -.16, -.42), (1.03, -.22, -.38), (.97, -.1, -.36)])
        ear *= (1 + .05 * s["width"], 1, 1)
        ear[:, :2] = (1, .02) + (ear[:, :2] - (1, .02)) * (1 + .25 * s["ears"])
        for name, flip, brow, eye, iris in (("left", -1, 17, 36, 68), ("right", 1, 22, 42, 69)):
            shapes["ear_" + name] = smooth(v.pixels(ear * (flip, 1, 1)), closed=True)
            shapes["earring_" + name] = v.pixels([(flip * 1.05, -.3, -.38)])
            shapes["blush_" + name] = v.pixels([(flip * .6, -.30, .1)])
            shapes["brow_" + name] = self._brow(p[:, brow:brow + 5], flip)
            parts = self._eye(p[:, eye:eye + 6], p[:, iris], flip)
            shapes |= {f"{k}_{name}": x for k, x in parts.items()}
        shapes |= self._neck(p) | self._hair(skull) | self._wears(p)
        shapes |= {"lips": smooth(p[:, 48:60], closed=True), "inner": p[:, 60:68],
                   "seam": p[:, 60:65], "nose": p[:, 27:36], "nostrils": smooth(p[:, 31:36])}
        rng = np.random.default_rng(i.seed + 1)
        x = rng.uniform(-.75, .75, i.freckles)
        shapes["freckles"] = v.pixels(on_skull(x, rng.uniform(-.32, -.08, i.freckles)))
        return shapes

    def _neck(self, p):
        width = .47 + .07 * self.identity.shape["neck"]
        top = self.view.pixels([(-width, -.6, -.45), (width, -.6, -.45)])
        low = np.repeat(self.view.still([(width, -1.75), (-width, -1.75)])[None], len(top), 0)
        chin = p[:, 5:12] + (0, self.unit * .15)
        return {"neck": np.concatenate([top, low], 1),
                "neck_shade": np.concatenate([top, chin[:, ::-1]], 1)}

    def _hair(self, skull):
        """Front hair follows a hairline on the skull up to its outline; back hair hangs behind."""
        i, v = self.identity, self.view
        lifts = {"bald": 1, "buzz": 1.025, "swept": 1.1, "afro": 1.1, "curly": 1.08}
        lift = lifts.get(i.hair, 1.07)
        lift += .02 * i.shape["volume"] if i.hair not in ("bald", "buzz") else 0
        if i.hat:
            lift = min(lift, 1.06)
        u = np.linspace(-1, 1, 15)
        height = .92 - .52 * np.abs(u) ** 3                               # of the hairline
        height += {"swept": .10 * u, "short": .05 * np.cos(7 * u), "buzz": -.03}.get(i.hair, 0)
        if i.fringe == 1:
            height = .60 - .25 * np.abs(u) ** 4
        elif i.fringe == 2:
            height = .60 + .30 * np.exp(-((u - .25) / .16) ** 2) - .22 * np.abs(u) ** 4
        elif i.fringe == 3:
            height = .62 + .07 * np.sign(np.sin(9 * u)) - .25 * np.abs(u) ** 4
        line = on_skull(u * .985, height)
        ends = np.array([(.99, .02, -.22)])
        line = v.pixels(np.concatenate([ends * (-1, 1, 1), line, ends]))
        dome = v.ellipsoid(SKULL_CENTRE + (0, .02, -.02),
                           SKULL * (lift * (1 + .05 * i.shape["width"]), lift, lift))
        shapes = {"hair": np.concatenate([line, dome[:, 1:24]], 1),
                  "gloss": dome[:, 7:18] * .93 + .07 * skull.mean(1, keepdims=True)}
        if i.hair in ("bob", "long"):
            x, y = (1.16, -.75) if i.hair == "bob" else (1.18, -1.75)
            half = np.array([(1.0, .6, -.4), (x, 0, -.45), (x + .04, y * .6, -.45),
                             (x - .04, y, -.4), (x - .4, y - .08, -.4)])
            curtain = smooth(np.concatenate([half * (-1, 1, 1), half[::-1]]))
            shapes["curtain"] = np.concatenate([v.pixels(curtain), dome[:, 1:24]], 1)
        rng = np.random.default_rng(i.seed + 2)
        if i.hair in ("curly", "afro"):
            n, far, first = (26, 1.12, -.35) if i.hair == "curly" else (34, 1.28, -.25)
            angle = np.linspace(first, np.pi + .3, n) + rng.normal(0, .04, n)
            shapes["curls"] = v.pixels(np.stack([
                far * np.cos(angle) * .93, SKULL_CENTRE[1] + far * 1.03 * np.sin(angle),
                rng.uniform(-.5, -.2, n)], 1))
            self.curl = (.20 if i.hair == "curly" else .27) * rng.uniform(.85, 1.15, n)
        elif i.hair == "bun":
            shapes["bun"] = v.ellipsoid((0, 1.42, -.42), (.36, .33, .36))
        elif i.hair == "mohawk":
            side = np.array([(.17, .85, .40), (.20, 1.15, .28), (.13, 1.34, .15), (.19, 1.45, .05),
                             (.08, 1.55, -.1), (.09, 1.72, -.2), (0, 1.6, -.3)])
            shapes["crest"] = v.pixels(np.concatenate([side * (-1, 1, 1), side[::-1]]))
        return shapes

    def _wears(self, p):
        """Glasses, hat, beard."""
        i, v = self.identity, self.view
        shapes, a = {}, np.linspace(0, 2 * np.pi, 25)
        if i.glasses:
            corner = {1: 1, 2: .55, 3: .75}[i.glasses]
            x, y = (np.sign(c) * np.abs(c) ** corner for c in (np.cos(a), np.sin(a)))
            tilt = .10 * (x + 1) * (y > 0) if i.glasses == 3 else 0
            ring = np.stack([.45 + .33 * x, .12 + .27 * y + tilt, .40 - .12 * x], 1)
            shapes["bridge"] = v.pixels([(-.13, .15, .52), (0, .19, .56), (.13, .15, .52)])
            for name, flip in (("left", -1), ("right", 1)):
                temple = [(flip * .78, .16, .28), (flip * 1.03, .12, -.3)]
                shapes["glass_" + name] = v.pixels(ring * (flip, 1, 1))
                shapes["temple_" + name] = v.pixels(temple)
        if i.hat:
            u = np.linspace(-1, 1, 13)
            band = on_skull(u * .99, .72 - .30 * np.abs(u) ** 3, 1.06)
            radii = {"beanie": (1.1, 1.16, 1.1), "cap": (1.07, 1.1, 1.08),
                     "straw": (1.06, 1.18, 1.05)}[i.hat]
            top = v.ellipsoid(SKULL_CENTRE + (0, .04, -.03), SKULL * radii)
            low, high = v.pixels(band), v.pixels(band + (0, .24, -.03))
            shapes["hat"] = np.concatenate([low, top[:, 2:23]], 1)
            shapes["hat_band"] = np.concatenate([low, high[:, ::-1]], 1)
            if i.hat == "beanie":
                shapes["pompom"] = v.pixels([(0, 1.58, -.35)])
            else:
                cap = i.hat == "cap"
                reach, wide, back = (.62, .82, .2) if cap else (.75, 1.5, -1.2)
                depth = back + reach * 1.6 * np.maximum(np.sin(a), 0 if cap else -1)
                front = np.stack([wide * np.cos(a), .74 + .03 * np.cos(2 * a), depth], 1)
                shapes["brim"] = v.pixels(front if cap else front * (1, 1, .85) + (0, -.06, .95))
        return shapes | (self._beard(p) if i.beard else {})

    def _beard(self, p):
        i = self.identity
        nose, lip = p[:, 33], p[:, 48:55]
        corner = lip + (lip - lip[:, 3:4]) * .18
        moustache = np.concatenate([corner[:, :1], lip[:, 1:6] * .45 + nose[:, None] * .55,
                                    corner[:, 6:], lip[:, 5:0:-1]], 1)
        if i.beard == 3:
            return {"moustache": moustache}
        jaw, centre = p[:, 6:11] if i.beard == 2 else p[:, 2:15], p[:, 57, None]
        outer = jaw + (jaw - centre) * (.035 if i.beard != 4 else 0)
        k = np.linspace(-1, 1, jaw.shape[1])[:, None]
        depth = .14 + .46 * (1 - k ** 2) ** .7 if i.beard != 2 else .42 + .3 * (1 - k ** 2)
        inner = jaw * (1 - depth) + centre * depth
        shape = {"beard": np.concatenate([smooth(outer), smooth(inner)[:, ::-1]], 1)}
        return shape | ({"moustache": moustache} if i.beard == 1 else {})

    def _eye(self, lid, iris, side):
        """Cubic lids through six points, iris cut off by them. lid (N, 6, 2), iris (N, 2)."""
        origin, axis = lid[:, :1], lid[:, 3:4] - lid[:, :1]
        length = np.sqrt((axis ** 2).sum(-1))                                 # (N, 1)
        along = axis / length[..., None]
        across = np.stack([along[..., 1], -along[..., 0]], -1)                # up in the picture

        def local(points):
            d = points - origin
            return (d * along).sum(-1), (d * across).sum(-1)
        a, b = local(lid)

        def cubic(i, j):
            """Height over the axis of the curve through corner, points i and j, corner."""
            x1, y1 = a[:, i, None] / length, b[:, i, None]
            x2, y2 = a[:, j, None] / length, b[:, j, None]
            f1, f2 = y1 / (x1 * (1 - x1)), y2 / (x2 * (1 - x2))
            slope = (f2 - f1) / np.where(np.abs(x2 - x1) < 1e-6, 1, x2 - x1)
            return lambda x: (x := np.clip(x / length, 0, 1)) * (1 - x) * (f1 + slope * (x - x1))
        upper, lower = cubic(1, 2), cubic(5, 4)
        grid = np.linspace(0, 1, 13) * length                                 # (N, 13)

        def world(x, y):
            return origin + x[..., None] * along + y[..., None] * across
        top, low = world(grid, upper(grid)), world(grid, lower(grid))
        shapes = {"white": np.concatenate([top, low[:, ::-1]], 1), "upper": top, "lower": low,
                  "crease": world(grid, upper(grid) + .07 * self.unit)[:, 2:11]}
        x0, y0 = local(iris[:, None])
        turn = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        for name, radius in (("iris", IRIS), ("pupil", IRIS * .5)):
            x = np.clip(x0 + np.cos(turn) * radius * self.unit, 0, length)
            y = y0 + np.sin(turn) * radius * self.unit
            shapes[name] = world(x, np.clip(y, lower(x), np.maximum(upper(x), lower(x))))
        shapes["glint"] = world(x0 - .035 * self.unit, y0 + .045 * self.unit)
        tip = top[:, -4:] if side > 0 else top[:, 3::-1]
        flick = tip[:, -1:] + (tip[:, -1:] - tip[:, :1]) * .28 - (0, .05 * self.unit)
        shapes["lash"] = np.concatenate([tip, flick], 1)
        return shapes

    def _brow(self, p, side):
        """A brow as thick as the identity's, thinner outwards. p (N, 5, 2), side -1 or 1."""
        thick = self.unit * (.055 + .025 * self.identity.shape["brow_thick"])
        taper = np.linspace(.45, 1, 13) if side < 0 else np.linspace(1, .45, 13)
        line, offset = smooth(p), np.stack([np.zeros(13), taper * thick], -1)
        return np.concatenate([line - offset, (line + offset)[:, ::-1]], 1)

    # ---- one frame -------------------------------------------------------------------------------

    def frame(self, n):
        """Draw frame n -> (size, size, 3) uint8."""
        canvas = self.wall.copy()
        self.pen, self.n = ImageDraw.Draw(canvas), n
        self._fill("hair_dark", "curtain", "bun")
        if "curls" in self.shapes:
            self._dots("hair_dark", self.curl, "curls")
        self._fill("neck", "neck")
        self._fill("shade", "neck_shade")
        canvas.paste(*self.cloth)
        self._head()
        self._mouth()
        self._nose()
        for side in ("left", "right"):
            self._one_eye(side)
            self._fill("brow", "brow_" + side)
        self._front()
        return np.asarray(canvas.reduce(SCALE))

    def _now(self, names):
        """Where those of the named shapes that this head has are in this frame: [(V, 2), ...]."""
        return [self.shapes[name][self.n] for name in names if name in self.shapes]

    def _fill(self, colour, *names):
        for points in self._now(names):
            self.pen.polygon(_flat(points), self.colours[colour])

    def _between(self, a, b, colour):
        self.pen.polygon(_flat([*a, *b[::-1]]), self.colours[colour])

    def _line(self, colour, width, *names):
        width = max(round(width * self.unit), 1)
        for points in self._now(names):
            self.pen.line(_flat(points), self.colours[colour], width, joint="curve")

    def _dots(self, colour, radius, *names):
        for points in self._now(names):
            for centre, r in zip(points, np.broadcast_to(radius, len(points)) * self.unit):
                self.pen.ellipse(_around(centre, r), self.colours[colour])

    def _head(self):
        i = self.identity
        for side in ("left", "right"):
            self._fill("shade", "ear_" + side)
            if i.earrings:
                self._dots("gold", .06, "earring_" + side)
        self._fill("shade", "skull", "jaw")
        face = self.shapes["face"][self.n]
        centre = face.mean(0)
        towards = np.array([i.light * .055, -.045]) * self.unit
        for share, far, tone in ((.96, .9, "skin_low"), (.90, 1, "skin"), (.70, 3, "skin_high")):
            lit = centre + (face - centre) * share + towards * far
            self.pen.polygon(_flat(lit), self.colours[tone])
        self._dots("blush", .13, "blush_left", "blush_right")
        self._dots("freckle", .02, "freckles")
        self._fill("beard", "beard", "moustache")

    def _mouth(self):
        self._fill("lip", "lips")
        inner = self.shapes["inner"][self.n]
        gap = np.abs(inner[2] - inner[6]).max() / self.unit
        if gap > .02:
            upper, lower = inner[:5], inner[[0, 7, 6, 5, 4]]             # left to right
            teeth = upper + (lower - upper) * min(.85, .085 / gap)
            self._between(upper, lower, "mouth")
            if gap > .12:
                self._between(lower + (upper - lower) * .42, lower, "tongue")
            self._between(upper, teeth, "teeth")
        else:
            self._line("lip_dark", .028, "seam")

    def _nose(self):
        nose = self.shapes["nose"][self.n]
        far = nose[8] if self.identity.light < 0 else nose[4]
        side = np.stack([nose[1], nose[3], far, (nose[1] + far) / 2])
        self.pen.polygon(_flat(side), self.colours["nose"])
        self._line("nose_dark", .03, "nostrils")
        light = nose[3] + (self.identity.light * .03 * self.unit, 0)
        self.pen.ellipse(_around(light, self.unit * .045), self.colours["skin_high"])

    def _one_eye(self, side):
        opening = self.expression[self.n, 7 if side == "left" else 8]
        self._line("crease", .022, "crease_" + side)
        if opening > .12:
            for part in ("white", "iris", "pupil"):
                self._fill(part, f"{part}_{side}")
            if opening > .6:
                self._dots("glint", .024, "glint_" + side)
            self._line("crease", .016, "lower_" + side)
        else:
            self._fill("lid", "white_" + side)
        self._line("lash", .045, "upper_" + side)
        if self.identity.lashes:
            self._line("lash", .04, "lash_" + side)

    def _front(self):
        i = self.identity
        self._line("frame", .045, "temple_left", "temple_right")
        if i.hair not in ("bald", "mohawk"):
            self._fill("stubble" if i.hair == "buzz" else "hair", "hair")
            if i.hair != "buzz" and not i.hat:
                self._line("hair_light", .07, "gloss")
        self._fill("hair", "crest")
        self._fill("mask", "mask")
        self._line("frame", .048, "glass_left", "glass_right")
        self._line("frame", .045, "bridge")
        if i.hat == "straw":
            self._fill("hat_dark", "brim")
        self._fill("hat", "hat")
        self._fill("hat_dark", "hat_band", *(["brim"] if i.hat == "cap" else []))
        self._dots("hat_light", .17, "pompom")


def _palette(identity):
    """All tones of an identity, as RGB tuples."""
    c, dark, white = identity.colours, (25, 12, 30), (255, 250, 240)
    skin, hair, hat = c["skin"], c["hair"], c["hat"]
    tones = {
        "skin": skin, "skin_low": mix(skin, dark, .09), "skin_high": mix(skin, white, .10),
        "shade": mix(skin, dark, .2), "neck": mix(skin, dark, .13), "lid": mix(skin, dark, .16),
        "blush": mix(skin, (235, 90, 90), .20), "freckle": mix(skin, (110, 55, 20), .45),
        "crease": mix(skin, dark, .3), "nose": mix(skin, dark, .12),
        "nose_dark": mix(skin, dark, .32), "stubble": mix(hair, skin, .35),
        "hair": hair, "hair_dark": mix(hair, dark, .3), "hair_light": mix(hair, white, .16),
        "brow": mix(hair, dark, .35), "beard": mix(hair, skin, .45 if identity.beard == 4 else .08),
        "lip": c["lip"], "lip_dark": mix(c["lip"], dark, .5), "mouth": (70, 18, 28),
        "tongue": (214, 92, 96), "teeth": (250, 248, 240), "white": (250, 250, 248),
        "iris": c["iris"], "pupil": (18, 14, 18), "glint": (255, 255, 255),
        "lash": mix(hair, (20, 10, 15), .8), "frame": mix(c["frame"], dark, .35),
        "gold": (236, 190, 80), "mask": (150, 200, 215),
        "hat": hat, "hat_dark": mix(hat, dark, .3), "hat_light": mix(hat, white, .45),
    }
    return {name: rgb(tone) for name, tone in tones.items()}


def _flat(points):
    return np.asarray(points).ravel().tolist()


def _around(centre, radius):
    x, y = float(centre[0]), float(centre[1])
    return [x - radius, y - radius, x + radius, y + radius]
