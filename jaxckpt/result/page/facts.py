"""What a page says of how a plan was found: its certificate, and what the page was made with."""

from jaxckpt import _compat
from jaxckpt._version import __version__
from jaxckpt.result._protocols import PlanLike
from jaxckpt.result.page import vega
from jaxckpt.result.page.content import Content
from jaxckpt.units import short_bytes, short_count, show_bytes


def facts(plan: PlanLike, *, is_part: bool) -> list[tuple[str, str]]:
    """The certificate: what was asked, what was found, and where each number comes from."""
    found = []
    if plan.budget_bytes is not None:
        found.append(("budget", f"{show_bytes(plan.budget_bytes)}, given"))
    if plan.max_cost is not None:
        found.append(("max cost", f"{plan.max_cost:g} x unplanned, given"))
    label = "measured" if plan.is_unplanned_measured else "predicted"
    found.append(("without a plan", f"{show_bytes(plan.unplanned_peak_bytes)}, {label}"))
    if plan.measured_peak_bytes is not None:
        found.append(("peak", f"{show_bytes(plan.measured_peak_bytes)}, measured{', at most' * plan.is_at_most}"))
    found.append(("model's peak", f"{show_bytes(plan.predicted_peak_bytes)}, predicted"))
    if plan.next_peak_bytes is not None:
        found.append(("next cheaper plan", f"{show_bytes(plan.next_peak_bytes)}, measured"))
    if not is_part:
        least = plan.least_peak_bytes
        said = f"about {short_bytes(plan.expected_least_bytes)}, predicted"
        found.append(("least feasible peak", said if least is None else f"{show_bytes(least)}, measured"))
    if plan.host_bytes:
        found.append(("on the host", show_bytes(plan.host_bytes)))
    share = plan.recompute_flops / max(1, plan.forward_flops)
    found.append(("recomputation", f"{short_count(plan.recompute_flops)}FLOP, {share:.2%} of the forward, counted"))
    if plan.num_asked is not None:
        made = f"{plan.num_recomputed} of {plan.num_asked} products and convolutions that it asks for"
        found.append(("made again by the compiler", f"{made}, counted in the compiled program"))
    found.append(("solver", plan.solver))
    found.append(("compiles", str(plan.num_compiles)))
    found.append(("program", plan.fingerprint))
    found.append(("schedule", plan.schedule_digest))
    return found


def made(content: Content) -> list[tuple[str, str]]:
    """What a page was made with: versions, and what else its numbers depend on."""
    plan = content.plans[0]
    versions = {"jaxckpt": __version__, "jax": plan.jax_version, **vega.versions()}
    if plan.jax_version != _compat.JAX_VERSION:
        versions["jax of the timelines"] = _compat.JAX_VERSION
    found = list(versions.items())
    if plan.calibration:
        found.append(("calibration", plan.calibration))
    if plan.flags:
        found.append(("compiler flags", ", ".join(plan.flags)))
    return found
