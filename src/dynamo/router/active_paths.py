"""Which of a prompt's blocks do active requests hold already, and at which workers?

Prompts are paths from a root; blocks in a row that nobody leaves or ends between are one node. A request is counted
at the nodes along its path, so what it costs to add or drop one grows with the forks on its way and not with its
length: three nodes for a prompt of ten thousand blocks behind a shared system prompt. A node's blocks are a part of
some request's path, which is kept and not copied, and looked at only where paths part: it may be one that is hashed
as it is looked at.

Sequence hashes that do not chain (made up by a caller) give odd paths, never wrong sums: a path is whatever the
request said, and dropping it takes away exactly what adding it brought.
"""

from collections.abc import Sequence

import msgspec


class Node(msgspec.Struct, eq=False):
    """Blocks in a row: those of `path`, from its beginning on, at `start` to `end`. A struct: each request has one."""

    parent: "Node | None"
    path: Sequence[int]
    start: int
    end: int
    children: dict[int, "Node"] = {}
    counts: dict[int, int] = {}
    """By worker position, how many active requests go through here."""


class ActivePaths:
    """The paths of all active requests, each at one worker."""

    def __init__(self) -> None:
        self._root = Node(None, (), 0, 0)

    @property
    def empty(self) -> bool:
        """Whether no path is left."""
        return not self._root.children

    def shared(self, path: Sequence[int]) -> Sequence[tuple[int, dict[int, int]]]:
        """(blocks, who): requests at these worker positions hold at least so many leading blocks of `path`.

        Of several entries that a position is in, the last one counts: every set is part of the one before. The sets
        are for reading now, not for keeping.
        """
        if not path or path[0] not in self._root.children:
            return ()
        shared: list[tuple[int, dict[int, int]]] = []
        node, depth, length = self._root, 0, len(path)
        while depth < length:
            child = node.children.get(path[depth])
            if child is None:
                break
            depth = _common(child, path, depth)
            if shared and len(shared[-1][1]) == len(child.counts):
                shared[-1] = depth, child.counts
            else:
                shared.append((depth, child.counts))
            if depth < child.end:
                break
            node = child
        return shared

    def add(self, path: Sequence[int], position: int) -> tuple[Node, int]:
        """Count a request. Returns the node it ends at, and how many blocks are new at that worker."""
        node, depth, length, fresh = self._root, 0, len(path), 0
        while depth < length:
            first = path[depth]
            child = node.children.get(first)
            if child is None:
                child = node.children[first] = Node(node, path, depth, length, {}, {position: 1})
                return child, fresh + length - depth
            end = _common(child, path, depth)
            if end < child.end:
                child = _split(child, end)
            counts = child.counts
            held = counts.get(position, 0)
            counts[position] = held + 1
            if not held:
                fresh += end - depth
            depth = end
            node = child
        return node, fresh

    def drop(self, end: Node, position: int) -> int:
        """Take back what `add` counted. Returns how many blocks nobody at that worker holds any more."""
        node, gone = end, 0
        while node.parent is not None:
            parent, counts = node.parent, node.counts
            held = counts[position]
            if held > 1:
                counts[position] = held - 1
            else:
                del counts[position]
                gone += node.end - node.start
                if not counts:
                    del parent.children[node.path[node.start]]
            if len(node.children) == 1:
                _join(node)
            node = parent
        return gone

    @staticmethod
    def move(end: Node, old: int, new: int) -> None:
        """A worker's position changed: move one request that ends at `end`."""
        node: Node | None = end
        while node is not None and node.parent is not None:
            counts = node.counts
            held = counts.pop(old)
            if held > 1:
                counts[old] = held - 1
            counts[new] = counts.get(new, 0) + 1
            node = node.parent


def _common(node: Node, path: Sequence[int], start: int) -> int:
    """Where `path` leaves the node, or ends. The first block is the node's: it was found by it.

    Hashes name a block with all before it, so where two agree they agree before, and one look at the end is enough;
    else the fork is found by bisection.
    """
    blocks, end = node.path, min(node.end, len(path))
    if blocks[end - 1] == path[end - 1]:
        return end
    low, high = start, end - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if blocks[middle] == path[middle]:
            low = middle
        else:
            high = middle
    return high


def _split(node: Node, at: int) -> Node:
    """Put a node's blocks before `at` into one of their own before it, and return that. `node` stays the end of those
    requests that end at it."""
    assert node.parent is not None
    first = node.path[node.start]
    head = Node(node.parent, node.path, node.start, at, {node.path[at]: node}, dict(node.counts))
    node.parent.children[first] = head
    node.parent = head
    node.start = at
    return head


def _join(node: Node) -> None:
    """Put a node's blocks before its only child's if nobody ends between, so that old forks are forgotten."""
    (child,) = node.children.values()
    parent, first = node.parent, node.path[node.start]
    if parent is None or child.counts != node.counts or child.path[node.start] != first:
        return
    child.start = node.start
    child.parent = parent
    parent.children[first] = child
