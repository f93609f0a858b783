"""A run_clm.py held against ours, and two versions of it held against each other: rows of a table, and a verdict."""

import ast
import difflib
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatch

from packaging.version import Version

from .facts import Fact, facts, helpers_in, raising_functions, stage_order
from .reading import class_fields, leaves, own_text, parsed, staged
from .tables import ENTRY, ERRORS, EXPLAINED, FUNCTIONS, NEWER_FLAGS, STAGES


TO_PORT, UPSTREAM, HERE, DIFFERENT, SAME = "to port", "only upstream", "only here", "different", "same"


@dataclass(frozen=True)
class Row:
    """A line of a table: facts of one stage with the same verdict, and the entry of docs/modifications.md on them."""

    stage: str
    verdict: str
    what: str
    entry: str = ""


# --------------------------------------------------------------------------------------------------- upstream and ours


def comparison(script, against) -> tuple[list[Row], str]:
    """Rows by stage and verdict of what differs, and the verdict on all in one sentence."""
    theirs, ours = facts(script), facts(against, ours=True)
    raising = raising_functions(parsed(against))
    judged = {}  # (kind, name) -> what is said of it; a fact of several stages is judged where it comes first
    for fact in theirs:
        if (fact.kind, fact.name) not in judged or fact.kind == "result":
            judged[fact.kind, fact.name] = (fact, *verdict(fact, ours, raising))
    said = [*judged.values(), *dropped(script, against, ours), *order_facts(script, against)]
    known = {fact.name for fact in theirs} | {fact.name for fact, *_ in said}
    shown = ("flag", "call", "keyword")
    added = {fact.name: fact for fact in ours[::-1] if fact.name not in known and fact.kind in shown}
    said += [(fact, HERE, ENTRY[fact.stage], fact.name) for fact in list(added.values())[::-1] if is_told(fact)]
    grouped = defaultdict(list)
    for fact, found, entry, text in said:
        grouped[fact.stage, found, entry].append(text)
    return rows_of(grouped), summary(said)


def is_told(fact) -> bool:
    """Whether it is named although only ours has it: flags, and what is made of classes; the rest is our own doing."""
    return fact.kind == "flag" or fact.kind == "call" and fact.name[0].isupper()


def rows_of(grouped) -> list[Row]:
    places, order = [stage.name for stage in STAGES], [TO_PORT, DIFFERENT, UPSTREAM, HERE, SAME]
    keys = sorted(grouped, key=lambda key: (places.index(key[0]), order.index(key[1]), key[2]))
    return [Row(key[0], key[1], listed(grouped[key]), key[2]) for key in keys if key[1] != SAME]


def summary(said) -> str:
    """One sentence: how much is to be ported, and at which stages."""
    counts = {each: sum(found == each for _, found, *_ in said) for each in (TO_PORT, UPSTREAM, HERE, DIFFERENT, SAME)}
    stages = list(dict.fromkeys(fact.stage for fact, found, *_ in said if found == TO_PORT))
    if stages:
        return f"To port: {counts[TO_PORT]}, at {', '.join(stages)}."
    explained = f"{counts[UPSTREAM]} only upstream, {counts[HERE]} only here and {counts[DIFFERENT]} different"
    return f"Nothing to port: {counts[SAME]} facts are the same, docs/modifications.md explains {explained}."


def label(fact) -> str:
    if fact.kind == "assignment":
        return f"{fact.name} = ..."
    return f"{fact.detail} over {fact.name.partition(': ')[2]}" if fact.kind == "error" else fact.name


def listed(texts) -> str:
    """Texts with commas, a call with the keywords that follow it: f(a, b)."""
    calls = defaultdict(list)
    for text in texts:
        name, _, keyword = text.partition(" ")
        is_keyword = keyword.endswith("=") and " " not in keyword
        calls[name if is_keyword else text] += [keyword[:-1]] if is_keyword else []
    return ", ".join(f"{name}({', '.join(found)})" if found else name for name, found in calls.items())


def verdict(fact, ours, raising) -> tuple[str, str, str]:
    """Verdict, entry of the docs and words on a fact of upstream."""
    explained = [entry for kind, name, entry in EXPLAINED if kind == fact.kind and fnmatch(fact.name, name)]
    like = [other for other in ours if other.kind == fact.kind and fnmatch(fact.name, other.name)]
    if fact.kind == "error":
        function, entry = ERRORS.get(fact.name, (None, ""))
        known = function == "" or function in raising
        return (DIFFERENT if entry else SAME, entry, label(fact)) if known else (TO_PORT, "", label(fact))
    if fact.kind == "floor":
        lowest = like[0].detail if like else "0"
        found = TO_PORT if Version(fact.detail) > Version(lowest) else SAME if fact.detail == lowest else DIFFERENT
        return found, "Versions" if found == DIFFERENT else "", f"{fact.name}>={fact.detail} (here: {lowest})"
    if fact.kind == "flag" and like and like[0].detail != fact.detail:
        return TO_PORT, "", f"{fact.name} is {fact.detail} upstream (here: {like[0].detail})"
    if like:
        return SAME, "", label(fact)
    return (UPSTREAM, explained[0], label(fact)) if explained else (TO_PORT, "", label(fact))


def dropped(script, against, ours):
    """Flags of upstream that the script lacks: to be dropped here too, unless it is older than they are."""
    theirs, tree = parsed(script), parsed(against)
    floor = [Version(fact.detail) for fact in facts(script) if fact.kind == "floor" and fact.name == "transformers"]
    for name in ("ModelArguments", "DataTrainingArguments"):
        there = {field.target.id for field in class_fields(theirs, name)}
        for field in class_fields(tree, name):
            flag = f"--{field.target.id}"
            if field.target.id not in there:
                newer = flag in NEWER_FLAGS and floor and floor[0] <= Version(NEWER_FLAGS[flag])
                fact = Fact("arguments", "flag", flag)
                gone = (fact, TO_PORT, "", f"{flag} is gone upstream")
                yield (fact, HERE, "Dropped upstream", flag) if newer else gone


def order_facts(script, against):
    """The order of the stages: where ours does one earlier or later than the script."""
    theirs, ours = stage_order(parsed(script)), stage_order(parsed(against))
    common = [stage for stage in theirs if stage in ours]
    kept = difflib.SequenceMatcher(a=common, b=[stage for stage in ours if stage in common], autojunk=False)
    kept = {stage for block in kept.get_matching_blocks() for stage in common[block.a : block.a + block.size]}
    for stage in common:
        if stage not in kept:
            found, entry = (DIFFERENT, ENTRY[stage]) if stage in MOVED else (TO_PORT, "")
            yield Fact(stage, "order", ""), found, entry, "its place in main"


MOVED = ("encoding",)  # before the model


# ------------------------------------------------------------------------------------------- two versions of upstream


def changes(old, new) -> tuple[list[Row], str]:
    """What a newer run_clm.py adds and removes, by stage, beside which our functions of it stand; and a sentence."""
    rows, stages = [], []
    before, after = described(old), described(new)
    for stage in STAGES:
        first, second = before[stage.name], after[stage.name]
        for line in difflib.ndiff(first, second):
            if line[:2] in ("- ", "+ "):
                place = f"{stage.name} (ours: {', '.join(FUNCTIONS[stage.name]) or 'nothing'})"
                rows.append(Row(place, {"-": "removed", "+": "added"}[line[0]], line[2:]))
                stages.append(stage.name)
    if not rows:
        return rows, "No change."
    return rows, f"To port: {len(rows)} changes, at {', '.join(dict.fromkeys(stages))}."


def described(path) -> dict[str, list[str]]:
    """The facts and steps of a script as sentences, by stage."""
    tree, found = parsed(path), defaultdict(list)
    for fact in facts(path):
        text = fact.name if fact.kind not in ("flag", "floor") else f"{fact.name}: {fact.detail}"
        if fact.kind in ("flag", "floor", "result"):
            found[fact.stage].append(text)
    for stage, statement, _ in staged(tree, helpers_in(tree)):
        body = statement.body if isinstance(statement, ast.FunctionDef) else [statement]
        steps = [own_text(step) for step, _ in leaves(body)]
        found[stage] += [step for step in steps if not step.startswith(("check_min_version(", "require_version("))]
    return found
