"""What a run_clm.py does, as facts that can be compared.

A fact belongs to a stage and is a flag, a version floor, a call, a keyword of one, an assignment to an attribute (such
as an argument), a helper, a result or an error.
"""

import ast
import functools
import re
from dataclasses import dataclass

from packaging.requirements import Requirement

from .reading import Keywords, assigned_names, calls_in, dotted, parsed, staged
from .tables import (
    ALIASES,
    DEFINED_UPSTREAM,
    LOUD_BUILTINS,
    QUIET_METHODS,
    QUIET_MODULES,
    STAGE_OF_FUNCTION,
    STAGE_OF_MARK,
    STAGES,
)


@dataclass(frozen=True)
class Fact:
    stage: str
    kind: str
    name: str
    detail: str = ""


def facts(path, ours=False) -> list[Fact]:
    """All facts of a script, in its order; of ours, without helpers. Raises NotRunClm."""
    return facts_of(parsed(path), ours)


@functools.cache
def facts_of(tree, ours) -> list[Fact]:
    keywords, found = Keywords(tree), [*flags(tree), *floors(tree)]
    modules = imported(tree)
    helpers = [] if ours else helpers_in(tree)
    names = {node.name for node in helpers}
    for stage, statement, conditions in staged(tree, helpers):
        found += helper_facts(stage, statement, helpers)
        found += call_facts(stage, statement, modules, names, keywords)
        found += assignment_facts(stage, statement)
        found += result_facts(stage, statement)
        found += error_facts(stage, statement, conditions)
    return list(dict.fromkeys(found))


def helpers_in(tree) -> list:
    """Functions and classes of the script and of its main that upstream does not define; not classes of arguments."""
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    defined = [node for node in (*tree.body, *ast.walk(main)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    known = DEFINED_UPSTREAM | STAGE_OF_MARK.keys()
    return [node for node in defined if node.name not in known and not is_of_arguments(node)]


def is_of_arguments(node) -> bool:
    return isinstance(node, ast.ClassDef) and node.name.endswith("Arguments")


def imported(tree) -> dict[str, str]:
    """The package that each imported name is or comes from."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [(getattr(node, "module", None) or alias.name, alias) for node in nodes for alias in node.names]
    return {(alias.asname or alias.name).partition(".")[0]: module.partition(".")[0] for module, alias in names}


def constant(node, tree):
    """The value of a literal, or of a constant of the script."""
    if isinstance(node, ast.Name):
        made = [each.value for each in tree.body if node.id in assigned_names(each)]
        node = made[0] if made else node
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def flags(tree):
    """--name with type, default and choices, of every field of the argument classes."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments")]
    for node in [each for cls in classes for each in cls.body if isinstance(each, ast.AnnAssign)]:
        kind = re.sub(r"Optional\[(.*)\]", r"\1", ast.unparse(node.annotation)).replace(" | None", "")
        options = {"default": node.value, "choices": None}
        if isinstance(node.value, ast.Call):
            options = {each.arg: each.value for each in node.value.keywords}
            metadata = options.get("metadata")
            if isinstance(metadata, ast.Dict):
                options |= {
                    constant(key, tree): each for key, each in zip(metadata.keys, metadata.values, strict=True)
                }
            if node.value.args:
                options["default"] = node.value.args[0]
        values = {name: constant(options[name], tree) for name in ("default", "choices") if options.get(name)}
        choices = f", one of {values['choices']}" if values.get("choices") else ""
        yield Fact("arguments", "flag", f"--{node.target.id}", f"{kind}, {values.get('default')}{choices}")


def floors(tree):
    """Library and lowest version, of check_min_version and require_version at the top of the script."""
    for call in [call for node in tree.body if isinstance(node, ast.Expr) for call in calls_in(node)]:
        if dotted(call.func) == "check_min_version":
            yield Fact("versions", "floor", "transformers", constant(call.args[0], tree))
        if dotted(call.func) == "require_version":
            requirement = Requirement(constant(call.args[0], tree))
            lowest = [each.version for each in requirement.specifier if each.operator == ">="]
            yield Fact("versions", "floor", requirement.name, lowest[0])


def helper_facts(stage, statement, helpers):
    """The helpers that a statement names or, in main, defines."""
    named = {each.id for each in ast.walk(statement) if isinstance(each, ast.Name)}
    for node in helpers:
        if node.name in named or node is statement:
            bases = ", ".join(ast.unparse(base) for base in getattr(node, "bases", []))
            kind = "class" if isinstance(node, ast.ClassDef) else "def"
            yield Fact(stage, "helper", f"{kind} {node.name}" + (f"({bases})" if bases else ""))


def call_facts(stage, statement, modules, helpers, keywords):
    """Calls of what is imported, of methods, and of the builtins that have an effect; with their keywords."""
    for call in calls_in(statement):
        name = ALIASES.get(dotted(call.func), dotted(call.func))
        root, _, rest = name.partition(".")
        method = f".{name.rpartition('.')[2]}" if isinstance(call.func, ast.Attribute) else ""
        if modules.get(root) in QUIET_MODULES:
            continue
        if root in modules or name in ALIASES.values() or (root in LOUD_BUILTINS and not rest):
            yield from with_keywords(stage, name, keywords.of(call))
        elif method and method[1:] not in QUIET_METHODS and root not in helpers:
            yield from with_keywords(stage, method, keywords.of(call))


def with_keywords(stage, name, keywords):
    """A call and its keywords as facts."""
    yield Fact(stage, "call", name)
    for keyword in sorted(keywords):
        yield Fact(stage, "keyword", f"{name} {keyword}=")


def assignment_facts(stage, statement):
    """Assignments to an attribute, as of arguments or a configuration, and to an entry of one, as of os.environ."""
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    for target in [each for group in targets for each in getattr(group, "elts", [group])]:
        entry = isinstance(target, ast.Subscript)
        name = dotted(target.value if entry else target)
        if "." in name and not name.startswith("self."):
            yield Fact(stage, "assignment", f"{name}[{ast.unparse(target.slice)}]" if entry else name)
    for call in calls_in(statement):
        if dotted(call.func) == "setattr":
            yield Fact(stage, "assignment", ".".join(ast.unparse(each).strip("'") for each in call.args[:2]))


def result_facts(stage, statement):
    """Files that Trainer is told to write, and metrics that the script adds."""
    for call in calls_in(statement):
        name = dotted(call.func).rpartition(".")[2]
        if name in ("log_metrics", "save_metrics") and isinstance(call.args[0], ast.Constant):
            yield Fact(stage, "result", f"{name} {call.args[0].value}")
    targets = [each for each in getattr(statement, "targets", []) if isinstance(each, ast.Subscript)]
    keys = [target.slice for target in targets if dotted(target.value) == "metrics"]
    dicts = [each for each in ast.walk(statement) if isinstance(each, ast.Dict)]
    keys += [key for each in dicts for key in each.keys if isinstance(key, ast.JoinedStr)]
    for key in keys:
        parts = key.values if isinstance(key, ast.JoinedStr) else [key]
        name = "".join(each.value if isinstance(each, ast.Constant) else "*" for each in parts)
        yield Fact(stage, "result", f"metric {name}")


def error_facts(stage, statement, conditions):
    if isinstance(statement, ast.Raise | ast.Assert):
        conditions = [*conditions[-1:], *([statement.test] if isinstance(statement, ast.Assert) else [])]
        kind = "AssertionError" if isinstance(statement, ast.Assert) else dotted(statement.exc).removesuffix("()")
        yield Fact(stage, "error", f"{stage}: {looked_at(conditions)}", kind)


def looked_at(conditions) -> str:
    """The arguments, else the variables, that conditions look at."""
    nodes = [node for condition in conditions for node in ast.walk(condition)]
    owners = {"self", "model_args", "data_args", "training_args"}
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute) and dotted(node.value) in owners}
    names |= {node.id for node in nodes if isinstance(node, ast.Name)} - owners - {"os", "len"}
    return " ".join(sorted(names))


def raising_functions(tree) -> set[str]:
    """Functions and classes with an error of their own."""
    named = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name for node in named if any(isinstance(each, ast.Raise) for each in ast.walk(node))}


def stage_order(tree) -> list[str]:
    """The stages that main goes through, in its order, those of upstream only."""
    marked = {stage.name for stage in STAGES if stage.marks}
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    names = [dotted(call.func) for call in sorted(calls_in(main), key=lambda call: call.lineno)]
    in_main = (
        [STAGE_OF_FUNCTION.get(name.rpartition(".")[2], STAGE_OF_MARK.get(name)) for name in names]
        if "raw_datasets" in names
        else []
    )
    in_main = in_main or [stage for stage, statement, _ in staged(tree) if statement.lineno > main.lineno]
    return [stage for stage in dict.fromkeys(in_main) if stage in marked]
