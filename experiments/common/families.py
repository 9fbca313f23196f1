"""The family of initial weights, a setting that all models share."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import deq_jax as deq
from deq_jax.training import option, require

FAMILIES = {
    "gaussian": deq.init.gaussian,
    "orthogonal": deq.init.orthogonal,
    "goe": deq.init.goe,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyConfig:
    """How the weights begin that map the state of a DEQ to itself; a model's settings inherit."""

    init: Literal["published", "gaussian", "orthogonal", "goe"] = option(
        "published",
        "initial weights of what maps the state to itself: as published, or random matrices of "
        "equal entry variance, init_scale^2 / n; goe: symmetric",
    )
    init_scale: float = option(1.0, "scale of gaussian, orthogonal and goe weights")
    init_centre: bool = option(
        False, "gaussian kernels of convolutions at the centre tap only, like those of orthogonal "
        "and goe",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.init_centre:
            require(self.init == "gaussian", "init", "gaussian for init_centre", self.init)
        wanted = "above 0 and finite"
        require(0 < self.init_scale < math.inf, "init_scale", wanted, self.init_scale)

    def build_weights(self) -> deq.init.MatrixInitializer | None:
        """The family.

        Returns:
          An initializer, None for the published weights.

        Example:
          >>> FamilyConfig(init="goe", init_scale=0.4).build_weights().scale
          0.4
        """
        if self.init == "gaussian":
            return deq.init.gaussian(self.init_scale, centre=self.init_centre)
        return None if self.init == "published" else FAMILIES[self.init](self.init_scale)
