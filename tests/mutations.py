"""Damages files of JSON at random, from a seed: bytes, values, and, in valid JSON of a valid schema, meaning."""

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from jaxckpt.compilation.files import content_digest

JUNK: list[Callable[[random.Random], Any]] = [
    lambda r: None,
    lambda r: r.choice([True, False]),
    lambda r: -r.randint(1, 9),
    lambda r: r.randint(0, 40),
    lambda r: 10 ** r.randint(3, 60),
    lambda r: r.uniform(-2, 2),
    lambda r: 1e308,
    lambda r: r.choice(["", "0", "plain", "a" * 1000, "\ud800", "ä" * 10]),
    lambda r: [],
    lambda r: [[]],
    lambda r: {},
    lambda r: {"kind": r.choice(["scan", "cond", "plain", "none", 3])},
    lambda r: {"recompute": [[0, 0]]},
]


def signed(data: Any) -> Any:
    """The object with its digest made right."""
    return {**data, "digest": content_digest(data)} if isinstance(data, dict) else data


def bytes_damaged(content: bytes, rng: random.Random) -> bytes:
    """A few bytes are changed, gone, added or repeated."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice([1, 1, 2, 8, 100]))
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 64]))
        elif kind == 3:
            data[at:at] = data[at:end] * rng.choice([1, 50])
        elif kind == 4:
            del data[at:]
        else:
            digits = [i for i, b in enumerate(data) if 48 <= b < 58]
            if digits:
                data[rng.choice(digits)] = 48 + rng.randrange(10)
    return bytes(data)


def value_damaged(data: Any, rng: random.Random) -> Any:
    """A value somewhere is replaced, gone, doubled or swapped with its neighbour."""
    data = copy.deepcopy(data)
    holder, key = rng.choice(list(_places(data)))
    kind = rng.randrange(4)
    if kind == 0 or (kind > 1 and not isinstance(holder, list)):
        holder[key] = rng.choice(JUNK)(rng)
    elif kind == 1:
        del holder[key]
    elif kind == 2:
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[key], holder[key - 1] = holder[key - 1], holder[key]
    return data


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    for key in data if isinstance(data, dict) else range(len(data)):
        yield data, key
        if isinstance(data[key], dict | list):
            yield from _places(data[key])


def meaning_damaged(data: Any, rng: random.Random) -> Any:
    """Lengths, covers, positions or saves are others, in valid JSON of a valid schema."""
    data = copy.deepcopy(data)
    trees = list(_trees(data))
    damage = [_positions, _covers, _saves, _schedule] + [_lengths] * any("lengths" in tree for tree in trees)
    rng.choice(damage)(trees, rng)
    return data


def _trees(data: dict) -> Iterator[dict]:
    """The plan and the plans inside it."""
    yield data
    for save in data.get("block_saves", data.get("saved", [])):
        for inner in save.get("parts", save.get("branches", [])) if isinstance(save, dict) else ():
            yield from _trees(inner)


def _saves_of(tree: dict) -> list:
    return tree["block_saves"] if "block_saves" in tree else tree["saved"]


def _lengths(trees: list[dict], rng: random.Random) -> None:
    parts = rng.choice([tree for tree in trees if "lengths" in tree])
    lengths = parts["lengths"]
    i = rng.randrange(len(lengths))
    kind = rng.randrange(5)
    if kind == 0:
        lengths[i] = max(1, lengths[i] + rng.choice([-1, 1, 2, 10]))
    elif kind == 1:
        lengths[i] = int(str(lengths[i])[:-1] or 1) or 1
    elif kind == 2:
        lengths.append(2)
    elif kind == 3:
        lengths[:] = [math.prod(lengths)]
        parts["num_states"] = rng.randint(1, 9)
    else:
        lengths.insert(i, 1)


def _positions(trees: list[dict], rng: random.Random) -> None:
    blocks = rng.choice(trees)["blocks"]
    a, b = rng.randrange(len(blocks)), rng.randrange(len(blocks))
    i, kind = rng.randrange(len(blocks[a])), rng.randrange(4)
    if kind == 0:
        blocks[a], blocks[b] = blocks[b], blocks[a]
    elif kind == 1:
        blocks[a][i] = rng.randrange(200)
    elif kind == 2:
        blocks[b].append(blocks[a][i])
    else:
        rng.shuffle(blocks[a])


def _covers(trees: list[dict], rng: random.Random) -> None:
    tree = rng.choice(trees)
    i, saves = rng.randrange(len(tree["blocks"])), _saves_of(tree)
    if rng.random() < 0.5:
        del tree["blocks"][i], saves[i]
        if "block_labels" in tree:
            del tree["block_labels"][i]
        tree["schedule"] = [[k, 0] for k in range(len(saves))]
    elif i:
        tree["blocks"][i - 1 : i + 1] = [tree["blocks"][i - 1] + tree["blocks"][i]]
        del saves[i]
        if "block_labels" in tree:
            del tree["block_labels"][i]
        tree["schedule"] = [[k, 0] for k in range(len(saves))]


def _saves(trees: list[dict], rng: random.Random) -> None:
    saves = _saves_of(rng.choice(trees))
    i = rng.randrange(len(saves))
    kind = rng.randrange(4)
    if kind == 0:
        saves[i] = None
    elif kind == 1:
        saves[i] = []
    elif kind == 2 or not isinstance(saves[i], list):
        saves[i] = [rng.randrange(200) for _ in range(rng.randint(1, 3))]
    else:
        saves[i] = saves[i][1:] or [rng.randrange(200)]


def _schedule(trees: list[dict], rng: random.Random) -> None:
    tree = rng.choice(trees)
    nodes = tree["schedule"]
    a = rng.randrange(len(nodes))
    b = rng.randint(a + 1, len(nodes))
    kind = rng.randrange(3)
    if kind == 0:
        nodes[a:b] = [{"recompute": nodes[a:b]}]
    elif kind == 1:
        tree["schedule"] = [[k, 0] for k in range(len(tree["blocks"]))]
    else:
        del nodes[a]


def damaged(content: bytes, rng: random.Random, meaning: Callable[[Any, random.Random], Any]) -> bytes:
    """One mutation: half of them with their digest made right, and half of those of meaning."""
    kind = rng.randrange(4)
    data = json.loads(content)
    if kind == 0:
        return bytes_damaged(content, rng)
    changed = meaning(data, rng) if kind == 3 else value_damaged(data, rng)
    if kind > 1:
        changed = signed(changed)
    return json.dumps(changed, indent=1).encode()
