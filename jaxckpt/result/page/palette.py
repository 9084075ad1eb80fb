"""Colours that people with any colour vision tell apart, on light and on dark ground."""

from jaxckpt.compilation.buffers import GAPS, RESERVED, UNATTRIBUTED

# Of Okabe and Ito; yellow, the faintest on white, comes last.
BANDS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7", "#F0E442")
ARGUMENTS, RESULTS, OTHER = "arguments and constants", "results", "other"
_FIXED = {
    ARGUMENTS: "#5f6b7a",
    RESULTS: "#93a1b0",
    OTHER: "#b79f8a",
    UNATTRIBUTED: "#8a7f78",
    RESERVED: "#8b98a970",
    GAPS: "#8b98a930",
}
# They differ in lightness too.
PHASES = {
    "forward": "#8ecae6",
    "recomputed": "#e4572e",
    "backward": "#5b5ea6",
    "optimizer": "#2a9d8f",
    "other": "#c9ced6",
}


def colors(labels: list[str]) -> list[str]:
    """A colour for each label, by its place among those that have none of their own."""
    own = [label for label in labels if label not in _FIXED and label not in PHASES]
    table = {**PHASES, **_FIXED, **dict(zip(own, BANDS, strict=False))}
    return [table.get(label, _FIXED[OTHER]) for label in labels]
