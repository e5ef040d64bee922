"""What a plan is wished to be chosen by."""

import math
from dataclasses import dataclass, fields

from qdq.checks import is_flag, is_number, want
from qdq.errors import ConfigError

__all__ = ["Wish"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a plan is chosen by; the options of ``quantize``.

    Raises:
        ConfigError: options that exclude each other, or a number that makes no sense.
    """

    worth: float | None = None
    measured: bool = False
    target_sqnr: float | None = None
    target_latency: float | None = None

    def __post_init__(self) -> None:
        right = self.worth is None or (is_number(self.worth) and 0 <= self.worth < math.inf)
        wanted = "a finite number from 0 (the fastest model) up; leave it out to have it chosen"
        want("worth", self.worth, right, wanted)
        want("measured", self.measured, is_flag(self.measured), "True or False")
        given = self._given()
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} are {len(given)} ways to choose one plan: give one of them"
            )
        _check_number("target_sqnr", self.target_sqnr, -math.inf, "a finite number of dB, as 30")
        _check_number(
            "target_latency",
            self.target_latency,
            0.0,
            "a number above 0, the latency over the float model's, as 0.5",
        )

    def _given(self) -> list[str]:
        """Names of the options that ask for something."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found["measured"] = found["measured"] or None  # a flag that is not set asks for nothing
        return [name for name, value in found.items() if value is not None]

    @property
    def runs(self) -> bool:
        """Whether plans are to be run on samples."""
        return self.measured or self.target_sqnr is not None or self.target_latency is not None

    def check(self, *, rated: bool) -> None:
        """Refuse a wish that nothing would heed.

        Args:
            rated: whether plans are chosen by the noise of their roundings.

        Raises:
            ConfigError: saying why, and what to do.
        """
        for name in self._given():
            if not rated:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} needs errors to weigh: a calibrator "
                    "that keeps histograms (MSE, Entropy, Percentile), and a target that weighs "
                    "costs (ORT_CPU)"
                )


def _check_number(option: str, value: object, above: float, wanted: str) -> None:
    right = value is None or (is_number(value) and above < value < math.inf)
    want(option, value, right, wanted)
