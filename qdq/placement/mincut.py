"""Minimum cut of a directed graph with capacities (Dinic's algorithm, 1970). No graph of ours.

Placement is a minimum cut: each node is on the integer or the float side, each side costs it
something, and each tensor that crosses costs a QuantizeLinear or a DequantizeLinear.
"""

from collections import deque

__all__ = ["Network"]

INFINITE = 1 << 60


class Network:
    """A flow network under construction; vertices are numbers from 0.

    Capacities are non-negative integers, so the cut is exact and the same on every machine.
    """

    def __init__(self, vertices: int) -> None:
        self._edges: list[list[int]] = [[] for _ in range(vertices)]
        self._head: list[int] = []
        self._room: list[int] = []
        self._counted: list[tuple[int, int, int]] = []

    def vertex(self) -> int:
        """Add a vertex and return its number."""
        self._edges.append([])
        return len(self._edges) - 1

    def copy(self) -> "Network":
        """Another network with the same vertices, edges and flow."""
        other = Network(0)
        other._edges = [list(edges) for edges in self._edges]
        other._head, other._room = list(self._head), list(self._room)
        other._counted = list(self._counted)
        return other

    def edge(self, tail: int, head: int, capacity: int, back: int = 0, *, due: bool = False) -> int:
        """Add tail → head; cutting it (tail on the source side, head not) costs ``capacity``.

        ``due``: it counts for the cut, as all do, but ``capacity()`` leaves it out.

        Returns:
            The edge's number, for ``widen``.
        """
        if not due:
            self._counted.append((tail, head, capacity))
        self._edges[tail].append(len(self._head))
        self._head.append(head)
        self._room.append(capacity)
        self._edges[head].append(len(self._head))
        self._head.append(tail)
        self._room.append(back)
        return len(self._head) - 2

    def widen(self, edge: int, by: int) -> None:
        """Give an edge that is a due more capacity. The flow that was found still fits."""
        self._room[edge] += by

    def source_side(self, source: int, sink: int) -> set[int]:
        """The vertices on the source's side of a minimum cut (the smallest such side).

        The flow stays: after ``widen`` or ``edge``, the next cut starts from it.
        """
        while True:
            level = self._levels(source)
            if level[sink] < 0:
                return {v for v, depth in enumerate(level) if depth >= 0}
            self._block(source, sink, level)

    def capacity(self, side: set[int]) -> int:
        """What cutting around ``side`` costs, without the edges that were added as dues."""
        return sum(c for v, w, c in self._counted if v in side and w not in side)

    def _levels(self, source: int) -> list[int]:
        edges, head, room = self._edges, self._head, self._room
        level = [-1] * len(edges)
        level[source] = 0
        queue = deque([source])
        while queue:
            v = queue.popleft()
            deeper = level[v] + 1
            for e in edges[v]:
                w = head[e]
                if level[w] < 0 and room[e] > 0:
                    level[w] = deeper
                    queue.append(w)
        return level

    def _block(self, source: int, sink: int, level: list[int]) -> None:
        """Saturate every shortest path (depth-first, no recursion: paths may be long)."""
        edges, head, room = self._edges, self._head, self._room
        at = [0] * len(edges)
        path: list[int] = []
        v = source
        while True:
            if v == sink:
                flow = min([room[e] for e in path])
                first = len(path)
                for k in range(len(path) - 1, -1, -1):
                    e = path[k]
                    room[e] -= flow
                    room[e ^ 1] += flow
                    if room[e] == 0:
                        first = k
                v = head[path[first] ^ 1]
                del path[first:]
                continue
            here, deeper = edges[v], level[v] + 1
            for k in range(at[v], len(here)):
                e = here[k]
                if room[e] > 0 and level[head[e]] == deeper:
                    at[v] = k
                    path.append(e)
                    v = head[e]
                    break
            else:  # a dead end
                if not path:
                    return
                level[v] = -1
                v = head[path.pop() ^ 1]
