"""A calibrator that is the end of its worker. Processes import it from here, by its name."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdq.calibrate import MinMax
from qdq.ranges import TensorRange


@dataclass(frozen=True)
class Deadly(MinMax):
    """Ends a worker process at the sample that holds the value 7, once per marker file."""

    marker: str = ""
    parent: int = 0

    def summarize(self, x: NDArray[np.floating]) -> TensorRange:
        if os.getpid() != self.parent and (x == 7).any() and not Path(self.marker).exists():
            Path(self.marker).touch()
            os._exit(1)
        return MinMax.summarize(self, x)
