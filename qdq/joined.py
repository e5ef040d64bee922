"""Things that are joined to each other, in parts."""

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

__all__ = ["Joined"]

T = TypeVar("T", bound=Hashable)


class Joined(Generic[T]):
    """Disjoint parts of a set, each known by one of its members.

    Tarjan, "Efficiency of a Good But Not Linear Set Union Algorithm" (1975), without ranks.
    """

    def __init__(self) -> None:
        self._up: dict[T, T] = {}  # to another one of the same part, or itself

    def add(self, member: T) -> None:
        """A new member, as a part of its own."""
        self._up[member] = member

    def join(self, one: T, to: T) -> None:
        """Make two members' parts one, known by what the part of ``to`` is known by."""
        self._up[self.first(one)] = self.first(to)

    def first(self, member: T) -> T:
        """What the member's part is known by."""
        up = self._up
        while up[member] != member:
            up[member] = member = up[up[member]]
        return member

    def __contains__(self, member: object) -> bool:
        return member in self._up

    def __iter__(self) -> Iterator[T]:
        return iter(self._up)
