"""Task vectors: exact arithmetic, half precision widened, every mismatch refused by name."""

import pytest
import torch

from common.core.errors import InputError
from common.core.task_vectors import add, is_finite, lazy_task_vector, require_same_shapes, subtract


def params(**tensors):
    return {name.replace("_", "."): torch.tensor(values) for name, values in tensors.items()}


def test_subtract_and_add_on_numbers():
    theta_0, theta = params(h_w=[[1.0, 2.0]], h_b=[3.0]), params(h_w=[[1.5, 0.0]], h_b=[3.0])
    tau = subtract(theta, theta_0)
    assert tau["h.w"].tolist() == [[0.5, -2.0]] and tau["h.b"].tolist() == [0.0]
    assert add(theta_0, tau)["h.w"].tolist() == [[1.5, 0.0]]
    assert add(theta_0, tau, scale=0.5)["h.w"].tolist() == [[1.25, 1.0]]
    assert add(theta_0, tau, scale=0)["h.w"].tolist() == theta_0["h.w"].tolist()


def test_half_precision_is_upcast_before_the_arithmetic_and_double_kept():
    """1 + 2⁻⁸ is not a bfloat16: the sum exists only if it was taken in float32."""
    one, small = {"w": torch.tensor([1.0]).bfloat16()}, {"w": torch.tensor([2.0**-8]).bfloat16()}
    total = add(one, small)["w"]
    assert total.dtype == torch.float32 and total.item() == 1 + 2.0**-8
    assert subtract(one, small)["w"].item() == 1 - 2.0**-8
    assert subtract({"w": one["w"].double()}, {"w": one["w"].double()})["w"].dtype == torch.float64


def test_arguments_are_left_alone():
    theta_0, tau = params(w=[1.0]), params(w=[2.0])
    add(theta_0, tau)["w"].zero_()
    subtract(theta_0, tau)["w"].zero_()
    assert theta_0["w"].item() == 1.0 and tau["w"].item() == 2.0


@pytest.mark.parametrize("operation", [subtract, lambda theta, theta_0: add(theta_0, theta)], ids=["subtract", "add"])
@pytest.mark.parametrize(
    ("theta", "sentence"),
    [
        (params(h_w=[[1.0, 2.0]]), r"h\.b: missing, a tensor of shape \(1,\) is expected"),
        (params(h_w=[[1.0, 2.0]], h_b=[0.0], x_w=[0.0]), r"x\.w: extra, no tensor of that name is expected"),
        (params(h_w=[[1.0], [2.0]], h_b=[0.0]), r"h\.w: \(2, 1\) against \(1, 2\)"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_other_names_or_shapes_are_refused_by_name(operation, theta, sentence):
    with pytest.raises(InputError, match=sentence):
        operation(theta, params(h_w=[[1.0, 2.0]], h_b=[3.0]))


def test_shapes_alone_are_compared_and_the_sentence_opens_with_who():
    require_same_shapes({"w": [2, 3]}, {"w": (2, 3)})
    with pytest.raises(InputError, match=r"^expert/model\.safetensors: w: \(3,\) against \(2, 3\)$"):
        require_same_shapes({"w": [3]}, {"w": [2, 3]}, "expert/model.safetensors")


def test_a_lazy_task_vector_reads_what_is_asked_for_and_keeps_nothing():
    theta_0, theta = params(h_w=[[1.0, 2.0]], h_b=[3.0]), params(h_w=[[1.5, 0.0]], h_b=[4.0])
    asked = []

    def read(name):
        asked.append(name)
        return theta[name].clone()

    tau = lazy_task_vector(read, theta_0)
    assert list(tau) == ["h.w", "h.b"] and len(tau) == 2 and "h.b" in tau and tau.keys() == theta_0.keys() and not asked
    assert tau["h.b"].tolist() == [1.0] and tau["h.b"].tolist() == [1.0] and asked == ["h.b", "h.b"]
    assert tau["h.w"].tolist() == subtract(theta, theta_0)["h.w"].tolist() == [[0.5, -2.0]]
    assert tau.get("x") is None and theta_0["h.b"].item() == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_finite_is_told_even_where_the_sum_overflows(dtype):
    assert is_finite(torch.full((99,), torch.finfo(dtype).max, dtype=dtype))
    assert is_finite(torch.empty(0, 3, dtype=dtype)) and is_finite(torch.tensor(1.0, dtype=dtype))
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.zeros(99, dtype=dtype)
        assert is_finite(x)
        x[77] = value
        assert not is_finite(x)
