"""Changes of the code of a module, one at a time, in a fixed order: what ``mutate.py`` draws from."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Function = ast.FunctionDef | ast.AsyncFunctionDef
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
PAIRS = ["min max", "sum mean", "any all", "amin amax", "argmin argmax", "clamp_min clamp_max", "floor ceil"]
PAIRS += ["startswith endswith", "zeros ones", "new_zeros new_ones", "zeros_like ones_like", "append extend"]
NAMES = {one: other for pair in PAIRS for one, other in (pair.split(), pair.split()[::-1])}
DROPPED_CALLS = {"abs", "sqrt", "square", "clamp_min", "clamp", "clone", "flip", "sort", "sorted", "reversed"}
DROPPED_CALLS |= {"log", "exp", "copy", "deepcopy", "resolve", "lower", "strip", "contiguous"}
DROPPED_ATTRIBUTES = {"mT", "T", "H"}
UNSEEN_KEYWORDS = {"strict", "device"}
SPEAKERS = {"warn", "warning", "info", "debug", "log", "progress", "advance", "reporter", "print"}
"""Functions that only tell something."""
SILENT = {"__repr__", "__str__"}


@dataclass
class Change:
    """A change of one place of a module."""

    function: str
    line: int
    before: str
    after: str
    make: Callable[[], None]


def changes(tree: ast.Module) -> Iterator[Change]:
    """Return every change of the functions of a module; only one of them may be made."""

    def within(node: ast.AST, function: str, put: Callable[[ast.AST], None]) -> Iterator[Change]:
        if function and isinstance(node, ast.expr | ast.stmt | ast.comprehension):
            line = getattr(node, "lineno", 0)
            for after in replacements(node):
                yield Change(function, line, ast.unparse(node), ast.unparse(after), _bound(put, after))
        for name, value in ast.iter_fields(node):
            for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST) and not _ignored(node, name, child):
                    inner = function
                    if isinstance(child, Function | ast.ClassDef):
                        prefix = getattr(node, "qualified", "")
                        child.qualified = f"{prefix}.{child.name}".lstrip(".")  # type: ignore[union-attr]
                        if isinstance(child, Function):
                            inner = function or child.qualified  # type: ignore[union-attr]
                    yield from within(child, inner, _setter(node, name, place))

    yield from within(tree, "", lambda _: None)


def _bound(put: Callable[[ast.AST], None], after: ast.AST) -> Callable[[], None]:
    return lambda: put(after)


def _setter(node: ast.AST, name: str, place: int | None) -> Callable[[ast.AST], None]:
    def put(after: ast.AST) -> None:
        if place is None:
            setattr(node, name, after)
        else:
            getattr(node, name)[place] = after

    return put


def _ignored(parent: ast.AST, field: str, node: ast.AST) -> bool:
    """Whether nothing under ``node`` changes a result."""
    if field in ("annotation", "returns", "decorator_list", "bases", "type_params", "exc", "cause"):
        return True
    if isinstance(node, ast.Assert | ast.JoinedStr | ast.Raise):
        return True
    if isinstance(node, Function) and node.name in SILENT:
        return True
    if isinstance(node, ast.keyword) and node.arg in UNSEEN_KEYWORDS:
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or _speaks(node.value)
    if isinstance(node, ast.If) and "progress is not None" in ast.unparse(node.test):
        return True
    called = ast.unparse(parent.func) if isinstance(parent, ast.Call) and field == "args" else ""
    return called in ("isinstance", "cast")


def _speaks(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in SPEAKERS


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Return what a node may become."""
    match node:
        case ast.BinOp(left, ast.MatMult() as operator, right):
            yield ast.BinOp(right, operator, left)
        case ast.BinOp(left, operator, right) if type(operator) in OPERATORS:
            yield ast.BinOp(left, OPERATORS[type(operator)](), right)
        case ast.AugAssign(target, operator, value) if type(operator) in OPERATORS:
            yield ast.AugAssign(target, OPERATORS[type(operator)](), value)
        case ast.Compare(left, ops, comparators):
            for place, operator in enumerate(ops):
                other = OPERATORS[type(operator)]()
                yield ast.Compare(left, [*ops[:place], other, *ops[place + 1 :]], comparators)
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(OPERATORS[type(operator)](), values)
        case ast.UnaryOp(ast.Not() | ast.USub() | ast.Invert(), operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value + 1)
            yield ast.Constant(value - 1)
        case ast.Constant(float(value)):
            yield ast.Constant(value * 2 if value else 1.0)
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Attribute(value, name) if name in DROPPED_ATTRIBUTES:
            yield value
        case ast.Call():
            yield from _other_calls(node)
        case ast.comprehension(target, iterator, conditions, is_async) if conditions:
            yield ast.comprehension(target, iterator, [], is_async)
        case _:
            yield from _other_statements(node)


def _other_calls(node: ast.Call) -> Iterator[ast.AST]:
    args, keywords, function = node.args, node.keywords, node.func
    first = args[:2]
    plain = len(first) == 2 and not any(isinstance(arg, ast.Starred) for arg in first)
    plain = plain and ast.unparse(function) not in ("isinstance", "getattr", "hasattr", "cast", "min", "max")
    if plain and ast.unparse(first[0]) != ast.unparse(first[1]):
        yield ast.Call(function, [first[1], first[0], *args[2:]], keywords)
    for keyword in keywords:
        if keyword.arg is not None and keyword.arg not in UNSEEN_KEYWORDS:
            yield ast.Call(function, args, [other for other in keywords if other is not keyword])
    if isinstance(function, ast.Attribute):
        if function.attr in NAMES:
            yield ast.Call(ast.Attribute(function.value, NAMES[function.attr], ast.Load()), args, keywords)
        if function.attr in DROPPED_CALLS and ast.unparse(function.value) != "torch":
            yield args[0] if function.attr in ("deepcopy", "copy") and args else function.value
    elif isinstance(function, ast.Name):
        if function.id in NAMES:
            yield ast.Call(ast.Name(NAMES[function.id], ast.Load()), args, keywords)
        if function.id in DROPPED_CALLS and args:
            yield args[0]


def _other_statements(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Return(value) if value is not None and ast.unparse(value) != "None":
            yield ast.Return(ast.Constant(None))
        case ast.If(test, body, orelse) if not isinstance(test, ast.UnaryOp):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.Expr(ast.Call()):
            yield ast.Pass()
        case ast.Assign([ast.Attribute() | ast.Subscript()], _):
            yield ast.Pass()
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()
