"""The numbers of a recipe: steps, rates, batch sizes."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from .dialogue import EVEN, LOOK_UP, REST


class Joint(NamedTuple):
    """One cycle of stage D: steps, shapes of the digits, weights of the question kinds, factor on the learning rates,
    questions per picture. Few questions per picture leave less to be told from the answers before."""

    steps: int
    shapes: str
    weights: tuple[float, ...]
    factor: float = 1.0
    turns: int = 8


@dataclass(frozen=True)
class Recipe:
    """Steps and batch sizes of every stage; the defaults are those of tiny-llava."""

    crop_steps: int = 1100
    crop_batch: int = 64
    full_steps: int = 250
    full_batch: int = 16
    # steps, learning rate, weights of the question kinds, numbers of visual tokens: order is learnt in the first cycle,
    # look-ups in the third, counting whatever the share of background in the fifth
    language_cycles: tuple = (
        (1400, 1.5e-3, EVEN, (48,)),
        (550, 1e-3, LOOK_UP, (48,)),
        (800, 1.5e-3, LOOK_UP, (48,)),
        (700, 1.5e-3, REST, (48,)),
        (1200, 1.5e-3, REST, (24, 48, 96, 160)),
        (800, 1e-3, REST, (24, 48, 96, 160)),
    )
    language_batch: int = 32
    # steps, learning rate of the tower, shapes of the digits, whether crops or full pictures
    projector_cycles: tuple = (
        (900, 6e-4, "plain", False),
        (450, 5e-4, "plain", False),
        (350, 5e-4, "slanted", False),
    )
    projector_rate: float = 2e-3  # of a new projector, in the first cycle
    joint_cycles: tuple[Joint, ...] = (
        Joint(300, "plain", EVEN),
        Joint(200, "slanted", EVEN),
        Joint(250, "slanted", REST, 0.5),
        Joint(700, "slanted", REST),
        Joint(300, "slanted", REST, 0.4),
    )
    # numbers of visual tokens, so that answers do not hang on how much background is left
    joint_tokens: tuple = (24, 48, 96, 192, 576, 576)
    turns: int = 8
    seed: int = 0
    device: str = "cpu"

    def smoke(self) -> "Recipe":
        """A step or two of every cycle, to see that it runs."""
        return replace(
            self,
            crop_steps=2,
            crop_batch=4,
            full_steps=1,
            full_batch=2,
            language_batch=4,
            language_cycles=tuple((2, *rest) for _, *rest in self.language_cycles),
            projector_cycles=tuple((2, *rest) for _, *rest in self.projector_cycles),
            joint_cycles=tuple(cycle._replace(steps=1) for cycle in self.joint_cycles),
        )
