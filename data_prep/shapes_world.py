"""The shapes world: procedural raw video with exact captions, from which every capability can be learned and measured.

    python -m data_prep.shapes_world --output DIR --clips 2000 --seed 0

    arguments --plan_world--> FilePlan, ShotPlan --draw_shot--> Shot --render_shot--> frames --make_file--> NAME.mp4 + NAME.json

Each file holds three to six shots with hard cuts between them, each shot one coloured shape that moves in one of eight
directions or stands, under a still, panning or zooming camera. What the words mean:

    direction   as seen on screen, whatever the camera does
    camera      where the camera goes: panning left moves the background right; zooming in enlarges background and shape

A path has its middle near the middle of the frame, at most half of `--wander` away from it along each axis: the further shapes
wander, the more clips it takes to tell what in them is due to the words.

About one shot or file in ten carries a defect on purpose, named in its sidecar for tests only (`"defect"`), so that curation
has something to find. Some combinations of colour, shape and direction never occur (`is_unseen`): they measure composition.

The same arguments give the same bytes with any number of workers. Files that are there and whole are kept, missing ones are
made, and `world.json` is written last.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from hunyuan_jax.data.dataset import replacing, write_json
from hunyuan_jax.errors import UserError, run_command
from hunyuan_jax.shape_detector import COLOURS, DIRECTIONS, SHAPES, draw_mask, short_caption
from hunyuan_jax.video_io import encode_mp4

Triple = tuple[str, str, str]  # colour, shape, direction

FORMAT = 1
SHOT_DEFECTS = ("no motion", "blur", "near-duplicate", "large text", "black borders")
FILE_DEFECTS = ("truncated", "not a video")
DEFECT_EVERY = 13  # shots; together with the truncated files about one shot in ten
BAD_FILE_EVERY = 40  # files, for each kind of defect a file can have
NUM_UNSEEN = 27  # of 216 combinations, 12.5 %
PROMPTS_OF_EACH_KIND = 48


# --- Which combinations there are -----------------------------------------------------------------------------------------


def _draw(*parts: object) -> int:
    """A fixed pseudo-random number of 64 bits for `parts`: the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big")


ALL_TRIPLES: tuple[Triple, ...] = tuple(itertools.product(COLOURS, SHAPES, DIRECTIONS))


@functools.cache
def unseen_triples() -> frozenset[Triple]:
    """The held-out combinations: three of each direction, and no pair of words more than twice."""
    counts: collections.Counter[Any] = collections.Counter()
    chosen: list[Triple] = []
    for triple in sorted(ALL_TRIPLES, key=lambda triple: _draw("unseen", *triple)):
        colour, shape, direction = triple
        singles = {("colour", colour): 5, ("shape", shape): 7, ("direction", direction): NUM_UNSEEN // len(DIRECTIONS)}
        pairs = {(colour, shape): 2, (shape, direction): 1, (colour, direction): 1}
        if all(counts[key] < most for key, most in (singles | pairs).items()):
            counts.update([*singles, *pairs])
            chosen.append(triple)
    return frozenset(chosen)


def is_unseen(colour: str, shape: str, direction: str) -> bool:
    """Whether this combination is kept out of every raw file. Each colour, shape, direction and pair of them does occur."""
    return (colour, shape, direction) in unseen_triples()


def _balanced(triples: list[Triple], count: int, seed: int) -> list[Triple]:
    """`count` of `triples`, in a pseudo-random order that uses each word about equally often; all once before any twice."""
    used: collections.Counter[Any] = collections.Counter()
    chosen: list[Triple] = []
    for step in range(count):
        # A direction taken once too often weighs more than a shape: there are nine of one and four of the other.
        def cost(triple: Triple, step: int = step) -> tuple[int, float, int]:
            weights = zip(triple, (len(COLOURS), len(SHAPES), len(DIRECTIONS)), strict=True)
            return used[triple], sum(used[word] * kinds for word, kinds in weights), _draw("prompt", seed, step, *triple)

        triple = min(triples, key=cost)
        used.update([triple, *triple])
        chosen.append(triple)
    return chosen


def evaluation_prompts(seed: int) -> list[dict[str, Any]]:
    """The rows of `prompts.jsonl`: 48 seen and 48 unseen combinations, in turn. Most of the 27 unseen ones come twice."""
    kinds = [(True, [t for t in ALL_TRIPLES if not is_unseen(*t)]), (False, [t for t in ALL_TRIPLES if is_unseen(*t)])]
    drawn = [[(seen, triple) for triple in _balanced(triples, PROMPTS_OF_EACH_KIND, seed)] for seen, triples in kinds]
    return [
        {"prompt": short_caption(*triple), "colour": triple[0], "shape": triple[1], "direction": triple[2], "seen": seen}
        for pair in zip(*drawn, strict=True)
        for seen, triple in pair
    ]


# --- The plan: what is in which file -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShotPlan:
    """One shot before it is drawn: equal `number`, `triple` and `dark` draw equal shots."""

    number: int  # seeds everything random in the shot
    triple: Triple
    dark: bool  # whether the background is dark; shots that meet at a cut differ
    defect: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilePlan:
    """One raw file."""

    name: str
    shots: tuple[ShotPlan, ...]
    crf: int
    defect: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """The arguments that decide every byte."""

    clips: int  # shots in all files together
    seed: int = 0
    size: int = 96  # pixels a side
    fps: int = 12
    wander: float = 0.3  # frame widths: the side of the square in which paths have their middle

    def __post_init__(self) -> None:
        for name, low, high in (("clips", 20, 100_000), ("seed", 0, 2**31 - 1), ("size", 32, 512), ("fps", 1, 60), ("wander", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name} must be between {low} and {high}, not {getattr(self, name)}.")
        if self.size % 2:
            raise UserError(f"--size must be even, not {self.size}: H.264 stores colour at half the size.")


def _file_lengths(world: World) -> list[int]:
    """Numbers of shots of each file: three to six, the last ones so that their sum is `clips`."""
    rng = np.random.default_rng([world.seed, 1])
    lengths: list[int] = []
    left = world.clips
    while left > 8:
        lengths.append(int(rng.integers(3, 7)))
        left -= lengths[-1]
    return [*lengths, *([left] if left <= 6 else [left - left // 2, left // 2])]


def _spread(count: int, *, every: int, offset: int) -> set[int]:
    """At least one of `count` places, about one in `every`, evenly spread."""
    return set(range(offset % min(every, count), count, every))


def _triples_in_turn(world: World) -> list[Triple]:
    """One seen combination for each shot: all of them once, in a random order, then again in another."""
    seen = [triple for triple in ALL_TRIPLES if not is_unseen(*triple)]
    rng = np.random.default_rng([world.seed, 2])
    rounds = math.ceil(world.clips / len(seen))
    return [seen[k] for _ in range(rounds) for k in rng.permutation(len(seen))][: world.clips]


def _with_defects(shots: list[ShotPlan], spoiled: set[int], seed: int) -> list[ShotPlan]:
    """Gives some shots a defect; `spoiled` are the numbers of shots in files that are bad as a whole."""
    standing = [t for t in ALL_TRIPLES if t[2] == "standing" and not is_unseen(*t)]
    chosen = _spread(len(shots), every=DEFECT_EVERY, offset=_draw("defects", seed)) - spoiled
    bad = spoiled | chosen
    sound = [shot for shot in shots if shot.number not in bad]
    originals = {dark: [shot for shot in sound if shot.dark == dark] for dark in (True, False)}
    defective = list(shots)
    for turn, number in enumerate(sorted(chosen)):
        shot, defect = shots[number], SHOT_DEFECTS[turn % len(SHOT_DEFECTS)]
        draw = _draw("defect", seed, number)
        if defect == "no motion":
            shot = dataclasses.replace(shot, triple=standing[draw % len(standing)])
        if defect == "near-duplicate":
            shot = originals[shot.dark][draw % len(originals[shot.dark])]
        defective[number] = dataclasses.replace(shot, defect=defect)
    return defective


def plan_world(world: World) -> list[FilePlan]:
    """Every file of the world. Files that are no videos come on top of `clips`; shots in a truncated file count."""
    lengths = _file_lengths(world)
    truncated = _spread(len(lengths), every=BAD_FILE_EVERY, offset=_draw("truncated", world.seed))
    starts = list(itertools.accumulate(lengths, initial=0))
    triples = _triples_in_turn(world)
    shots = [
        ShotPlan(number=number, triple=triples[number], dark=(number - start + file) % 2 == 0)
        for file, (start, length) in enumerate(zip(starts, lengths, strict=False))
        for number in range(start, start + length)
    ]
    spoiled = {number for file in truncated for number in range(starts[file], starts[file + 1])}
    shots = _with_defects(shots, spoiled, world.seed)
    files = [
        FilePlan(
            name=f"shapes-{file:05d}",
            shots=tuple(shots[start : start + length]),
            crf=14 + _draw("crf", world.seed, file) % 7,
            defect="truncated" if file in truncated else None,
        )
        for file, (start, length) in enumerate(zip(starts, lengths, strict=False))
    ]
    extra = range(len(files), len(files) + math.ceil(len(lengths) / BAD_FILE_EVERY))
    return [*files, *(FilePlan(name=f"shapes-{file:05d}", shots=(), crf=0, defect="not a video") for file in extra)]


# --- One shot ------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shot:
    """One shot, drawn: lengths in frame widths, times in frames, colours in RGB."""

    triple: Triple
    num_frames: int
    speed: str  # "slow" or "fast"; also for a shape that stands, where it says nothing
    start: tuple[float, float]  # the shape's centre (x, y) in the first frame
    step: tuple[float, float]  # its motion per frame
    diameter: float
    camera: str
    camera_step: float  # widths per frame for a pan; factor over the whole shot for a zoom
    background: str  # "flat", "gradient" or "stripes"
    tones: tuple[tuple[float, float, float], tuple[float, float, float]]
    wave: tuple[float, float]  # waves per frame width along x and y
    phase: float
    defect: str | None


_PANS = {"pan left": (-1.0, 0.0), "pan right": (1.0, 0.0), "pan up": (0.0, -1.0), "pan down": (0.0, 1.0)}
_ZOOMS = ("zoom in", "zoom out")
_TINTS = {"blue-grey": (-0.6, 0.0, 1.0), "warm grey": (1.0, 0.25, -0.7), "green-grey": (-0.6, 0.8, -0.3), "rose-grey": (1.0, -0.5, 0.2)}


def _tones(rng: np.random.Generator, *, colour: str, dark: bool) -> tuple[Any, Any]:
    """Two background colours of low saturation, both at least 25 of 255 darker or brighter than the shape's `colour`.

    Without that distance in brightness a sharp shot would look blurred in black and white, where sharpness is measured.
    """
    if dark:
        middle, contrast, strength = rng.uniform(42, 57), rng.uniform(10, 13), rng.uniform(3, 5)
    else:
        middle = rng.uniform(140, 158) if colour == "yellow" else rng.uniform(194, 222)
        contrast, strength = rng.uniform(14, 20), rng.uniform(5, 9)
    tint = strength * np.asarray(list(_TINTS.values())[rng.integers(len(_TINTS))])
    return tuple(map(float, middle - contrast + tint)), tuple(map(float, middle + contrast + tint))


def _wave(rng: np.random.Generator, background: str, camera: str) -> tuple[float, float]:
    """The background's waves per frame width; under a pan they lie along it, since otherwise nobody could see it."""
    waves = rng.uniform(1.7, 2.3) if background == "stripes" else rng.uniform(0.42, 0.55)
    angle = rng.uniform(0, 2 * np.pi)
    if camera in _PANS:
        angle = math.atan2(_PANS[camera][1], _PANS[camera][0]) + rng.uniform(-0.7, 0.7)
    return waves * math.cos(angle), waves * math.sin(angle)


def _camera(rng: np.random.Generator, *, standing: bool) -> tuple[str, float]:
    """A camera label and its strength; a shape that stands has a camera that moves."""
    kind = rng.choice(["still", "pan", "zoom"], p=[0, 0.5, 0.5] if standing else [0.4, 0.35, 0.25])
    if kind == "still":
        return "static shot", 0.0
    if kind == "pan":
        return str(rng.choice(list(_PANS))), float(rng.uniform(0.013, 0.02))
    return str(rng.choice(_ZOOMS)), float(rng.uniform(1.28, 1.42))


def _backgrounds(camera: str, *, standing: bool) -> tuple[str, ...]:
    """Backgrounds that show what this camera does: no pan is seen on a flat one; alone in a shot, a pan needs stripes."""
    if camera in _PANS:
        return ("stripes",) if standing else ("gradient", "stripes")
    return ("gradient", "stripes") if standing and camera in _ZOOMS else ("flat", "gradient", "stripes")


def _path(rng: np.random.Generator, *, direction: str, fast: bool, num_frames: int, widest: float, wander: float) -> tuple[Any, Any]:
    """Start and step of a shape `widest` across that stays in view: the middle of its path is near the middle of the frame."""
    towards = np.asarray(DIRECTIONS[direction])
    pace = rng.uniform(0.0195, 0.022) if fast else rng.uniform(0.0098, 0.0118)
    room = 1.03 - widest  # A shape may leave the frame by 1.5 % of its width.
    most = room / max(float(np.abs(towards).max()), 0.5) / (num_frames - 1)
    step = towards * min(pace, most)
    spare = np.maximum(room - np.abs(step) * (num_frames - 1), 0)
    middle = 0.5 + rng.uniform(-0.5, 0.5, size=2) * np.minimum(spare, wander)
    start = middle - step * (num_frames - 1) / 2
    return tuple(map(float, start)), tuple(map(float, step))


def draw_shot(plan: ShotPlan, seed: int, *, wander: float = World.wander) -> Shot:
    """Everything about one shot, from its plan and the world's seed."""
    rng = np.random.default_rng([seed, 3, plan.number])
    direction = plan.triple[2]
    standing = direction == "standing"
    fast = bool(rng.random() < 0.5)
    num_frames = int(rng.integers(20, 24)) if fast and not standing else int(rng.integers(20, 29))
    camera, camera_step = _camera(rng, standing=standing)
    if plan.defect == "no motion":
        camera, camera_step = "static shot", 0.0
    background = str(rng.choice(_backgrounds(camera, standing=standing)))
    diameter = float(rng.uniform(0.35, 0.43))
    if camera in _ZOOMS:
        diameter = float(rng.uniform(0.33, 0.36))
    widest = diameter * (camera_step if camera in _ZOOMS else 1.0) * 1.05
    start, step = _path(rng, direction=direction, fast=fast, num_frames=num_frames, widest=widest, wander=wander)
    return Shot(
        triple=plan.triple,
        num_frames=num_frames,
        speed="fast" if fast else "slow",
        start=start,
        step=step,
        diameter=diameter,
        camera=camera,
        camera_step=camera_step,
        background=background,
        tones=_tones(rng, colour=plan.triple[0], dark=plan.dark),
        wave=_wave(rng, background, camera),
        phase=float(rng.uniform(0, 2 * np.pi)),
        defect=plan.defect,
    )


def _zoom(shot: Shot, frame: int) -> float:
    """How much larger than at its smallest the view is in a frame."""
    if shot.camera not in _ZOOMS:
        return 1.0
    done = frame / (shot.num_frames - 1)
    return 1 + (shot.camera_step - 1) * (done if shot.camera == "zoom in" else 1 - done)


def _background(shot: Shot, frame: int, height: int, width: int) -> np.ndarray:
    """The background of one frame: float32 [H, W, 3]."""
    side = min(height, width)
    if shot.background == "flat":
        return np.broadcast_to(np.mean(shot.tones, axis=0, dtype=np.float32), (height, width, 3))
    pan = np.asarray(_PANS.get(shot.camera, (0.0, 0.0))) * shot.camera_step * frame
    zoom = _zoom(shot, frame)
    x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / side / zoom + pan[0]) * shot.wave[0]
    y = ((np.arange(height, dtype=np.float32) + 0.5 - height / 2) / side / zoom + pan[1]) * shot.wave[1]
    mix = 0.5 + 0.5 * np.cos(2 * np.pi * (x[None, :] + y[:, None]) + shot.phase).astype(np.float32)
    first, second = np.array(shot.tones, np.float32)
    return first + mix[..., None] * (second - first)


def _render_frame(shot: Shot, frame: int, height: int, width: int) -> np.ndarray:
    """One frame: float32 [H, W, 3]."""
    side = min(height, width)
    x, y = (
        length / 2 + (start + step * frame - 0.5) * side for length, start, step in zip((width, height), shot.start, shot.step, strict=True)
    )
    mask = draw_mask(shot.triple[1], centre=(x, y), diameter=shot.diameter * _zoom(shot, frame) * side, size=(height, width))
    background = _background(shot, frame, height, width)
    return background + mask[..., None] * (np.array(COLOURS[shot.triple[0]], np.float32) - background)


def _write_large(frames: np.ndarray) -> None:
    """Writes large white letters with a black edge over float32 `frames` in place."""
    side = frames.shape[1]
    for frame in frames:
        for line, text in enumerate(("BIG", "SALE")):
            scale, thick = side / 96 * 1.15, max(1, round(side / 40))
            place = (round(side * 0.06), round(side * (0.42 + 0.42 * line)))
            for colour, extra in (((0, 0, 0), thick), ((255, 255, 255), 0)):
                cv2.putText(frame, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, thick + extra, cv2.LINE_AA)


def render_shot(shot: Shot, size: int) -> np.ndarray:
    """Draws a shot, its defect included: uint8 RGB [num_frames, size, size, 3]."""
    border = round(size * 0.14) if shot.defect == "black borders" else 0
    frames = np.zeros((shot.num_frames, size, size, 3), np.float32)
    for number, frame in enumerate(frames):
        frame[border : size - border] = _render_frame(shot, number, size - 2 * border, size)
    if shot.defect == "blur":
        frames = np.stack([cv2.GaussianBlur(frame, (0, 0), 0.055 * size) for frame in frames])
    if shot.defect == "near-duplicate":
        frames *= 1.03
    if shot.defect == "large text":
        _write_large(frames)
    return np.clip(np.round(frames), 0, 255).astype(np.uint8)


# --- Words about a shot ---------------------------------------------------------------------------------------------------------


def _background_words(shot: Shot) -> str:
    first = np.asarray(shot.tones[0])
    brightness = "dark" if first.mean() < 128 else "light"
    tint = first - first.mean()
    name = max(_TINTS, key=lambda name: float(tint @ (np.asarray(_TINTS[name]) - np.mean(_TINTS[name]))))
    kind = {"flat": "flat background", "gradient": "background with a soft gradient", "stripes": "background with wide soft stripes"}
    return f"a {brightness} {name} {kind[shot.background]}"


def _camera_words(camera: str) -> str:
    verb, _, where = camera.partition(" ")
    return "the camera stands still" if camera == "static shot" else f"the camera {verb}s {where}"


def caption_of(shot: Shot) -> dict[str, str]:
    """The structured caption of a shot, exact in every field."""
    colour, shape, direction = shot.triple
    size = "large" if shot.diameter >= 0.39 else "medium-sized"
    standing = direction == "standing"
    pace = {"slow": "slowly", "fast": "quickly"}[shot.speed]
    motion = "stands still" if standing else f"moves {pace} {direction}"
    background, camera = _background_words(shot), _camera_words(shot.camera)
    return {
        "short": short_caption(colour, shape, direction),
        "dense": f"A {size} {colour} {shape} {motion} in front of {background}, while {camera}.",
        "background": background,
        "style": "flat computer animation with simple geometric shapes",
        "shot_type": "medium shot",
        "lighting": "even light without shadows",
        "atmosphere": "lively" if shot.speed == "fast" and not standing else "calm",
        "camera_motion": camera,
    }


def _sidecar_shot(shot: Shot, first_frame: int, fps: int) -> dict[str, Any]:
    colour, shape, direction = shot.triple
    described = {
        "start_seconds": round(first_frame / fps, 6),
        "end_seconds": round((first_frame + shot.num_frames) / fps, 6),
        "camera": shot.camera,
        "caption": caption_of(shot),
        "truth": {"colour": colour, "shape": shape, "direction": direction, "speed": shot.speed},
    }
    return described | ({"defect": shot.defect} if shot.defect else {})


# --- Files ----------------------------------------------------------------------------------------------------------------------


def make_file(plan: FilePlan, world: World) -> tuple[bytes, dict[str, Any]]:
    """The bytes of NAME.mp4 and the sidecar of one file."""
    if plan.defect == "not a video":
        data = f"This is a text file called {plan.name}.mp4. It holds no video.\n".encode() * 40
        return data, {"shots": [], "defect": plan.defect, "bytes": len(data)}
    shots = [draw_shot(shot, world.seed, wander=world.wander) for shot in plan.shots]
    starts = itertools.accumulate((shot.num_frames for shot in shots), initial=0)
    frames = np.concatenate([render_shot(shot, world.size) for shot in shots])
    data = encode_mp4(frames, fps=world.fps, crf=plan.crf)
    if plan.defect == "truncated":
        data = data[: len(data) * 6 // 10]
    sidecar = {"shots": [_sidecar_shot(shot, start, world.fps) for shot, start in zip(shots, starts, strict=False)], "bytes": len(data)}
    return data, sidecar | ({"defect": plan.defect} if plan.defect else {})


def _is_whole(folder: Path, name: str) -> bool:
    """Whether a file and its sidecar are there; the sidecar is written last and says how long the file is."""
    try:
        return json.loads((folder / f"{name}.json").read_text())["bytes"] == (folder / f"{name}.mp4").stat().st_size
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _write_file(plan: FilePlan, world: World, folder: Path) -> int:
    """Makes one file if it is not there; returns its number of shots."""
    if not _is_whole(folder, plan.name):
        data, sidecar = make_file(plan, world)
        with replacing(folder / f"{plan.name}.mp4") as temporary:
            temporary.write_bytes(data)
        write_json(folder / f"{plan.name}.json", sidecar)
    return len(plan.shots)


def _claim(folder: Path, arguments: dict[str, int]) -> None:
    """Makes `folder` the home of this world. Raises `UserError` if it holds another one, or anything else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        raise UserError(f"No folder can be made at {folder} ({error.strerror}). Choose another one.") from error
    path = folder / "arguments.json"
    if not path.exists():
        if any(not entry.name.startswith((".", "arguments.json")) for entry in folder.iterdir()):
            raise UserError(f"{folder} holds files that are not of the shapes world. Choose an empty or a new folder.")
        write_json(path, arguments)
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}). Remove {folder} or choose another folder.") from error
    if found != arguments:
        made, came = (json.dumps(value, sort_keys=True) for value in (found, arguments))
        raise UserError(f"{folder} was made with {made}, and {came} came. Use the same arguments or another folder.")


def _count_defects(plans: list[FilePlan]) -> dict[str, int]:
    counts = collections.Counter(plan.defect for plan in plans) + collections.Counter(s.defect for plan in plans for s in plan.shots)
    return {defect: counts[defect] for defect in (*SHOT_DEFECTS, *FILE_DEFECTS)}


def write_world(world: World, folder: Path, *, workers: int) -> dict[str, Any]:
    """Writes the world into `folder`, or what is missing of it, and returns what `world.json` then says."""
    arguments = {"format": FORMAT, **dataclasses.asdict(world)}
    _claim(folder, arguments)
    plans = plan_world(world)
    missing = [plan for plan in plans if not _is_whole(folder, plan.name)]
    with tqdm(total=world.clips, initial=world.clips - sum(len(plan.shots) for plan in missing), unit="shot", desc="shapes world") as bar:
        for shots in _in_parallel(missing, world, folder, workers):
            bar.update(shots)
    rows = [json.dumps(row, sort_keys=True) + "\n" for row in evaluation_prompts(world.seed)]
    with replacing(folder / "prompts.jsonl") as temporary:
        temporary.write_text("".join(rows))
    summary = {"arguments": arguments, "files": len(plans), "shots": world.clips, "prompts": len(rows), "defects": _count_defects(plans)}
    write_json(folder / "world.json", summary)
    return summary


def _in_parallel(plans: list[FilePlan], world: World, folder: Path, workers: int) -> Any:
    """Writes the files, in any order, and yields each one's number of shots."""
    if workers == 1 or len(plans) < 8:
        yield from (_write_file(plan, world, folder) for plan in plans)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        waiting = [pool.submit(_write_file, plan, world, folder) for plan in plans]
        try:
            for done in concurrent.futures.as_completed(waiting):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_prep.shapes_world", description="Makes the shapes world's raw video files.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to; an unfinished one is completed")
    parser.add_argument("--clips", type=int, required=True, help="shots in all files together, 20 to 100000")
    parser.add_argument("--seed", type=int, default=World.seed)
    parser.add_argument("--size", type=int, default=World.size, help="pixels a side")
    parser.add_argument("--fps", type=int, default=World.fps)
    parser.add_argument(
        "--wander", type=float, default=World.wander, help="side of the square, in frame widths, where paths have their middle"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes; the result does not depend on it")
    return parser.parse_args(argv[1:])


def main(argv: list[str]) -> None:
    args = _parse(argv)
    if not 1 <= args.workers <= 256:
        raise UserError(f"--workers must be between 1 and 256, not {args.workers}.")
    world = World(clips=args.clips, seed=args.seed, size=args.size, fps=args.fps, wander=args.wander)
    print(f"shapes world: {world.clips} shots of {world.size} x {world.size} pixels into {args.output}")
    summary = write_world(world, args.output, workers=args.workers)
    defects = ", ".join(f"{count} {defect}" for defect, count in summary["defects"].items())
    print(f"shapes world: {summary['files']} files are there; made with defects on purpose: {defects}")


if __name__ == "__main__":
    run_command(main)
