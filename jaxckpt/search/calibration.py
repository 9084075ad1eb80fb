"""How far predictions were from what compilers measured, kept for the next plan.

The model's bytes are off by what a compiler does with layouts, fusion and schedules, and by much the same for programs
that are made of the same operations. A record holds, for one target and one family of programs, the ratio of measured
to predicted temporaries at each plan that was compiled. A plan made with a record carries its hash.
"""

import hashlib
import json
import logging
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from jaxckpt import _compat
from jaxckpt._version import __version__
from jaxckpt.compilation import cache
from jaxckpt.compilation.files import check_digest, keep_text, read_object, with_digest, write_text
from jaxckpt.compilation.records import check_record, record_of
from jaxckpt.errors import PlanFileError
from jaxckpt.program.ir import Program
from jaxckpt.search.surrogate import offset_at
from jaxckpt.targets.chip import device_label

_LOG = logging.getLogger("jaxckpt")
_FORMAT = "jaxckpt calibration"
_SCHEMA = 2
# Samples of one program closer than this are the same place on its curve; the later one stands.
_SAME = 0.005
# Other programs' ratios say more about plans that save a like share: weights fall off over this many e-folds.
# On GPT-2s of 2 to 12 layers a plan takes 2.1 compiles without a record, 2.1 with the average of the other programs,
# and 3.0 with their samples interpolated.
_BANDWIDTH = 1.0
_MAX_SAMPLES = 256
_MAX_SPREAD = 0.05
# Programs so small that their temporaries are no buffers at all say nothing about others.
_LEAST_RATIO = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One compiled plan.

    Attributes:
        program: the beginning of its program's fingerprint.
        fraction: predicted temporaries, as a fraction of those predicted without a plan.
        ratio: measured temporaries over predicted ones.
        kind: as which of the ways to cut its program it was found.
    """

    program: str
    fraction: float
    ratio: float
    kind: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How prediction and measurement differ for a family of programs on one target.

    Attributes:
        target: for which chip.
        jaxlib_version: whose compiler measured.
        family: what the programs are made of, as a digest.
        samples: oldest first.
    """

    target: str
    jaxlib_version: str
    family: str
    samples: tuple[Sample, ...] = ()

    @property
    def hash(self) -> str:
        """A name for the record's contents that is the same everywhere."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()[:16]

    def ratio(self, program: str, fraction: float) -> float:
        """Return the measured over predicted temporaries to expect.

        Args:
            program: the fingerprint. What was measured of the same program counts alone.
            fraction: predicted temporaries, as a fraction of those predicted without a plan.
        """
        own = sorted((s.fraction, s.ratio) for s in self.of(program))
        if own:
            places = [x for x, _ in own]
            return 1 + offset_at(fraction, places, [x * (ratio - 1) for x, ratio in own]) / fraction
        if not self.samples:
            return 1.0
        weights = [math.exp(-0.5 * (math.log(fraction / s.fraction) / _BANDWIDTH) ** 2) + 1e-9 for s in self.samples]
        logs = [math.log(s.ratio) for s in self.samples]
        return math.exp(sum(w * x for w, x in zip(weights, logs, strict=True)) / sum(weights))

    def spread(self, program: str) -> float:
        """How far from `ratio` a program of the family may be; 0 for one that was measured itself."""
        if self.of(program) or len(self.samples) < 2:
            return 0.0
        return min(_MAX_SPREAD, statistics.pstdev(math.log(s.ratio) for s in self.samples))

    def of(self, program: str) -> list[Sample]:
        """What was measured of this very program."""
        return [s for s in self.samples if s.program == short(program)]

    def knows(self, program: str) -> bool:
        """Whether this very program was measured."""
        return bool(self.of(program))

    def with_samples(self, samples: Sequence[Sample]) -> "Calibration":
        """Return the record with what was measured since; a new sample takes the place of its near ones."""
        useful = [s for s in samples if s.ratio > _LEAST_RATIO and s.fraction > 0 and s not in self.samples]
        kept = [s for s in self.samples if not any(_is_near(s, new) for new in useful)]
        return Calibration(
            target=self.target,
            jaxlib_version=self.jaxlib_version,
            family=self.family,
            samples=tuple([*kept, *useful][-_MAX_SAMPLES:]),
        )

    def to_json(self) -> dict[str, Any]:
        """The record as plain data, with its hash and a digest of it all."""
        return with_digest({**self._content(), "hash": self.hash})

    def _content(self) -> dict[str, Any]:
        return {"format": _FORMAT, "schema": _SCHEMA, **asdict(self)}

    def to_text(self) -> str:
        """The record as the text of a file."""
        return json.dumps(self.to_json(), indent=1) + "\n"

    def save(self, path: str | os.PathLike) -> None:
        """Write the record as JSON; the file is there whole or not at all, and a link to a file stays one.

        Raises:
            PlanFileError: the path is no regular file's.
            OSError: it cannot be written.
        """
        write_text(path, self.to_text())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Calibration":
        """Read a record.

        Raises:
            PlanFileError: a file that is no record, is damaged, or is of another schema.
            OSError: a file that is not there or cannot be read.
        """
        return cls._from_json(read_object(path, _FORMAT + " record"), str(path))

    @classmethod
    def load_kept(cls, path: Path, folder: Path) -> "Calibration":
        """Read a record of a cache's folder, as `load` does; files of others and links out of it are refused too."""
        return cls._from_json(read_object(path, _FORMAT + " record", folder), str(path))

    @classmethod
    def _from_json(cls, data: dict[str, Any], where: str) -> "Calibration":
        if data.get("format") != _FORMAT:
            raise PlanFileError(f"{where} is not a {_FORMAT} record")
        if type(data.get("schema")) is not int or data["schema"] != _SCHEMA:
            raise PlanFileError(
                f"{where} is a {_FORMAT} record of another schema than {_SCHEMA}; plan without it to make another"
            )
        values = {name: value for name, value in data.items() if name not in ("format", "schema", "digest", "hash")}
        where = f"the {_FORMAT} record {where}"
        check_record(_RECORD, values, where)
        check_digest(data, where)
        found = cls(**{**values, "samples": tuple(Sample(**sample) for sample in values["samples"])})
        if data.get("hash") != found.hash:
            raise PlanFileError(f"{where} is damaged: its content does not match its hash")
        return found


_Ratio = Annotated[float, Field(gt=_LEAST_RATIO, le=1e6)]
_SAMPLES = list[record_of(Sample, fraction=Annotated[float, Field(gt=0, le=1e6)], ratio=_Ratio)]
_RECORD = record_of(Calibration, samples=Annotated[_SAMPLES, Field(max_length=_MAX_SAMPLES)])


def short(fingerprint: str) -> str:
    """What a record keeps of a program's fingerprint."""
    return fingerprint[:16]


def family_of(program: Program) -> str:
    """A digest of what a program is made of, whatever its sizes and however often: operations, dtypes, ranks."""
    kinds = set()
    for eqn in program.equations:
        made = (program.avals[v] for v in eqn.outputs)
        kinds.add(
            f"{eqn.primitive.name} {[(str(getattr(a, 'dtype', '')), len(getattr(a, 'shape', ()))) for a in made]}"
        )
    return hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()[:16]


def remembered(program: Program, target: str | None, cache_dir: str | os.PathLike | None = None) -> Calibration:
    """Read the record of a program's family from the cache, empty where there is none.

    Args:
        program: one of the family.
        target: the chip's name; None is the default backend.
        cache_dir: None is the user's cache directory.
    """
    return _read(family_of(program), target, cache_dir)


def remembered_of(programs: Sequence[Program], target: str | None) -> Calibration:
    """The same of whole steps that differentiate programs of these families."""
    return _read(cache.digest(("a step of", *map(family_of, programs)))[:16], target, None)


def _read(family: str, target: str | None, cache_dir: str | os.PathLike | None) -> Calibration:
    empty = Calibration(target=device_label(target), jaxlib_version=_compat.JAXLIB_VERSION, family=family)
    path = _path(empty, cache_dir)
    try:
        found = Calibration.load_kept(path, cache.folder(cache_dir))
    except (FileNotFoundError, NotADirectoryError):
        return empty
    except (PlanFileError, OSError) as error:
        _LOG.warning("the calibration record cannot be used and is begun again: %s", error)
        return empty
    keys = (empty.target, empty.jaxlib_version, empty.family)
    return found if (found.target, found.jaxlib_version, found.family) == keys else empty


def add_samples(
    record: Calibration,
    program: str,
    found: Iterable[tuple[float, float, int]],
    cache_dir: str | os.PathLike | None = None,
) -> None:
    """Keep a record with what was measured of a program since.

    Args:
        record: what was there.
        program: its fingerprint.
        found: of each plan the fraction of the unplanned temporaries, the ratio of measured to predicted ones, and the
            kind.
        cache_dir: None is the user's cache directory.
    """
    new = record.with_samples([Sample(program=short(program), fraction=f, ratio=r, kind=k) for f, r, k in found])
    if new != record:
        remember(new, cache_dir)


def remember(record: Calibration, cache_dir: str | os.PathLike | None = None) -> None:
    """Keep a record for the next plan; one that cannot be written is not kept."""
    path = _path(record, cache_dir)
    try:
        keep_text(path, record.to_text())
    except OSError as error:
        _LOG.warning("the calibration record could not be kept at %s: %s", path, error)


def _path(record: Calibration, cache_dir: str | os.PathLike | None) -> Path:
    # Ratios to the predictions of another release say nothing of this one's.
    release, flags = __version__, os.environ.get("XLA_FLAGS", "")
    parts = record.target, record.jaxlib_version, record.family, release, flags
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return cache.folder(cache_dir) / "calibration" / f"{key}.json"


def _is_near(sample: Sample, other: Sample) -> bool:
    same = (sample.program, sample.kind) == (other.program, other.kind)
    return same and abs(math.log(sample.fraction / other.fraction)) < _SAME
