"""What mergekit's methods are here: a start and its hyperparameters; the rest of a recipe is in mergekit_recipe.py."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.core.annotations import require_finite
from common.core.errors import InputError

METHODS = {  # what mergekit's methods read of the parameters; others are passed over there, and named here
    "linear": {"weight", "normalize"},
    "slerp": {"t"},
    "task_arithmetic": {"weight", "normalize", "rescale", "lambda"},
    "ties": {"weight", "normalize", "rescale", "lambda", "density"},
    "dare_linear": {"weight", "normalize", "rescale", "lambda", "density"},
    "dare_ties": {"weight", "normalize", "rescale", "lambda", "density"},
    "breadcrumbs": {"weight", "normalize", "rescale", "lambda", "density", "gamma"},
}
# Whether the weights are divided by their sum where the recipe does not say so, as mergekit has it.
NORMALIZED = {"linear": True, "ties": True}


def start_of(
    method: str, models: Mapping[str, Mapping[str, float]], said: Mapping[str, Any], file: str
) -> tuple[str, dict[str, Any]]:
    """(start.method, its hyperparameters) that do what the recipe asks for."""
    if method == "slerp":
        if len(models) != 2:
            raise InputError(f"{file}: slerp mixes the base_model and one other model, not {len(models)} in all")
        return "slerp", {"t": number(said, "t", method, file)}
    shares, normalize = shares_of(method, models, said, file)
    default = method.startswith("dare_")
    if "rescale" in METHODS[method] and said.get("rescale", default) != default:
        raise InputError(f"{file}: {method} is understood with rescale as it is by default, not {said['rescale']}")
    if method == "linear":
        require_sum_of_one(shares, normalize, file)
        return "ta", {"scale": shares}
    scaled = [said["lambda"] * share for share in shares]
    if method == "task_arithmetic":
        return "ta", {"scale": scaled}
    density = min(one(models, said, "density", 1.0, file), 1.0)  # more is all, as in mergekit
    if density <= 0:
        raise InputError(f"{file}: density is {density:g}, which leaves no change of any model; choose one above 0")
    if method == "dare_linear":
        return "dare_ta", {"drop": 1 - density, "scale": scaled}
    require_equal_weights(method, [(said | own)["weight"] for own in models.values()], normalize, file)
    if method == "ties":
        return "ties", {"density": density, "scale": said["lambda"], "granularity": "tensor"}
    if method == "dare_ties":
        return "dare_ties", {"drop": 1 - density, "density": 1.0, "scale": said["lambda"]}
    outliers = outliers_of(density, one(models, said, "gamma", 0.01, file), file)
    return "breadcrumbs", {"keep": density, "outliers": outliers, "scale": scaled[0]}


def shares_of(
    method: str, models: Mapping[str, Mapping[str, float]], said: Mapping[str, Any], file: str
) -> tuple[list[float], bool]:
    """The weight of each model, divided by their sum where the recipe or the method says so, and whether it does."""
    for name, own in models.items():
        if "weight" not in own and "weight" not in said:
            raise InputError(f"{file}: {method} needs a weight for {name}")
    weights = [float((said | own)["weight"]) for own in models.values()]
    normalize = NORMALIZED.get(method, False) if said["normalize"] is None else bool(said["normalize"])
    total = sum(weights)
    require_finite(total, f"{file}: the sum of the weights")
    # What rounding leaves of a sum of 0 is none to divide by; mergekit takes 1 in its place, but for linear.
    least = 1e-8 * max(map(abs, weights)) if method == "linear" else 1e-8
    return [weight / total for weight in weights] if normalize and abs(total) > least else weights, normalize


def require_sum_of_one(shares: Sequence[float], normalize: bool, file: str) -> None:
    """InputError if what linear mixes are no parts of a whole."""
    if math.isclose(total := sum(shares), 1):
        return
    step = (
        "so they cannot be divided by their sum; choose weights whose sum is not 0"
        if normalize
        else "with normalize: false they must add up to 1; without that line they are divided by their sum"
    )
    raise InputError(f"{file}: the weights of linear add up to {total:g}, {step}")


def require_equal_weights(method: str, weights: Sequence[float], normalize: bool, file: str) -> None:
    """InputError if models have unlike weights, which this method here has no place for, or TIES others than a mean."""
    if len(set(weights)) > 1:
        raise InputError(
            f"{file}: {method} is understood with equal weights, not {', '.join(str(float(w)) for w in weights)}"
        )
    if method in ("ties", "dare_ties"):
        if not all(weights):
            raise InputError(f"{file}: {method} is understood with weights that are not zero")
        if not normalize:
            raise InputError(f"{file}: {method} is understood with normalize: true, the mean of those that agree")


def outliers_of(density: float, gamma: float, file: str) -> float:
    """The share of the largest changes that breadcrumbs removes: gamma, or none where all changes are kept."""
    if density < 1 < density + gamma:
        raise InputError(
            f"{file}: breadcrumbs is understood with density + gamma of at most 1, not {density} + {gamma}"
        )
    return gamma if density < 1 else 0.0


def one(
    models: Mapping[str, Mapping[str, float]], said: Mapping[str, Any], name: str, otherwise: float, file: str
) -> float:
    """A number that must be the same for all models."""
    values = {float(p.get(name, said.get(name, otherwise))) for p in models.values()}
    if len(values) > 1:
        raise InputError(
            f"{file}: {name} is understood where it is the same for all, not {', '.join(map(str, values))}"
        )
    return values.pop()


def number(said: Mapping[str, Any], name: str, method: str, file: str) -> float:
    """A number that the recipe must have."""
    if name not in said:
        raise InputError(f"{file}: {method} needs parameters.{name}")
    return float(said[name])
