"""The mutants of a file: copies with one small fault each.

mutmut's operators make them (numbers, comparisons, arithmetic, arguments, assignments, keywords, strings), and one of
our own, which leaves a call out. Not changed is what no test should look at: annotations, docstrings, decorators,
imports, the words of messages to users, and whole sentences in strings.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

NOT_CHANGED = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Raise, cst.Assert, cst.FormattedString)
MESSAGES = {"print", "print_rank0", "warn", "add_argument", "add", "ArgumentParser", "add_argument_group"}


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        line: Number of the line that is changed, from 1.
        before: The expression or statement as it is.
        after: The same with the fault.
        source: The whole file with the fault.
    """

    line: int
    before: str
    after: str
    source: str


def leave_out_call(node: cst.Expr) -> Iterable[cst.BaseSmallStatement]:
    """Replace a statement that is nothing but a call by `pass`."""
    if isinstance(node.value, cst.Call):
        yield cst.Pass()


OPERATORS = (*mutation_operators, (cst.Expr, leave_out_call))


class _Collector(cst.CSTVisitor):
    """Collects (node, changed node) of every possible change."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, int]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, NOT_CHANGED) or _is_message(node) or _is_main_guard(node):
            return False
        if not _is_sentence(node):
            line = self.get_metadata(PositionProvider, node).start.line
            for kind, operator in OPERATORS:
                if isinstance(node, kind):
                    self.found += [(node, changed, line) for changed in operator(node)]
        return True


def _is_message(node: cst.CSTNode) -> bool:
    """Return whether a node is a call that only says something to the user, or defines a flag."""
    if not isinstance(node, cst.Call):
        return False
    name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
    return isinstance(name, cst.Name) and (name.value in MESSAGES or name.value.endswith(("Error", "BadImage")))


def _is_main_guard(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.If) and "__name__" in cst.Module([]).code_for_node(node.test)


def _is_sentence(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.SimpleString) and (" " in node.value or node.value.startswith(('"""', 'r"""')))


def draw(source: str, count: int, rng: random.Random) -> list[Mutant]:
    """Draw `count` different mutants of a file's source, or all of them if there are fewer."""
    collector = _Collector()
    module = MetadataWrapper(cst.parse_module(source)).visit(collector)
    rng.shuffle(collector.found)
    drawn = {}
    for node, changed, line in collector.found:
        if len(drawn) == count:
            break
        text = module.deep_replace(node, changed).code
        if text != source and _is_python(text):
            drawn[text] = Mutant(line, _brief(module, node), _brief(module, changed), text)
    return list(drawn.values())


def _is_python(text: str) -> bool:
    try:
        compile(text, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _brief(module: cst.Module, node: cst.CSTNode) -> str:
    return " ".join(module.code_for_node(node).split())[:200]
