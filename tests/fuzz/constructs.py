"""What programs are made of: one function for each construct, from values of one shape to such a value.

A construct is drawn as a name and a few choices, the simplest of each first, so that a reducer knows where to go.
Values are `[rows, width]` in double precision; everything else (integers, complex values, lower precisions, images,
other shapes) is inside a construct. What they return stays within some units of 1.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback

import jaxckpt

# Callbacks count here. A list in a closure would be watched, and what grows while a function is traced is a change.
CALLS: Counter = Counter()
TABLE = np.linspace(-1.0, 1.0, 64)


@dataclass(frozen=True, kw_only=True)
class Env:
    """What constructs read beside values.

    Attributes:
        weights: `[num_weights]`, each `[width, width]`; two constructs may read the same one.
        ints: `[rows]`, an integer argument.
        key: for random numbers.
        probe: a value that decides branches: an argument where low precisions would make decisions a matter of
            rounding, else None.
        axis: a named axis around the whole program, None if there is none.
        extra: auxiliary results that constructs leave.
    """

    weights: list[Any]
    ints: Any
    key: Any
    probe: Any = None
    axis: str | None = None
    extra: list[Any] = field(default_factory=list)

    def w(self, p: dict[str, Any]) -> Any:
        """The weight of a construct."""
        return self.weights[p["w"] % len(self.weights)]

    def decides(self, x: Any) -> Any:
        """A number that decides something; the derivative of what it decides is none of it."""
        return jnp.sum(x if self.probe is None else self.probe)


@dataclass(frozen=True, kw_only=True)
class Construct:
    """One construct.

    Attributes:
        run: `(env, params, x, y) -> value`.
        stands_for: its row in docs/transforms.md, or what else it stands for.
        choices: of each parameter, the simplest first.
        has_effects: it calls back.
        no_forward: it has no derivative in forward mode.
        digits: of its lowest precision.
        weight: how often it is drawn.
        no_vmap: it cannot be mapped, by JAX's own rules.
    """

    run: Callable[..., Any]
    stands_for: str
    choices: dict[str, tuple]
    has_effects: bool = False
    no_forward: bool = False
    digits: float = 15
    weight: int = 1
    no_vmap: bool = False


CONSTRUCTS: dict[str, Construct] = {}


def construct(stands_for: str, **options: Any) -> Callable[[Callable], Callable]:
    """Register a construct under its function's name; keyword arguments that are tuples are its choices."""
    flags = {k: v for k, v in options.items() if not isinstance(v, tuple)}
    choices = {k: v for k, v in options.items() if isinstance(v, tuple)}

    def add(run: Callable) -> Callable:
        CONSTRUCTS[run.__name__] = Construct(run=run, stands_for=stands_for, choices=choices, **flags)
        return run

    return add


WEIGHTS = (0, 1, 2, 3, 4)
LENGTHS = (1, 0, 2, 3, 4, 5)


# Operations, inlined and planned.


@construct("layers", weight=4, w=WEIGHTS, by=("tanh", "sin", "relu", "none"))
def dense(env, p, x, y):
    z = x @ env.w(p)
    return {"tanh": jnp.tanh, "sin": jnp.sin, "relu": lambda z: jnp.tanh(jax.nn.relu(z)), "none": lambda z: z / 2}[
        p["by"]
    ](z)


UNARY = {
    "sin": jnp.sin,
    "gauss": lambda x: jnp.exp(-(x**2)),
    "log1p": lambda x: jnp.log1p(x**2),
    "sqrt": lambda x: jnp.sqrt(1 + x**2) - 1,
    "gelu": jax.nn.gelu,
    "abs": lambda x: jnp.abs(jnp.tanh(x)),
    "clip": lambda x: jnp.clip(x, -1.0, 1.0),
    "erf": jax.scipy.special.erf,
    "power": lambda x: jnp.tanh(x) ** 3,
}


@construct("elementwise operations, fused or not", weight=3, by=tuple(UNARY))
def elementwise(env, p, x, y):
    return UNARY[p["by"]](x)


BINARY = {
    "add": lambda x, y: (x + y) / 2,
    "multiply": lambda x, y: jnp.tanh(x) * jnp.tanh(y),
    "divide": lambda x, y: x / (1 + y**2),
    "minimum": jnp.minimum,
    "row": lambda x, y: x + jnp.mean(y, axis=0, keepdims=True),
    "column": lambda x, y: x - jnp.mean(y, axis=1, keepdims=True),
}


@construct("values read in several places, broadcasts", weight=3, by=tuple(BINARY))
def binary(env, p, x, y):
    return BINARY[p["by"]](x, y)


REDUCTIONS = {
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    "norm": lambda x: (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1),
    "max": lambda x: x - jnp.max(x, axis=-1, keepdims=True) / 2,
    "logsumexp": lambda x: x - jax.nn.logsumexp(x, axis=1, keepdims=True),
    "prod": lambda x: x * jnp.prod(jnp.tanh(x) / 2 + 1, axis=1, keepdims=True) / 8,
    "cumsum": lambda x: jnp.cumsum(x, axis=1) / x.shape[1],
    "cumprod": lambda x: jnp.cumprod(jnp.tanh(x), axis=1),
    "std": lambda x: x + jnp.std(x, axis=0, keepdims=True),
}


@construct("reductions", weight=2, by=tuple(REDUCTIONS))
def reduction(env, p, x, y):
    return REDUCTIONS[p["by"]](x)


LAYOUTS = {
    "transpose": lambda x: jnp.sin(x.T).T,
    "reshape": lambda x: jnp.cos(x.reshape(-1)).reshape(x.shape),
    "halves": lambda x: jnp.concatenate([x[:, 1:], x[:, :1]], axis=1),
    "flip": lambda x: x[::-1],
    "pad": lambda x: jnp.pad(x, ((1, 1), (0, 0)))[:-2],
    "roll": lambda x: jnp.roll(x, 2, axis=0),
    "repeat": lambda x: jnp.repeat(x[: x.shape[0] // 2], 2, axis=0),
    "expand": lambda x: jnp.mean(x[:, None, :] * jnp.sin(x)[:, :, None], axis=1),
    "empty": lambda x: jnp.concatenate([x, x[:0]], axis=0),
}


@construct("layout changes, empty arrays", weight=2, by=tuple(LAYOUTS))
def layout(env, p, x, y):
    return LAYOUTS[p["by"]](x)


@construct("batched products in several layouts: operands that a compiler copies", weight=2, w=WEIGHTS, num=(1, 2, 4))
def attention(env, p, x, y):
    rows = x.shape[0] // p["num"]
    q, k, v = (z.reshape(p["num"], rows, -1) for z in (x @ env.w(p), y, x))
    scores = jax.nn.softmax(jnp.einsum("bid,bjd->bij", q, k), axis=-1)
    return jnp.einsum("bij,bjd->bid", scores, v).reshape(x.shape)


@construct("convolutions", w=WEIGHTS, last=(True, False))
def convolution(env, p, x, y):
    kernel = jnp.stack([env.w(p), env.w(p) / 2, env.w(p).T])
    if p["last"]:
        return jnp.tanh(
            lax.conv_general_dilated(x[None], kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))[0]
        )
    image, kernel = x.T[None], kernel.transpose(2, 1, 0)
    return jnp.tanh(lax.conv_general_dilated(image, kernel, (1,), "SAME")[0].T)


@construct("poolings of maxima, which compilers run better outside of regions", by=("max", "same", "sum"))
def pooling(env, p, x, y):
    image = x.reshape(1, x.shape[0] // 4, 4, x.shape[1])
    if p["by"] == "same":
        return lax.reduce_window(image, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME").reshape(x.shape)
    if p["by"] == "sum":
        return lax.reduce_window(image, 0.0, lax.add, (1, 3, 1, 1), (1, 1, 1, 1), "SAME").reshape(x.shape) / 3
    small = lax.reduce_window(image, -jnp.inf, lax.max, (1, 1, 2, 1), (1, 1, 2, 1), "VALID")
    return jnp.repeat(small, 2, axis=2).reshape(x.shape)


@construct(
    "indexing by integers, gathers and scatters",
    weight=2,
    by=("gather", "add", "set", "along", "embed", "slice", "update"),
)
def indexing(env, p, x, y):
    ints = env.ints % x.shape[0]
    if p["by"] == "gather":
        return x[ints]
    if p["by"] == "add":
        return (x.at[ints].add(y)) / 4
    if p["by"] == "set":
        return x.at[0].set(y[1])
    if p["by"] == "along":
        return x + jnp.take_along_axis(x, (env.ints % x.shape[1])[:, None], axis=1)
    if p["by"] == "embed":
        return env.weights[0][env.ints % x.shape[1]] + x
    if p["by"] == "slice":
        row = lax.dynamic_slice(x, (ints[0], jnp.int32(0)), (1, x.shape[1]))
        return x - row
    return lax.dynamic_update_slice(x, y[:2], (ints[1], jnp.int32(0)))


@construct("sorting")
def sorting(env, p, x, y):
    return jnp.sort(x, axis=1)


@construct("linear algebra", w=WEIGHTS, by=("solve", "cholesky", "triangular"))
def algebra(env, p, x, y):
    w = env.w(p)
    square = w @ w.T + 2 * jnp.eye(w.shape[0], dtype=w.dtype)
    if p["by"] == "solve":
        return jnp.linalg.solve(square, x.T).T
    lower = jnp.linalg.cholesky(square)
    if p["by"] == "cholesky":
        return x @ lower / 2
    return jax.scipy.linalg.solve_triangular(lower, x.T, lower=True).T


@construct("complex side values", weight=2, by=("turn", "fft", "product", "named"))
def complex_values(env, p, x, y):
    if p["by"] == "fft":
        return jnp.fft.irfft(jnp.fft.rfft(x, axis=1) * 0.5, n=x.shape[1], axis=1)
    z = lax.complex(x, y)
    if p["by"] == "turn":
        return jnp.real(z * jnp.exp(lax.complex(jnp.zeros_like(x), x)))
    if p["by"] == "named":
        z = checkpoint_name(z * z, "z")
    return jnp.tanh(jnp.abs(z @ env.weights[0].astype(z.dtype)) ** 2)


@construct("integer side values", weight=2, by=("argmax", "cast", "bits", "count", "one hot"))
def integer_values(env, p, x, y):
    source = (
        x
        if env.probe is None
        else jnp.sin(env.probe.reshape(-1)[0] + env.ints[:, None].astype(x.dtype) + jnp.zeros_like(x))
    )
    if p["by"] == "argmax":
        return x + jnp.take(x, jnp.argmax(source, axis=1) % x.shape[0], axis=0) / 2
    if p["by"] == "cast":
        return x * (jnp.floor(4 * jnp.tanh(source)).astype(jnp.int32) % 3).astype(x.dtype)
    if p["by"] == "bits":
        return x * ((env.ints << 1) ^ 3)[:, None].astype(x.dtype) % 7 / 8
    if p["by"] == "count":
        return x * jnp.count_nonzero(source > 0, axis=1, keepdims=True).astype(x.dtype) / x.shape[1]
    return x + jax.nn.one_hot(env.ints % x.shape[1], x.shape[1], dtype=x.dtype)


@construct("keys: dropout and noise", by=("dropout", "noise", "shuffle"))
def random_values(env, p, x, y):
    if p["by"] == "dropout":
        return jnp.where(jax.random.bernoulli(env.key, 0.7, x.shape), x, jnp.zeros_like(x))
    if p["by"] == "noise":
        return x + jax.random.normal(env.key, x.shape, x.dtype) / 4
    return x[jax.random.permutation(jax.random.fold_in(env.key, 2), x.shape[0])]


def _through(dtype):
    def run(env, p, x, y):
        low = x.astype(dtype)
        w = env.w(p).astype(dtype)
        return (jnp.tanh(low @ w) * low).astype(x.dtype)

    return run


@construct("mixed precisions: float32", w=WEIGHTS, digits=6.0)
def single(env, p, x, y):
    return _through(jnp.float32)(env, p, x, y)


@construct("mixed precisions: bfloat16", w=WEIGHTS, digits=1.3)
def bfloat(env, p, x, y):
    return _through(jnp.bfloat16)(env, p, x, y)


@construct("mixed precisions: float16", w=WEIGHTS, digits=2.0)
def half(env, p, x, y):
    return _through(jnp.float16)(env, p, x, y)


@construct("closed-over arrays: NumPy's and JAX's", by=("numpy", "jax"))
def closed_over(env, p, x, y):
    table = TABLE[: x.shape[1]] if p["by"] == "numpy" else jnp.asarray(TABLE[: x.shape[1]])
    return x * table[None].astype(x.dtype)


@construct("results that are constants, arguments or each other", by=("number", "array", "argument", "twice", "int"))
def result(env, p, x, y):
    found = {"number": 1.0, "array": jnp.ones((2,), x.dtype), "argument": env.ints, "twice": x, "int": 3}[p["by"]]
    env.extra.append(found)
    return (x + y) / 2


@construct("aliases: a value under another name", by=("identity", "zero", "stop"))
def alias(env, p, x, y):
    if p["by"] == "stop":
        return x + lax.stop_gradient(y)
    return x if p["by"] == "identity" else x + 0 * y


# Calls.


@construct("jit, closed calls", w=WEIGHTS, deep=(False, True))
def jitted(env, p, x, y):
    inner = jax.jit(jnp.dot) if p["deep"] else jnp.dot
    with jax.named_scope("inside"):
        return jax.jit(lambda x: jnp.sin(inner(x, env.w(p))))(x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _smooth(x, power):
    return jnp.sin(x) * x**power


@_smooth.defjvp
def _smooth_jvp(power, primals, tangents):
    (x,), (t,) = primals, tangents
    return _smooth(x, power), t * (jnp.cos(x) * x**power + 0.5 * jnp.sin(x))


@construct("custom_jvp", power=(1, 2))
def with_custom_jvp(env, p, x, y):
    return jnp.tanh(_smooth(x, p["power"]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _clipped(x, scale, y):
    return jnp.tanh(scale * x) + y


_clipped.defvjp(
    lambda x, scale, y: (jnp.tanh(scale * x) + y, (x, y)),
    lambda scale, kept, ct: (ct * jnp.cos(kept[0]), ct * kept[1] / 2),
)


@construct("custom_vjp", no_forward=True, scale=(2, 3))
def with_custom_vjp(env, p, x, y):
    return jnp.tanh(_clipped(x, float(p["scale"]), y))


POLICIES = {
    "nothing": lambda: None,
    "everything": lambda: jax.checkpoint_policies.everything_saveable,
    "dots": lambda: jax.checkpoint_policies.dots_saveable,
    "names": lambda: jax.checkpoint_policies.save_only_these_names("mine"),
    "others": lambda: jax.checkpoint_policies.save_anything_except_these_names("mine"),
}


@construct(
    "your own jax.checkpoint, with a policy and names inside",
    weight=2,
    w=WEIGHTS,
    policy=tuple(POLICIES),
    nested=(False, True),
)
def checkpoint(env, p, x, y):
    def inside(x, w):
        h = checkpoint_name(jnp.tanh(x @ w), "mine")
        if p["nested"]:
            h = jax.checkpoint(lambda h: checkpoint_name(jnp.sin(h @ w), "inner"))(h)
        return jnp.cos(h) * x

    return jax.checkpoint(inside, policy=POLICIES[p["policy"]]())(x, env.w(p))


@construct("names of your own outside of a checkpoint", w=WEIGHTS)
def named(env, p, x, y):
    return checkpoint_name(jnp.tanh(checkpoint_name(x @ env.w(p), "mine")), "other")


@construct("another auto_remat", w=WEIGHTS)
def inner_auto_remat(env, p, x, y):
    return jaxckpt.auto_remat(lambda x, w: jnp.sin(jnp.cos(x @ w)), budget="1GB", verify=False)(x, env.w(p))


# Branches.


def _arms(env, p, x):
    w = env.w(p)
    arms = {
        "same": lambda x, y: x,
        "dense": lambda x, y: jnp.tanh(jnp.sin(x @ w) @ w),
        "constant": lambda x, y: jnp.full_like(x, 0.5),
        "other": lambda x, y: y,
        "cheap": lambda x, y: x / 2,
        "scan": lambda x, y: lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=p["length"])[0],
        "cond": lambda x, y: lax.cond(env.decides(x) > 1, lambda x: jnp.sin(x @ w), lambda x: x, x),
        "checkpoint": lambda x, y: jax.checkpoint(lambda x: jnp.sin(checkpoint_name(x @ w, "arm")))(x),
        "named": lambda x, y: jnp.cos(checkpoint_name(x @ w, "arm") * 2),
        "closure": lambda x, y: jnp.tanh(x @ w + env.weights[0][:1]),
    }
    return arms


ARMS = ("dense", "same", "constant", "other", "cheap", "scan", "cond", "checkpoint", "named", "closure")


@construct("cond", weight=2, w=WEIGHTS, yes=ARMS, no=ARMS, length=LENGTHS)
def conditional(env, p, x, y):
    arms = _arms(env, p, x)
    return lax.cond(env.decides(x) > 0, arms[p["yes"]], arms[p["no"]], x, y)


@construct("switch", w=WEIGHTS, yes=ARMS, no=ARMS, last=ARMS, length=LENGTHS)
def switch(env, p, x, y):
    arms = _arms(env, p, x)
    index = env.ints[0] % 4 - 1  # clamped
    return lax.switch(index, [arms[p[name]] for name in ("yes", "no", "last")], x, y)


@construct("platform_dependent")
def by_platform(env, p, x, y):
    return lax.platform_dependent(x, cpu=lambda x: jnp.sin(x) * 2, default=lambda x: jnp.cos(x))


# Loops.


def _steps(length, x):
    """`[length, rows, width]`."""
    return jnp.stack([x * (0.5 + i) for i in range(length)]) if length else jnp.zeros((0, *x.shape), x.dtype)


def _body_plain(env, p, x, y):
    return lambda c, s: (jnp.tanh(c @ env.w(p)) + s / 4, jnp.sum(c, axis=0))


def _body_index(env, p, x, y):
    """It indexes by the loop's variable: `s` is not read, and the carry counts."""

    def body(c, s):
        i, c = c
        row = lax.dynamic_index_in_dim(y, i % y.shape[0], keepdims=False)
        c = jnp.tanh(c @ env.w(p)) * row[None] + x[i % x.shape[0]][None]
        return (i + 1, c.at[i % c.shape[0]].set(row)), c[0]

    return body


def _body_complex(env, p, x, y):
    """A complex carry and complex stacks."""

    def body(c, s):
        z, c = c
        z = z * jnp.exp(lax.complex(jnp.zeros_like(c), c)) / 2 + lax.complex(s, c)
        return (z, jnp.tanh(c @ env.w(p) + jnp.real(z))), z

    return body


def _body_passing(env, p, x, y):
    """A carry that passes unchanged, one that nothing reads, a constant among the stacks."""

    def body(c, s):
        kept, count, c = c
        return (kept, count + 1, jnp.sin(c @ env.w(p)) + kept / 2), (1.0, count, c)

    return body


def _body_cond(env, p, x, y):
    def body(c, s):
        i, c = c
        return (
            i + 1,
            lax.cond(i % 2 == 0, lambda c: jnp.tanh(jnp.sin(c @ env.w(p)) @ env.w(p)), lambda c: c + s / 4, c),
        ), None

    return body


def _body_scan(env, p, x, y):
    def body(c, s):
        inner = lambda c, _: (jnp.tanh(c @ env.w(p)), jnp.sum(c))  # noqa: E731
        c, ys = lax.scan(inner, c, length=p["inner"])
        return c + s / 4, jnp.sum(ys)

    return body


def _body_checkpoint(env, p, x, y):
    def body(c, s):
        inside = lambda c, s: jnp.tanh(checkpoint_name(c @ env.w(p), "step")) + s / 4  # noqa: E731
        policy = jax.checkpoint_policies.save_only_these_names("step")
        return jax.checkpoint(inside, policy=policy)(c, s), None

    return body


def _body_random(env, p, x, y):
    def body(c, s):
        i, c = c
        keep = jax.random.bernoulli(jax.random.fold_in(env.key, i), 0.8, c.shape)
        return (i + 1, jnp.where(keep, jnp.tanh(c @ env.w(p)), s / 4)), jnp.mean(c)

    return body


def _body_low(env, p, x, y):
    def body(c, s):
        h = jnp.tanh(c.astype(jnp.float32) @ env.w(p).astype(jnp.float32))
        return h.astype(c.dtype) + s / 4, h

    return body


def _body_long(env, p, x, y):
    """Several products in a step, of which a plan may save some."""

    def body(c, s):
        h = jnp.tanh(c @ env.w(p))
        h = jax.nn.softmax(h @ env.weights[0], axis=-1) * s
        return jnp.sin(h @ env.w(p)) + c / 2, None

    return body


# Of each body, the carry that it starts from, and what of the carry is the result.
BODIES: dict[str, tuple[Callable, Callable, Callable]] = {
    "plain": (_body_plain, lambda x: x, lambda c: c),
    "index": (_body_index, lambda x: (jnp.int32(0), x), lambda c: c[1]),
    "complex": (_body_complex, lambda x: (lax.complex(x, x), x), lambda c: c[1] + jnp.tanh(jnp.abs(c[0]) ** 2)),
    "passing": (_body_passing, lambda x: (x, jnp.int32(0), x), lambda c: c[2] + c[0] / 4),
    "cond": (_body_cond, lambda x: (jnp.int32(0), x), lambda c: c[1]),
    "scan": (_body_scan, lambda x: x, lambda c: c),
    "checkpoint": (_body_checkpoint, lambda x: x, lambda c: c),
    "random": (_body_random, lambda x: (jnp.int32(0), x), lambda c: c[1]),
    "low": (_body_low, lambda x: x, lambda c: c),
    "long": (_body_long, lambda x: x, lambda c: c),
}


def _summed(ys):
    """A number of each stack, all elements in it."""
    total = 0.0
    for leaf in jax.tree.leaves(ys):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            leaf = jnp.real(leaf) + jnp.imag(leaf) / 2
        total = total + jnp.tanh(jnp.sum(leaf.astype(jnp.float64)) / max(1, leaf.size))
    return total


@construct(
    "lax.scan: lengths 0 to 5, indices, integer and complex carries, nesting",
    weight=5,
    digits=6.0,  # of one of its bodies
    body=tuple(BODIES),
    w=WEIGHTS,
    length=LENGTHS,
    inner=LENGTHS,
    reverse=(False, True),
    unroll=(1, 2),
)
def scan(env, p, x, y):
    body, start, end = BODIES[p["body"]]
    carry, ys = lax.scan(
        body(env, p, x, y),
        start(x),
        _steps(p["length"], y),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return jnp.tanh(end(carry)) + _summed(ys)


@construct(
    "longer scans, whose loops are divided",
    weight=2,
    w=WEIGHTS,
    length=(6, 8, 12, 16, 25),
    body=("plain", "long", "index", "cond"),
    reverse=(False, True),
    inner=(1, 3),
)
def long_scan(env, p, x, y):
    body, start, end = BODIES[p["body"]]
    carry, ys = lax.scan(body(env, p, x, y), start(x), _steps(p["length"], y) / p["length"], reverse=p["reverse"])
    return jnp.tanh(end(carry)) + _summed(ys)


@construct("weights stacked for a scan", w=WEIGHTS, num=(2, 1, 3, 5))
def stacked_weights(env, p, x, y):
    weights = jnp.stack([env.weights[(p["w"] + i) % len(env.weights)] for i in range(p["num"])])
    return lax.scan(lambda c, w: (jnp.tanh(jnp.sin(c @ w) @ w), None), x, weights)[0]


@construct("fori_loop of fixed length", w=WEIGHTS, length=LENGTHS, index=(False, True))
def fori(env, p, x, y):
    def body(i, c):
        c = jnp.tanh(c @ env.w(p))
        return c + y[i % y.shape[0]][None] / 2 if p["index"] else c

    return lax.fori_loop(0, p["length"], body, x)


@construct("lax.map", w=WEIGHTS, batch=(None, 2))
def mapping(env, p, x, y):
    return lax.map(lambda row: jnp.tanh(row @ env.w(p)), x, batch_size=p["batch"])


@construct("associative_scan")
def associative(env, p, x, y):
    return lax.associative_scan(jnp.multiply, jnp.cos(x))


@construct("while_loop, fori_loop of unknown length", by=("while", "fori"))
def unknown_length(env, p, x, y):
    limit = lax.stop_gradient(env.decides(jnp.tanh(x)))
    if p["by"] == "while":
        size = lax.while_loop(lambda s: s > 0.1, lambda s: s / 2, jnp.abs(limit) + 1)
    else:
        size = lax.fori_loop(0, env.ints[0] % 3, lambda i, s: s / 2, jnp.abs(limit) / 100 + 1)
    return x * (1 + size).astype(x.dtype) / 2


@construct("jaxckpt.scan", w=WEIGHTS, length=(3, 1, 2, 5, 9), states=(2, 1, 3))
def own_scan(env, p, x, y):
    return jaxckpt.scan(_body_plain(env, p, x, y), x, _steps(p["length"], y), num_checkpoints=p["states"])[0]


@construct("jaxckpt.while_loop", no_forward=True, w=WEIGHTS, length=(3, 1, 2, 5), states=(2, 1, 3))
def own_while_loop(env, p, x, y):
    step = lambda s: (jnp.tanh(s[0] @ env.w(p)), s[1] + 1)  # noqa: E731
    return jaxckpt.while_loop(
        lambda s: s[1] < p["length"], step, (x, 0), max_steps=p["length"] + 2, num_checkpoints=p["states"]
    )[0]


# Named axes.


COLLECTIVES = {
    "pmean": lambda r, a: r - lax.pmean(r, a),
    "psum": lambda r, a: r + lax.psum(r, a) / 64,
    "gather": lambda r, a: r * jnp.tanh(jnp.mean(lax.all_gather(r, a), axis=0)),
    "index": lambda r, a: r * (lax.axis_index(a) % 3).astype(r.dtype),
    "permute": lambda r, a: (
        r + lax.ppermute(r, a, [(i, (i + 1) % lax.axis_size(a)) for i in range(lax.axis_size(a))]) / 2
    ),
}


@construct("vmap with a named axis and collectives inside", w=WEIGHTS, by=tuple(COLLECTIVES))
def inner_axis(env, p, x, y):
    return jax.vmap(lambda r: COLLECTIVES[p["by"]](jnp.tanh(r @ env.w(p)), "rows"), axis_name="rows")(x)


@construct("collectives of an axis around the program, where there is one", by=tuple(COLLECTIVES))
def outer_axis(env, p, x, y):
    return jnp.tanh(COLLECTIVES[p["by"]](x, env.axis)) if env.axis else jnp.sin(x)


@construct("shard_map over one device", w=WEIGHTS, no_vmap=True)
def sharded(env, p, x, y):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    rows, none = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    inside = lambda x, w: jnp.tanh(x @ w) - lax.pmean(jnp.mean(x, axis=0, keepdims=True), "data")  # noqa: E731
    return jax.shard_map(inside, mesh=mesh, in_specs=(rows, none), out_specs=rows)(x, env.w(p))


# Callbacks.


def _count(name, *_):
    CALLS[name] += 1


@construct("debug.print, debug.callback", has_effects=True, by=("callback", "in loop", "in branch"))
def debugged(env, p, x, y):
    note = lambda x: jax.debug.callback(functools.partial(_count, "debug"), jnp.sum(x))  # noqa: E731
    if p["by"] == "in loop":

        def body(c, _):
            note(c)
            return jnp.tanh(c), None

        return lax.scan(body, x, length=2)[0]
    if p["by"] == "in branch":

        def arm(x):
            note(x)
            return jnp.sin(x @ env.weights[0])

        return lax.cond(env.decides(x) > 0, arm, jnp.cos, x)
    note(x)
    return jnp.sin(x)


@construct("pure_callback, io_callback", has_effects=True, by=("pure", "io"))
def called_back(env, p, x, y):
    spec = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if p["by"] == "pure":
        made = jax.pure_callback(np.sin, spec, lax.stop_gradient(x), vmap_method="sequential")
    else:

        def noted(x):
            CALLS["io"] += 1
            return np.cos(x)

        made = io_callback(noted, spec, lax.stop_gradient(x))
    return x * made
