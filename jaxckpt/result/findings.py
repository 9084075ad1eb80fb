"""The parts of a diagnosis: what is wrong, the checkpoints, where the bytes are, what plans would take."""

from dataclasses import dataclass
from typing import Literal

Label = Literal["measured", "predicted", "counted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: a stable name, one of `diagnosis.texts.TEXTS`.
        source: the user's line; empty where it is none's.
        text: what is the case.
        advice: what to do.
        size_bytes: device bytes that the advice spares, below 0 where it takes more; None where it is not about bytes.
        flops: of one run, those that the advice spares; None where it is not about work.
        label: where the bytes come from: from compiling the program as it is and as advised (measured), from the model
            (predicted), or from shapes in the traced program (counted).
    """

    kind: str
    source: str
    text: str
    advice: str
    size_bytes: int | None
    flops: int | None
    label: Label


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The `jax.checkpoint` calls of one line.

    Attributes:
        source: the line.
        count: how many there are in the program; those in a loop once.
        policy: what they save, in a few words.
        saved_bytes: device bytes that the program takes more without them; None where that is not known.
        recomputed_flops: what one run does more with them.
        label: whether the bytes are measured or predicted.
    """

    source: str
    count: int
    policy: str
    saved_bytes: int | None
    recomputed_flops: int
    label: Label


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Bytes of the buffers at the peak that have a scope or a line in common.

    Attributes:
        label: the scope or the line.
        size_bytes: on each device.
    """

    label: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Where the bytes of the compiled program are at its peak.

    Attributes:
        scopes: by scope, largest first.
        lines: by line of source, largest first.
        padding_bytes: what layouts add to the elements, in buffers that are live there.
        gap_bytes: of the heap, where no buffer is at that step.
        is_estimated: whether the buffers come from shapes, for want of the compiler's assignment.
    """

    scopes: tuple[Share, ...]
    lines: tuple[Share, ...]
    padding_bytes: int
    gap_bytes: int
    is_estimated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a plan in place of the function's own checkpoints would take.

    Attributes:
        device_bytes: of the program under it.
        recomputed_flops: of the differentiated functions, beyond those without any checkpoint.
        label: whether the bytes are measured or predicted; work is counted.
    """

    device_bytes: int
    recomputed_flops: int
    label: Label


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """What was found of a function that has checkpoints of its own.

    Attributes:
        name: the function's.
        target: for which chip.
        is_step: whether it was taken as it is, or differentiated first.
        device_bytes: of the compiled program, measured, on each device.
        argument_bytes: of them, arguments.
        output_bytes: results.
        temp_bytes: temporaries.
        bare_bytes: the same program without any checkpoint, measured; None where there is none, or no compile was left.
        flops: of one run.
        bare_flops: without checkpoints.
        findings: what is wrong, most bytes first.
        checkpoints: the function's own, by line.
        where: the bytes at the peak; None where the compiler's description could not be read.
        num_asked: products and convolutions that checkpoints make again in the program that the compiler was given.
        num_recomputed: of those, how many are in what it made; None where that is not known.
        num_rematerialized: instructions that XLA's own rematerialization made again.
        flags: settings in force that decide which recomputation survives.
        notes: what could not be looked at, and why.
        same_cost: a plan that recomputes no more; None where there is none, or it was not asked for.
        same_bytes: a plan that takes no more bytes.
        num_compiles: how many programs were compiled.
    """

    name: str
    target: str
    is_step: bool
    device_bytes: int
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    bare_bytes: int | None
    flops: int
    bare_flops: int
    findings: tuple[Finding, ...]
    checkpoints: tuple[Checkpoint, ...]
    where: Where | None
    num_asked: int | None
    num_recomputed: int | None
    num_rematerialized: int | None
    flags: tuple[str, ...]
    notes: tuple[str, ...]
    same_cost: Offer | None
    same_bytes: Offer | None
    num_compiles: int
