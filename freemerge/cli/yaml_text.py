"""YAML as people have it: files of any Unicode encoding, and the characters that mean something else than they seem to.

Whatever cannot be read is one line that names the file, the place, and how it is written right.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

_MARKS = (  # UTF-32's mark begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SPECIAL = "*&!%@`|>"  # a word that begins with one of these is not text to YAML


def read_configuration(path: Path) -> str:
    """The text of a configuration file, checked to be a mapping in YAML.

    Args:
        path: of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Returns:
        The text; of an empty file, that of an empty mapping.

    Raises:
        ValueError: it cannot be read, is of another encoding, is not YAML, is no mapping, or has a key twice.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(f"{path}: line {line} is not {name} (byte 0x{byte:02x}); save the file as UTF-8") from None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return "{}"
        repeated = list(_repeated(root))  # first: to construct it copies what `<<` merges into the mapping itself
        with contextlib.suppress(ValueError):  # 31 February, which the parser that comes later takes for text
            loader.construct_document(root)  # unknown tags
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path}: is not a mapping of options to values, such as 'output: merged.safetensors'")
        for key, first, second in repeated:
            raise ValueError(f"{path}: the key '{key}' stands in line {first} and again in line {second}")
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is not valid YAML: {explain_yaml(error, text)}") from None
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply to be a configuration") from None
    return text


def explain_yaml(error: yaml.YAMLError, text: str) -> str:
    """What YAML says, where, and how it would be right if a character with a meaning of its own is the cause."""
    reason = " ".join(str(error).split())
    reason = re.sub(r'in "<[\w ]+>", ', "at ", reason)
    reason = reason[: reason.index(" The above exception")] if " The above exception" in reason else reason
    mark = getattr(error, "problem_mark", None)
    lines = text.splitlines()
    if mark is None or mark.line >= len(lines):
        return reason
    line = lines[mark.line]
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return f"{reason}; indent with spaces, not with tabs"
    for word in _special_words(line):
        return f"{reason}; a word that begins with {word[0]} must be quoted: {json.dumps(word, ensure_ascii=False)}"
    if re.search(r":\s+\S.*:\s", line):
        return f"{reason}; text with a colon and a space in it must be quoted"
    return reason


def check_names(text: str, option: str) -> None:
    """Raise a ValueError if a list of names, or a mapping to names, is to YAML not what it seems to be.

    Args:
        text: `[…]` or `{…}`.
        option: that it was given for, such as `--include`.
    """
    problem = None
    try:
        found = yaml.safe_load(text)
        items = list(found.values()) if isinstance(found, dict) else found
        wrong = next((item for item in items if isinstance(item, dict)), None)
        if wrong:
            problem = f"to YAML {'what has a colon and a space in it'} is a mapping, not a name"
        elif any(item is None for item in items):
            problem = "to YAML one of these is nothing"
    except (yaml.YAMLError, ValueError) as error:
        word = next(_special_words(text), None)
        problem = f"to YAML {word[0]} at the beginning of a word is not text" if word else "is not a list in YAML"
        if not word and isinstance(error, yaml.YAMLError):
            problem = f"is not YAML: {getattr(error, 'problem', None) or 'it cannot be read'}"
    if problem is None:
        return
    names = [name.strip() for name in text[1:-1].split(",") if name.strip()]
    if text.startswith("{"):
        raise ValueError(f"{option} '{text}': {problem}; put the values in double quotes")
    bare = " ".join(f"'{name}'" for name in names)
    raise ValueError(f"{option} '{text}': {problem}; quote it, {option} '{in_brackets(names)}', or leave the brackets "
                     f"away, {option} {bare}")  # fmt: skip


def in_brackets(names: Sequence[str]) -> str:
    """A list of names as YAML reads it, each in double quotes only where it must be."""
    return f"[{', '.join(map(_quoted, names))}]"


def _quoted(name: str) -> str:
    with contextlib.suppress(yaml.YAMLError, ValueError):
        if yaml.safe_load(f"[{name}]") == [name] and not re.fullmatch(r"[-+.\d]+([eE][-+]?\d+)?", name):  # 1e3
            return name
    # Bytes of a file name that no encoding explains reach YAML as escapes only.
    return json.dumps(name, ensure_ascii=not name.isprintable())


def _special_words(line: str) -> Iterator[str]:
    """The words of a line that begin with a character that means something to YAML, as far as they were meant to go."""
    for found in re.finditer(rf"(?:^|[\[,:{{-])\s*([{re.escape(_SPECIAL)}][^,\]}}\s#]*)", line):
        if len(found[1]) > 1:
            yield found[1]


def _repeated(node: yaml.Node, seen: set[int] | None = None) -> Iterator[tuple[str, int, int]]:
    """The keys that a mapping has twice, of which YAML would keep the last without a word, with their lines."""
    seen = set() if seen is None else seen
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _repeated(child, seen)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in lines:
                    yield key.value, lines[key.value], line
                lines[key.value] = line
            yield from _repeated(value, seen)
