"""What a page is about, as records, whatever made it: one plan, or a step with several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxckpt.compilation.buffers import CompiledMemory
from jaxckpt.result._protocols import FrontierLike, PlanLike, StepLike


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The compiled programs with a plan and without.

    Attributes:
        unplanned: memory of the program as it is; None where it was not read.
        planned: memory of the program under the plan; None where it was not read.
        why_not: why one of them is not there; empty where both are.
        costs: of the value and gradient by source line, without a plan and with it; None where they were not counted.
        texts: `file:line` -> the text of the line, where sources are shown.
    """

    unplanned: CompiledMemory | None = None
    planned: CompiledMemory | None = None
    why_not: str = ""
    costs: tuple[Mapping[str, int], Mapping[str, int]] | None = None
    texts: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """All that a page says.

    Attributes:
        name: of the function or the step.
        plans: of one function, or of all that a step differentiates.
        step: the whole step; None where the page is about one function.
        reading: what was compiled.
        frontier: of the function; None without one.
        command: that makes the page again; empty where it is not known.
    """

    name: str
    plans: Sequence[PlanLike]
    reading: Reading
    step: StepLike | None = None
    frontier: FrontierLike | None = None
    command: str = ""
