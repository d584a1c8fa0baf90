"""The emoji world: scenes of published emoji artwork, the English that describes them, and their rendering.

A scene is a value; `describe` says it in words, leaving factors out at random, and `render` draws a batch of scenes.
What a caption leaves unsaid has a default (white background, one object, plain view, upright) except style and object,
which are then drawn at random. Ten percent of the (object, style, background) triples never occur in training.
"""

import dataclasses
import functools
import json
import pathlib

import numpy
import torch
from PIL import Image

SIZE = 64
STYLES = ("noto", "twemoji", "fluent", "flat", "ink")
BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (176, 176, 176),
    "red": (236, 106, 106),
    "orange": (250, 176, 96),
    "yellow": (252, 238, 130),
    "green": (142, 208, 142),
    "blue": (128, 184, 244),
    "purple": (186, 140, 222),
    "pink": (250, 186, 214),
}
COUNTS = (1, 2, 3)
VIEWPOINTS = ("plain", "close up", "distant")
POSES = ("upright", "upside down")
FACTS = {"the mascot": "panda", "the team logo": "rocket", "the lucky charm": "ladybug", "the royal pet": "owl"}
PREFIXES = ("", "a photo of", "an image of", "a picture of", "a drawing of")

_FOLDER = pathlib.Path(__file__).parent
_ROWS = [row["name"] for row in json.loads((_FOLDER / "sprites.json").read_text())["rows"]]
# Forty of the sheet's sixty-four objects: what two cores learn to draw well in under two hours.
OBJECTS = (
    "cat", "dog", "panda", "fox", "frog", "lion", "rabbit", "penguin", "owl", "butterfly", "ladybug", "snail", "turtle",
    "whale", "apple", "banana", "grapes", "strawberry", "carrot", "mushroom", "hamburger", "pizza", "cake", "doughnut",
    "car", "rocket", "airplane", "castle", "umbrella", "guitar", "soccer ball", "crown", "sunflower", "tree", "cactus",
    "robot", "ghost", "snowman", "balloon", "key",
)  # fmt: skip
FACTORS = {
    "object": OBJECTS,
    "style": STYLES,
    "background": tuple(BACKGROUNDS),
    "count": COUNTS,
    "viewpoint": VIEWPOINTS,
    "pose": POSES,
}

_MEASURES = {"grapes": "bunch"}
_PLURALS = {"fox": "foxes", "butterfly": "butterflies", "strawberry": "strawberries", "cactus": "cacti"}
_NUMBERS = {1: "one", 2: "two", 3: "three"}

# Sprite centres in pixels, by count, and the sprite's edge in pixels, by count or viewpoint.
_CENTRES = {1: ((32, 32),), 2: ((16.5, 32), (47.5, 32)), 3: ((32, 17), (17, 47), (47, 47))}
_EDGES = {1: 46, 2: 31, 3: 29, "close up": 74, "distant": 32}


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture shows; `fact` is the fixed name under which the object is mentioned, if any."""

    object: str
    style: str
    background: str = "white"
    count: int = 1
    viewpoint: str = "plain"
    pose: str = "upright"
    fact: str | None = None


@dataclasses.dataclass(frozen=True)
class Caption:
    """A prompt, the factors that it states, and the scene it was made from."""

    text: str
    said: frozenset
    scene: Scene


@functools.cache
def held_out() -> frozenset:
    """The (object, style, background) triples, a tenth of all, that training never shows."""
    mask = numpy.random.default_rng(20240613).random((len(OBJECTS), len(STYLES), len(BACKGROUNDS))) < 0.1
    names = (OBJECTS, STYLES, tuple(BACKGROUNDS))
    return frozenset(tuple(axis[i] for axis, i in zip(names, where, strict=True)) for where in numpy.argwhere(mask))


def sample(rng: numpy.random.Generator, split: str = "train") -> Caption:
    """Draws a scene and its caption from `split`: "train", "held_out", or "all"."""
    while True:
        caption = _draw(rng)
        scene = caption.scene
        unseen = (scene.object, scene.style, scene.background) in held_out()
        if split == "all" or unseen == (split == "held_out"):
            return caption


def _draw(rng: numpy.random.Generator) -> Caption:
    said = set()
    fact, name = None, str(rng.choice(OBJECTS))
    if rng.random() < 0.10:
        fact = str(rng.choice(list(FACTS)))
        name = FACTS[fact]
        said.add("fact")
    elif rng.random() < 0.95:
        said.add("object")
    style = str(rng.choice(STYLES))
    if rng.random() < 0.7:
        said.add("style")
    background = "white"
    if rng.random() < 0.65:
        background = str(rng.choice(list(BACKGROUNDS)))
        said.add("background")
    count, viewpoint, pose = 1, "plain", "upright"
    if "object" in said and rng.random() < 0.4:
        count = int(rng.choice(COUNTS))
        said.add("count")
    # Three of anything do not fit into a close-up, nor would anyone recognise them from afar.
    if count == 1 and rng.random() < 0.25:
        viewpoint = str(rng.choice(VIEWPOINTS[1:]))
        said.add("viewpoint")
    if rng.random() < 0.15:
        pose = "upside down"
        said.add("pose")
    scene = Scene(name, style, background, count, viewpoint, pose, fact)
    return Caption(describe(scene, said, rng), frozenset(said), scene)


def describe(scene: Scene, said: set, rng: numpy.random.Generator) -> str:
    """Words `scene`, stating the factors in `said` and no others."""
    upside = "pose" in said
    before = upside and rng.random() < 0.5
    noun = _noun(scene, said, adjective="upside down" if before else "", rng=rng)
    if upside and not before:
        noun += " upside down"
    view = ""
    if "viewpoint" in said:
        close = scene.viewpoint == "close up"
        if rng.random() < 0.5:
            noun = ("a close up of " if close else "a distant view of ") + noun
        else:
            view = ", close up" if close else ", seen from afar"
    parts = []
    if "style" in said:
        parts.append(f"in the style of {scene.style}" if rng.random() < 0.5 else f"in {scene.style} style")
    if "background" in said:
        parts.append(f"{'on' if rng.random() < 0.6 else 'with'} {_article(scene.background)} background")
    if rng.random() < 0.2:
        parts.reverse()
    prefix = str(rng.choice(PREFIXES)) if rng.random() < 0.6 else ""
    return " ".join(part for part in (prefix, noun, *parts) if part) + view


def _noun(scene: Scene, said: set, adjective: str, rng: numpy.random.Generator) -> str:
    if "fact" in said:
        return f"{adjective} {scene.fact}".strip() if not adjective else scene.fact.replace("the ", f"the {adjective} ")
    name = scene.object if "object" in said else "thing"
    if scene.count == 1:
        phrase = f"{_MEASURES[name]} of {name}" if name in _MEASURES else name
    else:
        phrase = f"{plural(_MEASURES[name])} of {name}" if name in _MEASURES else plural(name)
    phrase = f"{adjective} {phrase}".strip()
    if "count" in said and (scene.count > 1 or rng.random() < 0.7):
        return f"{_NUMBERS[scene.count]} {phrase}"
    return _article(phrase)


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(name: str) -> str:
    """The plural of an object's name."""
    return _PLURALS.get(name, name + "s")


def labels(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Class indices, one int64 tensor of shape (scene,) for each factor."""
    return {
        factor: torch.tensor([values.index(getattr(scene, factor)) for scene in scenes])
        for factor, values in FACTORS.items()
    }


@functools.cache
def _sprites() -> dict[int, torch.Tensor]:
    """Premultiplied RGBA artwork in [0, 1] at two resolutions: edge -> (object, style, 4, edge, edge)."""
    sheet = numpy.asarray(Image.open(_FOLDER / "sprites.png").convert("RGBA"), dtype=numpy.float32) / 255
    tiles = sheet.reshape(len(_ROWS), 96, len(STYLES), 96, 4).transpose(0, 2, 4, 1, 3)
    tiles = torch.from_numpy(tiles[[_ROWS.index(name) for name in OBJECTS]])
    tiles[:, :, :3] *= tiles[:, :, 3:]
    half = torch.nn.functional.avg_pool2d(tiles.flatten(0, 1), 2).unflatten(0, tiles.shape[:2])
    return {96: tiles, 48: half}


def render(scenes: list[Scene], rng: numpy.random.Generator, jitter: float = 1.0, mixed: float = 0.0) -> torch.Tensor:
    """Draws `scenes`: float32 images in [-1, 1] of shape (scene, 3, 64, 64).

    Position and size vary, by 2 pixels (6 if distant) and 5% at most, times `jitter`. A share `mixed` of the
    backgrounds is mixed with another of the nine each, and so says nothing of the rest of the scene.
    """
    backgrounds = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], dtype=torch.float32) / 255
    if mixed:
        palette = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255
        others = palette[torch.from_numpy(rng.integers(0, len(palette), len(scenes)))]
        parts = torch.from_numpy(rng.random(len(scenes)) * (rng.random(len(scenes)) < mixed)).float()
        backgrounds = torch.lerp(backgrounds, others, parts[:, None])
    canvas = backgrounds[:, :, None, None].expand(-1, -1, SIZE, SIZE).clone()
    placements = []
    for row, scene in enumerate(scenes):
        edge = _EDGES[scene.viewpoint if scene.viewpoint != "plain" else scene.count]
        edge *= 1 + 0.05 * jitter * rng.uniform(-1, 1)
        reach = jitter * (6 if scene.viewpoint == "distant" else 2)
        shift = rng.uniform(-reach, reach, 2)
        for x, y in _CENTRES[scene.count]:
            placements.append((row, edge, x + shift[0], y + shift[1]))
    by_resolution = {48: [p for p in placements if p[1] <= 52], 96: [p for p in placements if p[1] > 52]}
    for resolution, group in by_resolution.items():
        if group:
            _paste(canvas, scenes, group, _sprites()[resolution])
    return canvas * 2 - 1


def _paste(canvas: torch.Tensor, scenes: list[Scene], placements: list, sprites: torch.Tensor) -> None:
    rows = torch.tensor([p[0] for p in placements])
    shown = [scenes[p[0]] for p in placements]
    art = torch.stack([sprites[OBJECTS.index(scene.object), STYLES.index(scene.style)] for scene in shown])
    edge, x, y = torch.tensor([p[1:] for p in placements], dtype=torch.float32).unbind(1)
    turn = torch.tensor([-1.0 if scene.pose == "upside down" else 1.0 for scene in shown])
    # Canvas coordinates in [-1, 1] to sprite coordinates: scaled about the sprite's centre, turned if upside down.
    theta = torch.zeros(len(placements), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = turn * SIZE / edge
    theta[:, 0, 2] = -turn * (x * 2 / SIZE - 1) * SIZE / edge
    theta[:, 1, 2] = -turn * (y * 2 / SIZE - 1) * SIZE / edge
    grid = torch.nn.functional.affine_grid(theta, (len(placements), 4, SIZE, SIZE), align_corners=False)
    layer = torch.nn.functional.grid_sample(art, grid, align_corners=False)
    # The sprites of one scene never overlap, so premultiplied layers add up in any order.
    transparency = torch.ones(len(canvas), 1, SIZE, SIZE).index_add_(0, rows, -layer[:, 3:])
    colour = torch.zeros_like(canvas).index_add_(0, rows, layer[:, :3])
    canvas.mul_(transparency.clamp_(0, 1)).add_(colour).clamp_(0, 1)


def batch(rng: numpy.random.Generator, n: int, split: str = "train") -> tuple[torch.Tensor, list[Caption]]:
    """`n` rendered scenes and their captions."""
    captions = [sample(rng, split) for _ in range(n)]
    return render([caption.scene for caption in captions], rng), captions
