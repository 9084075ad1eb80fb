"""Scanned models with and without the host's memory: least peaks, budgets between, and what the compilers measure.

    python benchmarks/offload.py [--targets h100 v5e] [--models llama vit] [--host 64GB] [--budgets 3] [--json FILE]

Each model is planned for its least peak without and with `host_budget`, and at budgets between the two. Every number
of bytes is the target's compiler's; extra time is modelled, of the unplanned step's.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "solvers"), str(ROOT / "tests")]

from zoo import llama

import jaxckpt
from jaxckpt.units import short_bytes

_HEADS, _WIDTH, _PATCH = 6, 384, 16


def llama_scan(layers: int, rows: int = 8, tokens: int = 2048) -> tuple[Callable, tuple]:
    """A scanned Llama-style decoder of the zoo at a longer sequence: there is something to send."""
    config = replace(llama.SIZES["base"], num_layers=layers, batch=rows, num_tokens=tokens, vocab=256, scanned=True)
    return llama.make_loss(config), llama.specs(config)


def vit_scan(layers: int = 12, rows: int = 64, side: int = 224) -> tuple[Callable, tuple]:
    """A scanned vision transformer of ViT-S/16's sizes."""
    num, features = (side // _PATCH) ** 2, 3 * _PATCH**2

    def norm(x: Any) -> Any:
        return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)

    def layer(x: Any, p: dict[str, Any]) -> tuple[Any, None]:
        q, k, v = jnp.moveaxis((norm(x) @ p["qkv"]).reshape(*x.shape[:2], 3, _HEADS, -1), 2, 0)
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / (_WIDTH // _HEADS) ** 0.5)
        x = x + jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(x.shape) @ p["out"]
        return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"], None

    def loss(params: dict[str, Any], patches: Any, labels: Any) -> Any:
        x = patches @ params["embed"] + params["place"]
        x, _ = lax.scan(layer, x, params["layers"])
        logits = norm(x).mean(1) @ params["head"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    spec = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    w = _WIDTH
    sizes = {"qkv": (w, 3 * w), "out": (w, w), "up": (w, 4 * w), "down": (4 * w, w)}
    params = {
        "embed": spec(features, w),
        "place": spec(num, w),
        "head": spec(w, 1000),
        "layers": {name: spec(layers, *size) for name, size in sizes.items()},
    }
    return loss, (params, spec(rows, num, features), jax.ShapeDtypeStruct((rows,), jnp.int32))


MODELS: dict[str, Callable[[], tuple[Callable, tuple]]] = {
    "llama": lambda: llama_scan(12),
    "llama-64": lambda: llama_scan(64),
    "vit": vit_scan,
}


def row(name: str, target: str, host: str | None, budget: int) -> dict[str, Any]:
    """One plan: what it measures, and what it costs."""
    fun, args = MODELS[name]()
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = jaxckpt.plan(
            fun, *args, budget=budget, target=target, host_budget=host, on_infeasible="least", calibration=None
        )
    return {
        "model": name,
        "target": target,
        "host_budget": host,
        "budget": budget,
        "device": plan.peak_bytes,
        "fits": plan.peak_bytes <= budget,
        "host": plan.measured_host_bytes,
        "predicted_host": plan.predicted_host_bytes,
        "unplanned": plan.unplanned_peak_bytes,
        "parameters": plan.parameter_bytes,
        "extra": plan.recompute_cost / plan.unplanned_cost,
        "idle": plan.idle_time / plan.unplanned_cost,
        "compiles": plan.num_compiles,
        "worse": plan.num_worse_on_host,
        "seconds": round(time.perf_counter() - started, 1),
    }


def show(found: dict[str, Any]) -> str:
    """A line of the table."""
    host = "-" if found["host"] is None else short_bytes(found["host"])
    return (
        f"| {found['model']} | {found['target']} | {found['host_budget'] or '-'} | {short_bytes(found['budget'])} | "
        f"{short_bytes(found['device'])} | {host} | {found['extra']:.1%} | {found['idle']:.1%} | {found['compiles']} |"
    )


def main() -> int:
    """Print the table, and return 1 if a budget between the two least peaks is not kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["h100", "v5e"])
    parser.add_argument("--models", nargs="+", default=["llama", "vit"], choices=MODELS)
    parser.add_argument("--host", default="64GB")
    parser.add_argument("--budgets", type=int, default=3, help="how many between the two least peaks")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print("| model | target | host budget | budget | device | host | extra time | idle | compiles |", flush=True)
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    rows = []

    def add(*what: Any) -> dict[str, Any]:
        rows.append(row(*what))
        print(show(rows[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
        return rows[-1]

    is_kept = True
    for target in options.targets:
        for name in options.models:
            least = [add(name, target, host, 1)["device"] for host in (None, options.host)]
            for i in range(options.budgets):
                budget = least[1] + (least[0] - least[1]) * (i + 1) // options.budgets
                is_kept &= add(name, target, options.host, budget)["fits"]
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
