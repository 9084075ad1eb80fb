"""Plan random programs and compare them, from one seed to another.

    python -m tests.fuzz.run --programs 2000 [--first 0] [--jobs 2] [--minutes 30] [--out benchmarks/out/fuzz]

A row for each program is kept in a file for this code, so a run goes on where the last one stopped, and the table is of
all rows that there are. Failures are made small and printed as programs for `tests/test_fuzz.py`. Returns 1 if a
program failed or the range was not finished.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import pprint
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(_ROOT), str(_ROOT / "solvers")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from rich.console import Console
from rich.table import Table

from tests.fuzz.counting import RULES
from tests.fuzz.programs import draw
from tests.fuzz.reducing import reduced
from tests.fuzz.trying import ORACLES, tried

# Longer than any program has taken by far.
_LIMIT_S = 300
# After so many a process makes way for a new one, so that what JAX remembers does not add up.
_PROGRAMS_PER_PROCESS = 25


def main() -> int:
    """Run what is missing, print the table of all there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=None, help="stop after so many; the next run goes on")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "out" / "fuzz")
    parser.add_argument("--no-reduce", action="store_true", help="leave failures as large as they are")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / f"{code_digest()}.jsonl"
    wanted = range(options.first, options.first + options.programs)
    done = {row["seed"] for row in rows_of(kept)}
    missing = [seed for seed in wanted if seed not in done]
    stop = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    with kept.open("a") as file:
        for row in _rows(missing, options.jobs, stop, not options.no_reduce):
            file.write(json.dumps(row) + "\n")
            file.flush()
            for failure in row["failures"]:
                print(f"seed {row['seed']}: {failure['oracle']}: {failure['text'][:300]}", file=sys.stderr)
    rows = [row for row in rows_of(kept) if row["seed"] in wanted]
    show(rows, len(wanted), kept)
    return 1 if len(rows) < len(wanted) or any(row["failures"] for row in rows) else 0


def code_digest() -> str:
    """Of all code that decides what a row says, and of JAX's version."""
    files = [f for folder in ("jaxckpt", "solvers", "tests/fuzz") for f in sorted((_ROOT / folder).rglob("*.py"))]
    found = hashlib.sha256(jax.__version__.encode())
    for file in files:
        found.update(str(file.relative_to(_ROOT)).encode() + file.read_bytes())
    return found.hexdigest()[:16]


def rows_of(kept: Path) -> list[dict[str, Any]]:
    """The rows of a file, one for each seed; a line that was cut off is none."""
    rows = {}
    for line in kept.read_text().splitlines() if kept.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows[row["seed"]] = row
    return list(rows.values())


def _rows(seeds: list[int], jobs: int, stop: float | None, reduces: bool) -> Iterator[dict[str, Any]]:
    """A row for each seed, in processes of their own, until the time is up."""
    batches = [seeds[i : i + _PROGRAMS_PER_PROCESS] for i in range(0, len(seeds), _PROGRAMS_PER_PROCESS)]
    spawn = multiprocessing.get_context("spawn")
    with multiprocessing.Manager() as manager, concurrent.futures.ThreadPoolExecutor(jobs) as threads:
        queue = manager.Queue()
        pending = [threads.submit(_in_process, spawn, batch, queue, stop, reduces) for batch in batches]
        while pending or not queue.empty():
            while not queue.empty():
                yield queue.get()
            pending = [p for p in pending if not p.done() or p.result()]
            time.sleep(0.1)


def _in_process(spawn: Any, batch: list[int], queue: Any, stop: float | None, reduces: bool) -> None:
    """Run a batch; a program that ends its process is a failure, and the next process goes on behind it."""
    left = list(batch)
    while left and (stop is None or time.monotonic() < stop):
        at = spawn.Value("i", 0)
        process = spawn.Process(target=_worker, args=(left, queue, at, stop, reduces))
        process.start()
        process.join()
        if process.exitcode == 0:
            return
        seed = left[at.value]
        failure = {"oracle": "crash", "text": f"its process ended with {process.exitcode}"}
        queue.put({"seed": seed, "failures": [failure], "counts": {}, "oracles": {}, "seconds": 0.0})
        left = left[at.value + 1 :]


def _worker(seeds: list[int], queue: Any, at: Any, stop: float | None, reduces: bool) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    signal.signal(signal.SIGALRM, _too_long)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for i, seed in enumerate(seeds):
            # The clock is the same for all processes of this machine.
            if stop is not None and time.monotonic() > stop:
                return
            at.value = i
            queue.put(_row(seed, reduces))


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {_LIMIT_S} s")


def _row(seed: int, reduces: bool) -> dict[str, Any]:
    spec, started = draw(seed), time.perf_counter()
    signal.alarm(_LIMIT_S)
    try:
        row = tried(spec)
    finally:
        signal.alarm(0)
    row["seconds"] = time.perf_counter() - started
    if row["failures"] and reduces:
        row["failures"][0]["spec"] = reduced(spec, row["failures"][0])
    return row


def show(rows: list[dict[str, Any]], num_wanted: int, kept: Path) -> None:
    """Print counts, and each failure as a program."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    failed = [row for row in rows if row["failures"]]
    console = Console(width=130)
    for row in failed:
        for failure in row["failures"]:
            console.print(f"seed {row['seed']}, {failure['oracle']}: {failure['text']}", markup=False, highlight=False)
            if "spec" in failure:
                console.print(
                    pprint.pformat(failure["spec"], width=110, sort_dicts=False), markup=False, highlight=False
                )
    counts: Counter = Counter()
    for row in rows:
        counts.update(row["counts"])
    oracles = {name: [sum(row["oracles"].get(name, 0) for row in rows), 0] for name in ORACLES}
    for row in failed:
        for failure in row["failures"]:
            oracles.setdefault(failure["oracle"], [0, 0])[1] += 1
    table = Table(
        "oracle", "comparisons", "failures", title=f"{len(rows)} of {num_wanted} programs, jax {jax.__version__}"
    )
    for name, numbers in oracles.items():
        table.add_row(name, *map(str, numbers))
    console.print(table)
    names = sorted({*RULES, *counts})
    few = [name for name in names if counts[name] < 20]
    table = Table("exercised", "times", "exercised ", "times ", title="how often")
    half = -(-len(names) // 2)
    cells = [(name, str(counts[name])) for name in names] + [("", "")]
    for i in range(half):
        table.add_row(*cells[i], *cells[min(half + i, len(cells) - 1)])
    console.print(table)
    print(f"fewer than 20 times: {', '.join(few) or 'nothing'}")
    seconds = sum(row["seconds"] for row in rows)
    print(f"{len(rows) - len(failed)} of {len(rows)} programs hold ({num_wanted} wanted), {seconds:.0f} s of work")
    print(f"commit {commit.stdout.strip()}, rows in {kept}")


if __name__ == "__main__":
    sys.exit(main())
