"""The few fields of XLA's `HloProto` that are read, with descriptors made at run time: no package ships them alone.

Numbers are those of XLA's `hlo.proto` and `xla_data.proto`. A field that is not listed here is skipped by protobuf.
"""

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from jaxckpt.errors import ProgramFormatError

_PACKAGE = "jaxckpt.hlo"
_KINDS: dict[str, Any] = {"int": 3, "bool": 8, "str": 9}
_MESSAGE: Any = 11
_ONE, _MANY = 1, 3
# Of each message its fields: name, number, type; "*" before a type is a list of it.
_FIELDS = {
    "Layout": (("minor_to_major", 1, "*int"), ("memory_space", 8, "int")),
    "Shape": (
        ("element_type", 2, "int"),
        ("dimensions", 3, "*int"),
        ("tuple_shapes", 4, "*Shape"),
        ("layout", 5, "Layout"),
    ),
    "Metadata": (("op_name", 2, "str"), ("source_file", 3, "str"), ("source_line", 4, "int"), ("frame", 15, "int")),
    "Aliasing": (
        ("output_index", 1, "*int"),
        ("operand", 2, "int"),
        ("operand_index", 3, "*int"),
    ),
    "Instruction": (
        ("name", 1, "str"),
        ("opcode", 2, "str"),
        ("shape", 3, "Shape"),
        ("metadata", 7, "Metadata"),
        ("parameter_number", 9, "int"),
        ("tuple_index", 13, "int"),
        ("custom_call_target", 28, "str"),
        ("id", 35, "int"),
        ("operands", 36, "*int"),
        ("called", 38, "*int"),
        ("aliasing", 74, "*Aliasing"),
    ),
    "Computation": (
        ("name", 1, "str"),
        ("instructions", 2, "*Instruction"),
        ("id", 5, "int"),
        ("root", 6, "int"),
    ),
    "Sequence": (("instructions", 1, "*int"),),
    "SequenceEntry": (("key", 1, "int"), ("value", 2, "Sequence")),
    "Schedule": (("sequences", 1, "*SequenceEntry"),),
    "AliasEntry": (
        ("output_index", 1, "*int"),
        ("parameter", 2, "int"),
        ("parameter_index", 3, "*int"),
        ("kind", 4, "int"),
    ),
    "Aliases": (("entries", 1, "*AliasEntry"),),
    "Location": (("file", 1, "int"), ("function", 2, "int"), ("line", 3, "int")),
    "Frame": (("location", 1, "int"), ("parent", 2, "int")),
    "Frames": (
        ("files", 1, "*str"),
        ("functions", 2, "*str"),
        ("locations", 3, "*Location"),
        ("frames", 4, "*Frame"),
    ),
    "Module": (
        ("name", 1, "str"),
        ("computations", 3, "*Computation"),
        ("entry", 6, "int"),
        ("schedule", 7, "Schedule"),
        ("aliases", 8, "Aliases"),
        ("frames", 17, "Frames"),
    ),
    "DefinedAt": (("index", 3, "*int"), ("instruction", 4, "int")),
    "LogicalBuffer": (("id", 1, "int"), ("size", 2, "int"), ("defined_at", 3, "DefinedAt"), ("color", 4, "int")),
    "Assigned": (("buffer", 1, "int"), ("offset", 2, "int"), ("size", 3, "int")),
    "Allocation": (
        ("index", 1, "int"),
        ("size", 2, "int"),
        ("is_thread_local", 3, "bool"),
        ("is_parameter", 5, "bool"),
        ("parameter_number", 6, "int"),
        ("is_result", 7, "bool"),
        ("color", 8, "int"),
        ("assigned", 9, "*Assigned"),
        ("is_tuple", 11, "bool"),
        ("is_constant", 12, "bool"),
    ),
    "Event": (("kind", 1, "int"), ("buffer", 2, "int"), ("shares_with", 5, "int")),
    "Trace": (("events", 1, "*Event"), ("allocation", 3, "int")),
    "Assignment": (
        ("buffers", 1, "*LogicalBuffer"),
        ("allocations", 3, "*Allocation"),
        ("traces", 4, "*Trace"),
    ),
    "Program": (("module", 1, "Module"), ("assignment", 3, "Assignment")),
}


def parse(content: bytes) -> Any:
    """Read a serialized `HloProto`.

    Raises:
        ProgramFormatError: it is none, or lacks what every scheduled program has.
    """
    try:
        program = _program_class().FromString(content)
    except (DecodeError, ValueError) as error:
        raise ProgramFormatError(f"XLA's description of the compiled program cannot be read: {error}") from error
    if not program.module.computations:
        raise ProgramFormatError("XLA's description of the compiled program has no computations")
    return program


def serialized(**parts: Any) -> bytes:
    """The bytes of a program with these parts, as plain nested data; for tests and for tools."""
    return _program_class()(**parts).SerializeToString()


@functools.cache
def _program_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="jaxckpt_hlo.proto", package=_PACKAGE, syntax="proto3")
    for message, fields in _FIELDS.items():
        made = file.message_type.add(name=message)
        for name, number, kind in fields:
            field = made.field.add(name=name, number=number, label=_MANY if kind[0] == "*" else _ONE)
            kind = kind.lstrip("*")
            field.type = _KINDS.get(kind, _MESSAGE)
            if kind not in _KINDS:
                field.type_name = f".{_PACKAGE}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Program"))
