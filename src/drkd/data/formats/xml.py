"""A small XML tree with line numbers that refuses document types, so no entity of a hostile file is ever expanded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from xml.parsers import expat

from drkd.contracts import DrkdError

_DEEPEST = 50


@dataclass
class Element:
    """An element of an XML file.

    Attributes:
        tag: Its name.
        line: Line that it begins in.
        text: The text right in it, stripped.
        children: Elements in it.
    """

    tag: str
    line: int
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str) -> list[Element]:
        """Children of this name."""
        return [child for child in self.children if child.tag == tag]

    def first(self, tag: str) -> Element | None:
        """The first child of this name."""
        return next((child for child in self.children if child.tag == tag), None)


def parse_xml(path: Path) -> Element:
    """Parse an XML file.

    Raises:
        DrkdError: If it cannot be read, is not well-formed, is nested too deeply, or declares a document type (that is
            where entity bombs and references to other files live; annotations have none).
    """
    root: list[Element] = []
    open_elements: list[Element] = []
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def start(tag: str, _: dict[str, str]) -> None:
        element = Element(tag, parser.CurrentLineNumber)
        if len(open_elements) >= _DEEPEST:
            raise DrkdError(f"{path}: line {element.line}: the XML is nested too deeply to be annotations.")
        (open_elements[-1].children if open_elements else root).append(element)
        open_elements.append(element)

    def end(_: str) -> None:
        element = open_elements.pop()
        element.text = element.text.strip()

    def text(data: str) -> None:
        open_elements[-1].text += data

    def refuse(*_: object) -> NoReturn:
        raise DrkdError(
            f"{path}: line {parser.CurrentLineNumber}: the file declares a document type or entities (<!DOCTYPE ...>), "
            "which annotations have no use for and which could fill the memory; it is not read."
        )

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(path.read_bytes(), True)
    except OSError as error:
        raise DrkdError(f"{path}: the file cannot be read ({error}).") from None
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        raise DrkdError(
            f"{path}: this is no well-formed XML (line {error.lineno}, column {error.offset + 1}: {reason}). "
            "The file may be cut short."
        ) from None
    except (LookupError, ValueError) as error:
        if isinstance(error, DrkdError):
            raise
        raise DrkdError(f"{path}: the XML cannot be decoded ({error}).") from None
    return root[0]
