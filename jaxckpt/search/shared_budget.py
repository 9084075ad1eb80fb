"""How several functions of one step may share its memory: paths from the least bytes to the least work."""

from collections.abc import Sequence

# Sums stand this far apart, as the candidates they are made of do.
_STEP = 1.01
# One option of each function, `[num_functions]`.
Picks = tuple[int, ...]


def apart(peaks: Sequence[Sequence[int]], costs: Sequence[Sequence[float]]) -> list[Picks]:
    """Every function keeps to one common limit: right where their peaks do not coincide.

    Args:
        peaks: `[num_functions, num_options]` bytes, ascending.
        costs: the same of work.

    Returns:
        Picks from the least bytes to the least work.
    """
    limits = sorted({peak for row in peaks for peak in row})
    found = [tuple(_cheapest(row, work, limit) for row, work in zip(peaks, costs, strict=True)) for limit in limits]
    return list(dict.fromkeys(found))


def together(peaks: Sequence[Sequence[int]], costs: Sequence[Sequence[float]]) -> list[Picks]:
    """The least work for every sum of the functions' bytes: right where what they hold adds up.

    Args:
        peaks: `[num_functions, num_options]` bytes, ascending.
        costs: the same of work.

    Returns:
        Picks from the least bytes to the least work.
    """
    best: list[tuple[int, float, Picks]] = [(0, 0.0, ())]
    for row, work in zip(peaks, costs, strict=True):
        sums = ((b + row[i], c + work[i], (*picks, i)) for b, c, picks in best for i in range(len(row)))
        best = _unbeaten(sorted(sums))
    return [picks for _, _, picks in best]


def _unbeaten(sums: Sequence[tuple[int, float, Picks]]) -> list[tuple[int, float, Picks]]:
    """Those that no other beats in bytes and work, without those between two that are all but equal in bytes."""
    best: list[tuple[int, float, Picks]] = []
    for entry in sums:
        if best and entry[1] >= best[-1][1]:
            continue
        if len(best) > 1 and entry[0] < _STEP * best[-2][0]:
            best.pop()
        best.append(entry)
    return best


def _cheapest(peaks: Sequence[int], costs: Sequence[float], limit: int) -> int:
    """The option with the least work within a limit, of equal ones the last; the first where none is."""
    return min((i for i, peak in enumerate(peaks) if peak <= limit), key=lambda i: (costs[i], -i), default=0)
