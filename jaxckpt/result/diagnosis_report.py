"""The report of a diagnosis: at most 80 columns."""

import textwrap
from collections.abc import Iterator, Sequence

from jaxckpt.result.findings import Examined, Finding, Offer, Share
from jaxckpt.units import short_bytes, short_count

_WIDTH, _MOST_ROWS = 80, 8
_BOLD, _PLAIN = "\033[1m", "\033[0m"


def show_diagnosis(found: Examined, *, color: bool = False) -> str:
    """The report a person reads.

    Args:
        found: the diagnosis.
        color: whether to use a terminal's bold letters.
    """
    return "\n".join(_lines(found, color))


def _lines(found: Examined, color: bool) -> Iterator[str]:
    num = len(found.findings)
    said = "nothing found" if not num else f"{num} finding{'s' if num > 1 else ''}"
    verdict = f"{found.name} for {found.target}: {said}, {short_bytes(found.device_bytes)} measured."
    yield from (_bold(line, color) for line in textwrap.wrap(verdict, _WIDTH))
    for i, finding in enumerate(found.findings, 1):
        yield ""
        yield from _finding(i, finding, color)
    yield ""
    yield from _sizes(found)
    yield from _checkpoints(found)
    yield from _where(found)
    yield from _compiler(found)
    for note in found.notes:
        yield from _wrapped(f"Note: {note}.")


def _finding(i: int, finding: Finding, color: bool) -> Iterator[str]:
    for line in textwrap.wrap(f"{i}. {finding.kind}  {finding.source}".rstrip(), _WIDTH):
        yield _bold(line, color)
    yield from _wrapped(finding.text, 3)
    about = []
    if finding.size_bytes is not None:
        verb = "more" if finding.size_bytes < 0 else "spared"
        about.append(f"{short_bytes(abs(finding.size_bytes))} {verb} ({finding.label})")
    if finding.flops:
        verb = "more" if finding.flops < 0 else "spared"
        about.append(f"{short_count(abs(finding.flops))}FLOP {verb} in each run (counted)")
    advice = f"{finding.advice} {'; '.join(about)}." if about else finding.advice
    yield from _wrapped(f"-> {advice}", 3)


def _sizes(found: Examined) -> Iterator[str]:
    yield _row("device bytes", short_bytes(found.device_bytes), "measured")
    yield _row("  arguments", short_bytes(found.argument_bytes), "")
    yield _row("  results", short_bytes(found.output_bytes), "")
    yield _row("  temporaries", short_bytes(found.temp_bytes), "")
    if found.bare_bytes is not None:
        yield _row("without checkpoints", short_bytes(found.bare_bytes), "measured")
    again = found.flops - found.bare_flops
    share = again / max(1, found.bare_flops)
    yield _row("recomputed", f"{short_count(again)}FLOP", f"{share:.1%} of a run without, counted")
    for label, offer in (("a plan at that work", found.same_cost), ("a plan at those bytes", found.same_bytes)):
        if offer is not None:
            yield _row(label, short_bytes(offer.device_bytes), _offer(offer))
    yield _row("compiles", str(found.num_compiles), "")


def _offer(offer: Offer) -> str:
    return f"{offer.label}, {short_count(offer.recomputed_flops)}FLOP recomputed"


def _row(label: str, value: str, note: str) -> str:
    return f"{label:23}{value:>14}  {note}".rstrip()[:_WIDTH]


def _checkpoints(found: Examined) -> Iterator[str]:
    if not found.checkpoints:
        return
    yield ""
    yield "checkpoints"
    for one in found.checkpoints:
        times = f" x {one.count}" if one.count > 1 else ""
        yield from _wrapped(f"{one.source}{times}, {one.policy}", 2)
        saved = "" if one.saved_bytes is None else f"saves {short_bytes(one.saved_bytes)} ({one.label}), "
        yield from _wrapped(f"{saved}recomputes {short_count(one.recomputed_flops)}FLOP", 4)


def _where(found: Examined) -> Iterator[str]:
    if found.where is None:
        return
    label = "estimated from shapes" if found.where.is_estimated else "measured"
    tables = [("scope", found.where.scopes), ("line", found.where.lines)]
    # Code without named scopes has its lines in both.
    for title, shares in tables[found.where.scopes == found.where.lines :]:
        yield ""
        yield f"at the peak, by {title} ({label})"
        yield from (_share(s.label, s.size_bytes) for s in shares[:_MOST_ROWS])
        if rest := _rest(shares):
            yield _share(f"and {len(shares) - _MOST_ROWS} more", rest)
    yield _share("padding, in the above", found.where.padding_bytes)
    yield _share("gaps in the heap", found.where.gap_bytes)


def _rest(shares: Sequence[Share]) -> int:
    return sum(s.size_bytes for s in shares[_MOST_ROWS:])


def _share(label: str, size_bytes: int) -> str:
    room = _WIDTH - 16
    shown = label if len(label) <= room else f"...{label[3 - room :]}"
    return f"{short_bytes(size_bytes):>14}  {shown}"


def _compiler(found: Examined) -> Iterator[str]:
    yield ""
    if found.num_recomputed is not None and found.num_asked:
        yield from _wrapped(
            f"Of {found.num_asked} products that checkpoints make again, {found.num_recomputed} are in the compiled "
            f"program; the compiler merged or removed the others."
            if found.num_recomputed < found.num_asked
            else f"All {found.num_asked} products that checkpoints make again are in the compiled program."
        )
    if found.num_rematerialized is not None:
        yield from _wrapped(f"Instructions that XLA's own rematerialization made again: {found.num_rematerialized}.")
    yield from _wrapped(f"Settings that matter: {', '.join(found.flags) or 'none is set'}.")


def _wrapped(text: str, indent: int = 0) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, _WIDTH, initial_indent=space, subsequent_indent=space, break_on_hyphens=False)


def _bold(text: str, color: bool) -> str:
    return f"{_BOLD}{text}{_PLAIN}" if color else text
