"""Fields of a form as the JSON object that they spell: `a`, `a[b]`, `a[]` and `a[][b]`."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from serve.schema import RequestError

#: A name taken apart: `segments[][prompt]` is ("segments", "", "prompt"). The empty part is any element of a list.
Path = tuple[str, ...]
#: A field of one of a list's elements: its name within the element, and its value.
Part = tuple[Path, Any]

_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
_MOST_BRACKETS = 4
#: Fields that are text even where they look like something else, wherever they stand; the others are read as JSON.
_TEXT = {"prompt", "seconds", "size", "model", "user", "negative_prompt", "draft", "id", "image_url"}


def nested(fields: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The object. Raises RequestError for a name that is malformed, or that contradicts another one."""
    body: dict[str, Any] = {}
    lists: defaultdict[Path, list[Part]] = defaultdict(list)
    kinds: dict[Path, str] = {}
    for name, text in fields:
        path = _path(name)
        _check_kinds(path, kinds)
        value = _value(path, text)
        if "" in path:
            at = path.index("")
            lists[path[:at]].append((path[at + 1 :], value))
        else:
            _put(body, path, value, name)
    for path, parts in lists.items():
        _put(body, path, _elements(path, parts), _name(path))
    return body


def _path(name: str) -> Path:
    match = _NAME.fullmatch(name)
    if match is None:
        raise RequestError("malformed name: expected a, a[b], a[] or a[][b]", param=name[:64])
    path = (match[1], *match[2][1:-1].split("][")) if match[2] else (match[1],)
    if len(path) > _MOST_BRACKETS + 1:
        raise RequestError(f"malformed name: at most {_MOST_BRACKETS} brackets", param=name[:64])
    if path.count("") > 1:
        raise RequestError("lists within lists are not read from forms: send JSON", param=name[:64])
    return path


def _name(path: Path) -> str:
    return path[0] + "".join(f"[{part}]" for part in path[1:])


def _check_kinds(path: Path, kinds: dict[Path, str]) -> None:
    """Raises RequestError if a part of the path is another kind of thing in an earlier field."""
    for end in range(1, len(path) + 1):
        kind = "value" if end == len(path) else "object" if path[end] else "list"
        if kinds.setdefault(path[:end], kind) != kind:
            message = f"is a form's {kinds[path[:end]]} in one field and its {kind} in another"
            raise RequestError(message, param=_name(path[:end])[:64])


def _put(target: dict[str, Any], path: Path, value: Any, name: str) -> None:
    for part in path[:-1]:
        target = target.setdefault(part, {})
    if path[-1] in target:
        raise RequestError("is there twice", param=name[:64])
    target[path[-1]] = value


def _elements(path: Path, parts: Sequence[Part]) -> list[Any]:
    """The elements of a list, from its fields in the order of the form.

    Forms are written element by element (prompt, seconds, prompt, seconds), or field by field (prompt, prompt, seconds,
    seconds), as the OpenAI client does. Raises RequestError where the latter leaves out a field of some elements: of
    which cannot be told.
    """
    if not parts[0][0]:
        return [value for _, value in parts]
    counts = Counter(field for field, _ in parts)
    even = len(set(counts.values())) == 1
    if not even and len(list(groupby(field for field, _ in parts))) == len(counts):
        field, count = min(counts.items(), key=lambda item: item[1])
        message = f"{count} of {max(counts.values())} elements have it, and a form does not say which: send JSON"
        raise RequestError(message, param=_name((*path, "", *field))[:64])
    elements: list[dict[str, Any]] = []
    last: dict[Path, int] = {}  # element that has the field
    for field, value in parts:
        index = last.get(field, -1) + 1
        if not even:
            index = max(index, len(elements) - 1)
        if index == len(elements):
            elements.append({})
        last[field] = index
        _put(elements[index], field, value, _name((*path, "", *field)))
    return elements


def _value(path: Path, text: str) -> Any:
    if next(part for part in reversed(path) if part) in _TEXT:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
