"""A whole step with its plans, as a record."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from jaxckpt.compilation.files import write_text
from jaxckpt.compilation.measure import Measurement
from jaxckpt.errors import OptionError
from jaxckpt.result.notebook import report_html
from jaxckpt.result.page import vega
from jaxckpt.result.page.content import Content, Reading
from jaxckpt.result.page.page import page_html
from jaxckpt.result.page.reading import read_step
from jaxckpt.result.plan import Plan
from jaxckpt.result.report import show_step
from jaxckpt.search.step_search import FoundStep
from jaxckpt.units import show_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A step whose plans fit.

    Attributes:
        step: jitted, with the plans inside. At other trees, shapes or dtypes it raises `PlanMismatchError`.
        plans: of the decorated functions, in the order they are differentiated. Their peaks are predicted: it is the
            step that was measured.
        measurement: of the whole step.
        unplanned: the same without plans; None where it was expected so far above the budget, in bytes, that nobody
            compiled it.
        budget_bytes: what had to hold it.
        num_compiles: how many steps were compiled to find it.
        is_stopped: whether `max_compiles` ended the search before there was nothing left that is worth a compile.
        constant_bytes: of the arrays that the step closes over, which are constants of its program, as in `Plan`.
        next_bytes: the least that was measured at the next larger batch, which does not fit; None from `fit`, and where
            the global batch fits.
        calibration: the hash of the record it was found with; None without one.
        batch: what `largest_batch` found; None from `fit`.
        global_batch: as `largest_batch` was given it.
        found: what the search chose it from, to compile it again; no part of its JSON.
    """

    step: Callable
    plans: tuple[Plan, ...]
    measurement: Measurement
    unplanned: Measurement | None
    budget_bytes: int
    num_compiles: int
    is_stopped: bool = False
    constant_bytes: int = 0
    batch: int | None = None
    next_bytes: int | None = None
    global_batch: int | None = None
    calibration: str | None = None
    found: FoundStep | None = field(default=None, repr=False, compare=False)

    @property
    def accumulation_steps(self) -> int | None:
        """How many batches make the global batch; None without one."""
        return None if self.global_batch is None or self.batch is None else self.global_batch // self.batch

    def __str__(self) -> str:
        """The report a person reads."""
        return self.report()

    def report(self, *, color: bool = False, width: int = 80, all_rows: bool = False) -> str:
        """The report a person reads.

        Args:
            color: with terminal colours.
            width: columns.
            all_rows: whether to show every row of what is saved, and not the ten largest.
        """
        return show_step(self, more=self._batch_rows(), color=color, width=width, all_rows=all_rows)

    def _repr_html_(self) -> str:
        """The report, as notebooks show it."""
        return report_html(str(self))

    def to_html(
        self,
        *,
        path: str | os.PathLike | None = None,
        reading: Reading | None = None,
        name: str = "",
        command: str = "",
        source: bool = False,
    ) -> str:
        """One page about the step that needs nothing from anywhere: its memory over time with the plans and without.

        Args:
            path: a file to write it to.
            reading: of the compiled programs, where they were read already.
            name: of the step, as the page has it.
            command: that makes the page, as the page has it.
            source: whether the page shows the text of source lines.

        Returns:
            The page, the same text for the same step and versions.

        Raises:
            OptionError: the extra `html` is not installed, or the step was not made by `fit` or `largest_batch`.
        """
        vega.check_installed()
        reading = reading or self.read(source=source)
        name = name or getattr(self.step, "__name__", "step")
        text = page_html(Content(name=name, plans=self.plans, step=self, reading=reading, command=command))
        if path is not None:
            write_text(path, text)
        return text

    def read(self, *, source: bool = False) -> Reading:
        """Compile the step again, with its plans and without, and read where its bytes go.

        Args:
            source: whether the text of source lines is read too.

        Raises:
            OptionError: the step was not made by `fit` or `largest_batch`.
        """
        if self.found is None:
            raise OptionError("this step cannot be compiled again; make it with fit or largest_batch")
        return read_step(self.found, source=source)

    def _batch_rows(self) -> list[tuple[str, str, str]]:
        if self.batch is None:
            return []
        rows = [("batch", f"{self.batch:,}", "measured to fit")]
        if self.next_bytes is not None:
            rows.append(("next larger batch", show_bytes(self.next_bytes), "measured, does not fit"))
        if self.global_batch is not None:
            said = f"make a global batch of {self.global_batch:,}"
            rows.append(("accumulation steps", f"{self.accumulation_steps:,}", said))
        return rows

    def to_json(self) -> dict[str, Any]:
        """Its numbers and plans as plain data, under the names of its attributes."""
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("step", "found")}
        data["accumulation_steps"] = self.accumulation_steps
        data["measurement"] = asdict(self.measurement)
        data["unplanned"] = None if self.unplanned is None else asdict(self.unplanned)
        data["plans"] = [plan.to_json() for plan in self.plans]
        return json.loads(json.dumps(data))  # lists for tuples
