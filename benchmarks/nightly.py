"""The long checks, in parts of at most half an hour; what passed at this commit is not run again.

    python benchmarks/nightly.py [PART ...] [--again]

Parts are named below. Each leaves a file with its date, commit, outcome and output in `benchmarks/out/nightly/`.
Without a name those run that have not passed at this commit, one after the other. Returns 1 if one of them did not
pass.
"""

import argparse
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

_ROOT = Path(__file__).parents[1]
_OUT = _ROOT / "benchmarks" / "out" / "nightly"
_LIMIT_S = 30 * 60
_FUZZ_PROGRAMS, _FUZZ_RANGES = 2000, 20
# Chips whose compilers run anywhere; `make test-targets` installs them into an environment of their own.
_TARGETS = ("h100", "v5e")
# Of the slow tests' output as much is kept as says what failed.
_MOST_OUTPUT = 20_000
# Files whose slow tests are parts of their own.
_APART = {
    "mutations": ("tests/test_plan_file.py", "tests/test_calibration.py"),
    "kills": ("tests/test_cache_files.py",),
    "leaks": ("tests/test_leaks.py",),
    "models": ("tests/test_zoo.py", "tests/test_gpt2.py", "tests/test_examples.py", "tests/test_measured.py"),
    "transforms": ("tests/test_transforms.py",),
    "optima": ("tests/solvers/test_optima.py",),
    "long": ("tests/test_long.py",),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a part went.

    Attributes:
        part: its name.
        date: when it ended, UTC.
        commit: of the code, with "+" where files differ from it.
        outcome: "passed", "failed", or "too long".
        seconds: it took.
        command: what ran.
        output: the end of what it printed.
    """

    part: str
    date: str
    commit: str
    outcome: str
    seconds: float
    command: list[str]
    output: str


def parts() -> dict[str, list[str]]:
    """Of each part the command."""
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "slow", "-p", "no:cacheprovider"]
    apart = {file for files in _APART.values() for file in files}
    others = [f"--ignore={file}" for file in sorted(apart)]
    found = {name: [*tests, *files] for name, files in _APART.items()}
    found["slow-tests"] = [*tests, "tests", *others]
    fidelity = [sys.executable, "benchmarks/fidelity.py", "--minutes", "28"]
    found["fidelity"] = [*fidelity, "--verified"]
    for target in _TARGETS:
        found[f"fidelity-{target}"] = [_with_compilers(), *fidelity[1:], "--targets", target, "--budgets", "10"]
    reading = ["benchmarks/compiled_memory.py", "--minutes", "20"]
    for target in ("cpu", *_TARGETS):
        python = sys.executable if target == "cpu" else _with_compilers()
        # A GPU's assembler takes its time; what is tiny a TPU keeps on its chip.
        command = [python, *reading, "--targets", target, *(["--size", "tiny"] if target == "h100" else [])]
        xprof = ["--xprof", str(_ROOT / ".venv-xprof" / "bin" / "python")]
        found |= {f"memory-{target}": command, f"memory-xprof-{target}": [*command, *xprof]}
    each = _FUZZ_PROGRAMS // _FUZZ_RANGES
    for i in range(_FUZZ_RANGES):
        seeds = ["--first", str(i * each), "--programs", str(each), "--minutes", "25"]
        found[f"fuzz-{i:02}"] = [sys.executable, "-m", "tests.fuzz.run", *seeds]
    return found


def _with_compilers() -> str:
    """The Python that has the chips' compilers, where `make test-targets` made one."""
    found = _ROOT / ".venv-targets" / "bin" / "python"
    return str(found) if found.exists() else sys.executable


def main() -> int:
    """Run the parts that are due, and print what there is of all of them."""
    commands = parts()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="*", metavar="PART", help=f"of {', '.join(commands)}")
    parser.add_argument("--again", action="store_true", help="also what has passed at this commit")
    options = parser.parse_args()
    if unknown := [name for name in options.part if name not in commands]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(commands)}")
    names = options.part or list(commands)
    commit = commit_here()
    for name in names:
        kept = _kept(name)
        if kept is None or kept.commit != commit or kept.outcome != "passed" or options.again:
            print(f"{name}: {' '.join(commands[name])}", file=sys.stderr)
            keep(run(name, commands[name], commit))
    outcomes = [_kept(name) for name in names]
    show(names, outcomes, commit)
    return 0 if all(one is not None and one.outcome == "passed" and one.commit == commit for one in outcomes) else 1


def commit_here() -> str:
    """The commit, with "+" where files differ from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")


def run(part: str, command: list[str], commit: str, limit_s: float = _LIMIT_S) -> Outcome:
    """Run a part in a process group of its own, which ends with it."""
    path = os.pathsep.join([str(_ROOT), str(_ROOT / "solvers")])
    env = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": path}
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=_ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        outcome = "failed" if process.returncode else "passed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, outcome = process.communicate()[0], "too long"
    return Outcome(
        part=part,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=commit,
        outcome=outcome,
        seconds=round(time.monotonic() - started, 1),
        command=command,
        output=output[-_MOST_OUTPUT:],
    )


def keep(outcome: Outcome) -> None:
    """Write an outcome beside those of other commits."""
    _OUT.mkdir(parents=True, exist_ok=True)
    stamp = outcome.date.replace(":", "").replace("+0000", "")
    (_OUT / f"{outcome.part}.{stamp}.json").write_text(json.dumps(dataclasses.asdict(outcome), indent=1) + "\n")


def _kept(part: str) -> Outcome | None:
    """The latest outcome of a part."""
    found = [Outcome(**json.loads(file.read_text())) for file in _files(part)]
    return max(found, key=lambda one: one.date, default=None)


def _files(part: str) -> Iterator[Path]:
    return _OUT.glob(f"{part}.*.json")


def show(names: list[str], outcomes: list[Outcome | None], commit: str) -> None:
    """Print a table, and the end of what failed."""
    table = Table("part", "outcome", "minutes", "commit", "date", title=f"nightly at {commit}")
    for name, one in zip(names, outcomes, strict=True):
        if one is None:
            table.add_row(name, "never run", "", "", "")
        else:
            table.add_row(name, one.outcome, f"{one.seconds / 60:.1f}", one.commit, one.date)
    for one in outcomes:
        if one is not None and one.outcome != "passed":
            print(f"--- {one.part}: {one.outcome}\n{one.output[-2000:]}")
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(main())
