"""Turns the Markdown of a README into HTML that is safe to show, whoever wrote it. Pure.

HTML in the source is shown as text, except for a few tags without attributes, which model cards use to fold long logs.
markdown-it drops unsafe links. Relative links lead into the repository.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token

HARMLESS_TAG = re.compile(r"</?(?:details|summary|br|sub|sup|kbd|b|i|em|strong)\s*/?>", re.IGNORECASE)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
ABSOLUTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:|/|#")


def render(source: str, *, link: Callable[[str], str], image: Callable[[str], str]) -> str:
    """The HTML of a card. `link` and `image` turn a path inside the repository into an address."""
    parser = MarkdownIt("commonmark", {"html": True, "typographer": False}).enable(["table", "strikethrough"])
    tokens = parser.parse(source)
    name_headings(tokens)
    for token in flat(tokens):
        if token.type in ("html_block", "html_inline"):
            token.content = harmless(token.content)
        for attribute, address in (("href", link), ("src", image)):
            target = token.attrGet(attribute)
            if isinstance(target, str) and not ABSOLUTE.match(target):
                token.attrSet(attribute, address(target.removeprefix("./")))
    return parser.renderer.render(tokens, parser.options, {})


def harmless(html: str) -> str:
    """The HTML without comments, and with every tag escaped that is not a HARMLESS_TAG."""
    html = COMMENT.sub("", html)
    pieces, end = [], 0
    for tag in HARMLESS_TAG.finditer(html):
        pieces += [escape(html[end : tag.start()]), tag[0]]
        end = tag.end()
    return "".join([*pieces, escape(html[end:])])


def flat(tokens: Sequence[Token]) -> list[Token]:
    """The tokens, each followed by those inside it."""
    return [one for token in tokens for one in (token, *flat(token.children or ()))]


def name_headings(tokens: Sequence[Token]) -> None:
    """Give headings the ids that links such as #how-to-use-it point to."""
    for opening, content in pairwise(tokens):
        if opening.type == "heading_open":
            words = re.sub(r"[^\w\- ]", "", content.content.lower()).strip()
            opening.attrSet("id", re.sub(r"\s+", "-", words))
