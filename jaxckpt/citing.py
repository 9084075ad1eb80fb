"""Which papers stand behind a solver, as BibTeX."""

from ckptsolvers.citations import CITATIONS

from jaxckpt.errors import OptionError

# The names that `plan(solver=...)` takes, and under which their solutions go.
_METHODS = {"auto": "chain", "ilp": "regions_milp"}


def bibtex(solver: str = "auto") -> str:
    """Return the BibTeX of the methods that a solver uses, each entry once.

    Args:
        solver: as in `plan`, a name that `ckptsolvers` gives a solution, or "all".

    Raises:
        OptionError: a solver without a paper.

    Example:
        >>> bibtex("chen").splitlines()[0]
        '@article{chen2016training,'
    """
    name = _METHODS.get(solver, solver)
    if name != "all" and name not in CITATIONS:
        known = sorted({*_METHODS, *(n for n in CITATIONS if " " not in n), "all"})
        raise OptionError(f"solver={solver!r} is not known; write one of {', '.join(known)}")
    texts = CITATIONS.values() if name == "all" else [CITATIONS[name]]
    entries = (entry for text in texts for entry in text.split("\n\n"))
    return "\n\n".join(dict.fromkeys(entries))
