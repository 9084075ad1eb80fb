"""What the framework examples share: scikit-learn's digits, and training twice, with and without a plan."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

if not __package__:  # run as a file: make the repository importable
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "solvers")]

import jaxckpt

BATCH = 512


def batches(num_steps: int, size: int = BATCH) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield images, float32 `[size, 64]` from 0 to 1, and labels, int32 `[size]`; the same ones every time."""
    from sklearn.datasets import load_digits

    data: Any = load_digits(return_X_y=True)
    for i in range(num_steps):
        chosen = np.random.default_rng(i).integers(0, len(data[0]), size)
        yield data[0][chosen].astype(np.float32) / 16, data[1][chosen].astype(np.int32)


def compare(train: Callable[[Callable, int], list[float]], budget: str, num_steps: int) -> float:
    """Train twice and print both curves.

    Args:
        train: takes what decorates the loss, and a number of steps, and returns the losses.
        budget: of value and gradient.
        num_steps: of each.

    Returns:
        The largest relative difference of the losses.
    """
    plain = train(lambda fun: fun, num_steps)
    planned = train(lambda fun: jaxckpt.auto_remat(fun, budget=budget), num_steps)
    print("no plan: " + " ".join(f"{value:.6f}" for value in plain))
    print("plan:    " + " ".join(f"{value:.6f}" for value in planned))
    return max(abs(a - b) / abs(a) for a, b in zip(plain, planned, strict=True))


def jit(fun: Callable, **options: Any) -> Callable:
    """`jax.jit` under which recomputation survives on every backend."""
    return jax.jit(fun, compiler_options=jaxckpt.compiler_options(), **options)


def main(train: Callable, description: str, argv: list[str] | None = None) -> int:
    """Compare from the command line; 1 if the losses differ."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--budget", default="70%", help='such as "4MB", or "70%%" of the unplanned peak')
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    difference = compare(train, args.budget, args.steps)
    print(f"largest relative difference {difference:.1e}")
    return 0 if difference < 1e-3 else 1
