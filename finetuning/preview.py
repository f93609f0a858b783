"""How do rows look to the model? Their first examples in the terminal, or as a page that shows every token.

Shapes: S tokens of a row.
"""

import os
import sys
from html import escape
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

from .batches import IGNORE_INDEX
from .mistakes import named


PAGE_ROWS = 20  # of --preview_html without --preview
CONTEXT = 8  # tokens before one, which tell how it is written: with a blank, as the rest of a character
COLOUR, PLAIN = "\x1b[30;42m", "\x1b[0m"  # black on green; the terminal's own

PAGE = """\
<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.9 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; }}
h2 {{ font-size: 1em; margin: 2em 0 .3em; }}
p {{ font-family: ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }}
i {{ border-right: 1px solid #8886; font-style: normal; padding: .1em 0; }}
i:hover {{ outline: 1px solid; }}
i.t {{ background: #3c35; }}
i.s {{ color: #b26; }}
</style>
</head>
<body>
<h1>{title}</h1>
<div>A line stands after each token. <i class="t">Green</i> is trained, <i class="s">red</i> are special tokens;
the pointer on a token shows its place, id and name.</div>
{rows}
</body>
</html>
"""


def show(data, tokenizer, chat_args):
    """Print the first examples with --preview, write the page of --preview_html: of the training, if there is one."""
    if not (chat_args.preview or chat_args.preview_html):
        return
    split = next(iter(data))
    examples = list(islice(data[split], chat_args.preview or PAGE_ROWS))
    for number, example in enumerate(examples, 1) if chat_args.preview else ():
        print(f"--- {title(split, number, example)} ---\n{text(tokenizer, example, coloured(sys.stdout))}")
    if chat_args.preview_html:
        page = html_page(tokenizer, split, examples)
        with named(f"--preview_html {chat_args.preview_html}", OSError):
            Path(chat_args.preview_html).write_text(page, encoding="utf-8")
        print(f"Wrote {chat_args.preview_html}: the first {len(examples)} {split} examples.")


def title(split, number, example) -> str:
    trained = sum(is_trained(label) for label in labels_of(example))
    return f"{split} example {number}: {len(example['input_ids'])} tokens, {trained} of them trained"


def labels_of(example) -> list[int]:
    """The labels of an example [S]; a row to answer has none."""
    return example.get("labels") or [IGNORE_INDEX] * len(example["input_ids"])


def is_trained(label) -> bool:
    return label != IGNORE_INDEX


def coloured(stream) -> bool:
    """Whether a stream is a terminal whose owner wants colours (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def text(tokenizer, example, colours) -> str:
    """The text of an example, special tokens included; what is trained is coloured, or stands in 【】."""
    before, after = (COLOUR, PLAIN) if colours else ("【", "】")
    tokens = zip(example["input_ids"], map(is_trained, labels_of(example)), strict=True)
    parts = []
    for trained, run in groupby(tokens, itemgetter(1)):
        words = printable(tokenizer.decode([token for token, _ in run]))
        parts.append(f"{before}{words}{after}" if trained else words)
    return "".join(parts)


def printable(words) -> str:
    """A text whose control characters are written out: data give no orders to a terminal."""
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in words)


def html_page(tokenizer, split, examples) -> str:
    rows = [
        f"<h2>{escape(title(split, number, example))}</h2>\n<p>{html_tokens(tokenizer, example)}</p>"
        for number, example in enumerate(examples, 1)
    ]
    return PAGE.format(title=f"The first {len(examples)} {split} examples", rows="\n".join(rows))


def html_tokens(tokenizer, example) -> str:
    """Each token as an element with its place, id and name."""
    ids, special = example["input_ids"], set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    elements = []
    names = tokenizer.convert_ids_to_tokens(ids)
    for place, (token, label, name, words) in enumerate(
        zip(ids, labels_of(example), names, token_texts(tokenizer, ids), strict=True)
    ):
        classes = " ".join(each for each, holds in {"t": is_trained(label), "s": token in special}.items() if holds)
        shown = escape(printable(words)).replace("\n", "⏎\n") or "·"  # a part of a character that a later token ends
        hint = escape(f"{place}: {token} {name}", quote=True)
        elements.append(f'<i class="{classes}" title="{hint}">{shown}</i>')
    return "".join(elements)


def token_texts(tokenizer, ids) -> list[str]:
    """What each of the ids [S] adds to the text: nothing, where a later one completes its character."""
    texts = []
    for end in range(1, len(ids) + 1):
        start = max(0, end - CONTEXT)
        before = tokenizer.decode(ids[start : end - 1]).rstrip("\ufffd")
        after = tokenizer.decode(ids[start:end])
        texts.append("" if after.endswith("\ufffd") else after[len(before) :])
    return texts
