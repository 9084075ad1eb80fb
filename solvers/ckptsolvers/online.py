"""Checkpoints for a loop whose length is not known before it ends.

"New algorithms for optimal online checkpointing" (Stumm, Walther, 2010), also known as adaptive or dynamic
checkpointing; related to "Minimal repetition dynamic checkpointing algorithm for unsteady adjoint calculation" (Wang,
Moin, Iaccarino, 2009). While the loop runs forward every new state takes the place of a held one, so that what is held
is at each moment a good set for a loop that ends there. With d_i the distance from held state i to the next and
beta(c, r) = binomial(c + r, c), the latest held state goes whose removal keeps the merged distance within
beta(c - i, r - 1), i the place of the state before it; when there is none, r grows by one.

Once the length is known each stretch is reversed by revolve with the slots that are free by then. The number of forward
steps is revolve's, the least there is, while no step runs more than twice, to beta(c, 2) steps, as in the paper. Beyond
that the schedule is a heuristic, judged against revolve's count in the tests.

O(c) time per step while running, O(c) space.
"""

from collections.abc import Iterator
from math import comb

from ckptsolvers.errors import InvalidProblemError
from ckptsolvers.revolve import Action, revolve_actions


class OnlineCheckpoints:
    """Which states to hold while a loop of unknown length runs, and how to reverse it once it ends.

    The step that turns out to be the last is not advanced: it is turned straight from the working state, which is no
    held one. A loop that learns of its end one step late keeps the state before that step besides.

    Args:
        num_states: states held at once, the initial one included.

    Attributes:
        held: the steps before which a state is held, ascending; 0 at first.
        num_advanced: how many steps have run.

    Example:
        >>> online = OnlineCheckpoints(3)
        >>> for _ in range(5):
        ...     actions = online.advance()
        >>> online.held
        (0, 1, 4)
        >>> [action.kind for action in actions]
        ['drop', 'store', 'advance']
    """

    def __init__(self, num_states: int):
        """Hold the initial state."""
        if num_states < 1:
            raise InvalidProblemError(f"{num_states=} must be at least 1")
        self._num_states = num_states
        self._held = [0]
        self._repeats = 1
        self.num_advanced = 0

    @property
    def held(self) -> tuple[int, ...]:
        """The steps before which a state is held."""
        return tuple(self._held)

    def advance(self) -> tuple[Action, ...]:
        """Run one step more.

        Returns:
            What to do: an advance, and before it perhaps a store of the state before the step, and before that
            perhaps a drop that makes room for it.
        """
        now = self.num_advanced
        self.num_advanced += 1
        run = Action("advance", now, now + 1)
        if now == 0:
            return Action("store", now, now + 1), run
        if len(self._held) < self._num_states:
            self._held.append(now)
            return Action("store", now, now + 1), run
        place = self._least_useful(now)
        if place is None:
            return (run,)
        dropped = self._held.pop(place)
        self._held.append(now)
        return Action("drop", dropped, dropped + 1), Action("store", now, now + 1), run

    def reverse(self) -> Iterator[Action]:
        """Yield the actions that turn the last step and reverse those advanced before it, in revolve's vocabulary."""
        yield Action("turn", self.num_advanced, self.num_advanced + 1)
        stops = [*self._held[1:], self.num_advanced]
        for place in range(len(self._held) - 1, -1, -1):
            start, free = self._held[place], self._num_states - place
            if start < stops[place]:
                yield Action("restore", start, start + 1)
                # The state is held already, so revolve's own first store and last drop are left out.
                for action in list(revolve_actions(stops[place] - start, free))[1:-1]:
                    yield Action(action.kind, action.step + start, action.stop + start)
            yield Action("drop", start, start + 1)

    def _least_useful(self, now: int) -> int | None:
        """The place of the held state to give up for the one before step `now`; None to store nothing."""
        c = self._num_states
        ends = [*self._held[1:], now]
        while True:
            spare = {
                i: comb(c - i + self._repeats, c - i + 1) - (ends[i] - self._held[i - 1]) for i in range(c - 1, 0, -1)
            }
            fitting = [i for i, room in spare.items() if room >= 0]
            if fitting:
                exact = (i for i in fitting if spare[i] == 0 and self._repeats <= 2)
                return next(exact, fitting[0])
            # The loop runs to step now + 2 at least; the last stretch is reversed with the one state it starts from.
            if now + 2 - self._held[-1] <= self._repeats + 1 or c == 1:
                return None
            self._repeats += 1


def num_online_forwards(num_steps: int, num_states: int) -> int:
    """Forward steps of the online schedule, counted as `revolve.num_forwards` does: the turns' own are left out."""
    online = OnlineCheckpoints(num_states)
    for _ in range(num_steps - 1):
        online.advance()
    again = sum(action.stop - action.step for action in online.reverse() if action.kind == "advance")
    return num_steps - 1 + again
