"""The arguments of a jitted step in a pure form, arrays in and arrays out, and back.

A form is the one place that knows how users' arguments become what `jax.jit` takes and what is planned: `split` turns
a call into a function of specs alone, `jitted` and `caller` do the same for calls. There are three: that of `jax.jit`
itself, which costs nothing at a call, one for objects of flax NNX, whose state goes in and out, and one for Equinox
modules, whose fields that are no arrays are static by value.
"""

import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxckpt import _compat
from jaxckpt.errors import OptionError
from jaxckpt.program import nnx
from jaxckpt.program.same_call import ChangingError, key_of, tree_key
from jaxckpt.program.static import places_and_names
from jaxckpt.program.trace import traced_leaves


@dataclass(frozen=True, kw_only=True)
class JitOptions:
    """The keywords of `jax.jit`.

    Attributes:
        static_argnums: as users write them, like the next three.
        static_argnames: likewise.
        donate_argnums: likewise.
        donate_argnames: likewise.
        in_shardings: None where not given, as is the next.
        out_shardings: likewise.
        rest: keywords that are passed on unchanged.
    """

    static_argnums: Any = None
    static_argnames: Any = None
    donate_argnums: Any = None
    donate_argnames: Any = None
    in_shardings: Any = None
    out_shardings: Any = None
    rest: Mapping[str, Any] = field(default_factory=dict)

    def keywords(self) -> dict[str, Any]:
        """All of them that are given, for `jax.jit`."""
        names = [name for name in self.__dataclass_fields__ if name != "rest"]
        return {name: value for name in names if (value := getattr(self, name)) is not None} | dict(self.rest)

    def measured(self) -> dict[str, Any]:
        """Those that decide what a compiled program takes, beside the donation and what the arguments say."""
        given = {} if self.out_shardings is None else {"out_shardings": self.out_shardings}
        return given | {name: value for name, value in self.rest.items() if name != "inline"}


@dataclass(frozen=True, kw_only=True)
class PureCall:
    """A call as a function of specs.

    Attributes:
        fun: of the specs alone.
        args: the specs: pytrees of `ShapeDtypeStruct`s, with shardings where the arguments lie on several devices.
        donate_argnums: which of them give their buffers away.
        same: what is equal for calls that are traced to the same.
        shapes: of the arguments.
    """

    fun: Callable
    args: tuple[Any, ...]
    donate_argnums: tuple[int, ...]
    same: Hashable
    shapes: tuple[tuple[int, ...], ...]

    @property
    def shardings(self) -> tuple[Any, ...]:
        """Of each leaf; None on the default device."""
        return tuple(leaf.sharding for leaf in jax.tree.leaves(self.args))


class PlainForm:
    """Arguments as `jax.jit` takes them."""

    def __init__(self, fun: Callable, options: JitOptions):
        self._options = options
        self._static = places_and_names(fun, options.static_argnums, options.static_argnames)
        self._donated = places_and_names(fun, options.donate_argnums, options.donate_argnames, "donate")

    def jitted(self, fun: Callable) -> Callable:
        """The function under `jax.jit`."""
        return jax.jit(fun, **self._options.keywords())

    def caller(self, jitted: Callable) -> Callable:
        """What is called with users' arguments."""
        return jitted

    def split(self, fun: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PureCall:
        """A call as a function of specs."""
        numbers, names = _positions(self._static[0], len(args)), self._static[1]
        static, num_args = {i: args[i] for i in numbers}, len(args)
        static_names = {name: kwargs[name] for name in sorted(kwargs) if name in names}
        given_away = {name: kwargs[name] for name in sorted(kwargs) if name in self._donated[1]}
        others = {name: kwargs[name] for name in sorted(kwargs) if name not in {*static_names, *given_away}}
        dynamic = [i for i in range(len(args)) if i not in static]
        specs = _specs(tuple(args[i] for i in dynamic), self._options.in_shardings)
        named = tuple(map(_specs, filter(None, (others, given_away))))

        def pure(*given: Any) -> Any:
            values, extra = given[: len(dynamic)], given[len(dynamic) :]
            full = static | dict(zip(dynamic, values, strict=True))
            merged = static_names | {name: value for part in extra for name, value in part.items()}
            return fun(*(full[i] for i in range(num_args)), **merged)

        donated = _positions(self._donated[0], len(args))
        away = [k for k, i in enumerate(dynamic) if i in donated]
        away += [len(specs) + len(named) - 1] if given_away else []
        whole = (*specs, *named)
        statics = tuple((type(x), x) for x in (*static.values(), *static_names.values()))
        return PureCall(
            fun=pure,
            args=whole,
            donate_argnums=tuple(away),
            same=(jax.tree.structure(whole), tuple(static), tuple(static_names), statics, _avals(whole)),
            shapes=tuple(leaf.shape for leaf in jax.tree.leaves(whole)),
        )


class NnxForm(PlainForm):
    """Arguments with objects of flax NNX: what the step changes in them is changed after each call."""

    def __init__(self, fun: Callable, options: JitOptions):
        super().__init__(fun, options)
        self._fun = fun
        # What is donated comes back whatever became of it.
        self._returns_all = any(map(bool, self._donated))

    def jitted(self, fun: Callable) -> Callable:
        """The function of the objects' structure and state, under `jax.jit`."""
        return super().jitted(nnx.Carried(fun, self._returns_all))

    def caller(self, jitted: Callable) -> Callable:
        """What is called with users' arguments."""

        def call(*args: Any, **kwargs: Any) -> Any:
            state = self._pure(self._fun, args, kwargs)
            return state.finish(jitted(*state.args, **state.kwargs))

        return call

    def split(self, fun: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PureCall:
        """A call as a function of specs."""
        state = self._pure(fun, args, kwargs)
        return super().split(state.fun, state.args, state.kwargs)

    def _pure(self, fun: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nnx.Pure:
        return nnx.pure(fun, args, kwargs, returns_all=self._returns_all)


class EquinoxForm:
    """Arguments with Equinox modules: arrays are traced, the modules' other fields are static by value.

    Outside of modules numbers, True and False are traced, as in `jax.jit`.
    """

    def __init__(self, fun: Callable, options: JitOptions):
        if options.in_shardings is not None or options.out_shardings is not None:
            raise OptionError(
                "in_shardings and out_shardings cannot say which leaves of Equinox modules are arrays; "
                "put the arrays where they belong with jax.device_put"
            )
        self._options = options
        self._static = places_and_names(fun, options.static_argnums, options.static_argnames)
        self._donated = places_and_names(fun, options.donate_argnums, options.donate_argnames, "donate")

    def jitted(self, fun: Callable) -> Callable:
        """The function of static values, of donated leaves and of others, under `jax.jit`."""

        def flat(static: _Static, donated: list[Any], kept: list[Any]) -> Any:
            return _Result.of(static.call(fun, donated, kept))

        return jax.jit(flat, static_argnums=0, donate_argnums=1, **self._options.rest)

    def caller(self, jitted: Callable) -> Callable:
        """What is called with users' arguments."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return jitted(*self._parts(args, kwargs)).whole()

        return call

    def split(self, fun: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PureCall:
        """A call as a function of specs."""
        static, *dynamic = self._parts(args, kwargs)
        specs = tuple(map(_specs, dynamic))
        return PureCall(
            fun=lambda donated, kept: _Result.of(static.call(fun, donated, kept)),
            args=specs,
            donate_argnums=(0,),
            same=(static, _avals(specs)),
            shapes=tuple(leaf.shape for leaf in jax.tree.leaves(specs)),
        )

    def _parts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "tuple[_Static, list[Any], list[Any]]":
        static, away = (_positions(numbers, len(args)) for numbers, _ in (self._static, self._donated))
        owners = [
            *((x, i in static, i in away) for i, x in enumerate(args)),
            *((kwargs[n], n in self._static[1], n in self._donated[1]) for n in sorted(kwargs)),
        ]
        leaves, places = [], []
        parts: tuple[list[Any], list[Any]] = ([], [])
        for value, is_static, is_away in owners:
            if is_static:
                leaves.append(value)
                places.append(None)
                continue
            for leaf, dyn in zip(jax.tree.leaves(value), _dynamic(value), strict=True):
                leaves.append(None if dyn else leaf)
                places.append(is_away if dyn else None)
                if dyn:
                    parts[0 if is_away else 1].append(leaf)
        names = tuple(sorted(kwargs))
        trees = tuple(_Whole if is_static else jax.tree.structure(value) for value, is_static, _ in owners)
        return _Static(len(args), names, trees, tuple(leaves), tuple(places)), *parts


_Whole = jax.tree.structure(0)


def form_of(fun: Callable, options: JitOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The form that a call's arguments ask for."""
    if nnx.has_objects(fun, args, kwargs):
        return NnxForm(fun, options)
    equinox = sys.modules.get("equinox")
    if equinox is not None:
        module = equinox.Module
        is_module = lambda x: isinstance(x, module)  # noqa: E731
        for node in jax.tree.leaves((args, kwargs), is_leaf=is_module):
            if is_module(node) and not all(traced_leaves(node)):
                return EquinoxForm(fun, options)
    return PlainForm(fun, options)


class _Static:
    """What of a call is static, compared by type and value, and how its leaves are put together again."""

    def __init__(self, num_args: int, names: tuple[str, ...], trees: tuple, leaves: tuple, places: tuple):
        self.num_args, self.names, self.trees, self.leaves, self.places = num_args, names, trees, leaves, places
        # Static fields of modules are in their trees.
        self._key = (num_args, names, tuple(map(_tree_key, trees)), tuple(map(_static_key, leaves)), places)
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key == other._key

    def call(self, fun: Callable, donated: Sequence[Any], kept: Sequence[Any]) -> Any:
        parts = {True: iter(donated), False: iter(kept)}
        leaves = iter(
            [x if where is None else next(parts[where]) for x, where in zip(self.leaves, self.places, strict=True)]
        )
        values = [tree.unflatten([next(leaves) for _ in range(tree.num_leaves)]) for tree in self.trees]
        return fun(*values[: self.num_args], **dict(zip(self.names, values[self.num_args :], strict=True)))


@jax.tree_util.register_pytree_node_class
class _Result:
    """A result whose leaves that are no arrays travel beside them."""

    def __init__(self, arrays: Sequence[Any], static: _Static):
        self.arrays, self.static = arrays, static

    @classmethod
    def of(cls, value: Any) -> "_Result":
        leaves, tree = jax.tree.flatten(value)
        is_array = _dynamic(value)
        static = tuple(None if dyn else leaf for leaf, dyn in zip(leaves, is_array, strict=True))
        arrays = [leaf for leaf, dyn in zip(leaves, is_array, strict=True) if dyn]
        return cls(arrays, _Static(1, (), (tree,), static, tuple(False if dyn else None for dyn in is_array)))

    def whole(self) -> Any:
        return self.static.call(lambda value: value, (), self.arrays)

    def tree_flatten(self) -> tuple[Sequence[Any], _Static]:
        return self.arrays, self.static

    @classmethod
    def tree_unflatten(cls, static: _Static, arrays: Any) -> "_Result":
        return cls(list(arrays), static)


def _dynamic(value: Any) -> tuple[bool, ...]:
    """Which leaves are traced: as everywhere, and True and False outside of modules too."""
    module = sys.modules["equinox"].Module
    found: list[bool] = []
    for node in jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, module)):
        found += traced_leaves(node) if isinstance(node, module) else [isinstance(node, bool) or traced_leaves(node)[0]]
    return tuple(found)


def _tree_key(tree: Any) -> Hashable:
    try:
        return tree_key(tree)
    except ChangingError:
        return tree


def _static_key(value: Any) -> Hashable:
    try:
        return key_of(value)
    except ChangingError:
        return type(value), value  # as `equinox.filter_jit` has it


def _specs(tree: Any, shardings: Any = None) -> Any:
    if shardings is None:
        return jax.tree.map(_spec, tree)
    is_leaf = lambda x: x is None  # noqa: E731
    full = jax.tree.broadcast(shardings, tree, is_leaf=is_leaf)
    return jax.tree.map(lambda s, x: _spec(x, s), full, tree, is_leaf=is_leaf)


def _spec(leaf: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    """What is planned for in place of a leaf: its shape, dtype and weak type, and where it lies if that matters."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        weak, shape, dtype = leaf.weak_type, leaf.shape, leaf.dtype
    else:
        aval = jax.typeof(leaf)
        weak, shape, dtype = getattr(aval, "weak_type", False), aval.shape, aval.dtype
    if isinstance(sharding, PartitionSpec):
        sharding = NamedSharding(jax.sharding.get_mesh(), sharding)
    placed = sharding or _placed(leaf)
    return jax.ShapeDtypeStruct(shape, dtype, weak_type=weak, sharding=placed)


def _placed(leaf: Any) -> Any:
    """A leaf's sharding, None where it is on one device and might as well be on another."""
    found = getattr(leaf, "sharding", None)
    if found is None:
        return None
    if found.num_devices > 1:
        return found
    if not getattr(leaf, "committed", not isinstance(leaf, jax.Array)):
        return None
    (device,) = found.device_set
    default = _compat.default_device()
    return found if getattr(default, "device_kind", None) != device.device_kind else None


def _avals(specs: Any) -> tuple[Any, ...]:
    return tuple((x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(specs))


def _positions(numbers: Sequence[int], num_args: int) -> set[int]:
    return {n % num_args for n in numbers if -num_args <= n < num_args}
