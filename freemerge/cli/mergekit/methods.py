"""mergekit's methods as ours: for each, its parameters and the description of our method.

A description is what a configuration file of ours holds: `class_path` and `init_args`. Numbers may be gradients there,
which `described` moves into `OverLayers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from freemerge.cli.mergekit.values import Misfit, Value, combined


class Base(Enum):
    """What a method does with `base_model`."""

    ORIGIN = "required; the differences to it are merged"
    END = "required; it is merged with one other model"
    EITHER = "the differences to it are merged, or the weights without it"
    MODEL = "one of the models"


class Own(NamedTuple):
    """The values of a method's parameters for one case of tensors."""

    weights: Sequence[Value | None]  # those of each model
    model: Mapping[str, Sequence[Value | None]]  # other parameters of each model
    whole: Mapping[str, Value | None]  # parameters of the whole merge

    def number(self, name: str) -> Any:
        return self.whole[name]


Make = Callable[[Own], dict[str, Any]]


class Method(NamedTuple):
    """A method of mergekit.

    Args:
        base: the role of the base.
        per_model: parameter of each model → its default; `...` if it has none.
        whole: parameter of the whole merge → its default; `...` if it has none.
        make: describes our method of the models besides the base.
        rest: without a base, where the first model is ours: describes our method of the other models. All models have
            weights. A `Misfit` leaves it to `all`.
        all: the same for our method of all models, the first of which is our base too.
        models: the number of models besides the base, if it is fixed.
    """

    base: Base
    per_model: Mapping[str, Any]
    whole: Mapping[str, Any]
    make: Make | None = None
    rest: Make | None = None
    all: Make | None = None
    models: int | None = None


def described(name: str, **arguments: Any) -> dict[str, Any]:
    """A class by its name and its arguments."""
    return {"class_path": name, "init_args": arguments} if arguments else {"class_path": name}


def over_layers(method: dict[str, Any], layers: Sequence[int] | None) -> dict[str, Any]:
    """A description whose gradients are moved into `OverLayers`; the same if it has none.

    Tensors after the layers have the first value, as in mergekit 0.1.

    Args:
        method: a description.
        layers: the first layer and the one after the last; None for all.
    """
    values: dict[str, list[float]] = {}

    def first(value: Any, path: str) -> Any:
        """The value without gradients, which are replaced by what they begin with."""
        if isinstance(value, dict):
            inner = {key: first(each, f"{path}.{key}" if path else key) for key, each in value["init_args"].items()}
            return {**value, "init_args": inner}
        if isinstance(value, Each):
            return [first(each, f"{path}.{index}") for index, each in enumerate(value)]
        if isinstance(value, list):
            values[path] = value
            return value[0]
        return value

    plain = first(method, "") if "init_args" in method else method
    if not values:
        return plain
    arguments = {"method": plain, "values": values, **({"layers": list(layers)} if layers else {}), "end": 0.0}
    return described("OverLayers", **arguments)


class Each(list[Any]):
    """One value for each model, as opposed to a gradient."""


def _each(values: Sequence[Any]) -> Any:
    """One value if all models have the same, otherwise one for each."""
    return values[0] if all(value == values[0] for value in values) else Each(values)


def _times(own: Own, factor: Value | None = 1.0) -> Each:
    """The weights times a factor."""
    return Each(combined("parameters.weight", lambda weight, by: weight * by, each, factor) for each in own.weights)


def _sum(own: Own, factors: Value | None = None) -> dict[str, Any]:
    """A weighted sum or mean of differences, without election."""
    scale = own.number("lambda")
    if not own.number("normalize"):
        return described("TaskArithmetic", scale=_each(_times(own, scale)))
    if scale != 1:
        total = _share(own, scale)
        return described("TaskArithmetic", scale=_each(total))
    return described("WeightAverage", coefficients=Each(own.weights))


def _share(own: Own, scale: Value | None = 1.0) -> Each:
    """The weights divided by their sum, times a factor."""
    return Each(
        combined("parameters.weight", lambda by, *all, at=index: by * all[at] / _nonzero(sum(all)), scale, *own.weights)
        for index in range(len(own.weights))
    )


def _nonzero(total: float) -> float:
    if abs(total) < 1e-8:
        raise Misfit("parameters.weight: the sum of the weights is 0")
    return total


def _elected(own: Own, **more: Any) -> dict[str, Any]:
    """TIES' election of weighted differences."""
    arguments: dict[str, Any] = {"density": 1.0, "scale": own.number("lambda"), **more}
    if any(weight != 1.0 for weight in own.weights):
        arguments["coefficients"] = Each(own.weights)
    if not own.number("normalize"):
        arguments["mean"] = False
    return described("Ties", **arguments)


def _ties(own: Own) -> dict[str, Any]:
    if own.number("rescale"):
        raise Misfit("parameters.rescale: TIES does not rescale what it keeps; remove it")
    density = _each([_minimum(each, 1.0) for each in own.model["density"]])
    return _elected(own, density=density, scope="tensor")


def _minimum(value: Value | None, bound: float) -> Any:
    return combined("parameters.density", lambda number: min(number, bound), value)


def _dropped(own: Own) -> Any:
    return _each(
        [combined("parameters.density", lambda kept: max(1 - kept, 0.0), each) for each in own.model["density"]]
    )


def _unscaled(own: Own) -> Own:
    """DARE without rescaling: the weights times the densities."""
    if own.number("rescale"):
        return own
    if own.number("normalize"):
        raise Misfit("parameters.rescale: false together with normalize: true is not possible")
    pairs = zip(own.weights, own.model["density"], strict=True)
    product = [combined("parameters.weight", lambda weight, kept: weight * min(kept, 1.0), *pair) for pair in pairs]
    return own._replace(weights=product)


def _dare(merge: Make) -> Make:
    return lambda own: described("Dare", method=merge(_unscaled(own)), drop=_dropped(own))


def _della(merge: Make) -> Make:
    def make(own: Own) -> dict[str, Any]:
        pairs = zip(own.model["epsilon"], own.model["density"], strict=True)
        widths = [
            # mergekit's is half the width, and without effect where everything is kept
            combined("parameters.epsilon", lambda half, kept: 2 * half if kept < 1 else 0.0, *pair)
            for pair in pairs
        ]
        return described("Della", method=merge(_unscaled(own)), drop=_dropped(own), epsilon=_each(widths))

    return make


def _breadcrumbs(own: Own) -> dict[str, Any]:
    if own.number("rescale"):
        raise Misfit("parameters.rescale: Breadcrumbs does not rescale what it keeps; remove it")
    pairs = list(zip(own.model["density"], own.model["gamma"], strict=True))
    key = "parameters.density"
    top = _each([combined(key, lambda kept, gamma: min(gamma, max(1 - kept, 0.0)), *pair) for pair in pairs])
    bottom = _each([combined(key, lambda kept, gamma: max(1 - kept - gamma, 0.0), *pair) for pair in pairs])
    weights = _share(own, own.number("lambda")) if own.number("normalize") else _times(own, own.number("lambda"))
    return described("Breadcrumbs", bottom=bottom, top=top, scale=_each(weights))


def _breadcrumbs_ties(own: Own) -> dict[str, Any]:
    made = _breadcrumbs(own._replace(whole={**own.whole, "normalize": False}))
    if not own.number("normalize"):
        made["init_args"]["elect"] = "sum"
        return made
    if any(weight != own.weights[0] for weight in own.weights):
        raise Misfit("parameters.normalize: true needs equal weights for breadcrumbs_ties")
    made["init_args"].update(elect=True, scale=own.number("lambda"))
    return made


def _linear(own: Own) -> dict[str, Any]:
    """The first model is our base, and has no weight in the sum of differences; the weights have to add up to 1."""
    if own.number("normalize"):
        return described("TaskArithmetic", scale=_each(_share(own)[1:]))
    if combined("parameters.weight", lambda *weights: sum(weights), *own.weights) != 1.0:
        raise Misfit("parameters.weight: the sum is not 1")
    return described("TaskArithmetic", scale=_each(own.weights[1:]))


def _linear_of_all(own: Own) -> dict[str, Any]:
    if own.number("normalize"):
        return described("WeightAverage", coefficients=Each(own.weights))
    return described("WholeWeights", method=described("TaskArithmetic", scale=_each(own.weights)))


def _slerp_part(own: Own) -> Any:
    if not own.number("nuslerp_flatten"):
        raise Misfit("parameters.nuslerp_flatten: false is not possible; a tensor is one vector")
    if own.number("nuslerp_row_wise"):
        raise Misfit("parameters.nuslerp_row_wise: true is not possible; a tensor is one vector")
    key = "parameters.weight"
    return combined(key, lambda one, two: 0.5 if abs(one + two) < 1e-6 else two / (one + two), *own.weights)


def _multislerp(own: Own) -> dict[str, Any]:
    if not own.number("normalize_weights"):
        raise Misfit("parameters.normalize_weights: false is not possible; the weights are divided by their sum")
    return described("MultiSlerp", coefficients=Each(own.weights))


def _model_stock(own: Own) -> dict[str, Any]:
    if own.number("filter_wise"):
        raise Misfit("parameters.filter_wise: true is not possible; a tensor is one vector")
    return described("ModelStock")


def _karcher(own: Own) -> dict[str, Any]:
    made = described("KarcherMean", iterations=int(own.number("max_iter")), tolerance=own.number("tol"))
    return described("WholeWeights", method=made)


def _passthrough(own: Own) -> dict[str, Any]:
    (scale,) = own.model["scale"]
    if scale is None or scale == 1.0:
        return described("WeightAverage")
    return described("WholeWeights", method=described("TaskArithmetic", scale=scale))


_SUM = {"int8_mask": False, "normalize": False, "rescale": False, "lambda": 1.0}
_RESCALED = {**_SUM, "rescale": True}
_THIN = {"weight": ..., "density": 1.0}

METHODS = {
    "linear": Method(Base.MODEL, {"weight": ...}, {"normalize": True}, rest=_linear, all=_linear_of_all),
    "task_arithmetic": Method(Base.ORIGIN, _THIN, _SUM, _sum),
    "ties": Method(Base.ORIGIN, _THIN, {**_SUM, "normalize": True}, _ties),
    "dare_linear": Method(Base.ORIGIN, _THIN, _RESCALED, _dare(_sum)),
    "dare_ties": Method(Base.ORIGIN, _THIN, _RESCALED, _dare(_elected)),
    "della_linear": Method(Base.ORIGIN, {**_THIN, "epsilon": 0.15}, _RESCALED, _della(_sum)),
    "della": Method(Base.ORIGIN, {**_THIN, "epsilon": 0.15}, {**_RESCALED, "normalize": True}, _della(_elected)),
    "breadcrumbs": Method(Base.ORIGIN, {**_THIN, "gamma": 0.01}, _SUM, _breadcrumbs),
    "breadcrumbs_ties": Method(Base.ORIGIN, {**_THIN, "gamma": 0.01}, _SUM, _breadcrumbs_ties),
    "slerp": Method(Base.END, {}, {"t": ...}, lambda own: described("WeightSlerp", t=own.number("t")), models=1),
    "nuslerp": Method(
        Base.EITHER,
        {"weight": ...},
        {"nuslerp_row_wise": False, "nuslerp_flatten": True},
        lambda own: described("Slerp", t=_slerp_part(own)),
        rest=lambda own: described("WeightSlerp", t=_slerp_part(own)),
        models=2,
    ),
    "multislerp": Method(
        Base.EITHER,
        {"weight": ...},
        {"normalize_weights": True, "eps": 1e-8},
        _multislerp,
        all=lambda own: described("WholeWeights", method=_multislerp(own)),
    ),
    "karcher": Method(Base.MODEL, {}, {"max_iter": 10.0, "tol": 1e-5}, all=_karcher),
    "sce": Method(
        Base.ORIGIN,
        {},
        {"int8_mask": False, "select_topk": 1.0},
        lambda own: described("SCE", select=own.number("select_topk")),
    ),
    "model_stock": Method(Base.ORIGIN, {}, {"filter_wise": False}, _model_stock),
    "nearswap": Method(Base.END, {}, {"t": ...}, lambda own: described("NearSwap", t=own.number("t")), models=1),
    "arcee_fusion": Method(Base.END, {}, {}, lambda own: described("ArceeFusion"), models=1),
    "passthrough": Method(Base.MODEL, {"scale": None}, {}, all=_passthrough, models=1),
}
