"""Does a chat template want a message's content as one string, or as a list of parts?"""

from collections.abc import Iterable
from typing import Literal

from jinja2 import nodes

ContentFormat = Literal["string", "openai"]
"""`string`: content is one string. `openai`: content is a list of `{"type": "text", "text": …}` and the like."""


def _core(node: nodes.Node | None) -> nodes.Node | None:
    """The expression under filters, tests and slices: they keep what is looked through."""
    while True:
        if isinstance(node, (nodes.Filter, nodes.Test)) or (
            isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        ):
            node = node.node
        else:
            return node


def _is_one_of(node: nodes.Node | None, names: set[str]) -> bool:
    core = _core(node)
    return isinstance(core, nodes.Name) and core.name in names


def _is_element_of(node: nodes.Node | None, lists: set[str]) -> bool:
    core = _core(node)
    return isinstance(core, nodes.Getitem) and _is_one_of(core.node, lists)


def _owner_of_content(node: nodes.Node | None) -> nodes.Node | None:
    """The expression `x` in `x.content` or `x['content']`."""
    core = _core(node)
    if isinstance(core, nodes.Getattr) and core.attr == "content":
        return core.node
    if isinstance(core, nodes.Getitem) and isinstance(core.arg, nodes.Const) and core.arg.value == "content":
        return core.node
    return None


def _assigned(assigns: Iterable[nodes.Assign]) -> list[tuple[str, nodes.Node]]:
    return [(assign.target.name, assign.node) for assign in assigns if isinstance(assign.target, nodes.Name)]


class _Names:
    """Which names in a template stand for the list of messages, for one message, and for its content."""

    def __init__(self, tree: nodes.Template) -> None:
        self.lists, self.messages, self.contents = {"messages"}, set[str](), {"content"}
        self._assigned = _assigned(tree.find_all(nodes.Assign))
        self._loops = [loop for loop in tree.find_all(nodes.For) if isinstance(loop.target, nodes.Name)]
        self._macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        self._calls = [call for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Name)]
        while self._grow():
            pass

    def _size(self) -> int:
        return len(self.lists) + len(self.messages) + len(self.contents)

    def _grow(self) -> bool:
        before = self._size()
        for name, value in self._assigned:
            if _is_one_of(value, self.lists):
                self.lists.add(name)
            elif self._is_message(value):
                self.messages.add(name)
            elif self.is_content(value):
                self.contents.add(name)
        for loop in self._loops:
            if _is_one_of(loop.iter, self.lists) and isinstance(loop.target, nodes.Name):
                self.messages.add(loop.target.name)
        for call in self._calls:
            self._follow(call)
        return self._size() > before

    def _follow(self, call: nodes.Call) -> None:
        """Names of macro parameters that are given a content."""
        macro = self._macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        if macro is None:
            return
        by_position = zip(macro.args, call.args, strict=False)
        self.contents.update(arg.name for arg, value in by_position if self.is_content(value))
        names = {arg.name for arg in macro.args}
        self.contents.update(kw.key for kw in call.kwargs if kw.key in names and self.is_content(kw.value))

    def _is_message(self, node: nodes.Node | None) -> bool:
        return _is_one_of(node, self.messages) or _is_element_of(node, self.lists)

    def is_content(self, node: nodes.Node | None) -> bool:
        return _is_one_of(node, self.contents) or self._is_message(_owner_of_content(node))


def content_format(tree: nodes.Template) -> ContentFormat:
    """`openai` if the template loops over some message's content, else `string` (vLLM's rule).

    Content is followed through `set`, filters, slices and macro parameters; a name is taken to mean the same
    everywhere in the template, and `content` always to mean content.
    """
    names = _Names(tree)
    return "openai" if any(names.is_content(loop.iter) for loop in tree.find_all(nodes.For)) else "string"
