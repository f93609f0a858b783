"""Follow upstream: compare this project with any run_clm.py, and graft its additions onto one.

    python scripts/upstream.py diff transformers/examples/pytorch/language-modeling/run_clm.py
    python scripts/upstream.py diff --old OLD/run_clm.py --new NEW/run_clm.py
    python scripts/upstream.py graft transformers/examples/pytorch/language-modeling/run_clm.py -o run_clm_lora.py

docs/upstream.md says how to read what they print. Exit status of diff: 0 if there is nothing to port, 1 if there is,
2 if the file is no run_clm.py; of graft: 0 if the file is written, 1 if a place was not found or something of the
file's own would break or be replaced, 2 as above.
"""

import argparse
import sys
import textwrap
from pathlib import Path

from following.comparing import TO_PORT, changes, comparison
from following.reading import OURS, NotRunClm


INDENTS = {"initial_indent": "    ", "subsequent_indent": "        ", "break_long_words": False}


def graft(arguments) -> int:
    from following.editing import Refused  # late, as grafting: both import LibCST, most of a second that diff saves
    from following.grafting import GRAFT_POINTS, changed_lines, grafted

    path, out = Path(arguments.script), Path(arguments.output)
    if out.exists() and out.samefile(path):
        raise NotRunClm(f"{out} is the file to graft onto, which stays as it is: write to another one.")
    try:
        old, new, encoding = grafted(path, out.resolve().parent)
    except Refused as error:
        line, what = error.args
        print(f"{path}, line {line}: {what}. Nothing is written.", file=sys.stderr)
        return 1
    out.write_bytes(new.encode(encoding))
    print(f"{out}: {changed_lines(old, new)} lines changed of {len(old.splitlines())}, at {len(GRAFT_POINTS)} places.")
    return 0


def diff(arguments) -> int:
    if arguments.old and arguments.new:
        rows, verdict = changes(arguments.old, arguments.new)
        to_port = rows
    elif arguments.script:
        rows, verdict = comparison(arguments.script, arguments.against)
        to_port = [row for row in rows if row.verdict == TO_PORT]
    else:
        raise NotRunClm("Name a run_clm.py, or two of them with --old and --new.")
    print("\n".join([*table(rows), verdict]))
    return int(bool(to_port))


def table(rows) -> list[str]:
    """Rows under their stages, with the entry of docs/modifications.md that explains them."""
    lines, stage = [], None
    for row in rows:
        if row.stage != stage:
            stage = row.stage
            lines.append(textwrap.fill(stage, 110, subsequent_indent="    "))
        entry = f" [{row.entry}]" if row.entry else ""
        lines.append(textwrap.fill(f"{row.verdict}{entry}: {row.what}", 110, **INDENTS))
    return [*lines, ""] if lines else []


def main(words=None) -> int:
    """Run the command line; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("diff", help="compare by meaning")
    command.add_argument("script", nargs="?", help="a run_clm.py")
    command.add_argument("--against", default=OURS, help="what it is compared with; default: run_chatglm_lora.py")
    command.add_argument("--old", help="a run_clm.py, and")
    command.add_argument("--new", help="a newer one: what changed between them, and at which of our functions")
    command.set_defaults(run=diff)
    command = commands.add_parser("graft", help="put our additions into a copy")
    command.add_argument("script", help="a run_clm.py")
    command.add_argument("-o", "--output", required=True, help="the file to write")
    command.set_defaults(run=graft)
    arguments = parser.parse_args(words)
    try:
        return arguments.run(arguments)
    except (NotRunClm, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
