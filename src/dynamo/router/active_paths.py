"""Which of a prompt's blocks do active requests hold already, and at which workers?

Prompts are paths from a root; blocks in a row that nobody leaves or ends between are one node. A request is counted
at the nodes along its path, so what it costs to add or drop one grows with the forks on its way and not with its
length: three nodes for a prompt of ten thousand blocks behind a shared system prompt.

Sequence hashes that do not chain (made up by a caller) give odd paths, never wrong sums: a path is whatever the
request said, and dropping it takes away exactly what adding it brought.
"""

from collections.abc import Sequence


class Node:
    """Blocks in a row. `counts`: by worker position, how many active requests go through here."""

    __slots__ = ("blocks", "children", "counts", "parent")

    def __init__(self, parent: "Node | None", blocks: Sequence[int]) -> None:
        self.parent = parent
        self.blocks = blocks
        self.children: dict[int, Node] = {}
        self.counts: dict[int, int] = {}


class ActivePaths:
    """The paths of all active requests, each at one worker."""

    def __init__(self) -> None:
        self._root = Node(None, ())

    @property
    def empty(self) -> bool:
        """Whether no path is left."""
        return not self._root.children

    def shared(self, path: Sequence[int]) -> list[tuple[int, dict[int, int]]]:
        """(blocks, who): requests at these worker positions hold at least so many leading blocks of `path`.

        Of several entries that a position is in, the last one counts: every set is part of the one before. The sets
        are for reading now, not for keeping.
        """
        shared: list[tuple[int, dict[int, int]]] = []
        node, depth, length = self._root, 0, len(path)
        while depth < length:
            child = node.children.get(path[depth])
            if child is None:
                break
            common = _common(child.blocks, path, depth)
            depth += common
            if shared and len(shared[-1][1]) == len(child.counts):
                shared[-1] = depth, child.counts
            else:
                shared.append((depth, child.counts))
            if common < len(child.blocks):
                break
            node = child
        return shared

    def add(self, path: Sequence[int], position: int) -> tuple[Node, int]:
        """Count a request. Returns the node it ends at, and how many blocks are new at that worker."""
        node, depth, length, fresh = self._root, 0, len(path), 0
        while depth < length:
            child = node.children.get(path[depth])
            if child is None:
                child = node.children[path[depth]] = Node(node, path[depth:])
            else:
                common = _common(child.blocks, path, depth)
                if common < len(child.blocks):
                    child = _split(child, common)
            counts = child.counts
            held = counts.get(position, 0)
            counts[position] = held + 1
            if not held:
                fresh += len(child.blocks)
            depth += len(child.blocks)
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
                gone += len(node.blocks)
                if not counts:
                    del parent.children[node.blocks[0]]
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


def _common(blocks: Sequence[int], path: Sequence[int], start: int) -> int:
    """How many of `blocks` are `path[start:]`'s first. The first one is: the child was found by it.

    Hashes name a block with all before it, so where two agree they agree before, and one look at the end is enough;
    else the fork is found by bisection.
    """
    length = min(len(blocks), len(path) - start)
    if blocks[length - 1] == path[start + length - 1]:
        return length
    low, high = 0, length - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if blocks[middle] == path[start + middle]:
            low = middle
        else:
            high = middle
    return high


def _split(node: Node, at: int) -> Node:
    """Put the first `at` blocks of a node into one of their own before it, and return that. `node` stays the end of
    those requests that end at it."""
    assert node.parent is not None
    head = Node(node.parent, node.blocks[:at])
    head.counts = dict(node.counts)
    head.children[node.blocks[at]] = node
    node.parent.children[node.blocks[0]] = head
    node.parent = head
    node.blocks = node.blocks[at:]
    return head


def _join(node: Node) -> None:
    """Put a node's blocks before its only child's if nobody ends between, so that old forks are forgotten."""
    (child,) = node.children.values()
    parent = node.parent
    if parent is None or child.counts != node.counts:
        return
    child.blocks = [*node.blocks, *child.blocks]
    child.parent = parent
    parent.children[child.blocks[0]] = child
