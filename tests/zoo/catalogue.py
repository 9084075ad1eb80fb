"""Every model of the zoo by name, each at a tiny size for tests and a realistic one for benchmarks."""

import importlib
from dataclasses import dataclass
from typing import Any

from zoo.handmade import Case


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a model is, imported only when it is asked for, since some need packages of their own.

    Attributes:
        module: its file in this folder.
        options: of its `case`.
        size: its realistic size.
    """

    module: str
    options: tuple[tuple[str, Any], ...] = ()
    size: str = "base"

    def case(self, size: str | None = None, *, is_cut: bool = False) -> Case:
        """The model at a size, by default the realistic one; ImportError where its framework is missing.

        Cut to one layer (or iteration, or block of each kind), its temporaries are those that no plan removes.
        """
        made = importlib.import_module(f"zoo.{self.module}").case
        return made(size or self.size, is_cut=is_cut, **dict(self.options))


_SCANNED = (("scanned", True),)
CATALOGUE = {
    "gpt2": Entry(module="gpt2"),
    "gpt2-scan": Entry(module="gpt2", options=_SCANNED),
    "llama": Entry(module="llama"),
    "llama-scan": Entry(module="llama", options=_SCANNED),
    "vit": Entry(module="vit"),
    "resnet50": Entry(module="resnet"),
    "unet": Entry(module="unet"),
    "seq2seq": Entry(module="seq2seq"),
    "lstm": Entry(module="lstm"),
    "moe": Entry(module="moe"),
    "diffusion": Entry(module="diffusion"),
    "ode": Entry(module="ode"),
}
# Deep ones, to see how far memory can go down.
DEEP = {
    "gpt2-24": Entry(module="gpt2", size="deep"),
    "llama-64-scan": Entry(module="llama", options=_SCANNED, size="deep"),
    "tanh-64": Entry(module="tanh"),
}
