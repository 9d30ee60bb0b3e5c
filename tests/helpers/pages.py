"""What every page must satisfy."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

VOID = {"meta", "input"}


class Reader(HTMLParser):
    """Checks that tags close in order; collects tags, attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def check_page(text: str) -> Reader:
    """What holds for every page: well formed, nothing loaded, a caption for each figure, and no script
    but the one whose hash its policy names."""
    reader = Reader(text)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert reader.tags.count("script") == len(scripts) <= 1
    assert re.findall(r"script-src ([^\"]*)\"", text) == [f"'sha256-{digest}'" for digest in hashes]
    assert {"img", "link", "iframe", "object", "embed", "base", "form"}.isdisjoint(reader.tags)
    names = [name for name, _ in reader.attributes]
    assert not [name for name in names if name.startswith("on") or name in ("src", "srcset", "xlink:href")]
    links = [value for name, value in reader.attributes if name == "href"]
    assert all(link.startswith("#") for link in links)
    targets = {value for name, value in reader.attributes if name == "id"}
    assert {link[1:] for link in links} == targets
    assert not re.search(r"url\(|@import", text)
    assert reader.tags.count("figure") == reader.tags.count("figcaption")
    assert text.lstrip().startswith("<!doctype html>")
    return reader
