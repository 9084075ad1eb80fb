"""Plain blocks: their options are sets of values to save."""

import itertools

from ckptsolvers import Option

from jaxckpt.model.block import Model
from jaxckpt.model.joint import LocalBlock, differentiate
from jaxckpt.model.option import BlockAnalysis, dominates
from jaxckpt.model.time import Timer
from jaxckpt.model.tree import Saved
from jaxckpt.targets.chip import Target

# Options that differ by less than these parts of a block's largest value and of its work are alike.
_ALIKE_BYTES, _ALIKE_TIME = 64, 2000


def analyse_block(local: LocalBlock, timer: Timer, target: Target) -> BlockAnalysis:
    """Find a block's options; the last one leaves it to JAX."""
    joint = differentiate(local)
    model = Model(local, joint, timer, target)
    # Of a loop's whole body the peaks where what was saved is read from stacks come on top of the options' own.
    peak = model.stacked_peak if local.is_whole_body else lambda option, saved: 0
    kept: list[tuple[Option, frozenset[int], int]] = []
    choices: list[Saved] = []
    spare_bytes = max(map(model.size, model.savable), default=0) // _ALIKE_BYTES
    spare_time = sum(model.time.values()) // _ALIKE_TIME
    for saved in model.save_sets():
        option = model.option(f"save {len(saved)}" if saved else "nothing", saved)
        own = peak(option, saved)
        if any(p <= own + spare_bytes and dominates(o, option, spare_bytes, spare_time) for o, _, p in kept):
            continue
        kept.append((option, saved, own))
        choices.append(tuple(sorted(model.named[v] for v in saved)))
    everything, held, unread = model.everything()
    # Where leaving the block to JAX takes no more of anything, no checkpoint is due.
    most = peak(everything, held)
    useful = [not (dominates(everything, option, spare_bytes) and most <= p + spare_bytes) for option, _, p in kept]
    kept = [*itertools.compress(kept, useful), (everything, held, most)]
    choices = [*itertools.compress(choices, useful), None]
    return BlockAnalysis(
        model.block(tuple(option for option, *_ in kept), model.time),
        model.block(tuple(model.in_flops(option, saved) for option, saved, _ in kept), model.flops),
        tuple(choices),
        (*(model.unread(saved) for _, saved, _ in kept[:-1]), unread),
        sum(model.time.values()) + sum(timer(joint.backward, joint.avals, [*joint.waiting, *joint.gradients])),
        model.residual_bytes(),
        stacked_peaks=tuple(p for *_, p in kept) if local.is_whole_body else (),
    )
