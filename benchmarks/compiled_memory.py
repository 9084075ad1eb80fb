"""Compiled programs as they are read, against XLA's own account of them: schedule, live ranges, sums, names.

    python benchmarks/compiled_memory.py [--models gpt2 unet] [--targets cpu h100 v5e] [--size tiny] [--minutes 25]
    python benchmarks/compiled_memory.py --xprof .venv-xprof/bin/python

Each model's gradient is compiled as it is, under a plan, and in a whole step with Adam that gives its parameters and
its state away. The schedule and every live range must be those that XLA prints, live bytes and gaps the heap at every
step, the allocations what the compiler reports, and buffers without scope and line at most 5 % of the bytes at the
peak. With `--xprof` five programs' peaks must be those that XProf's memory viewer shows; it is installed into an
environment of its own (`make .venv-xprof/.installed`), for it is large and nothing else here needs it.

What passed under the same code is not run again. Returns 1 if something differs or is not finished.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "solvers"), str(_ROOT / "tests")]

import jax
import optax
from live_ranges import Told, peak_of_arrays, told
from rich.console import Console
from rich.table import Table
from zoo.catalogue import CATALOGUE

import jaxckpt
from benchmarks.store import OUT, Store, code_digest
from jaxckpt import _compat
from jaxckpt.units import short_bytes

_KINDS = ("plain", "planned", "step")
_MOST_UNATTRIBUTED = 0.05
# Programs of one sort each for XProf, which takes a second for each.
_VIEWED = ("gpt2", "gpt2-scan", "unet", "lstm", "moe")
# What runs under the other Python: peak and indefinite bytes of a description, by XProf.
_VIEWER = """
import json, os, shutil, sys, tempfile
from xprof.convert import raw_to_tool_data
with tempfile.TemporaryDirectory() as folder:
    shutil.copy(sys.argv[1], os.path.join(folder, "program.hlo_proto.pb"))
    trace = os.path.join(folder, "host.xplane.pb")
    open(trace, "wb").close()
    options = {"module_name": "program", "memory_space": "0"}
    raw, _ = raw_to_tool_data.xspace_to_tool_data([trace], "memory_viewer", options)
    shown = json.loads(raw)
    print(json.dumps([shown["peakHeapMib"] * 2**20, shown["indefiniteBufferAllocationMib"] * 2**20]))
"""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What is compiled of a model.

    Attributes:
        fun: a function of arrays.
        specs: its arguments.
        donated: which of them it gives away.
    """

    fun: Callable
    specs: tuple
    donated: tuple[int, ...] = ()


def program(name: str, kind: str, target: str | None, size: str | None) -> Program:
    """A model's gradient as it is or under a plan, or a whole step."""
    case = CATALOGUE[name].case(size)
    if kind == "plain":
        return Program(fun=jax.value_and_grad(case.fun), specs=case.specs)
    if kind == "planned":
        options: dict[str, Any] = {"max_cost": 1.2, "cost": "flops", "verify": False, "calibration": None}
        plan = jaxckpt.plan(case.fun, *case.specs, target=target, **options)
        return Program(fun=jax.value_and_grad(plan.apply(case.fun)), specs=case.specs)
    adam = optax.adam(1e-3)

    def step(params: Any, state: Any, *batch: Any) -> tuple[Any, ...]:
        value, grads = jax.value_and_grad(case.fun)(params, *batch)
        with jax.named_scope("optimizer"):
            updates, state = adam.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state, value

    state = jax.eval_shape(adam.init, case.specs[0])
    return Program(fun=step, specs=(case.specs[0], state, *case.specs[1:]), donated=(0, 1))


def read(name: str, kind: str, target: str, size: str | None) -> Told:
    """Compile a model's program and read it both ways."""
    chip = None if target == jax.default_backend() else target
    with tempfile.TemporaryDirectory(prefix="jaxckpt") as folder, jax.numpy_rank_promotion("allow"):
        found = program(name, kind, chip, size)
        return told(Path(folder), found.fun, found.specs, chip, found.donated)


def row(name: str, kind: str, target: str, size: str | None) -> dict[str, Any]:
    """What is printed of a program; what differs is in `error`."""
    started = time.perf_counter()
    found = read(name, kind, target, size)
    memory, error = found.memory, ""
    try:
        found.check(_MOST_UNATTRIBUTED)
    except AssertionError as failure:
        error = " ".join(str(failure).split())[:200] or "differs"
    peak = memory.peak_step
    bare = [band.size_bytes[peak] for band in memory.bands("scope") if band.label == "unattributed"]
    return {
        "steps": memory.num_steps,
        "ranges": len(found.ranges),
        "heap_bytes": memory.heap_bytes,
        "live_bytes": memory.live_bytes[peak],
        "gap_bytes": memory.gap_bytes[peak],
        "unattributed": sum(bare) / memory.totals.device_bytes,
        "seconds": time.perf_counter() - started,
        "error": error,
    }


def viewed(name: str, target: str, size: str | None, python: str) -> dict[str, Any]:
    """A program's peak as it is read and as XProf shows it; tables of addresses are not in XProf's."""
    found = read(name, "step", target, size)
    with tempfile.NamedTemporaryFile(suffix=".pb") as file:
        file.write(found.content)
        file.flush()
        done = subprocess.run([python, "-c", _VIEWER, file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"ours": 0, "xprof": 0, "error": f"XProf failed: {done.stderr.strip().splitlines()[-1][:200]}"}
    peak, indefinite = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = peak_of_arrays(found.memory), round(peak - indefinite)
    return {"ours": ours, "xprof": theirs, "error": "" if ours == theirs else "differs"}


def main() -> int:
    """Read what is due, print all of it."""
    parser = _parser()
    options = parser.parse_args()
    if options.xprof and not Path(options.xprof).exists():
        parser.error(f"there is no {options.xprof}; `make .venv-xprof/.installed` makes one with XProf")
    warnings.simplefilter("ignore")
    stop = time.monotonic() + 60 * options.minutes
    store, rows, left = Store(OUT / "compiled-memory.jsonl"), [], 0
    for target in options.targets:
        asked = [(n, "viewed") for n in _VIEWED] if options.xprof else [(n, k) for n in options.models for k in _KINDS]
        for name, kind in asked:
            if time.monotonic() > stop:
                left += 1
                continue
            rows.append({"model": name, "kind": kind, "target": target, **_kept(store, name, kind, target, options)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    Console(width=160).print(_table(rows))
    wrong = [row for row in rows if row["error"]]
    print(
        "PASS" if not wrong else "FAIL", f"{len(rows) - len(wrong)} of {len(rows)} programs are read as XLA tells them"
    )
    if left:
        print(f"not finished: {left} programs are left; run the same again")
    return 1 if wrong or left else 0


class _Wrong(Exception):
    """A row that differs: it is not kept, and made again by the next run."""


def _kept(store: Store, name: str, kind: str, target: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row; one that passed under the same code is not made again."""

    def make() -> dict[str, Any]:
        is_viewed = kind == "viewed"
        made = viewed(name, target, options.size, options.xprof) if is_viewed else row(name, kind, target, options.size)
        if made["error"]:
            raise _Wrong(made)
        return made

    try:
        return store.get((name, kind, target, options.size, code_digest(), _compat.JAX_VERSION), make)
    except _Wrong as wrong:
        return wrong.args[0]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("target", "model", "program", "steps", "ranges", "heap", "live", "gaps", "bare", "s", "")
    for each in rows:
        found = [each["target"], each["model"], each["kind"]]
        if each["kind"] == "viewed":
            found += ["", "", f"{each['xprof']:,} XProf", f"{each['ours']:,}", "", "", ""]
        else:
            found += [f"{each['steps']:,}", f"{each['ranges']:,}"]
            found += [short_bytes(each[name]) for name in ("heap_bytes", "live_bytes", "gap_bytes")]
            found += [f"{each['unattributed']:.1%}", f"{each['seconds']:.0f}"]
        table.add_row(*found, each["error"] or "as XLA tells")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = list(CATALOGUE)
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="MODEL", help=", ".join(names))
    parser.add_argument("--targets", nargs="+", default=["cpu"])
    parser.add_argument("--size", help="of the models; by default a realistic one")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then stop; the next run goes on")
    parser.add_argument("--xprof", metavar="PYTHON", help="compare peaks with XProf, which this Python has")
    return parser


if __name__ == "__main__":
    sys.exit(main())
