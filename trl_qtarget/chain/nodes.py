"""Settings as YAML nodes, and the references to outputs of stages among them.

A setting stays a node until its command's parser reads it, because only the parser knows whether `no` is a word or
false. A reference is a node with typed parts, so that the inputs of a stage are known without comparing texts with
paths.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from ..options.reading import nearest


IN_BRACES = re.compile(r"\$\{([^}]*)\}")
OUTPUT_DIR = re.compile(r"stages\.(.+)\.output_dir")


@dataclass(frozen=True)
class Output:
    """The output folder of a stage, as settings of this stage and of later ones refer to it."""

    stage: str
    path: str

    def __str__(self) -> str:
        return self.path


class Reference(yaml.ScalarNode):
    """A text with outputs of stages in it.

    `parts` are the outputs and the pieces of text around them. The node's `value` is the text with the real paths of
    the outputs, as it is written into a stage's YAML file.
    """

    def __init__(self, *parts: Output | str):
        super().__init__(scalar("").tag, "".join(map(str, parts)))
        self.parts = [part for part in parts if part]

    @property
    def stages(self) -> set[str]:
        """The names of the stages that the text refers to."""
        return {part.stage for part in self.parts if isinstance(part, Output)}

    @property
    def path(self) -> tuple[str, str] | None:
        """The stage and the path inside its output ("" for the output itself); None for any other text."""
        first, *rest = self.parts
        inside = "".join(map(str, rest))
        if isinstance(first, str) or len(rest) > 1 or not f"{inside}/".startswith("/"):
            return None
        return first.stage, inside.strip("/")

    def named(self, names: Mapping[str, str]) -> yaml.ScalarNode:
        """Return the text with a name for each stage in place of its output's path."""
        return scalar("".join(part if isinstance(part, str) else names[part.stage] for part in self.parts))


def with_references(node: yaml.Node, handed_on: Mapping[str, Output], earlier: Iterable[Output]) -> yaml.Node:
    """Return `node` with a `Reference` for each text that holds `${stages.NAME.output_dir}` or is an output's path.

    Args:
        handed_on: the output that `${stages.NAME.output_dir}` stands for, by NAME
        earlier: the outputs of all earlier stages, which a text may also name by their paths

    Raises:
        ValueError: `${...}` has another form or names no earlier stage; the message continues the setting's name.
    """

    def referring(node: yaml.ScalarNode) -> yaml.ScalarNode:
        pieces = IN_BRACES.split(node.value)  # text and insides of braces in turn
        if len(pieces) > 1:
            return Reference(*(_output(piece, handed_on) if i % 2 else piece for i, piece in enumerate(pieces)))
        for output in earlier:
            if f"{node.value}/".startswith(f"{output}/"):
                return Reference(output, node.value.removeprefix(output.path))
        return node

    return changed(node, referring)


def _output(inside: str, handed_on: Mapping[str, Output]) -> Output:
    """Return the output that `${inside}` refers to."""
    match = OUTPUT_DIR.fullmatch(inside)
    if match is None:
        raise ValueError(f"has '${{{inside}}}': the only reference is ${{stages.NAME.output_dir}}")
    name = match[1]
    if name not in handed_on:
        raise ValueError(f"refers to stage {name!r}, and there is no such stage before it{nearest(name, handed_on)}")
    return handed_on[name]


def changed(node: yaml.Node, change: Callable[[Any], yaml.Node]) -> yaml.Node:
    """Return a copy of `node` with `change` applied to each scalar in it; keys of mappings stay as they are."""
    if isinstance(node, yaml.ScalarNode):
        return change(node)
    if isinstance(node, yaml.SequenceNode):
        return yaml.SequenceNode(node.tag, [changed(item, change) for item in node.value])
    return yaml.MappingNode(node.tag, [(key, changed(item, change)) for key, item in node.value])


def references(node: yaml.Node) -> Iterator[Reference]:
    """Yield the references in `node`."""
    if isinstance(node, Reference):
        yield node
    elif isinstance(node, yaml.CollectionNode):
        for item in node.value:
            yield from references(item[1] if isinstance(node, yaml.MappingNode) else item)


def plain(node: yaml.Node | None) -> Any:
    """Return the value that plain YAML reads from a node; None if there is no node."""
    return None if node is None else yaml.SafeLoader("").construct_document(node)


def scalar(text: str, kind: str = "str") -> yaml.ScalarNode:
    """Return the node of a text, or of another kind of value that `text` spells."""
    return yaml.ScalarNode(f"tag:yaml.org,2002:{kind}", text)
