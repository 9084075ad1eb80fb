"""The errors users meet. Each is a sentence that says what to do next; numbers are attributes."""

SEE_DOCTOR = (
    "`jaxckpt doctor` on the same function or step (in Python jaxckpt.doctor) says where its bytes go, and which of "
    "its own jax.checkpoint calls do nothing."
)


def advise(error: Exception) -> None:
    """Let an error of a compiler or a device that has no memory left say what to do next."""
    if "RESOURCE_EXHAUSTED" in str(error) and SEE_DOCTOR not in getattr(error, "__notes__", ()):
        error.add_note(SEE_DOCTOR)


class JaxckptError(Exception):
    """Base of every error jaxckpt raises on purpose."""


class JaxckptWarning(UserWarning):
    """Something works but not as hoped, with what to do."""


class BudgetError(JaxckptError, ValueError):
    """A budget, reserve or max_cost that cannot be read."""


class OptionError(JaxckptError, ValueError):
    """An option that is not one of those there are."""


class InfeasibleBudgetError(JaxckptError):
    """No plan fits the budget.

    Attributes:
        budget_bytes: what was asked for, `reserve` taken off.
        least_peak_bytes: the least peak, measured: a budget of as many bytes has a plan. None where it was not
            measured.
        expected_least_bytes: the same, predicted where it was not measured.
        unplanned_peak_bytes: the peak without a plan.
        measured: whether the unplanned peak was measured, or predicted.
        num_compiles: how many programs were compiled to find that out.
        forced_by: what stands at the least plan's peak, largest first: (what, bytes, source line).
    """

    def __init__(
        self,
        message: str,
        *,
        budget_bytes: int,
        least_peak_bytes: int | None,
        expected_least_bytes: int,
        unplanned_peak_bytes: int,
        measured: bool,
        num_compiles: int,
        forced_by: tuple[tuple[str, int, str], ...],
    ):
        # Where several processes plan, each raises what the first one said.
        super().__init__(message if SEE_DOCTOR in message else f"{message.rstrip()}\n{SEE_DOCTOR}")
        self.budget_bytes = budget_bytes
        self.least_peak_bytes = least_peak_bytes
        self.expected_least_bytes = expected_least_bytes
        self.unplanned_peak_bytes = unplanned_peak_bytes
        self.measured = measured
        self.num_compiles = num_compiles
        self.forced_by = forced_by


class NotDifferentiableError(JaxckptError, TypeError):
    """Nothing to differentiate: no floating-point argument, or an output that no gradient flows from."""


class PlanFileError(JaxckptError, ValueError):
    """A file that is not a plan, is damaged, or was written by a newer version."""


class PlanMismatchError(JaxckptError, ValueError):
    """A plan that was made for another function, other shapes, or another version of JAX."""


class UnsupportedProgramError(JaxckptError, NotImplementedError):
    """A program that cannot be planned, with the line that stands in the way."""


class TargetError(JaxckptError, ValueError):
    """A target that is unknown, has no such topology, or whose compiler cannot be used."""


class CompilerError(TargetError):
    """A target's compiler that is not installed, does not match this JAX, or failed: nothing can be measured."""


class ShardingError(JaxckptError, ValueError):
    """Arguments that lie on several devices in a way that cannot be compiled."""


class ProgramFormatError(CompilerError):
    """A compiled program whose description by XLA is not as jaxckpt knows it: nothing is guessed about it."""
