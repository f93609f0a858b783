"""Which names are surely bound where a function reads them, whatever way its branches take."""

import ast


BLOCKS = (ast.stmt, ast.ExceptHandler, ast.match_case)  # what holds statements of its own


def unbound(function: ast.FunctionDef, names: set[str]) -> list[tuple[int, str]]:
    """(line, name) for each of the names that the function reads where it need not be bound. Inner functions apart."""
    found = []
    parameters = {each.arg for each in ast.walk(function.args) if isinstance(each, ast.arg)}
    after_body(function.body, parameters, names, found)
    return sorted(set(found))


def after_body(body, bound, names, found):
    """The names bound after statements, given those before; None where no way leads past them."""
    for statement in body:
        if bound is None:
            return None
        bound = after_statement(statement, bound, names, found)
    return bound


def after_statement(node, bound, names, found):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return bound | {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return bound | {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    parts = [child for child in ast.iter_child_nodes(node) if not isinstance(child, BLOCKS)]
    for name in [each for part in parts for each in own_nodes(part) if isinstance(each, ast.Name)]:
        if isinstance(name.ctx, ast.Load) and name.id in names - bound:
            found.append((name.lineno, name.id))
    stored = {each.id for part in parts for each in own_nodes(part) if is_bound_here(each)}
    if isinstance(node, ast.Delete):
        return bound - {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.Return | ast.Raise | ast.Continue | ast.Break):
        return None
    if isinstance(node, ast.If):
        return on_both([after_body(body, bound | stored, names, found) for body in (node.body, node.orelse)])
    if isinstance(node, ast.For | ast.AsyncFor | ast.While):
        after_body(node.body, bound | stored, names, found)  # it may not run at all
        after_body(node.orelse, bound, names, found)
        return bound
    if isinstance(node, ast.With | ast.AsyncWith):
        return after_body(node.body, bound | stored, names, found)
    if isinstance(node, ast.Match):
        for case in node.cases:
            after_body(case.body, bound | stored, names, found)
        return bound
    if isinstance(node, ast.Try):
        done = after_body([*node.body, *node.orelse], bound, names, found)
        ways = [done, *(after_body(handler.body, bound, names, found) for handler in node.handlers)]
        both = on_both(ways)
        last = after_body(node.finalbody, bound if both is None else both, names, found)
        return None if both is None else last
    return bound | stored


def on_both(ways):
    """What is bound on every way that leads on."""
    leading_on = [way for way in ways if way is not None]
    return set.intersection(*leading_on) if leading_on else None


def own_nodes(node):
    """The nodes of an expression, without those of functions in it, which run later."""
    if isinstance(node, ast.Lambda):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from own_nodes(child)


def is_bound_here(node) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
