"""The whole of a configuration: models and slices, the method for each of them, and the files of the result."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from freemerge.cli.mergekit.methods import METHODS, Base, Make, Method, Own, described, over_layers
from freemerge.cli.mergekit.values import Condition, Misfit, Value, conditions, find, patterns
from freemerge.cli.names import closest

_KEYS = (
    *("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "name"),
)
_PARAMETERS = {name: None for method in METHODS.values() for name in (*method.per_model, *method.whole)}
_LEADING = r"re:(?:(?!\d+\.)[^.]+\.)*"  # the parts of a name before the first number
_EMBEDDINGS = r"re:(?!.*\.\d+\.)(?:.*[._])?(?:\w*embed\w*|wte|wpe|shared)(?:[._].*)?"


class Translation(NamedTuple):
    """A configuration in our words."""

    options: dict[str, Any]  # of `python -m freemerge merge`
    notes: list[str]  # what has no effect


class _Source(NamedTuple):
    """A model in a slice."""

    key: str
    model: str
    layers: tuple[int, int] | None
    parameters: Mapping[str, Any]


class _Slice(NamedTuple):
    """Models whose layers become consecutive layers of the result."""

    key: str
    sources: list[_Source]
    parameters: Mapping[str, Any]

    @property
    def size(self) -> int:
        """The number of layers."""
        first = self.sources[0].layers
        return first[1] - first[0] if first else 0


def is_of_mergekit(table: Mapping[str, Any]) -> bool:
    """Whether a configuration is mergekit's."""
    return "merge_method" in table


def translate(table: Mapping[str, Any]) -> Translation:
    """The options of `python -m freemerge merge` for a configuration of mergekit.

    Args:
        table: the contents of the file.

    Raises:
        ExceptionGroup: of a `Misfit` for each key that is misspelt, incomplete, or not possible here.
    """
    problems: list[Misfit] = []
    notes: list[str] = []
    for key in table:
        if key not in _KEYS:
            problems.append(Misfit(f"{key}: is not a key of mergekit's configurations{closest(str(key), _KEYS)}"))
    options: dict[str, Any] = {}
    for part in (_models_and_method, _dtype, _files):
        try:
            options |= part(table, options, notes)
        except Misfit as problem:
            problems.append(problem)
        except ExceptionGroup as several:
            problems.extend(several.exceptions)  # type: ignore[arg-type]
    if problems:
        raise ExceptionGroup("not possible", problems)
    return Translation(options, notes)


def _models_and_method(table: Mapping[str, Any], _: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    name = table["merge_method"]
    if not isinstance(name, str) or name not in METHODS:
        raise Misfit(
            f"merge_method: there is no {name!r} here{closest(str(name), METHODS)}; there are {', '.join(METHODS)}"
        )
    method = METHODS[name]
    if "modules" in table:
        raise Misfit("modules: are not possible here; merge the modules' folders one by one")
    base = _model(table["base_model"], "base_model") if table.get("base_model") is not None else None
    slices = _slices(table)
    _check_parameters(name, table, slices, notes)
    if base is None and method.base in (Base.ORIGIN, Base.END):
        raise Misfit(f"base_model: is missing; {name} needs it")
    whole = _table(table, "parameters")
    apart = method.make is not None and base is not None
    ordered = [_order(each, base, apart, method.per_model) for each in slices]
    models = [source.model for source in ordered[0].sources]
    number = len(models) - (1 if apart else 0)
    if method.models is not None and number != method.models:
        besides = " besides base_model" if apart else ""
        raise Misfit(f"{slices[0].key or 'models'}: {name} needs {method.models}{besides}, got {number}")
    if number < 1:
        raise Misfit("models: there is none to merge besides base_model")
    for each in ordered[1:]:
        if len(each.sources) != len(models):
            raise Misfit(
                f"{each.key}: has {len(each.sources)} sources and slices[0] has {len(models)}; as many are needed"
            )
    return _assemble(method, name, ordered, whole, apart)


def _assemble(
    method: Method, name: str, slices: Sequence[_Slice], whole: Mapping[str, Any], apart: bool
) -> dict[str, Any]:
    """The base, the models and the method."""
    columns = [_stack([each.sources[index] for each in slices]) for index in range(len(slices[0].sources))]
    makes: list[tuple[Make, bool]] = [(method.make, False)] if apart and method.make else []
    if not apart:
        makes = [(make, every) for make, every in ((method.rest, False), (method.all, True)) if make is not None]
    for make, every in makes:
        try:
            described_method = _method(make, method, name, slices, whole, apart)
        except Misfit:
            if make is makes[-1][0]:
                raise
            continue
        return {"base": columns[0], "finetuned": columns if every else columns[1:], "method": described_method}
    raise AssertionError(f"{name} has no counterpart")


def _stack(sources: Sequence[_Source]) -> str:
    """The name of a model, with the ranges of its layers."""
    return "+".join(
        source.model if source.layers is None else f"{source.model}[{source.layers[0]}:{source.layers[1]}]"
        for source in sources
    )


def _method(
    make: Make, method: Method, name: str, slices: Sequence[_Slice], whole: Mapping[str, Any], apart: bool
) -> dict[str, Any]:
    """Our method: the same for all slices, or one for the layers of each."""
    found, start = [], 0
    for each in slices:
        part = [start, start + each.size] if len(slices) > 1 else None
        found.append(_method_of_slice(make, method, name, each, whole, apart, part))
        start += each.size
    if all(each == found[0] for each in found):
        return found[0]
    overrides, start = {_EMBEDDINGS: found[0]}, 0
    for each, own in zip(slices, found, strict=True):
        layers = "|".join(map(str, range(start, start + each.size)))
        overrides[rf"{_LEADING}(?:{layers})(?:\..*)?"] = own
        start += each.size
    return described("PerPattern", default=found[-1], overrides=overrides, optional=True)


def _method_of_slice(
    make: Make,
    method: Method,
    name: str,
    each: _Slice,
    whole: Mapping[str, Any],
    apart: bool,
    part: Sequence[int] | None,
) -> dict[str, Any]:
    """Our method, by the filters of its parameters."""
    outer = [(f"{each.key}.parameters", each.parameters)] if each.key else []
    outer.append(("parameters", whole))
    of_models = {
        parameter: [
            conditions([(f"{source.key}.parameters", source.parameters), *outer], parameter)
            for source in each.sources[1 if apart else 0 :]
        ]
        for parameter in method.per_model
    }
    of_whole = {parameter: conditions(outer, parameter) for parameter in method.whole}
    cases = patterns([*(one for lists in of_models.values() for one in lists), *of_whole.values()])

    def make_case(contained: frozenset[str]) -> dict[str, Any]:
        values = {
            parameter: [
                _find(tried, contained, default, f"{name} needs `{parameter}` for each model") for tried in lists
            ]
            for (parameter, default), lists in zip(method.per_model.items(), of_models.values(), strict=True)
        }
        numbers = {
            parameter: _find(of_whole[parameter], contained, default, f"{name} needs `{parameter}`")
            for parameter, default in method.whole.items()
        }
        return over_layers(make(Own(values.get("weight", ()), values, numbers)), part)

    default = make_case(frozenset())
    overrides = {pattern: make_case(contained) for pattern, contained in cases}
    if all(own == default for own in overrides.values()):
        return default
    return described("PerPattern", default=default, overrides=overrides, optional=True)


def _find(tried: Sequence[Condition], contained: frozenset[str], default: Any, needs: str) -> Value | None:
    value = find(tried, contained)
    if value is None and default is ...:
        where = f" and those that contain {', '.join(contained)}" if contained else ""
        raise Misfit(f"parameters: {needs}{', also for tensors that no filter names' + where if tried else ''}")
    return default if value is None else value


def _order(each: _Slice, base: str | None, apart: bool, per_model: Collection[str]) -> _Slice:
    """The slice with its base first, if it has one; without one it is added, unless it needs a weight of its own."""
    own = [source for source in each.sources if source.model == base]
    others = [source for source in each.sources if source.model != base]
    if base is not None and not own:
        if any(source.layers for source in others):
            raise Misfit(f"{each.key}.sources: list base_model too, with its layer_range")
        if "weight" in per_model and not apart and any("weight" in source.parameters for source in others):
            raise Misfit("base_model: is not among the models, and has no weight; list it there, or remove it")
        own = [_Source("base_model", base, None, {})]
    return each._replace(sources=[*own, *others])


def _slices(table: Mapping[str, Any]) -> list[_Slice]:
    given = [key for key in ("models", "slices") if table.get(key)]
    if len(given) != 1:
        raise Misfit("models: give either models or slices" + (", not both" if given else ""))
    base = table.get("base_model")
    if given == ["models"]:
        entries = _list(table["models"], "models")
        return [
            _Slice("", [_source(entry, f"models[{index}]", base, False) for index, entry in enumerate(entries)], {})
        ]
    slices = []
    for index, entry in enumerate(_list(table["slices"], "slices")):
        key = f"slices[{index}]"
        for extra in entry.keys() - {"sources", "parameters"}:
            if extra == "base_model" and entry[extra] == base:
                continue
            raise Misfit(f"{key}.{extra}: is not possible here")
        sources = _list(entry.get("sources"), f"{key}.sources")
        found = [_source(each, f"{key}.sources[{place}]", base, True) for place, each in enumerate(sources)]
        sizes = {each.layers[1] - each.layers[0] for each in found if each.layers}
        if len(sizes) != 1:
            raise Misfit(f"{key}.sources: all need as many layers, got {', '.join(map(str, sorted(sizes)))}")
        slices.append(_Slice(key, found, _table(entry, "parameters", key)))
    return slices


def _source(entry: Any, key: str, base: Any, ranged: bool) -> _Source:
    if not isinstance(entry, Mapping) or "model" not in entry:
        raise Misfit(f"{key}: expected a mapping with `model`, got {entry!r}")
    known = ("model", "parameters", "layer_range") if ranged else ("model", "parameters")
    for extra in entry.keys() - set(known):
        raise Misfit(f"{key}.{extra}: is not a key here{closest(str(extra), known)}")
    layers: Any = entry.get("layer_range")
    if ranged:
        valid = isinstance(layers, list) and len(layers) == 2 and all(isinstance(each, int) for each in layers)
        if not valid or not 0 <= layers[0] < layers[1]:
            raise Misfit(f"{key}.layer_range: expected the first layer and the one after the last, got {layers!r}")
    model = _model(entry["model"], f"{key}.model", base)
    return _Source(key, model, tuple(layers) if ranged else None, _table(entry, "parameters", key))


def _model(value: Any, key: str, base: Any = None) -> str:
    """The path or name of a model; an adapter is one of base_model."""
    if isinstance(value, Mapping):  # as mergekit writes it out
        inner = value.get("model")
        inner = inner if isinstance(inner, Mapping) else {"path": inner or value.get("path")}
        revision = inner.get("revision") or value.get("revision")
        text = str(inner.get("path")) + (f"@{revision}" if revision else "")
        lora = value.get("lora")
        lora = lora.get("path") if isinstance(lora, Mapping) else lora
        value = f"{text}+{lora}" if lora else text
    if not isinstance(value, str) or not value:
        raise Misfit(f"{key}: expected a path or a name on the Hub, got {value!r}")
    model, plus, adapter = value.partition("+")
    if not plus:
        return model
    if model != base:
        raise Misfit(
            f"{key}: an adapter is merged only with base_model, and {model} is another model; merge the two first"
        )
    return adapter


def _check_parameters(name: str, table: Mapping[str, Any], slices: Sequence[_Slice], notes: list[str]) -> None:
    """Refuse parameters that no method has, and note those that this one does not use."""
    method, problems = METHODS[name], []
    levels = [("parameters", _table(table, "parameters"))]
    for each in slices:
        levels += [(f"{each.key}.parameters", each.parameters)]
        levels += [(f"{source.key}.parameters", source.parameters) for source in each.sources]
    for key, parameters in levels:
        for parameter in parameters:
            if parameter not in _PARAMETERS:
                hint = closest(str(parameter), _PARAMETERS)
                problems.append(Misfit(f"{key}.{parameter}: is no parameter of any method{hint}"))
            elif parameter not in method.per_model and parameter not in method.whole:
                notes.append(f"{key}.{parameter}: has no effect on {name}")
    if problems:
        raise ExceptionGroup("parameters", problems)


def _dtype(table: Mapping[str, Any], _: Mapping[str, Any], __: list[str]) -> dict[str, Any]:
    """The result's dtype; we compute in float32 always."""
    found = table.get("out_dtype") or table.get("dtype")
    if found is not None and not isinstance(found, str):
        raise Misfit(f"dtype: expected a name such as bfloat16, got {found!r}")
    return {"dtype": found} if found else {}


def _files(table: Mapping[str, Any], options: Mapping[str, Any], _: list[str]) -> dict[str, Any]:
    """Tokenizer and chat template."""
    problems = []
    if table.get("chat_template") is not None:
        problems.append(
            Misfit("chat_template: is not possible here; --chat_template_from takes a model's, or a .jinja file's")
        )
    source, key = table.get("tokenizer_source"), "tokenizer_source"
    if isinstance(table.get("tokenizer"), Mapping):
        source, key = table["tokenizer"].get("source", "union"), "tokenizer.source"
        extra = [name for name in table["tokenizer"] if name != "source" and table["tokenizer"][name] is not None]
        problems += [Misfit(f"tokenizer.{name}: is not possible here") for name in extra]
    found: dict[str, Any] = {}
    if source == "union":
        problems.append(Misfit(f"{key}: a union of tokenizers is not possible here; name one of the models, or base"))
    elif source == "base":
        found = {"companions_from": "base", "embeddings": "base"}
    elif source is not None:
        try:
            model = _model(source.removeprefix("model:") if isinstance(source, str) else source, key)
            if options and model not in (options["base"], *options["finetuned"]):
                raise Misfit(f"{key}: {model} is none of the models")
            found = {"companions_from": "base" if options and model == options["base"] else model}
        except Misfit as problem:
            problems.append(problem)
    if problems:
        raise ExceptionGroup("files", problems)
    return found


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list) or not value or not all(isinstance(each, Mapping) for each in value):
        raise Misfit(f"{key}: expected a list of mappings, got {value!r}")
    return value


def _table(table: Mapping[str, Any], name: str, key: str = "") -> Mapping[str, Any]:
    value = table.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise Misfit(f"{key + '.' if key else ''}{name}: expected a mapping, got {value!r}")
    return value or {}
