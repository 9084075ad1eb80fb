"""Programs as plain data: drawn from a seed, and made into functions.

A program is a dict that `json` can hold. Operations name what they read by how far back it is, so that one can be
dropped and the rest is a program still.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .constructs import CONSTRUCTS, Env

Spec = dict[str, Any]
# How far two results may differ, relative to the largest element, by the digits of the lowest precision inside.
_TOLERANCES = ((1.5, 1e-1), (3, 3e-2), (7, 1e-3), (16, 1e-8))
TRANSFORMS = ("none", "none", "none", "grad of vmap", "vmap of grad")
OUTPUTS = ("scalar", "aux", "vector")
SOLVERS = ("auto",) * 6 + ("chain", "chen", "revolve", "lower_sets")
TARGETS = (None,) * 8 + ("h100", "v5e")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A program as a function.

    Attributes:
        fun: of `args`.
        args: arrays.
        has_aux: as in `jax.grad`.
        argnums: what is differentiated.
        is_vector: the result is an array, and its cotangent an argument.
        batched: gradients are taken inside `vmap`, over all arguments but the first.
        tolerance: relative to the largest element.
        has_effects: it calls back.
        has_forward: it has a derivative in forward mode.
    """

    fun: Callable
    args: tuple
    has_aux: bool
    argnums: Any
    is_vector: bool
    batched: bool
    tolerance: float
    has_effects: bool
    has_forward: bool


def draw(seed: int, least: int = 5, most: int = 60) -> Spec:
    """A program, the same for the same seed."""
    rng = random.Random(seed)
    names = [name for name, c in CONSTRUCTS.items() for _ in range(c.weight)]
    transform = rng.choice(TRANSFORMS)
    if transform != "none":
        names = [name for name in names if not CONSTRUCTS[name].no_vmap]
    # As many short ones as long ones.
    size = round(least * (most / least) ** rng.random())
    # A precision that hides what doubles show is in one program of three.
    if rng.random() < 0.67:
        names = [name for name in names if CONSTRUCTS[name].digits > 10 or name == "scan"]
    return {
        "seed": seed,
        "rows": rng.choice((8, 32, 128)),
        "width": rng.choice((4, 6)),
        "num_weights": rng.choice((1, 2, 5)),
        "transform": transform,
        "output": "scalar" if transform == "vmap of grad" else rng.choice(OUTPUTS),
        "argnums": rng.choice((0, 0, (0, 1))),
        "ops": [_operation(rng, rng.choice(names)) for _ in range(size)],
        "plans": _plans(rng, transform),
    }


def _operation(rng: random.Random, name: str) -> list:
    params = {key: rng.choice(values) for key, values in CONSTRUCTS[name].choices.items()}
    if name == "scan" and params["body"] == "low" and rng.random() < 0.8:
        params["body"] = "plain"
    # Mostly what came last.
    back = [0 if rng.random() < 0.8 else rng.randint(1, 6), rng.randint(0, 4)]
    return [name, params, *back]


def _plans(rng: random.Random, transform: str) -> list[dict[str, Any]]:
    """Three budgets of one search, so that it is analysed once."""
    target = rng.choice(TARGETS)
    search = {
        "cost": rng.choice(("time", "flops")),
        "solver": rng.choice(SOLVERS),
        "target": target,
        # What is not here cannot be measured; the gradient of one example is planned under names that only it has.
        "verify": target is None and transform != "vmap of grad" and rng.random() < 0.8,
        "keep_checkpoints": rng.random() < 0.7,
        # All that a search may compile is seldom needed, and most of a program's time.
        "max_compiles": rng.choice((2, 3, 3, None)),
    }
    hows = ("auto_remat",) if transform == "vmap of grad" else ("apply", "apply", "file", "auto_remat")
    return [{"budget": budget, "how": rng.choice(hows), **search} for budget in ("high", "middle", "least")]


def digits(spec: Spec) -> float:
    """Of the lowest precision in a program."""
    found = [CONSTRUCTS[name].digits for name, params, *_ in spec["ops"] if params.get("body", "low") == "low"]
    return min(found, default=15)


def build(spec: Spec, *, by_hand: bool = False) -> Case:
    """Make a program.

    Args:
        spec: from `draw`, or smaller.
        by_hand: put every few operations into a `jax.checkpoint`.
    """
    rng = np.random.default_rng(spec["seed"])
    rows, width, num = spec["rows"], spec["width"], spec["num_weights"]
    weights = [rng.normal(size=(width, width)) / width**0.5 for _ in range(num)]
    mapped, low = spec["transform"] != "none", digits(spec) < 10
    shape = (2, rows, width) if mapped else (rows, width)
    x = jnp.asarray(rng.normal(size=shape))
    ints = jnp.asarray(rng.integers(0, 50, size=shape[:-1]), jnp.int32)
    args = ({"w": list(map(jnp.asarray, weights)), "unused": jnp.ones((3,))}, x, ints, jax.random.key(spec["seed"]))

    def run(parameters: Any, x: Any, ints: Any, key: Any) -> tuple[list[Any], list[Any]]:
        def segment(ops: list, pool: list, parameters: Any, ints: Any, key: Any, probe: Any) -> Any:
            axis = "examples" if mapped else None
            env = Env(weights=parameters["w"], ints=ints, key=key, probe=probe, axis=axis, extra=[])
            pool = list(pool)
            for name, params, first, second in ops:
                inputs = (pool[-1 - first % len(pool)], pool[-1 - second % len(pool)])
                pool.append(CONSTRUCTS[name].run(env, params, *inputs))
            return pool[-7:], env.extra

        pool, extra = [x], []
        for ops in _segments(spec["ops"]) if by_hand else [spec["ops"]]:
            wrap = jax.checkpoint if by_hand and not _has_effects(ops) else lambda f: f
            inside = wrap(lambda *args, ops=ops: segment(ops, *args))
            pool, more = inside(pool, parameters, ints, key, x if low else None)
            extra += more
        return pool, extra

    def loss(*args: Any) -> Any:
        pool, extra = run(*args)
        total = jnp.mean(pool[-1] ** 2) + 0.1 * sum(jnp.mean(jnp.tanh(v)) for v in pool[:-1])
        aux = {"extra": extra, "value": pool[-1], "same": pool[-1], "number": 2}
        return {"scalar": total, "aux": (total, aux), "vector": pool[-1]}[spec["output"]]

    def fun(parameters: Any, x: Any, ints: Any, key: Any) -> Any:
        if spec["transform"] != "grad of vmap":
            return loss(parameters, x, ints, key)
        found = jax.vmap(loss, (None, 0, 0, None), axis_name="examples")(parameters, x, ints, key)
        return (found[0].mean(), found[1]) if spec["output"] == "aux" else found.mean(0)

    argnums = spec["argnums"]
    return Case(
        fun=fun,
        args=args,
        has_aux=spec["output"] == "aux",
        argnums=argnums if isinstance(argnums, int) else tuple(argnums),
        is_vector=spec["output"] == "vector",
        batched=spec["transform"] == "vmap of grad",
        tolerance=next(t for most, t in _TOLERANCES if digits(spec) < most),
        has_effects=_has_effects(spec["ops"]),
        has_forward=not any(CONSTRUCTS[name].no_forward for name, *_ in spec["ops"]),
    )


def _has_effects(ops: list) -> bool:
    return any(CONSTRUCTS[name].has_effects for name, *_ in ops)


def _segments(ops: list) -> list[list]:
    step = max(2, round(len(ops) ** 0.5))
    return [ops[i : i + step] for i in range(0, len(ops), step)] or [[]]
