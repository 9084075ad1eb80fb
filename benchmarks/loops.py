"""Loops: a scanned decoder against policies written by hand, an LSTM with a tenth of its temporaries, long loops.

    python benchmarks/loops.py [--quick] [--target h100] [--only decoder lstm long] [--json FILE]

The decoder is planned at the peak of every policy and at budgets between. At a policy's own peak the plan must
recompute no more than the policy; the least temporaries above the floor (those of the same program with one iteration)
must be at most 0.4 of what a checkpoint around the body takes above it. A plan's recomputation is counted in its
gradient's jaxpr; where it runs a loop by binomial checkpointing, whose trips are in a table and not in the jaxpr, it is
the plan's own count (marked *).

Long loops are value and gradient of `tanh(x @ w + b)`, by `lax.scan`, by `jaxckpt.scan(num_checkpoints=)` and by
Equinox's checkpointed loop with as many checkpoints. A loop of ours must hold at most 12 states more than asked for and
16 bytes a step, and compile in at most 1.5 times what the shortest one takes.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "solvers")]

import jaxckpt
from jaxckpt.kinds.scan_run import LoopPlan
from jaxckpt.model.option import Save
from jaxckpt.program.flops import gradient_cost
from jaxckpt.units import short_bytes

try:
    import equinox.internal as eqxi
except ImportError:  # its loops are left out
    eqxi = None

_POLICIES = jax.checkpoint_policies
# A plan is good enough when it uses this share of its budget, or the next cheaper one is measured not to fit.
_ENOUGH = 0.9
_MOST_LEAST_SHARE = 0.4
_MOST_LSTM_TIME = 1.6
_CASES = ("decoder", "lstm", "long")
_MOST_COMPILE_TIME = 1.5
# Of the long loops.
_STATE = (64, 128)
_STATE_BYTES = 4 * math.prod(_STATE)
# Policies are counted by the same rules as plans, so only rounding may differ.
_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Sizes of a pre-norm decoder whose layers are scanned."""

    layers: int = 64
    width: int = 512
    heads: int = 8
    tokens: int = 256
    batch: int = 32
    vocab: int = 256

    def specs(self, layers: int | None = None) -> tuple[Any, Any]:
        """Shapes of the parameters and of the token ids."""
        n, w = layers or self.layers, self.width
        spec = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
        stack = {
            **{name: spec(n, w) for name in ("scale1", "scale2")},
            **{name: spec(n, *s) for name, s in (("qkv", (w, 3 * w)), ("out", (w, w)))},
            **{name: spec(n, *s) for name, s in (("up", (w, 4 * w)), ("down", (4 * w, w)))},
        }
        params = {"embed": spec(self.vocab, w), "layers": stack}
        return params, jax.ShapeDtypeStruct((self.batch, self.tokens + 1), jnp.int32)

    def layer(self, x: Any, p: dict[str, Any]) -> Any:
        """One layer, attention written out."""
        batch, tokens, width = x.shape
        h = _norm(x) * p["scale1"]
        q, k, v = jnp.moveaxis((h @ p["qkv"]).reshape(batch, tokens, 3, self.heads, width // self.heads), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (width // self.heads) ** 0.5
        scores = jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), scores, -1e30)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(batch, tokens, width)
        x = x + mixed @ p["out"]
        return x + jax.nn.gelu((_norm(x) * p["scale2"]) @ p["up"]) @ p["down"]

    def loss(self, layers: Callable[[Any, Any], Any]) -> Callable[..., Any]:
        """Mean cross-entropy of the next token; `layers` runs the stack."""

        def fun(params: Any, ids: Any) -> Any:
            x = layers(params["embed"][ids[:, :-1]], params["layers"])
            logits = _norm(x) @ params["embed"].T
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], -1))

        return fun


def _norm(x: Any) -> Any:
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def _scan(layer: Callable, *lengths: int) -> Callable[[Any, Any], Any]:
    """Run a stack by levels of scans of checkpointed scans; one level is a plain scan."""

    def run(x: Any, stack: Any) -> Any:
        if len(lengths) < 2:
            return lax.scan(lambda x, p: (layer(x, p), None), x, stack)[0]
        chunks = jax.tree.map(lambda a: a.reshape(lengths[0], -1, *a.shape[1:]), stack)
        inner = jax.checkpoint(_scan(layer, *lengths[1:]), prevent_cse=False)
        return lax.scan(lambda x, p: (inner(x, p), None), x, chunks)[0]

    return run


def _remat_scan(config: Decoder, lengths: tuple[int, ...]) -> Callable[[Any, Any], Any]:
    """The stack by flax's remat_scan, over a module that holds the same parameters."""
    from flax import linen as nn

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            stack = config.specs()[0]["layers"]
            zeros = nn.initializers.zeros
            return config.layer(x, {k: self.param(k, zeros, s.shape[1:]) for k, s in stack.items()})

    def run(x: Any, stack: Any) -> Any:
        module = nn.remat_scan(Layer, lengths=lengths)()
        axes = jax.tree.map(lambda a: a.reshape(*lengths, *a.shape[1:]), stack)
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)
        # The module names its parameters; the leaves are those of the stack in the same order.
        params = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(axes))
        return module.apply(params, x)

    return run


def policies(config: Decoder) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What people write by hand, by name."""
    layer, n = config.layer, config.layers
    body = functools.partial(jax.checkpoint, prevent_cse=False)
    yield "none", config.loss(_scan(layer))
    yield "body", config.loss(_scan(body(layer)))
    for name in ("dots_saveable", "dots_with_no_batch_dims_saveable"):
        yield f"body, {name}", config.loss(_scan(body(layer, policy=getattr(_POLICIES, name))))
    root = int(n**0.5)
    for outer in (root, 2 * root, root // 2):
        lengths = (outer, n // outer)
        levels = " x ".join(map(str, lengths))
        yield f"{levels}", config.loss(_scan(layer, *lengths))
        yield f"{levels}, body", config.loss(_scan(body(layer), *lengths))
        yield f"remat_scan {levels}", config.loss(_remat_scan(config, lengths))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One policy, or one plan.

    Attributes:
        name: which.
        device_bytes: measured.
        temp_bytes: measured, for policies.
        recompute_flops: beyond the unplanned gradient.
        budget_bytes: for plans.
        shown: the plan's loops in a few words.
        is_counted: in the gradient's jaxpr; otherwise the plan says it.
        num_compiles: that the search took.
        plan_s: time of planning without compiling.
        next_bytes: measured of the next cheaper plan.
    """

    name: str
    device_bytes: int
    recompute_flops: int
    temp_bytes: int = 0
    budget_bytes: int = 0
    shown: str = ""
    is_counted: bool = True
    num_compiles: int = 0
    plan_s: float = 0.0
    next_bytes: int | None = None

    @property
    def is_used(self) -> bool:
        """Whether the budget is used, or the next cheaper plan measured not to fit."""
        return self.device_bytes >= _ENOUGH * self.budget_bytes or (self.next_bytes or 0) > self.budget_bytes


def measured_policies(config: Decoder, target: str | None) -> list[Row]:
    """Every policy with its bytes and its recomputation."""
    specs, rows, base = config.specs(), [], 0
    for name, fun in policies(config):
        flops = gradient_cost(jax.value_and_grad(fun), *specs).flops
        base = base or flops
        found = jaxckpt.measure(fun, *specs, target=target)
        rows.append(
            Row(
                name=name,
                device_bytes=found.device_bytes,
                temp_bytes=found.temp_bytes,
                recompute_flops=flops - base,
            )
        )
        _say(f"{name}: {short_bytes(found.temp_bytes)} temporaries, {100 * (flops / base - 1):.1f} %")
    return rows


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def decoder_table(config: Decoder, target: str | None, most: int | None) -> dict[str, Any]:
    """Plan at the policies' peaks and between them, and find the least bytes."""
    specs, plain = config.specs(), config.loss(_scan(config.layer))
    one = jaxckpt.measure(plain, *config.specs(1), target=target)
    known = measured_policies(config, target)
    rows = [_planned(plain, specs, budget, target) for budget in _budgets(known, most)]
    fixed, body = known[0].device_bytes - known[0].temp_bytes, next(r for r in known if r.name == "body")
    least = _least(plain, specs, target)
    share = (least - fixed - one.temp_bytes) / (body.temp_bytes - one.temp_bytes)
    return {
        "target": target or jax.default_backend(),
        "floor_bytes": one.temp_bytes,
        "policies": [asdict(r) for r in known],
        "plans": [asdict(r) for r in rows],
        "beaten": [_is_beaten(policy, rows) for policy in known],
        "used": [r.is_used for r in rows],
        "least_temp_bytes": least - fixed,
        "least_share": share,
        "least_share_of_best": (least - fixed - one.temp_bytes) / (min(r.temp_bytes for r in known) - one.temp_bytes),
    }


def _budgets(known: list[Row], most: int | None) -> list[int]:
    """The policies' peaks without the unplanned one's, and the geometric means of those far apart."""
    peaks = sorted({r.device_bytes for r in known[1:]})
    between = [int((a * b) ** 0.5) for a, b in itertools.pairwise(peaks) if b > 1.3 * a]
    budgets = sorted([*peaks, *between])
    return budgets if most is None else budgets[:: -(-len(budgets) // most)]


def _planned(fun: Callable, specs: Any, budget: int, target: str | None) -> Row:
    started = time.perf_counter()
    plan = jaxckpt.plan(fun, *specs, budget=budget, target=target, cost="flops")
    took = time.perf_counter() - started
    extra, is_counted = plan.recompute_flops, not any(map(_is_binomial, plan.block_saves))
    if is_counted:
        counted = [gradient_cost(jax.value_and_grad(f), *specs).flops for f in (plan.apply(fun), fun)]
        extra = counted[0] - counted[1]
    _say(f"{short_bytes(budget)}: {short_bytes(plan.measured_peak_bytes or 0)}, {plan.num_compiles} compiles")
    return Row(
        name="plan",
        device_bytes=plan.measured_peak_bytes or 0,
        recompute_flops=extra,
        budget_bytes=budget,
        shown=" | ".join(filter(None, map(_shown, plan.block_saves))),
        is_counted=is_counted,
        num_compiles=plan.num_compiles,
        plan_s=took,
        next_bytes=plan.next_peak_bytes,
    )


def _shown(saved: Save) -> str:
    if not isinstance(saved, LoopPlan):
        return ""
    shown = (
        " x ".join(map(str, part.lengths)) + (f", {part.num_states} states" if part.num_states else "")
        for part in saved.parts
    )
    return " + ".join(shown)


def _is_binomial(saved: Save) -> bool:
    parts = saved.parts if isinstance(saved, LoopPlan) else ()
    return any(part.num_states or any(map(_is_binomial, part.body.saved)) for part in parts)


def _least(fun: Callable, specs: Any, target: str | None) -> int:
    try:
        return jaxckpt.plan(fun, *specs, budget=1, target=target, cost="flops").measured_peak_bytes or 0
    except jaxckpt.InfeasibleBudgetError as error:
        return error.expected_least_bytes


def _is_beaten(policy: Row, plans: list[Row]) -> bool:
    """Whether a plan takes no more bytes than the policy and recomputes no more; true where its peak was not asked."""
    return policy.device_bytes not in {plan.budget_bytes for plan in plans} or any(
        plan.device_bytes <= policy.device_bytes and plan.recompute_flops <= policy.recompute_flops * (1 + _TOLERANCE)
        for plan in plans
    )


def lstm(steps: int, inputs: int = 32, hidden: int = 512, batch: int = 32) -> tuple[Callable[..., Any], tuple]:
    """A recurrent network with a loss on its last state, and the shapes of its arguments."""

    def cell(params: Any, state: Any, x: Any) -> Any:
        h, c = state
        i, f, g, o = jnp.split(x @ params["x"] + h @ params["h"] + params["b"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    def loss(params: Any, xs: Any) -> Any:
        zeros = jnp.zeros((xs.shape[1], hidden), xs.dtype)
        return jnp.mean(lax.scan(functools.partial(cell, params), (zeros, zeros), xs)[0][0] ** 2)

    spec = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    params = {"x": spec(inputs, 4 * hidden), "h": spec(hidden, 4 * hidden), "b": spec(4 * hidden)}
    return loss, (params, spec(steps, batch, inputs))


def lstm_table(steps: int, rounds: int) -> dict[str, Any]:
    """Plan for a tenth of the temporaries and time the step against the unplanned one, in turns."""
    fun, specs = lstm(steps)
    unplanned = jaxckpt.measure(fun, *specs)
    budget = unplanned.device_bytes - unplanned.temp_bytes + unplanned.temp_bytes // 10
    started = time.perf_counter()
    plan = jaxckpt.plan(fun, *specs, budget=budget)
    took = time.perf_counter() - started
    random = np.random.default_rng(0)
    args = jax.tree.map(lambda s: jnp.asarray(random.normal(size=s.shape) / s.shape[-1], s.dtype), specs)
    options = jaxckpt.compiler_options() or None
    run = [jax.jit(jax.value_and_grad(f), compiler_options=options) for f in (fun, plan.apply(fun))]
    # The first round compiles.
    times = np.array([[_seconds(f, args) for f in run] for _ in range(rounds + 1)])[1:]
    return {
        "unplanned_temp_bytes": unplanned.temp_bytes,
        "planned_temp_bytes": (plan.measured_peak_bytes or 0) - unplanned.device_bytes + unplanned.temp_bytes,
        "shown": " | ".join(filter(None, map(_shown, plan.block_saves))),
        "num_compiles": plan.num_compiles,
        "plan_s": took,
        "unplanned_s": float(np.median(times[:, 0, 0])),
        "planned_s": float(np.median(times[:, 1, 0])),
        "ratio": statistics.median((times[:, 1, 0] / times[:, 0, 0]).tolist()),
        "cpu_ratio": statistics.median((times[:, 1, 1] / times[:, 0, 1]).tolist()),
    }


def _seconds(fun: Callable, args: Any) -> tuple[float, float]:
    """Time of a call, and how much of it this process was given: other processes do not count in that."""
    started, given = time.perf_counter(), time.process_time()
    jax.block_until_ready(fun(*args))
    return time.perf_counter() - started, time.process_time() - given


@dataclass(frozen=True, kw_only=True)
class LongLoop:
    """A loop's value and gradient: how long it compiles, what it holds, how long it runs."""

    name: str
    length: int
    num_states: int | None
    compile_s: float
    temp_bytes: int
    run_s: float
    difference: float


def long_table(lengths: tuple[int, ...], counts: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Loops of different lengths, each with different numbers of states, in turns."""
    jax.block_until_ready(jax.jit(jnp.sin)(0.0))
    rows = [row for length in lengths for row in _long_loops(length, counts, rounds)]
    ours = [row for row in rows if row.name == "jaxckpt"]
    fits = [row.temp_bytes <= ((row.num_states or 0) + 12) * _STATE_BYTES + 16 * row.length for row in ours]
    quickest = max(row.compile_s for row in ours if row.length == min(lengths))
    return {
        "rows": [asdict(row) for row in rows],
        "state_bytes": _STATE_BYTES,
        "fits": fits,
        "compiles": [row.compile_s <= _MOST_COMPILE_TIME * quickest for row in ours],
    }


def _long_loops(length: int, counts: tuple[int, ...], rounds: int) -> list[LongLoop]:
    """The loops of one length."""
    random = np.random.default_rng(0)
    args = [jnp.asarray(random.normal(size=s) / 12, jnp.float32) for s in (_STATE, (_STATE[1],) * 2, (length,))]
    cases: list[tuple[str, int | None, Callable]] = [("lax.scan", None, lax.scan)]
    for count in (c for c in counts if c < length):
        cases.append(("jaxckpt", count, functools.partial(jaxckpt.scan, num_checkpoints=count)))
        if eqxi is not None:
            cases.append(("equinox", count, functools.partial(eqxi.scan, kind="checkpointed", checkpoints=count)))
    compiled = [_compiled(scan, args) for _, _, scan in cases]
    times = np.array([[_seconds(fun, args)[0] for fun, _ in compiled] for _ in range(rounds + 1)])[1:]
    wanted = jax.tree.leaves(compiled[0][0](*args))
    rows = []
    for (name, count, _), (fun, compile_s), run_s in zip(cases, compiled, np.median(times, 0), strict=True):
        pairs = zip(jax.tree.leaves(fun(*args)), wanted, strict=True)
        rows.append(
            LongLoop(
                name=name,
                length=length,
                num_states=count,
                compile_s=compile_s,
                temp_bytes=fun.memory_analysis().temp_size_in_bytes,
                run_s=float(run_s),
                difference=max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs),
            )
        )
    return rows


def _compiled(scan: Callable, args: list[jax.Array]) -> tuple[Any, float]:
    """A loop's value and gradient, and the seconds in which it was traced and compiled."""

    def loss(x: jax.Array, w: jax.Array, shifts: jax.Array) -> jax.Array:
        body = lambda x, shift: (jnp.tanh(x @ w + shift), None)  # noqa: E731
        return jnp.sum(scan(body, x, shifts)[0] ** 2)

    started = time.perf_counter()
    options = jaxckpt.compiler_options() or None
    fun = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), compiler_options=options).lower(*args).compile()
    return fun, time.perf_counter() - started


def _print_long(found: dict[str, Any]) -> None:
    table = Table(title=f"long loops; a state is {short_bytes(found['state_bytes'])}")
    for name in ("steps", "loop", "states", "compile s", "temporaries, states", "run ms", "off by"):
        table.add_column(name, justify="right")
    for row in found["rows"]:
        states = f"{row['temp_bytes'] / found['state_bytes']:,.1f}"
        count = "" if row["num_states"] is None else str(row["num_states"])
        times = f"{row['compile_s']:.2f}", states, f"{1000 * row['run_s']:.1f}"
        table.add_row(f"{row['length']:,}", row["name"], count, *times, f"{row['difference']:.0e}")
    Console(width=140).print(table)


def _print_decoder(found: dict[str, Any]) -> None:
    base = found["floor_bytes"]
    table = Table(title=f"scanned decoder, {found['target']}; floor {short_bytes(base)} of temporaries")
    for name in ("", "budget", "measured", "recompute GFLOP", "plan", "compiles", "s", "holds"):
        table.add_column(name)
    holds = lambda is_good: "yes" if is_good else "NO"  # noqa: E731
    for row, beaten in zip(found["policies"], found["beaten"], strict=True):
        flops = f"{row['recompute_flops'] / 1e9:.1f}"
        table.add_row(row["name"], "", short_bytes(row["device_bytes"]), flops, "", "", "", holds(beaten))
    for row, used in zip(found["plans"], found["used"], strict=True):
        flops = f"{row['recompute_flops'] / 1e9:.1f}{'' if row['is_counted'] else '*'}"
        sizes = short_bytes(row["budget_bytes"]), short_bytes(row["device_bytes"])
        table.add_row(
            "plan", *sizes, flops, row["shown"], str(row["num_compiles"]), f"{row['plan_s']:.0f}", holds(used)
        )
    Console(width=140).print(table)
    share = found["least_share"]
    print(
        f"least temporaries {short_bytes(found['least_temp_bytes'])}: above the floor {share:.2f} of the checkpointed "
        f"body's, {found['least_share_of_best']:.2f} of the best one's written by hand"
    )


def _print_lstm(found: dict[str, Any]) -> None:
    sizes = short_bytes(found["unplanned_temp_bytes"]), short_bytes(found["planned_temp_bytes"])
    print(
        f"LSTM: {sizes[0]} of temporaries, {sizes[1]} planned ({found['shown']}, {found['num_compiles']} compiles); "
        f"{found['unplanned_s']:.2f} s a step, {found['planned_s']:.2f} planned: {found['ratio']:.2f} times "
        f"({found['cpu_ratio']:.2f} times in processor seconds)"
    )


def main() -> int:
    """Run the cases and return 1 if one falls short."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes and few budgets")
    parser.add_argument("--target", help="a chip whose compiler measures the decoder; the default backend otherwise")
    parser.add_argument("--only", nargs="+", default=_CASES, choices=_CASES)
    parser.add_argument("--budgets", type=int, help="how many budgets at most")
    parser.add_argument("--rounds", type=int, default=9, help="timings of the LSTM and of long loops")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    found: dict[str, Any] = {"jax": jax.__version__}
    good = True
    if "decoder" in options.only:
        config = Decoder(layers=16, width=64, heads=4, tokens=64, batch=8) if options.quick else Decoder()
        found["decoder"] = decoder_table(config, options.target, options.budgets or (4 if options.quick else None))
        _print_decoder(found["decoder"])
        good &= all([*found["decoder"]["beaten"], *found["decoder"]["used"]])
        good &= options.quick or found["decoder"]["least_share"] <= _MOST_LEAST_SHARE
    if "lstm" in options.only:
        found["lstm"] = lstm_table(*((256, 3) if options.quick else (4096, options.rounds)))
        _print_lstm(found["lstm"])
        good &= options.quick or found["lstm"]["ratio"] <= _MOST_LSTM_TIME
    if "long" in options.only:
        found["long"] = long_table((100, 1000) if options.quick else (100, 1000, 10_000), (10, 20, 100), options.rounds)
        _print_long(found["long"])
        good &= all([*found["long"]["fits"], *found["long"]["compiles"]])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
