"""The pages of the documentation, cut into sections and blocks of code, for the tests that hold them to the program."""
from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.name: path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def prose(page: str) -> str:
    """Return the page of that name (``server.md``) without its blocks of code."""
    return BLOCK.sub("", PAGES[page])


def section(page: str, heading: str) -> str:
    """Return what stands under a heading of any level, up to the next one of this level or of a higher one."""
    found = re.search(rf"^(#+) {re.escape(heading)}\n", PAGES[page], re.MULTILINE)
    assert found is not None, f"{page} has no heading {heading!r}"
    text = PAGES[page][found.end():]
    level, start, end = len(found[1]), 0, len(text)
    for block in [*BLOCK.finditer(text), None]:         # a line of code may begin with #, too
        before = text[start:block.start() if block is not None else len(text)]
        following = re.search(rf"^#{{1,{level}}} ", before, re.MULTILINE)
        if following is not None:
            end = start + following.start()
            break
        if block is not None:
            start = block.end()
    return text[:end]


def blocks(page: str, heading: str, language: str = "") -> list[str]:
    """Return the blocks of code under a heading that are in ``language``."""
    return [text for name, text in BLOCK.findall(section(page, heading)) if name == language]


def block(page: str, heading: str, language: str = "") -> str:
    """Return the only block of code under a heading that is in ``language``."""
    found = blocks(page, heading, language)
    assert len(found) == 1, f"{page} has {len(found)} blocks of {language or 'plain text'} under {heading!r}"
    return found[0]
