"""Whether weights are numbers, in every dtype that a file can hold."""

from __future__ import annotations

import math

import pytest
import torch

from byg_plugin.finite import first_not_finite, is_finite, refuse_not_finite

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 7, 11])
def test_one_bad_element_is_found_wherever_it_is(dtype: torch.dtype, bad: float, index: int):
    values = torch.linspace(-3, 3, 12)
    assert is_finite(values.to(dtype))
    values[index] = bad
    assert not is_finite(values.to(dtype).reshape(3, 4))


def test_the_fp8_of_most_files_has_no_infinity_but_a_nan():
    values = torch.tensor([448.0, -448.0, 0.0])
    assert is_finite(values.to(torch.float8_e4m3fn))
    values[1] = math.nan
    assert not is_finite(values.to(torch.float8_e4m3fn))


def test_the_largest_numbers_are_numbers():
    for dtype in FLOATS:
        assert is_finite(torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("tensor", [torch.zeros(0), torch.tensor([1, 2]), torch.tensor([True]), torch.zeros(2, dtype=torch.complex64)])
def test_what_cannot_be_otherwise_is_finite(tensor: torch.Tensor):
    assert is_finite(tensor)


def test_a_complex_nan_is_found():
    assert not is_finite(torch.tensor([complex(0, math.nan)]))


def test_the_first_bad_tensor_is_named_with_its_file():
    tensors = {"a": torch.ones(2), "b": torch.tensor([1.0, math.nan]), "c": torch.tensor([math.inf])}
    assert first_not_finite(tensors) == "b" == first_not_finite(iter(tensors.items()))
    with pytest.raises(ValueError, match=r"^lora\.safetensors: tensor b holds NaN or infinite values; train it again$"):
        refuse_not_finite(tensors, "lora.safetensors", "train it again")
    refuse_not_finite({"a": tensors["a"]}, "lora.safetensors", "train it again")
