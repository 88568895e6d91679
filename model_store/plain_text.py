"""Plain text of documentation pages: HTML, pod, and the man pages that pod2man writes.

Kept: headings, paragraphs, lists, tables, code blocks with their line breaks. Dropped: navigation, tables of
contents, sidebars, scripts, footers. Nothing here knows where a page comes from.
"""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

_SKIPPED_TAGS = {"script", "style", "nav", "footer", "form", "svg", "select", "button", "noscript", "math"}
_SKIPPED_CLASSES = {
    "navheader", "navfooter", "toc", "contents", "local", "topic-contents", "toctree-wrapper",
    "sphinxsidebar", "related", "headerlink", "nosearch", "fancy_toc", "mobileonly", "linenos",
}  # fmt: skip
_SKIPPED_IDS = {"footer", "footnotes-nav", "toc", "toc_sub", "document_title_nav"}
_PARAGRAPHS = {
    "p", "div", "section", "article", "table", "ul", "ol", "dl", "blockquote", "pre",
    "h1", "h2", "h3", "h4", "h5", "h6",
}  # fmt: skip
_LINES = {"li", "dt", "dd", "tr", "br", "hr", "caption", "thead", "tbody"}
_MAIN = re.compile(r"""<(\w+)[^>]*\brole=["']main["'][^>]*>|<body\b[^>]*>""", re.IGNORECASE)
_VOID = {"br", "hr", "img", "input", "link", "meta", "col", "wbr", "area", "base", "embed", "source"}


def html_text(page: str) -> str:
    """The text of the page's main part (the element with role="main", else the body)."""
    starts = list(_MAIN.finditer(page))
    main = next((m for m in starts if m.group(1)), starts[0] if starts else None)
    parser = _PageParser(main.group(1) if main else None)
    parser.feed(page[main.start() :] if main else page)
    parser.close()
    return tidy("".join(parser.parts))


class _PageParser(HTMLParser):
    """Collects text pieces; stops where the main element `main_tag` ends (None: reads to the end)."""

    def __init__(self, main_tag: str | None) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._main_tag = main_tag
        self._main_depth = 0
        self._done = False
        self._pre_depth = 0
        self._in_cell = False
        # Real HTML leaves <p> and <li> open, so a skipped element ends when its own tag balances.
        self._skip_tag = ""
        self._skip_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._done or (tag in _VOID and self._skip_depth):
            return
        if tag == self._main_tag:
            self._main_depth += 1
        if self._skip_depth:
            self._skip_depth += tag == self._skip_tag
            return
        values = dict(attrs)
        classes = set((values.get("class") or "").split())
        if tag in _SKIPPED_TAGS or classes & _SKIPPED_CLASSES or (values.get("id") or "") in _SKIPPED_IDS:
            self._skip_tag, self._skip_depth = tag, 1
            return
        if tag in {"td", "th"}:
            self._in_cell = True
        self._break(tag)
        if tag == "pre":
            self._pre_depth += 1
        elif tag == "li":
            self.parts.append("- ")

    def handle_endtag(self, tag: str) -> None:
        if self._done:
            return
        if tag == self._main_tag:
            self._main_depth -= 1
            self._done = self._main_depth <= 0
        if self._skip_depth:
            self._skip_depth -= tag == self._skip_tag
            return
        if tag == "pre":
            self._pre_depth = max(0, self._pre_depth - 1)
        if tag in {"td", "th"}:
            self.parts.append("  ")
            self._in_cell = False
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._done or self._skip_depth:
            return
        if self._pre_depth:
            self.parts.append(data)
            return
        text = re.sub(r"\s+", " ", data)
        if text != " " or not (self.parts and self.parts[-1].endswith("\n")):
            self.parts.append(text.lstrip() if self.parts and self.parts[-1].endswith("\n") else text)

    def _break(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            self._in_cell &= tag != "table"
            self.parts.append("\n" if self._in_cell else "\n\n")
        elif tag in _LINES:
            self.parts.append("\n")


_POD_ESCAPES = {"lt": "<", "gt": ">", "verbar": "|", "sol": "/", "nbsp": " "}
_POD_CODE = re.compile(r"([A-Z])(?:<<<\s+(.*?)\s+>>>|<<\s+(.*?)\s+>>|<([^<>]*)>)", re.DOTALL)


def pod_text(pod: str) -> str:
    """The text of a Perl "plain old documentation" file."""
    parts: list[str] = []
    in_pod = skipping = False
    for paragraph in re.split(r"\n[ \t]*\n", pod.replace("\r", "")):
        block = paragraph.strip("\n")
        command = re.match(r"=(\w+)\s*(.*)", block, re.DOTALL)
        if command:
            word, rest = command.groups()
            in_pod = word != "cut"
            if word in {"begin", "end"}:
                skipping = word == "begin"
            elif word.startswith("head") or (word == "item" and rest.strip() not in {"", "*"}):
                parts.append(_pod_line(rest))
        elif in_pod and not skipping:
            parts.append(block if block[:1] in {" ", "\t"} else _pod_line(block))
    return tidy("\n\n".join(parts))


def _pod_line(text: str) -> str:
    """Formatting codes resolved from the inside out: `C<< $a->[0] >>` gives `$a->[0]`."""
    text = " ".join(text.split())
    while True:
        plain, num_codes = _POD_CODE.subn(_pod_code, text)
        if not num_codes:
            # the placeholders stand for angle brackets that belong to the text
            return plain.replace("\x00", "<").replace("\x01", ">")
        text = plain


def _pod_code(code: re.Match[str]) -> str:
    body = next(group for group in code.groups()[1:] if group is not None)
    match code.group(1):
        case "X" | "Z":
            body = ""
        case "E":
            body = _POD_ESCAPES.get(body) or html.unescape(f"&{body};")
        case "L":
            body = body.split("|")[0].strip('"/') if "|" in body else body.replace("/", " ").strip('" ')
    return body.replace("<", "\x00").replace(">", "\x01")


_ROFF_STRINGS = {
    "Aq": "'", "dq": '"', "C`": "", "C'": "", 'L"': '"', 'R"': '"', "lq": '"', "rq": '"', "--": "-",
}  # fmt: skip
_ROFF_ESCAPE = re.compile(r"\\(?:\*\((..)|\((..)|f(?:\((?:..)|\[[^]]*\]|.)|s[-+]?\d|\*(.)|(.))")


def man_text(page: str) -> str:
    """The text of a man page written by pod2man; everything before the first section is its preamble."""
    parts: list[str] = []
    verbatim = False
    lines = page[page.find("\n.SH ") + 1 :].splitlines()
    for line in lines:
        if not line.startswith((".", "'")):
            parts.append(_roff_line(line) + ("\n" if verbatim else " "))
            continue
        macro, _, rest = line[1:].partition(" ")
        if macro in {"Vb", "Ve"}:
            verbatim = macro == "Vb"
            parts.append("\n\n")
        elif macro in {"SH", "SS", "PP", "IP"}:
            argument = re.match(r'"((?:[^"]|"")*)"|(\S*)', rest)
            title = argument.group(1) or argument.group(2) if argument else ""
            shown = _roff_line((title or "").replace('""', '"'))
            bullet = {"\\(bu": "- ", "•": "- "}.get(title or "", shown + "\n" if shown else "")
            parts.append("\n\n" + (bullet if macro == "IP" else shown + "\n\n" if shown else ""))
    return tidy("".join(parts))


def _roff_line(line: str) -> str:
    return _ROFF_ESCAPE.sub(_roff_escape, line)


def _roff_escape(escape: re.Match[str]) -> str:
    string, glyph, short_string, character = escape.groups()
    if string is not None:
        return _ROFF_STRINGS.get(string, "")
    if glyph is not None:
        return {"bu": "-", "em": "--", "en": "-", "co": "(c)"}.get(glyph, "")
    if short_string is not None:
        return {":": "", "8": ""}.get(short_string, "")
    return {"-": "-", "e": "\\", "\\": "\\", "'": "'", "`": "`", " ": " ", ".": "."}.get(character or "", "")


def tidy(text: str) -> str:
    """Line ends without spaces, at most one blank line in a row, no-break spaces as plain ones."""
    text = text.replace("\xa0", " ").replace("\r", "").replace("\t", "    ").replace("¶", "")
    text = re.sub(r"[ ]+\n", "\n", text)
    text = re.sub(r"\n-\n+", "\n- ", text)  # a list item that opens with a paragraph
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
