"""What ruff cannot measure of the product code: lengths of functions, constructors' parameters, share of comments."""

import ast
import io
import tokenize

import pytest
from conftest import ROOT

FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "util").rglob("*.py")])
TOOLS = sorted(path for folder in ("scripts", "benchmarks", "recipes") for path in (ROOT / folder).rglob("*.py"))


def functions(file):
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]


def code_lines(node):
    """Lines of a function from its `def` on, without its docstring."""
    lines = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= first.end_lineno - first.lineno + 1
    return lines


@pytest.mark.parametrize("file", [*FILES, *TOOLS], ids=lambda file: str(file.relative_to(ROOT)))
def test_functions_are_short_and_take_few_parameters(file):
    for node in functions(file):
        count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]) - (
            bool(node.args.args) and node.args.args[0].arg in ("self", "cls")
        )
        assert code_lines(node) <= 50, f"{node.name} has {code_lines(node)} lines"
        assert count <= (12 if node.name == "__init__" else 8), f"{node.name} takes {count} parameters"


def test_comments_stand_on_at_least_a_twentieth_of_the_code_lines():
    comments, code = 0, set()
    for file in FILES:
        for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
            if token.type == tokenize.COMMENT:
                comments += 1
            elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.STRING):
                code.add((file, token.start[0]))
    assert comments >= 0.05 * len(code), f"{comments} comments on {len(code)} lines of code"


def test_few_rules_are_switched_off_and_the_formatter_nowhere():
    switched_off = [
        line
        for file in [*FILES, *TOOLS]
        for line in file.read_text().splitlines()
        if "# noqa" in line or "# fmt:" in line
    ]
    assert len(switched_off) <= 10 and not any("# fmt:" in line for line in switched_off)
    assert all("(" in line.split("# noqa")[1] for line in switched_off), "each with its reason"
