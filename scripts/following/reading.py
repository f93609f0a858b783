"""Reading a script: its syntax tree, its statements by stage, names and keyword arguments in it. Nothing is run."""

import ast
import functools
import io
import re
import tokenize
from collections import defaultdict
from pathlib import Path

from .tables import ROOMS, STAGE_OF_FUNCTION, STAGE_OF_MARK


OURS = Path(__file__).resolve().parents[2] / "run_chatglm_lora.py"


class NotRunClm(ValueError):
    """The file is not a run_clm.py; the text says why."""


def source_text(path) -> tuple[str, str]:
    """The text of a Python file, without a byte order mark, and its encoding, which the file may name; NotRunClm."""
    source = Path(path).read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        return source.decode(encoding), encoding
    except UnicodeDecodeError as error:
        line = source[: error.start].count(b"\n") + 1
        raise NotRunClm(f"{path}, line {line}: no {error.encoding} text: name its encoding in line 1.") from error
    except SyntaxError as error:
        raise NotRunClm(f"{path}, line {broken_line(source)}: {error}; save it as UTF-8.") from error


def broken_line(source) -> int:
    """The first line of a file that is no UTF-8; 1 if all are."""
    lines = source.split(b"\n")
    return next((n for n, line in enumerate(lines, 1) if line.decode("utf-8", "ignore").encode() != line), 1)


def parsed(path) -> ast.Module:
    """The syntax tree of a file, made once; NotRunClm if it has not what makes a run_clm.py."""
    return parsed_text(Path(path), source_text(path)[0])


@functools.cache
def parsed_text(path, text) -> ast.Module:
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise NotRunClm(f"{path}, line {error.lineno or 1}: this is no Python: {error.msg}.") from error
    except ValueError as error:
        raise NotRunClm(f"{path}, line 1: {error}.") from error
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    needed = {"ModelArguments", "DataTrainingArguments", "main"} - defined
    needed |= {"AutoModelForCausalLM", "load_dataset"} - words
    if "run_chatglm_lora" in {
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    }:
        raise NotRunClm(f"{path} is grafted already: take the run_clm.py that it was made from.")
    if needed:
        raise NotRunClm(f"{path} is no run_clm.py: it has no {', '.join(sorted(needed))}.")
    tree.body += definitions(path.parent / "finetuning") if ROOMS & words else []
    return tree


def definitions(folder) -> list[ast.stmt]:
    """Imports, functions and classes of the modules in a folder: where our stages lie that are not in the script."""
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
    trees = [ast.parse(path.read_bytes()) for path in sorted(folder.glob("*.py")) if path.stem in ROOMS]
    return [node for tree in trees for node in tree.body if isinstance(node, kinds)]


def dotted(node) -> str:
    """a.b.c of a name, an attribute, or a call (with brackets); an empty string of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call):
        return f"{dotted(node.func)}()"
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def last_name(node) -> str:
    """c of a.b.c."""
    return dotted(node).rpartition(".")[2]


def own_text(node) -> str:
    """A statement in one line, without the words of its messages."""
    shortened = ast.parse(ast.unparse(node))
    for each in ast.walk(shortened):
        if isinstance(each, ast.Constant) and isinstance(each.value, str) and " " in each.value:
            each.value = "..."
    return re.sub(r"\s+", " ", ast.unparse(shortened))


def assigned_names(statement) -> list[str]:
    """Names that a simple statement assigns to, or that a definition defines."""
    if isinstance(statement, ast.FunctionDef):
        return [statement.name]
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    targets = [each for target in targets for each in getattr(target, "elts", [target])]
    bases = [target.value if isinstance(target, ast.Subscript) else target for target in targets]
    return [base.id for base in bases if isinstance(base, ast.Name)]


def class_fields(tree, name) -> list[ast.AnnAssign]:
    """The fields of a dataclass of a script, with those of its bases there."""
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    own = [each for node in found for each in node.body if isinstance(each, ast.AnnAssign)]
    return [
        field for node in found for base in node.bases for field in class_fields(tree, last_name(base) or dotted(base))
    ] + own


def calls_in(node) -> list[ast.Call]:
    return [each for each in ast.walk(node) if isinstance(each, ast.Call)]


def leaves(statements, conditions=()):
    """(statement, conditions above it) for the simple statements and definitions in a body, and for the conditions."""
    for statement in statements:
        tests = [statement.test] if isinstance(statement, ast.If | ast.While) else []
        tests += [item.context_expr for item in getattr(statement, "items", [])] + [
            each for each in [getattr(statement, "iter", None)] if each
        ]
        bodies = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
        bodies += [handler.body for handler in getattr(statement, "handlers", [])]
        if isinstance(statement, ast.FunctionDef | ast.ClassDef) or not any(bodies):
            yield statement, conditions
            continue
        for test in tests:
            yield ast.copy_location(ast.Expr(test), test), conditions
        for body in bodies:
            yield from leaves(body, (*conditions, *tests))


def staged(tree, helpers=()):
    """(stage, statement, conditions) for all code of a script: by our function's stage, or by the marks in main.

    The body of a helper has the stage in which main first names it.
    """
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    stage, in_main, named = "arguments", [], {}
    for statement, conditions in leaves(main.body):
        names = assigned_names(statement) + [dotted(call.func) for call in calls_in(statement)]
        stage = next((STAGE_OF_MARK[name] for name in names if name in STAGE_OF_MARK), stage)
        in_main.append((stage, statement, conditions))
        for word in [each.id for each in ast.walk(statement) if isinstance(each, ast.Name)]:
            named.setdefault(word, stage)
    for node in tree.body:
        if node is main:
            yield from in_main
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            stage = named.get(node.name, "arguments") if node in helpers else STAGE_OF_FUNCTION.get(node.name)
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            bodies = [node.body] if isinstance(node, ast.FunctionDef) else [method.body for method in methods]
            for body in bodies if stage else []:
                yield from ((stage, *leaf) for leaf in leaves(body))
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            yield from (("versions", *leaf) for leaf in leaves([node]))


class Keywords:
    """The keyword arguments of calls, also of those that come from dicts which the script makes."""

    def __init__(self, tree):
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        self.dicts, self.owner = defaultdict(list), {}  # dicts: what is assigned to (function, name)
        for function in self.functions.values():
            for node in ast.walk(function):
                self.owner[node] = function
        for function in self.functions.values():
            for node in ast.walk(function):
                for target in getattr(node, "targets", []):
                    if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
                        self.dicts[function.name, target.value.id].append(ast.Dict([target.slice], [node.value]))
                    elif isinstance(target, ast.Name):
                        self.dicts[function.name, target.id].append(node.value)
                    elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        for each, value in zip(target.elts, node.value.elts, strict=False):
                            if isinstance(each, ast.Name):
                                self.dicts[function.name, each.id].append(value)

    def of(self, call) -> set[str]:
        named = {keyword.arg for keyword in call.keywords if keyword.arg}
        return named.union(*(self.keys(each.value, call) for each in call.keywords if not each.arg))

    def keys(self, value, place, seen=()) -> set[str]:
        """String keys of what `**value` unpacks."""
        if isinstance(value, ast.Dict):
            plain = {key.value for key in value.keys if isinstance(key, ast.Constant)}
            inner = [each for key, each in zip(value.keys, value.values, strict=True) if key is None]
            return plain.union(*(self.keys(each, place, seen) for each in inner))
        function = self.owner.get(place)
        if isinstance(value, ast.Name) and function and (function.name, value.id) not in seen:
            seen = (*seen, (function.name, value.id))
            made = [(each, place) for each in self.dicts[function.name, value.id]] + self.given(function, value.id)
            found = set().union(*(self.keys(each, where, seen) for each, where in made))
            return found | (self.passed(function) if getattr(function.args.kwarg, "arg", "") == value.id else set())
        name = last_name(value.func) if isinstance(value, ast.Call) else ""
        if name in self.functions:
            returns = [each for each in ast.walk(self.functions[name]) if isinstance(each, ast.Return)]
            return set().union(*(self.keys(each.value, each, seen) for each in returns))
        return set()

    def calls_of(self, function) -> list[ast.Call]:
        return [each for each in self.owner if isinstance(each, ast.Call) and dotted(each.func) == function.name]

    def given(self, function, name) -> list[tuple]:
        """What calls give for an argument of a function of the script, and where."""
        names = [argument.arg for argument in function.args.args]
        calls = self.calls_of(function) if name in names else []
        return [(call.args[names.index(name)], call) for call in calls if len(call.args) > names.index(name)]

    def passed(self, function) -> set[str]:
        """Keywords that calls give to the **options of a function of the script."""
        named = {argument.arg for argument in function.args.args}
        return {keyword.arg for call in self.calls_of(function) for keyword in call.keywords if keyword.arg} - named
