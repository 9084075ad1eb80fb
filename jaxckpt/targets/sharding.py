"""Arguments that lie on several devices: meshes of chips that are not here, and bytes per device."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxckpt import _compat
from jaxckpt.errors import ShardingError
from jaxckpt.program.describe import show_aval
from jaxckpt.program.ir import Program, size_bytes
from jaxckpt.program.nnx import pure
from jaxckpt.program.trace import Traced, trace
from jaxckpt.targets.chip import find_chip, find_target, topology_of
from jaxckpt.targets.topology import devices_for

# What is smaller lies on every device if nobody says where: step counters, keys, learning rates.
_SMALL_BYTES = 1024
# JAX's name of the host's memory from which devices read.
HOST = "pinned_host"


def mesh(
    target: str | None,
    axis_sizes: Mapping[str, int] | Sequence[int],
    axis_names: Sequence[str] = (),
    *,
    axis_types: Sequence[AxisType] | None = None,
) -> Mesh:
    """Make a mesh of a target's devices, none of which has to be here.

    Specs whose shardings are on it compile for that target in `plan`, `measure` and `fit`, and sizes are per device.

    Args:
        target: a chip and a topology, such as "v5e:2x4" or "h100:8"; None is the devices that are here.
        axis_sizes: sizes by name, such as `{"data": 4, "model": 2}`, or in order.
        axis_names: their names, where `axis_sizes` has none.
        axis_types: as in `jax.make_mesh`; None leaves every axis to the compiler (`AxisType.Auto`).

    Returns:
        The mesh.

    Raises:
        ShardingError: the sizes do not multiply to the number of devices, or there is not one name for each.
        TargetError: an unknown target or topology, or a compiler that is not here.

    Example:
        >>> mesh("cpu:8", {"data": 4, "model": 2}).shape["data"]
        4
    """
    names = tuple(axis_sizes) if isinstance(axis_sizes, Mapping) else tuple(axis_names)
    sizes = tuple(axis_sizes.values()) if isinstance(axis_sizes, Mapping) else tuple(axis_sizes)
    if len(names) != len(sizes):
        raise ShardingError(f"axis_names={names!r} and axis_sizes={sizes!r} are not of one length")
    devices = devices_of(target)
    if math.prod(sizes) != len(devices):
        shown = " x ".join(map(str, sizes)) or "1"
        raise ShardingError(
            f"axis_sizes={shown} is {math.prod(sizes)} devices, and target={target!r} has {len(devices)}"
        )
    kinds = tuple(axis_types) if axis_types is not None else (AxisType.Auto,) * len(names)
    return jax.make_mesh(sizes, names, axis_types=kinds, devices=devices)


def devices_of(target: str | None) -> tuple[Any, ...]:
    """The devices that a target's name stands for, real or described."""
    if target is None:
        return tuple(jax.devices())
    return devices_for(find_chip(target), topology_of(target))


def trace_placed(
    fun: Callable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] = MappingProxyType({}),
    *,
    keep_checkpoints: bool = True,
) -> Traced:
    """Trace a function, and note on which devices its arguments lie.

    Raises:
        ShardingError: some arguments lie on several devices, and one that is not small does not say where it does.
    """
    call = pure(fun, tuple(args), kwargs)
    traced = trace(call.fun, call.args, call.kwargs, keep_checkpoints=keep_checkpoints)
    leaves = traced.dynamic(jax.tree.leaves((call.args, call.kwargs)))
    if (variables := call.variables()) is not None:
        own_tree, _ = traced.out_tree.children()  # beside the state
        traced = replace(traced, out_tree=own_tree, variables=traced.dynamic(variables))
    names = [*(f"closed-over array {i}" for i in range(len(traced.consts))), *traced.arg_names]
    found = completed([*map(_replicable, traced.consts), *leaves], names)
    return replace(traced, program=replace(traced.program, shardings=found)) if any(found) else traced


def described(target: str | None) -> AbstractContextManager:
    """Inside, functions are traced, and lowered later, for a target's device, which does not have to be here.

    Raises:
        TargetError: an unknown target.
    """
    if target is None:
        return nullcontext()
    chip = find_target(target)
    return _compat.described_device(chip.kind, chip.platform)


def completed(leaves: Sequence[Any], names: Sequence[str]) -> tuple[Any, ...]:
    """The sharding of each leaf, those that are small and have none on every device; all None on one device.

    Raises:
        ShardingError: a leaf without a sharding among others that have one, by its name.
    """
    found = [_sharding(leaf) for leaf in leaves]
    first: Any = next(filter(None, found), None)
    if first is None:
        return (None,) * len(found)
    everywhere = on_every_device(leaves)
    for i, leaf in enumerate(leaves):
        if found[i] is not None:
            continue
        if everywhere is None or not (isinstance(leaf, _Closed) or size_bytes(jax.typeof(leaf)) <= _SMALL_BYTES):
            raise ShardingError(
                f"{names[i]}: {show_aval(jax.typeof(leaf))} has no sharding, while other arguments lie on "
                f"{first.num_devices} devices; give its spec sharding=NamedSharding(mesh, PartitionSpec(...)), with an "
                "empty PartitionSpec() if every device holds all of it"
            )
        found[i] = everywhere
    return tuple(found)


def on_every_device(leaves: Sequence[Any]) -> NamedSharding | None:
    """What lies whole on every device that these leaves lie on; None on one device, or where nobody knows."""
    first = next(filter(None, map(_sharding, leaves)), None)
    return NamedSharding(first.mesh, PartitionSpec()) if isinstance(first, NamedSharding) else None


class _Closed:
    """A closed-over array without a sharding: JAX puts it on every device."""

    sharding = None


def _replicable(const: Any) -> Any:
    return const if _sharding(const) is not None else _Closed()


def _sharding(leaf: Any) -> Any:
    """A leaf's sharding if it is on several devices."""
    if isinstance(leaf, Tracer):
        return None
    found = getattr(leaf, "sharding", None)
    return found if found is not None and found.num_devices > 1 else None


def local_bytes(aval: Any, sharding: Any) -> int:
    """Bytes that one device holds of an array."""
    if sharding is None:
        return size_bytes(aval)
    return -(-size_bytes(aval) // num_shards(aval, sharding))


def num_shards(aval: Any, sharding: Any) -> int:
    """Into how many parts an array is cut."""
    whole, part = math.prod(aval.shape), math.prod(sharding.shard_shape(aval.shape))
    return max(1, whole // max(1, part))


def program_split(program: Program) -> int:
    """Over how many devices the values of a program are taken to be cut: as its most finely cut argument is."""
    pairs = zip(program.inputs, program.shardings, strict=False)
    return max((num_shards(program.avals[v], s) for v, s in pairs if s is not None), default=1)


def step_split(args: Any) -> int:
    """The same for the arguments of a step."""
    pairs = ((leaf, _sharding(leaf)) for leaf in jax.tree.leaves(args))
    return max((num_shards(leaf, sharding) for leaf, sharding in pairs if sharding is not None), default=1)


def place(specs: Sequence[Any], target: str | None) -> tuple[list[Any], int]:
    """Put argument specs on a target's devices.

    Args:
        specs: pytrees of arrays or specs.
        target: as users write it.

    Returns:
        The specs with their shardings, unchanged where nothing is named and nothing sharded, and the number of devices.

    Raises:
        ShardingError: specs of several devices that are not the target's, or of which some are missing.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(list(specs))
    leaves = [leaf for _, leaf in paths]
    found = completed(leaves, [f"args{jax.tree_util.keystr(path)}" for path, _ in paths])
    number = max((s.num_devices for s in found if s is not None), default=1)
    if number == 1:
        if target is None:
            return list(specs), 1
        device = devices_of(target)[0]
        found = tuple(jax.sharding.SingleDeviceSharding(device, memory_kind=host_memory(x)) for x in leaves)
    else:
        found = tuple(_on_target(sharding, target) for sharding in found)
    placed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s, weak_type=getattr(x, "weak_type", False))
        for x, s in zip(leaves, found, strict=True)
    ]
    return jax.tree.unflatten(tree, placed), number


def without_values(tree: Any) -> Any:
    """A tree whose arrays are specs: who holds it keeps no array alive."""
    return jax.tree.map(_without_value, tree)


def _without_value(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
    if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array):
        return leaf
    # One that nobody put on its device may as well be on another.
    sharding = leaf.sharding if getattr(leaf, "committed", False) else None  # keys do not say
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=getattr(leaf, "weak_type", False))


def is_on_host(sharding: Any) -> bool:
    """Whether an array with this sharding lives in the host's memory."""
    return getattr(sharding, "memory_kind", None) == HOST


def host_memory(leaf: Any) -> str | None:
    """The kind of the host's memory that an argument lives in; None where it lives on its device."""
    return HOST if not isinstance(leaf, Tracer) and is_on_host(getattr(leaf, "sharding", None)) else None


def _on_target(sharding: Any, target: str | None) -> Any:
    """A sharding on the target's devices; an abstract mesh has none of its own and gets them."""
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        shape = sharding.mesh
        real = mesh(target, shape.axis_sizes, shape.axis_names, axis_types=shape.axis_types)
        return NamedSharding(real, sharding.spec, memory_kind=sharding.memory_kind)
    device = min(sharding.device_set, key=lambda d: d.id)
    chip = find_target(target)
    if target is None:
        is_right = device.platform == jax.default_backend()
    else:
        is_right = device.device_kind == chip.kind if chip.kind else device.platform == chip.platform
    wanted = None if target is None else topology_of(target)
    if is_right and wanted is not None and sharding.num_devices != len(devices_of(target)):
        is_right = False
    if not is_right:
        there = f"{len(devices_of(target))} devices of {chip.kind or chip.platform}"
        raise ShardingError(
            f"the arguments lie on {sharding.num_devices} devices of {device.device_kind}, and target={target!r} is "
            f"{there}; make their mesh with jaxckpt.mesh(target, ...), and plan for that target"
        )
    return sharding
