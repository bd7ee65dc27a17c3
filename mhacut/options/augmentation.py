"""Options of the images that are trained on: how they are varied and mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mhacut.errors import option_name
from mhacut.options.option import Options, option, require

EraseMode = Literal["const", "rand", "pixel"]


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions(Options):
    """Variation of training images by timm's transforms; validation images are never varied."""

    aug: bool = option(
        True,
        "Augment training images; off: they are preprocessed as for validation, and only mixup and cutmix "
        "change them.",
        panel="Augmentation",
    )
    aa: str | None = option(
        None, "AutoAugment policy, rand-m9-mstd0.5-inc1.", panel="Augmentation", metavar="POLICY"
    )
    mixup: float = option(
        0.0, "Alpha of mixup; 0 for none.", panel="Augmentation", metavar="ALPHA", at_least=0
    )
    cutmix: float = option(
        0.0, "Alpha of cutmix; 0 for none.", panel="Augmentation", metavar="ALPHA", at_least=0
    )
    scale: tuple[float, ...] = option(
        (0.5, 1.0),
        "Smallest and largest share of the area that a random crop keeps.",
        panel="Rarer options",
        metavar="A,B",
        above=0,
        at_most=1,
    )
    ratio: tuple[float, ...] = option(
        (0.75, 4 / 3),
        "Smallest and largest aspect ratio of a random crop.",
        panel="Rarer options",
        metavar="A,B",
        above=0,
        at_most=100,
    )
    hflip: float = option(
        0.5,
        "Probability of a horizontal flip; use 0 if left and right mean different things.",
        panel="Rarer options",
        metavar="P",
        at_least=0,
        at_most=1,
    )
    vflip: float = option(
        0.0, "Probability of a vertical flip.", panel="Rarer options", metavar="P", at_least=0, at_most=1
    )
    color_jitter: float = option(
        0.0,
        "Strength of changes of brightness, contrast and saturation; unused with an AutoAugment policy.",
        panel="Rarer options",
        metavar="STRENGTH",
        at_least=0,
    )
    reprob: float = option(
        0.0, "Probability of erasing a rectangle.", panel="Rarer options", metavar="P", at_least=0, at_most=1
    )
    remode: EraseMode = option("pixel", "Contents of an erased rectangle.", panel="Rarer options")
    recount: int = option(
        1, "Largest number of erased rectangles per image.", panel="Rarer options", metavar="N", at_least=1
    )
    mixup_prob: float = option(
        1.0,
        "Probability that mixup or cutmix is applied in a step.",
        panel="Rarer options",
        metavar="P",
        at_least=0,
        at_most=1,
    )
    mixup_switch_prob: float = option(
        0.5,
        "Probability of cutmix rather than mixup, if both are on.",
        panel="Rarer options",
        metavar="P",
        at_least=0,
        at_most=1,
    )
    smoothing: float = option(
        0.0, "Label smoothing.", panel="Rarer options", metavar="SHARE", at_least=0, below=1
    )
    train_interpolation: str | None = option(
        None,
        "Interpolation of random crops; by default the model's own.",
        panel="Rarer options",
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scale", "ratio"):
            value = getattr(self, name)
            require(name, value, len(value) == 2 and value[0] <= value[1], "the smallest, then the largest")

    def idle(self) -> dict[str, str]:
        """Names of options that would have no effect if they were changed, each with the reason."""
        found: dict[str, str] = {}
        if self.reprob == 0:
            found |= dict.fromkeys(("remode", "recount"), f"{option_name('reprob', 0)} erases nothing")
        if not (self.mixup and self.cutmix):
            found["mixup_switch_prob"] = f"{option_name('mixup')} and {option_name('cutmix')} are not both on"
        if not (self.mixup or self.cutmix):
            found["mixup_prob"] = f"neither {option_name('mixup')} nor {option_name('cutmix')} is on"
        if self.aa is not None and "3a" not in self.aa:
            found["color_jitter"] = f"{option_name('aa', self.aa)} varies colours itself"
        if not self.aug:
            kept = ("aug", "mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "smoothing")
            off = f"{option_name('aug', False)} leaves images as they are"
            found |= dict.fromkeys([name for name in self.options() if name not in kept], off)
        return found
