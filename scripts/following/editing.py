"""A run_clm.py whose parts are found by what they do, and the edits that are made to its text."""

import io
from collections import defaultdict
from dataclasses import dataclass

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider

from .reading import source_text


class Refused(Exception):
    """A script that is not grafted: (line, sentence that names what stands there)."""


class PlaceNotFound(Refused):
    """A graft point that the script lacks: (line where it was looked for, what was looked for)."""


@dataclass
class Edit:
    """Text for the characters between two places (line from 1, column from 0); for nothing, if they are equal."""

    start: tuple[int, int]
    end: tuple[int, int]
    text: str


def called(name):
    """Matcher of a call by its dotted name."""
    *owner, last = name.split(".")
    return m.Call(func=m.Attribute(value=m.Name(owner[0]), attr=m.Name(last)) if owner else m.Name(last))


def code(node) -> str:
    """The text of a node, on one line."""
    return " ".join(cst.Module([]).code_for_node(node).split())


class Script:
    """The text of a script, its syntax tree with positions, and the edits so far."""

    def __init__(self, path):
        self.text, self.encoding = source_text(path)
        wrapper = MetadataWrapper(cst.parse_module(self.text), unsafe_skip_copy=True)
        self.module, self.positions = wrapper.module, wrapper.resolve(PositionProvider)
        self.lines = list(io.StringIO(self.text, newline=""))  # as Python counts them, with the ends that they have
        self.kinds, self.spans, self.edits = (
            defaultdict(list),
            {},
            [],
        )  # spans: the counts where a node begins and ends
        self.main = None
        self.collect(self.module, 0)
        self.main = self.find(self.module, m.FunctionDef(name=m.Name("main")), "the function main")

    def collect(self, node, start) -> int:
        """Count the nodes from this one on, and sort them by kind; the number that comes next."""
        self.kinds[type(node).__name__].append(node)
        end = start + 1
        for child in node.children:
            end = self.collect(child, end)
        self.spans[node] = (start, end)
        return end

    def within(self, scope, matcher) -> list:
        """The nodes in the scope that match, in the order of the text; of main, without its inner functions."""
        kind = type(matcher).__name__
        found = [node for node in self.kinds[kind] if self.lies_in(node, scope) and m.matches(node, matcher)]
        if scope is not self.main or kind == "FunctionDef":
            return found
        inner = [node for node in self.within(scope, m.FunctionDef()) if node is not scope]
        return [node for node in found if not any(self.lies_in(node, function) for function in inner)]

    def lies_in(self, node, scope) -> bool:
        start, end = self.spans[scope]
        return start <= self.spans[node][0] < end

    def line(self, node) -> int:
        return self.positions[node].start.line

    def find(self, scope, matcher, what):
        """The first node in the scope that matches; else PlaceNotFound with the line where the scope begins."""
        found = self.within(scope, matcher)
        if not found:
            raise PlaceNotFound(1 if scope is self.module else self.line(scope), what)
        return found[0]

    def only(self, scope, matcher, what):
        """The node in the scope that matches, of which there must be one."""
        first = self.find(scope, matcher, what)
        if others := self.within(scope, matcher)[1:]:
            raise Refused(self.line(others[0]), f"{what} stands here a second time (first in line {self.line(first)})")
        return first

    def stage(self, matcher, what, last=False):
        """The statement of main, of the first level, in which something is done first, or last."""
        self.find(self.main, matcher, what)
        return [statement for statement in self.main.body.body if self.within(statement, matcher)][-1 if last else 0]

    def statement_of(self, node):
        """The line of code that holds a node."""
        for line in self.kinds["SimpleStatementLine"]:
            if self.lies_in(node, line):
                return line
        raise Refused(self.line(node), f"{code(node)} stands in the line of another statement: give it one of its own")

    def name_given_to(self, call) -> str:
        """The variable that the result of a call is assigned to."""
        for statement in self.statement_of(call).body:
            targets = [each.target for each in getattr(statement, "targets", [])] or [getattr(statement, "target", 0)]
            if len(targets) == 1 and isinstance(targets[0], cst.Name):
                return targets[0].value
        raise Refused(self.line(call), f"{code(call.func)}() is not assigned to one variable")

    # How a place is edited. New lines take the indentation of the statement that they stand next to.

    def insert(self, line, indentation, new_lines):
        text = "".join(indentation + new + self.module.default_newline for new in new_lines)
        self.edits.append(Edit((line, 0), (line, 0), text))

    def indentation(self, statement) -> str:
        start = self.positions[statement].start
        before = self.lines[start.line - 1][: start.column]
        if before.strip():
            raise Refused(start.line, f"{code(statement)} stands behind something else: give it a line of its own")
        return before

    def before(self, statement, *new_lines):
        self.insert(self.line(statement), self.indentation(statement), new_lines)

    def after(self, statement, *new_lines):
        end = self.positions[statement].end
        last = end.line if end.column else end.line - 1
        if not self.lines[last - 1].endswith(("\n", "\r")):
            raise Refused(last, "the file ends without a line break: add one")
        self.insert(last + 1, self.indentation(statement), new_lines)

    def replace(self, node, text):
        place = self.positions[node]
        self.edits.append(Edit((place.start.line, place.start.column), (place.end.line, place.end.column), text))

    def insert_before(self, node, text):
        start = self.positions[node].start
        self.edits.append(Edit((start.line, start.column), (start.line, start.column), text))

    def insert_after(self, node, text):
        end = self.positions[node].end
        self.edits.append(Edit((end.line, end.column), (end.line, end.column), text))

    def insert_arguments(self, call, text):
        """Arguments before all others of a call."""
        end = self.positions[call.func].end
        bracket = self.lines[end.line - 1].find("(", end.column)
        same_line = call.args and self.line(call.args[0]) == end.line
        separator = ", " if same_line else "," if call.args else ""
        self.edits.append(Edit((end.line, bracket + 1), (end.line, bracket + 1), text + separator))

    def edited(self) -> str:
        """The text with all edits; what no edit touches stays as it is, to the byte."""
        starts = [0]
        for line in self.lines:
            starts.append(starts[-1] + len(line))
        text = self.text
        # From the end, so that places before an edit stay true; of two in one place the later stands behind.
        for edit in sorted(self.edits, key=lambda edit: edit.start)[::-1]:
            start, end = (starts[line - 1] + column for line, column in (edit.start, edit.end))
            text = text[:start] + edit.text + text[end:]
        return text
