"""A deep MLP on scikit-learn's digits over several devices, or several processes, with and without a plan.

From the repository's root, on one machine:

    python examples/sharded_digits.py --devices 8 --layout fsdp
    python examples/sharded_digits.py --processes 2

The first shards the training over eight host devices: `data` splits the batch, `fsdp` the parameters as well, and
`tensor` every other layer's weights by columns and by rows. The second starts two processes that train together. In
both the plan is made under `jit`, at the shapes of the whole program, and with several processes the first one plans
and the others take its plan.
"""

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYOUTS = ("data", "fsdp", "tensor")
WIDTH, BATCH = 64, 1024


def loss(params: Any, images: Any, labels: Any) -> Any:
    """Mean cross entropy of images `[batch, 64]` and labels `[batch]` under a residual MLP."""
    import jax
    import jax.numpy as jnp

    x = images @ params["in"]
    for up, down in params["layers"]:
        x = x + jnp.tanh(jnp.tanh(x @ up) @ down)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x @ params["out"]), labels[:, None], axis=1))


def init(seed: int = 0, num_layers: int = 8) -> Any:
    """Make parameters."""
    import numpy as np

    rng = np.random.default_rng(seed)
    matrix = lambda rows, cols: (rng.normal(size=(rows, cols)) / rows**0.5).astype(np.float32)  # noqa: E731
    layers = [(matrix(WIDTH, 4 * WIDTH), matrix(4 * WIDTH, WIDTH)) for _ in range(num_layers)]
    return {"in": matrix(64, WIDTH), "layers": layers, "out": matrix(WIDTH, 16)}


def shardings(layout: str) -> tuple[Any, Any]:
    """Where the parameters and the batch live on all devices there are."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("x",))
    at = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    up, down = {"data": (at(), at()), "fsdp": (at("x"), at("x")), "tensor": (at(None, "x"), at("x"))}[layout]
    ends = at("x") if layout == "fsdp" else at()
    params = {"in": ends, "layers": [(up, down)] * len(init()["layers"]), "out": ends}
    return params, at() if layout == "tensor" else at("x")


def train(fun: Callable, layout: str, num_steps: int) -> list[float]:
    """Train from the same start on the same batches and return the losses."""
    import jax
    import numpy as np
    from sklearn.datasets import load_digits

    import jaxckpt

    data: Any = load_digits(return_X_y=True)
    images, labels = data[0].astype(np.float32) / 16, data[1].astype(np.int32)
    params_at, batch_at = shardings(layout)
    place = lambda x, at: jax.make_array_from_callback(x.shape, at, lambda index: x[index])  # noqa: E731

    def step(params: Any, *batch: Any) -> Any:
        value, grads = jax.value_and_grad(fun)(params, *batch)
        return jax.tree.map(lambda p, g: p - 0.02 * g, params, grads), value

    step = jax.jit(step, donate_argnums=0, compiler_options=jaxckpt.compiler_options(), out_shardings=(params_at, None))
    params, values = jax.tree.map(place, init(), params_at), []
    for i in range(num_steps):
        chosen = np.random.default_rng(i).integers(0, len(images), BATCH)
        params, value = step(params, place(images[chosen], batch_at), place(labels[chosen], batch_at))
        values.append(float(value))
    return values


def main(argv: list[str] | None = None) -> int:
    """Train with and without a plan; 1 if the losses differ."""
    parser = argparse.ArgumentParser(description="Train over several devices with and without a checkpoint plan.")
    parser.add_argument("--layout", choices=LAYOUTS, default="data")
    parser.add_argument("--devices", type=int, default=4, help="host devices in each process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--budget", default="60%", help="of value and gradient at the whole program's shapes")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.processes > 1 and args.process is None:
        return _start_all(args.processes, sys.argv[1:] if argv is None else argv)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}"
    import jax

    jax.config.update("jax_platforms", "cpu")
    if args.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    import jaxckpt

    planned = jaxckpt.auto_remat(loss, budget=args.budget)
    curves = {name: train(fun, args.layout, args.steps) for name, fun in (("no plan", loss), ("plan", planned))}
    difference = max(abs(a - b) / abs(a) for a, b in zip(curves["no plan"], curves["plan"], strict=True))
    where = f"process {jax.process_index()}, {len(jax.devices())} devices, {args.layout}"
    for name, values in curves.items():
        print(f"{where}, {name}: " + " ".join(f"{value:.6f}" for value in values))
    print(f"{where}: largest relative difference {difference:.1e}", flush=True)
    return 0 if difference < 1e-4 else 1


def _start_all(count: int, argv: list[str]) -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, __file__, *argv, "--coordinator", address]
    running = [subprocess.Popen([*command, "--process", str(i)]) for i in range(count)]
    return max(process.wait() for process in running)


if not __package__:  # run as a file: make the repository importable
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "solvers")]

if __name__ == "__main__":
    sys.exit(main())
