"""Read YAML files of any Unicode encoding, and explain syntax errors that special characters cause.

Each error is one line that names the file, the place, and the right notation.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

_MARKS = (  # UTF-32 first, because its mark begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SPECIAL = "*&!%@`|>"  # YAML does not read a word that begins with one of these as text


def read_configuration(path: Path) -> str:
    """Read the text of a configuration file, and check that it is a YAML mapping.

    Args:
        path: a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Returns:
        The text; "{}" for an empty file.

    Raises:
        ValueError: the file cannot be read, has another encoding, is not YAML or not a mapping, or repeats a key.
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
        repeated = list(_repeated(root))  # before construction, which copies merged keys (`<<`) into the mapping
        with contextlib.suppress(ValueError):  # impossible dates, which the parser reads as text later
            loader.construct_document(root)  # raises for unknown tags
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path}: is not a mapping of options to values, such as 'output: merged.safetensors'")
        for key, first, second in repeated:
            raise ValueError(f"{path}: the key '{key}' is in line {first} and again in line {second}; remove one")
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is not valid YAML: {explain_yaml(error, text)}") from None
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply to be a configuration") from None
    return text


def explain_yaml(error: yaml.YAMLError, text: str) -> str:
    """YAML's reason and its place, with the right notation if a special character is the cause."""
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
    """Check that YAML reads a list of names, or a mapping to names, as such.

    Args:
        text: `[…]` or `{…}`.
        option: the option, such as `--include`.

    Raises:
        ValueError: YAML reads it as something else; the message suggests quotes.
    """
    problem = None
    try:
        found = yaml.safe_load(text)
        items = list(found.values()) if isinstance(found, dict) else found
        wrong = next((item for item in items if isinstance(item, dict)), None)
        if wrong:
            problem = "YAML reads text with a colon and a space in it as a mapping, not as a name"
        elif any(item is None for item in items):
            problem = "YAML reads one of these as null"
    except (yaml.YAMLError, ValueError) as error:
        word = next(_special_words(text), None)
        problem = f"YAML reads {word[0]} at the beginning of a word as syntax" if word else "is not a list in YAML"
        if not word and isinstance(error, yaml.YAMLError):
            problem = f"is not YAML: {getattr(error, 'problem', None) or 'it cannot be read'}"
    if problem is None:
        return
    names = [name.strip() for name in text[1:-1].split(",") if name.strip()]
    if text.startswith("{"):
        raise ValueError(f"{option} '{text}': {problem}; put the values in double quotes")
    bare = " ".join(f"'{name}'" for name in names)
    raise ValueError(f"{option} '{text}': {problem}; quote it, {option} '{in_brackets(names)}', or omit the brackets, "
                     f"{option} {bare}")  # fmt: skip


def in_brackets(names: Sequence[str]) -> str:
    """A YAML list of names, in double quotes only where needed."""
    return f"[{', '.join(map(_quoted, names))}]"


def _quoted(name: str) -> str:
    with contextlib.suppress(yaml.YAMLError, ValueError):
        if yaml.safe_load(f"[{name}]") == [name] and not re.fullmatch(r"[-+.\d]+([eE][-+]?\d+)?", name):  # 1e3
            return name
    # Undecodable bytes of a file name can be written in YAML only as escapes.
    return json.dumps(name, ensure_ascii=not name.isprintable())


def _special_words(line: str) -> Iterator[str]:
    """The words of a line that begin with a character that is special in YAML."""
    for found in re.finditer(rf"(?:^|[\[,:{{-])\s*([{re.escape(_SPECIAL)}][^,\]}}\s#]*)", line):
        if len(found[1]) > 1:
            yield found[1]


def _repeated(node: yaml.Node, seen: set[int] | None = None) -> Iterator[tuple[str, int, int]]:
    """Repeated keys of mappings with both line numbers; YAML would silently keep the last one."""
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
