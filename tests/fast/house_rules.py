"""The rules of the house, as pure functions from text to faults.

`test_house.py` applies them to the tree, `test_house_rules.py` shows that each one can fail. What ruff
and mypy already hold (order of imports and of `__all__`, docstrings, types) is not repeated here.
"""

import ast
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

PACKAGE = "tokenmill"
MAX_FUNCTION_LINES = 60
MAX_P90_FUNCTION_LINES = 30
MAX_FILE_LINES = 500
MAX_NATIVE_SHARE = 0.25

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A place that breaks a rule: a module, `module:function` or a path; `value` is what was measured."""

    rule: str
    where: str
    message: str
    value: float = 0.0

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """An exception with its reason. A fault above `limit` is still a fault, so an exception cannot grow."""

    rule: str
    where: str
    reason: str
    limit: float = 0.0

    def covers(self, fault: Fault) -> bool:
        """Whether this exception is for that fault."""
        return (self.rule, self.where) == (fault.rule, fault.where) and fault.value <= self.limit


def layer_table(markdown: str) -> dict[str, int]:
    """The rooms and their layers, from the rows `| 2 | `models` | ... |` of the architecture page."""
    rows = re.findall(r"^\|\s*(\d+)\s*\|\s*`(\w+)`\s*\|", markdown, flags=re.MULTILINE)
    return {package: int(layer) for layer, package in rows}


def functions(tree: ast.Module) -> Iterator[tuple[str, FunctionNode]]:
    """Every function with its dotted name, methods and inner functions included."""
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        prefix, node = stack.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, FunctionNode | ast.ClassDef):
                name = f"{prefix}{child.name}"
                if isinstance(child, FunctionNode):
                    yield name, child
                stack.append((f"{name}.", child))
            else:
                stack.append((prefix, child))


def imported_modules(node: ast.AST) -> list[str]:
    """Modules that an import statement names; a relative import starts with a dot; [] for other nodes."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        return [f"{PACKAGE}.{a.name}" for a in node.names] if module == PACKAGE else [module]
    return []


def import_faults(module: str, source: str, layers: Mapping[str, int]) -> list[Fault]:
    """Arrows that do not go to a strictly lower layer, and relative imports."""
    faults = []
    room = room_of(module)
    if room and room not in layers:
        return [Fault(rule="imports", where=module, message=f"{room} is not in docs/architecture.md")]
    for node in ast.walk(ast.parse(source)):
        for target in imported_modules(node):
            why = _arrow_fault(module, room, target, layers)
            if why:
                faults.append(Fault(rule="imports", where=module, message=f"imports {target}: {why}"))
    return faults


def room_of(module: str) -> str:
    """`models` for `tokenmill.models.formats.gguf`; empty for the root package and its `__main__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__main__" else ""


def _arrow_fault(module: str, room: str, target: str, layers: Mapping[str, int]) -> str:
    if target.startswith("."):
        return "use an absolute import"
    if target != PACKAGE and not target.startswith(f"{PACKAGE}."):
        return ""
    goal = room_of(target)
    if goal in {room, "__version__"}:
        return ""
    if goal not in layers:
        return f"{goal or 'the root package'} is not a room of docs/architecture.md"
    if not room:
        is_main = module.endswith(".__main__") and goal == "cli"
        return "" if is_main else "the root package imports nothing"
    if layers[goal] >= layers[room]:
        return f"layer {layers[goal]} is not below layer {layers[room]}"
    return ""


def lazy_import_faults(module: str, source: str) -> list[Fault]:
    """Imports of own code inside a function; only `cli` may have them."""
    if room_of(module) == "cli":
        return []
    return [
        Fault(rule="lazy-import", where=f"{module}:{name}", message=f"imports {target} in a function")
        for name, function in functions(ast.parse(source))
        for node in ast.walk(function)
        for target in imported_modules(node)
        if target.split(".")[0] == PACKAGE
    ]


def optional_import_faults(module: str, source: str, optional: Sequence[str]) -> list[Fault]:
    """Libraries of an extra that are imported when the module is; types alone may be."""
    tree = ast.parse(source)
    later: list[ast.AST] = [function for _, function in functions(tree)]
    later += [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    exempt = {id(node) for block in later for node in ast.walk(block)}
    return [
        Fault(rule="optional-import", where=module, message=f"imports {target}, which only an extra installs")
        for node in ast.walk(tree)
        for target in imported_modules(node)
        if target.split(".")[0] in optional and id(node) not in exempt
    ]


def function_lengths(source: str) -> list[tuple[str, int]]:
    """Lines of every function, from `def` to its last line."""
    named = functions(ast.parse(source))
    return [(name, (node.end_lineno or node.lineno) - node.lineno + 1) for name, node in named]


def length_faults(module: str, source: str) -> list[Fault]:
    """Functions and files that are too long."""
    faults = [
        Fault(
            rule="function-length",
            where=f"{module}:{name}",
            message=f"{lines} lines, at most {MAX_FUNCTION_LINES}",
            value=lines,
        )
        for name, lines in function_lengths(source)
        if lines > MAX_FUNCTION_LINES
    ]
    return faults + file_length_faults(module, source)


def file_length_faults(where: str, source: str) -> list[Fault]:
    """A file that is too long, in any language."""
    lines = len(source.splitlines())
    if lines <= MAX_FILE_LINES:
        return []
    message = f"{lines} lines, at most {MAX_FILE_LINES}"
    return [Fault(rule="file-length", where=where, message=message, value=lines)]


def p90_faults(where: str, lengths: Sequence[int]) -> list[Fault]:
    """The 90th percentile (nearest rank) of the lengths of all functions is too high."""
    if not lengths:
        return []
    p90 = sorted(lengths)[math.ceil(0.9 * len(lengths)) - 1]
    if p90 <= MAX_P90_FUNCTION_LINES:
        return []
    message = f"p90 of function lengths is {p90} lines, at most {MAX_P90_FUNCTION_LINES}"
    return [Fault(rule="function-p90", where=where, message=message, value=p90)]


def native_share_faults(num_native: int, num_python: int) -> list[Fault]:
    """C++ is more than its share of all lines."""
    share = num_native / max(1, num_native + num_python)
    if share <= MAX_NATIVE_SHARE:
        return []
    message = f"C++ is {share:.0%} of the lines, at most {MAX_NATIVE_SHARE:.0%}"
    return [Fault(rule="native-share", where="csrc", message=message, value=share)]


def annotation_faults(module: str, source: str) -> list[Fault]:
    """Functions with an argument or a return value that has no type."""
    faults = []
    for name, node in functions(ast.parse(source)):
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        args += [arg for arg in (node.args.vararg, node.args.kwarg) if arg]
        bare = [a.arg for a in args if a.annotation is None and a.arg not in {"self", "cls"}]
        bare += ["return"] if node.returns is None else []
        if bare:
            message = f"no type for {', '.join(bare)}"
            faults.append(Fault(rule="annotations", where=f"{module}:{name}", message=message))
    return faults


def export_faults(module: str, source: str, is_package: bool) -> list[Fault]:
    """`__all__` is missing or is not exactly the public names; a package also exports what it imports."""
    tree = ast.parse(source)
    if module.endswith(".__main__"):
        return []
    listed = _listed_names(tree)
    if listed is None:
        return [Fault(rule="exports", where=module, message="no __all__ with literal names")]
    public = set(_public_names(tree.body, is_package))
    faults = [f"{name} is public but not in __all__" for name in sorted(public - set(listed))]
    faults += [f"__all__ lists {name}, which is not defined here" for name in sorted(set(listed) - public)]
    faults += [f"__all__ lists {name} twice" for name in sorted({n for n in listed if listed.count(n) > 1})]
    return [Fault(rule="exports", where=module, message=message) for message in faults]


def _listed_names(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
                return [str(name) for name in ast.literal_eval(node.value)]
    return None


def _public_names(body: Sequence[ast.stmt], is_package: bool) -> Iterator[str]:
    for node in body:
        names: list[str] = []
        if isinstance(node, FunctionNode | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        elif isinstance(node, ast.ImportFrom) and is_package and str(node.module).startswith(PACKAGE):
            names = [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.If | ast.Try):
            blocks = [node.body, node.orelse, *(h.body for h in getattr(node, "handlers", []))]
            names = [name for block in blocks for name in _public_names(block, is_package)]
        yield from (name for name in names if not name.startswith("_") or name == "__version__")


def error_faults(sources: Mapping[str, str], root: str) -> list[Fault]:
    """Public exception classes that do not derive from `root`."""
    bases: dict[str, tuple[str, list[str]]] = {}
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = (module, [ast.unparse(b).split(".")[-1] for b in node.bases])
    return [
        Fault(rule="errors", where=f"{module}:{name}", message=f"is an exception outside {root}")
        for name, (module, _) in bases.items()
        if not name.startswith("_") and _is_exception(name, bases) and not _derives(name, root, bases)
    ]


def _derives(name: str, root: str, bases: Mapping[str, tuple[str, list[str]]]) -> bool:
    return name == root or any(_derives(base, root, bases) for base in bases.get(name, ("", []))[1])


def _is_exception(name: str, bases: Mapping[str, tuple[str, list[str]]]) -> bool:
    if name not in bases:
        return name.endswith(("Error", "Exception", "Exit", "Interrupt"))
    return any(_is_exception(base, bases) for base in bases[name][1])


def dataclass_faults(module: str, source: str) -> list[Fault]:
    """Dataclasses named `...Config`, `...Params` or `...Options` that are not frozen and keyword-only."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef) or not node.name.endswith(("Config", "Params", "Options")):
            continue
        marks = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
        if "dataclass" in marks and not ("frozen=True" in marks and "kw_only=True" in marks):
            message = "make it @dataclass(frozen=True, kw_only=True)"
            faults.append(Fault(rule="config", where=f"{module}:{node.name}", message=message))
    return faults


def global_faults(module: str, source: str) -> list[Fault]:
    """`global` statements: state belongs to an object that is passed."""
    return [
        Fault(rule="global-state", where=module, message=f"global {', '.join(node.names)}")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Global)
    ]
