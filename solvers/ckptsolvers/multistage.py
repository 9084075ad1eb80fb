"""Binomial checkpointing with two kinds of memory, fast and few slots and slow and many.

"MultiStage approaches for optimal offline checkpointing" (Stumm, Walther, 2009). The schedule is revolve's for all
slots together, so the number of forward steps is the least there is; each slot of revolve's stack is given the kind of
memory by how often it is written and read: the busiest slots are the fast ones. Optimal in forward steps, and among
such schedules in slow accesses for revolve's stack with a fixed kind per slot.

O(number of actions).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ckptsolvers.errors import InvalidProblemError
from ckptsolvers.revolve import Action, revolve_actions


@dataclass(frozen=True, slots=True)
class StagedAction:
    """An action of `revolve_actions` and, for store, restore and drop, whether the state lies in fast memory."""

    action: Action
    slot: int | None
    is_fast: bool


def multistage_actions(num_steps: int, num_fast_states: int, num_slow_states: int) -> Iterator[StagedAction]:
    """Yield the actions that reverse a chain with states in two kinds of memory.

    Args:
        num_steps: n.
        num_fast_states: states that fit in fast memory.
        num_slow_states: states that fit in slow memory. The initial state counts as one of either.

    Raises:
        InvalidProblemError: no step, no state, or a negative count.
    """
    if num_fast_states < 0 or num_slow_states < 0:
        raise InvalidProblemError(f"{num_fast_states=} and {num_slow_states=} must not be negative")
    actions = list(revolve_actions(num_steps, num_fast_states + num_slow_states))
    slots = _slots(actions)
    uses = Counter(
        slot for action, slot in zip(actions, slots, strict=True) if slot is not None and action.kind != "drop"
    )
    fast = set(sorted(uses, key=lambda slot: (-uses[slot], slot))[:num_fast_states])
    for action, slot in zip(actions, slots, strict=True):
        yield StagedAction(action, slot, slot in fast)


def num_slow_accesses(num_steps: int, num_fast_states: int, num_slow_states: int) -> int:
    """How many stores and restores of the schedule go to slow memory."""
    return sum(
        staged.slot is not None and not staged.is_fast and staged.action.kind != "drop"
        for staged in multistage_actions(num_steps, num_fast_states, num_slow_states)
    )


def _slots(actions: list[Action]) -> list[int | None]:
    """The place on the stack of held states that each action touches."""
    stack: list[int] = []
    slots: list[int | None] = []
    for action in actions:
        if action.kind == "store":
            stack.append(action.step)
            slots.append(len(stack) - 1)
        elif action.kind in ("restore", "drop"):
            slots.append(stack.index(action.step))
            if action.kind == "drop":
                stack.pop()
        else:
            slots.append(None)
    return slots
