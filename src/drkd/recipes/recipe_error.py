"""jsonargparse's errors in one sentence: the key, what was expected, what was given."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

_KEY = re.compile(r'Parser key "([^"]+)":\s*(.*)')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':\s*(.*)")
_GIVEN = re.compile(r"Given value: (.*)")
_EXPECTED = re.compile(r"Expected (?:an? )?(.*?)(?:\. Got value: (.*))?$")
_UNKNOWN = re.compile(
    r"(?:(?:Group '([\w.]+)'|Subcommand '\w+') does not accept (?:option|key)|Option|Key|unrecognized arguments:)"
    r"\s+'?-*([^\s'=]+)'?"
)
_CLASS_PATH = re.compile(r"class_path[= ]'([\w.]+)'")
_NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_CALLABLE = re.compile(r"Type collections\.abc\.Callable\[.*?\] expects a function or a callable class: ")
_REQUIRED = re.compile(r"the following arguments are required: (.*)|Key \"?([\w.]+)\"? is required.*")
_NOISE = ("Does not validate against any", "Subtypes:", "Errors:", "Given value type:", "Expected a <class 'NoneType'>")
_SHOWN = 160


def readable(error: Exception | str, parser: ArgumentParser | None = None, *, verb: str = "") -> str:
    """Shorten an error of jsonargparse to one sentence.

    Args:
        error: The error or its message.
        parser: Where given, a mistyped key is answered with the nearest known one.
        verb: Sub-command whose name precedes the keys in the message.

    Returns:
        For instance "training.steps: expected int, got 'x'".
    """
    keys: list[str] = []
    reasons: list[str] = []
    given = class_path = ""
    for line in str(error).splitlines():
        class_path = next(iter(_CLASS_PATH.findall(line)), class_path)
        text = _note_key(_CALLABLE.sub("", line.strip().removeprefix("- ").strip()), keys)
        if match := _GIVEN.match(text):
            given = "" if match[1].startswith(("Namespace(", "NestedArg(", "{")) else match[1]
        elif text and not text.startswith(_NOISE):
            sentence = _sentence(text, parser, keys, class_path)
            if sentence not in reasons:
                reasons.append(sentence)
    place = _dotted(keys, verb)
    reason = " or ".join([*reasons[:1], *(text.removeprefix("expected ") for text in reasons[1:])]) or "not understood"
    said = ", got " in reason or repr(given) in reason or reason.endswith("?")
    got = f", got {_shorten(given)!r}" if given and not said else ""
    sentence = f"{place + ': ' if place else ''}{_shorten(reason.removeprefix(verb + '.'), 4 * _SHOWN)}{got}"
    return sentence if sentence.endswith("?") else f"{sentence}."


def _note_key(text: str, keys: list[str]) -> str:
    """Take the keys and class paths off the front of a line, into ``keys``; return what is left."""
    while True:
        if match := _KEY.match(text):
            name = match[1]
        elif match := _CLASS.match(text):
            name = f"init_args ({match[1].rpartition('.')[2]})"
        else:
            return text
        if name not in keys:
            keys.append(name)
        text = match[2].strip()


def _sentence(text: str, parser: ArgumentParser | None, keys: list[str], class_path: str) -> str:
    text = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    if match := _EXPECTED.match(text):
        return f"expected {match[1]}" + (f", got {_shorten(match[2])!r}" if match[2] else "")
    if match := _UNKNOWN.match(text):
        name = f"{match[1]}.{match[2]}" if match[1] else match[2]
        return f"there is no such key as '{name}'{_suggestion(name, parser, keys, class_path)}"
    if match := _NO_ATTRIBUTE.match(text):
        public = [entry for entry in dir(sys.modules.get(match[1])) if not entry.startswith("_")]
        return f"{match[1]} has no '{match[2]}'{_nearest(match[2], public)}"
    if match := _REQUIRED.match(text):
        return f"{match[1] or match[2]} must be given"
    return text.rstrip(".")


def _suggestion(name: str, parser: ArgumentParser | None, keys: list[str], class_path: str) -> str:
    if keys and class_path:
        return _nearest(name.partition(".")[0], _arguments_of(class_path), owner=class_path.rpartition(".")[2])
    if parser is None or keys:
        return ""
    known = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
    close = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(
        name.rpartition(".")[2], [dest for dest in known if "." not in dest], n=1
    )
    return f"; did you mean '{close[0]}'?" if close else f"; {_listing(known)}"


def _nearest(name: str, known: Sequence[str], *, owner: str = "") -> str:
    """The known name that was meant, or all that an owner takes."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; {owner} takes {', '.join(known)}" if owner and known else ""


def _arguments_of(class_path: str) -> list[str]:
    """Names that a recipe may give a class or function; none where they cannot be told."""
    module, _, name = class_path.rpartition(".")
    try:
        # Parsing has imported it.
        parameters = inspect.signature(getattr(sys.modules[module], name)).parameters.values()
    except (KeyError, AttributeError, TypeError, ValueError):
        return []
    named = [entry for entry in parameters if entry.kind in (entry.KEYWORD_ONLY, entry.POSITIONAL_OR_KEYWORD)]
    # What a method gets from drkd and not from a recipe: the two detectors' specs.
    return [entry.name for entry in named if "DetectorSpec" not in str(entry.annotation)]


def _listing(known: list[str]) -> str:
    groups = sorted({dest.partition(".")[0] for dest in known if not dest.startswith("print_")})
    return f"there are {', '.join(groups)}"


def _dotted(keys: list[str], verb: str) -> str:
    place = ""
    for key in keys:
        place += key if not place else f".{key}"
    # "student.init_args (RetinaNetBuilder).width" reads better with the class last.
    found = re.findall(r" \(([^)]*)\)", place)
    plain = re.sub(r" \([^)]*\)", "", place).removesuffix(".init_args")
    plain = plain.removeprefix(f"{verb}.") if verb else plain
    return f"{plain} (of {found[-1]})" if found else plain


def _shorten(text: str, limit: int = _SHOWN) -> str:
    return text if len(text) <= limit else text[: limit - 4] + " ..."
