"""From a function to its diagnosis: look for causes, then compile with and without what they would explain."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from jaxckpt import _compat
from jaxckpt.compilation.buffers import CompiledMemory
from jaxckpt.compilation.compiled import flags
from jaxckpt.compilation.measure import Measurement
from jaxckpt.diagnosis.names_faults import name_findings
from jaxckpt.diagnosis.residuals import Kept, copies_of_constants, gathered, is_in, kernels_again
from jaxckpt.diagnosis.sites import Group, equations, groups_of
from jaxckpt.diagnosis.subject import EVERY, Subject, Treatment, change
from jaxckpt.diagnosis.suspects import Suspect, misses_kernels, suspects_of
from jaxckpt.diagnosis.texts import TEXTS
from jaxckpt.errors import ProgramFormatError
from jaxckpt.result.diagnosis import Diagnosis
from jaxckpt.result.findings import Checkpoint, Finding, Label, Share, Where

# Of the device bytes, less than this is no difference, and less than that is not worth a word.
_SAME, _WORTH = 1 / 200, 1 / 200
# What a checkpoint saves at most whose place says why it saves next to nothing.
_LITTLE = 1 / 50
_MOST_SHARES = 12
_UNREAD = ("names-nowhere", "names-outside", "names-no-residual")


def examine(subject: Subject, name: str, is_step: bool, options: Mapping[str, Any], kept_for_plan: int) -> Diagnosis:
    """Examine a function; a plan's offers are added by who can plan.

    Args:
        subject: what is examined.
        name: of the function.
        is_step: whether it is taken as it is.
        options: compiler options that the user gave.
        kept_for_plan: of the compiles, how many are left for plans.
    """
    return _Examination(subject, options).run(name, is_step, kept_for_plan)


class _Examination:
    def __init__(self, subject: Subject, options: Mapping[str, Any]):
        self.subject, self.options = subject, options
        self.notes: list[str] = []
        self.losses = subject.losses()
        self.groups = groups_of(self.losses)

    def run(self, name: str, is_step: bool, kept_for_plan: int) -> Diagnosis:
        subject = self.subject
        base = subject.measure(as_set=subject.as_set is not None)
        assert base is not None, "one compile at least is allowed"
        self.base = base
        memory = self._memory()
        self._note_unseen()
        # The plan's compiles are set aside while suspects are looked at.
        subject.most_compiles -= kept_for_plan
        findings = [*self._about_flags(), *self._about_groups(), *self._about_kernels()]
        bare = subject.measure(change(EVERY, "out")) if self.groups else None
        checkpoints = tuple(map(self._checkpoint, self.groups))
        subject.most_compiles += kept_for_plan
        if self.groups:
            findings += name_findings(self.groups, self.losses, subject.jaxpr(change(EVERY, "save nothing")))
        findings += self._about_residuals(memory)
        # Where there is a cause, that nothing is saved is no finding of its own.
        explained = {f.source for f in findings if f.kind in ("cse-outside-loop", *_UNREAD)}
        if any(f.kind == "barriers-removed" for f in findings):
            explained |= {group.source for group in self.groups}
        findings = [f for f in findings if f.kind != "saves-nothing" or f.source not in explained]
        findings.sort(key=lambda f: -(f.size_bytes or 0))
        return Diagnosis(
            name=name,
            target=base.target,
            is_step=is_step,
            device_bytes=base.device_bytes,
            argument_bytes=base.argument_bytes,
            output_bytes=base.output_bytes,
            temp_bytes=base.temp_bytes,
            bare_bytes=None if bare is None else bare.device_bytes,
            flops=subject.flops(),
            bare_flops=subject.flops(change(EVERY, "out")) if self.groups else subject.flops(),
            findings=tuple(findings),
            checkpoints=checkpoints,
            where=None if memory is None else _where(memory),
            num_asked=base.num_asked,
            num_recomputed=base.num_recomputed,
            num_rematerialized=base.num_rematerialized,
            flags=(*flags(os.environ), *_compat.barrier_flags(), *_given(self.options)),
            notes=tuple(self.notes),
            same_cost=None,
            same_bytes=None,
            num_compiles=subject.num_compiles,
        )

    def _memory(self) -> CompiledMemory | None:
        if not self.subject.can_compile:
            self.notes.append("no compile was left to read the buffers")
            return None
        try:
            return self.subject.memory()
        except ProgramFormatError as error:
            self.notes.append(f"the buffers could not be read: {error}")
            return None

    def _note_unseen(self) -> None:
        jaxpr = self.subject.jaxpr()
        if not self.losses and _compat.backward_lines(jaxpr):
            lines = ", ".join(_compat.backward_lines(jaxpr)[:3])
            self.notes.append(
                f"what is differentiated at {lines} cannot be seen, and so only what is saved was looked at: a vjp "
                "that was imported from jax by name before jaxckpt"
            )
        elif not self.losses:
            self.notes.append("the function differentiates nothing backward")

    # Checkpoints.

    def _about_groups(self) -> Iterator[Finding]:
        suspects = suspects_of(self.groups)
        weight = {group.source: group.flops for group in self.groups}
        # Those with a cause first, then by what is at stake: so many are compiled, and the rest is predicted.
        suspects.sort(key=lambda s: (s.kind == "saves-nothing", -weight[s.source]))
        for suspect in suspects:
            found = self._confirmed(suspect)
            if found is not None:
                yield found

    def _confirmed(self, suspect: Suspect) -> Finding | None:
        treatment = change(suspect.source, suspect.change)
        bytes_, label = self._bytes(treatment)
        spared, work = self.base.device_bytes - bytes_, self.subject.flops() - self.subject.flops(treatment)
        little = _SAME * self.base.device_bytes
        if suspect.rule == "spares work":
            most = little if suspect.kind == "saves-nothing" else _LITTLE * self.base.device_bytes
            is_so = work > 0 and spared >= -most
        elif suspect.rule == "spares bytes":
            is_so = spared > little or self._merges(treatment)
        else:
            is_so = spared >= -little
        # A guess is no reason to speak of what has no cause.
        if not is_so or (suspect.kind == "saves-nothing" and label == "predicted"):
            return None
        return _finding(suspect.kind, suspect.source, dict(suspect.named), spared, work, label)

    def _merges(self, treatment: Treatment) -> bool:
        """Whether the compiler leaves out of what is written more of the recomputation than under a treatment."""
        other = self.subject.measure(treatment)
        return other is not None and _merged(self.base) > _merged(other)

    def _bytes(self, treatment: Treatment) -> tuple[int, Label]:
        found = self.subject.measure(treatment)
        if found is not None:
            return found.device_bytes, "measured"
        return self.subject.predict(treatment, self.base), "predicted"

    def _about_kernels(self) -> Iterator[Finding]:
        groups = [group for group in self.groups if misses_kernels(group)]
        again = kernels_again(self.subject.jaxpr()) if groups else set()
        for group in groups:
            inside = (eqn for site in group.sites for eqn in equations(site.jaxpr) if _compat.is_kernel(eqn))
            names = sorted(again & {_compat.kernel_cost(eqn)[0] for eqn in inside})
            treatment = change(group.source, "save kernels")
            work = self.subject.flops() - self.subject.flops(treatment) if names else 0
            if work > 0:
                bytes_, label = self._bytes(treatment)
                spared, named = self.base.device_bytes - bytes_, {"names": ", ".join(names)}
                yield _finding("kernel-recomputed", group.source, named, spared, work, label)

    def _checkpoint(self, group: Group) -> Checkpoint:
        treatment = change(group.source, "out")
        bytes_, label = self._bytes(treatment)
        return Checkpoint(
            source=group.source,
            count=len(group.sites),
            policy=_policy_text(group),
            saved_bytes=bytes_ - self.base.device_bytes,
            recomputed_flops=self.subject.flops() - self.subject.flops(treatment),
            label=label,
        )

    # Settings.

    def _about_flags(self) -> Iterator[Finding]:
        """Settings without which the compiler takes fewer bytes."""
        if not self.groups:
            return
        ways = []
        if set_ := _compat.barrier_flags():
            ways.append((set_, self.subject.measure()))
        if own := [*flags(os.environ), *_given(self.options)]:
            names = {flag.split("=")[0].split(" ")[0] for flag in own}
            options = {name: value for name, value in self.options.items() if name not in names}
            ways.append((own, self.subject.measure(options=options | _undone(names, self.options))))
        for names, other in ways:
            if other is None:
                self.notes.append(f"no compile was left to look at {', '.join(names)}")
                continue
            spared = self.base.device_bytes - other.device_bytes
            if spared > _SAME * self.base.device_bytes:
                yield _finding("barriers-removed", "", {"names": ", ".join(names)}, spared, 0, "measured")

    # What is saved.

    def _about_residuals(self, memory: CompiledMemory | None) -> Iterator[Finding]:
        jaxpr = self.subject.jaxpr()
        found = [*copies_of_constants(jaxpr), *(("gathers-saved", kept) for kept in gathered(jaxpr))]
        for kind, kept in _by_line(found):
            if kept.size_bytes >= _WORTH * self.base.device_bytes:
                label = "measured" if is_in(memory, kept.avals) else "counted"
                yield _finding(kind, kept.source, {"names": kept.shown}, kept.size_bytes, None, label)


def _by_line(found: list[tuple[str, Kept]]) -> list[tuple[str, Kept]]:
    by: dict[tuple[str, str], list[Kept]] = {}
    for kind, kept in found:
        by.setdefault((kind, kept.source), []).append(kept)
    return [
        (
            kind,
            Kept(
                source=source,
                shown=", ".join(dict.fromkeys(k.shown for k in some)),
                size_bytes=sum(k.size_bytes for k in some),
                avals=tuple(aval for k in some for aval in k.avals),
            ),
        )
        for (kind, source), some in by.items()
    ]


def _finding(
    kind: str, source: str, named: Mapping[str, str], size_bytes: int | None, flops: int | None, label: Label
) -> Finding:
    text, advice = TEXTS[kind]
    return Finding(
        kind=kind,
        source=source,
        text=text.format(**named),
        advice=advice,
        size_bytes=size_bytes,
        flops=flops,
        label=label,
    )


def _merged(found: Measurement) -> int:
    return (found.num_asked or 0) - (found.num_recomputed or 0) if found.num_recomputed is not None else 0


def _given(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The user's compiler options that decide which recomputation survives."""
    text = " ".join(f"--{name}={value}" for name, value in options.items())
    return tuple(flag.replace(" in XLA_FLAGS", " in compiler_options") for flag in flags({"XLA_FLAGS": text}))


def _undone(names: set[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that set flags of the environment back: a list of passes to nothing; others cannot be."""
    name = "xla_disable_hlo_passes"
    return {name: ""} if name in names and name not in options else {}


def _policy_text(group: Group) -> str:
    texts = []
    for policy in dict.fromkeys(site.policy for site in group.sites):
        names = sorted(n for n in _compat.names_in_policy(policy) if policy and _compat.saves_name(policy, n))
        shown = getattr(policy, "__name__", type(policy).__name__)
        texts.append("saves nothing" if policy is None else f"saves {', '.join(names)}" if names else shown)
    return "; ".join(texts)


def _where(memory: CompiledMemory) -> Where:
    peak = memory.peak_step
    shares = {
        by: tuple(
            Share(label=band.label, size_bytes=band.size_bytes[peak])
            for band in memory.bands(by)  # type: ignore[arg-type]
            if band.kind == "live" and band.size_bytes[peak]
        )[:_MOST_SHARES]
        for by in ("scope", "source")
    }
    return Where(
        scopes=shares["scope"],
        lines=shares["source"],
        padding_bytes=sum(buffer.padding_bytes for buffer in memory.at(peak) if buffer.place == "device"),
        gap_bytes=memory.gap_bytes[peak] if memory.gap_bytes else 0,
        is_estimated=memory.is_estimated,
    )
