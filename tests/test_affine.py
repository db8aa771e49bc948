"""The affine quantizer: the lecture's examples, the bounds that rounding promises, and the parts of an array."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from ggufkit_formats.blocks import find
from ggufkit_formats.errors import FormatError, UsageError

import ggufkit

quantize = ggufkit.affine.quantize


def test_range_0_to_1000_in_8_bits():
    q = quantize(np.array([0, 250, 1000]), bits=8)
    assert round(float(q.scale.item()), 2) == 3.92
    assert q.zero_point.item() == 0
    assert q.codes.tolist() == [0, 64, 255]
    assert abs(q.dequantize()[1] - 250) <= 3.92 / 2


def test_range_minus_20_to_1000_in_8_bits():
    q = quantize(np.array([-20.0, 0, 1000]), bits=8)
    assert q.scale.item() == 4
    assert q.zero_point.item() == 5
    assert q.codes.tolist() == [0, 5, 255]
    assert q.dequantize().tolist() == [-20, 0, 1000]


def test_limits_that_are_given():
    q = quantize(np.array([250.0, 2000, -3]), bits=8, limits=(0, 1000))
    assert round(float(q.scale.item()), 2) == 3.92 and q.codes.tolist() == [64, 255, 0]
    q = quantize(np.array([[0.0, 1000], [-20, 9]]), bits=8, axis=0, limits=(-20, 1000))
    assert q.scale.tolist() == [[4], [4]] and q.zero_point.tolist() == [[5], [5]] and q.codes[1].tolist() == [0, 7]
    assert quantize(np.array([300.0]), symmetric=True, limits=(-127, 100)).codes.tolist() == [127]
    for bad in ((1, 0), (0, np.inf), (np.nan, 1)):
        with pytest.raises(UsageError, match="limits"):
            quantize(np.ones(3), limits=bad)


def test_symmetric_codes_are_signed():
    q = quantize(np.array([-127.0, 0, 63.4, 127]), symmetric=True)
    assert q.scale.item() == 1 and q.zero_point.item() == 0
    assert q.codes.dtype == np.int8 and q.codes.tolist() == [-127, 0, 63, 127]
    assert quantize(np.array([-1.0, 1]), bits=2, symmetric=True).codes.tolist() == [-1, 1]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("parts", [{}, {"axis": 0}, {"axis": -1}, {"group": 16}], ids=str)
def test_errors_are_at_most_half_a_step_and_zero_is_exact(bits, symmetric, parts):
    rng = np.random.default_rng(bits)
    x = (rng.standard_normal((6, 48)) * 10.0 ** rng.integers(-3, 4, (6, 1))).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = 0
    q = quantize(x, bits, symmetric, **parts)
    back = q.dequantize()
    assert back.shape == x.shape and back.dtype == np.float32
    scale = np.repeat(q.scale, 16, axis=-1) if "group" in parts else np.broadcast_to(q.scale, x.shape)
    # the zero point is rounded too, which may shift the ends of the range by half a step
    assert (np.abs(back - x) <= scale * (0.5 if symmetric else 1.0) * (1 + 1e-6)).all()
    assert (back[x == 0] == 0).all()
    low, high = (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    assert low <= q.codes.min() and q.codes.max() <= high
    assert high - np.abs(q.codes.astype(int)).max() <= 1  # the range is used
    shapes = {"axis": (6, 1) if parts.get("axis") == 0 else (1, 48), "group": (6, 3)}
    assert q.scale.shape == q.zero_point.shape == next((shapes[key] for key in parts), (1, 1))


def test_a_channel_does_not_depend_on_the_others():
    x = np.stack([np.linspace(0, 1, 9), np.linspace(-500, 3, 9)])
    both = quantize(x, bits=5, axis=0)
    for i in range(2):
        alone = quantize(x[i], bits=5)
        assert both.codes[i].tolist() == alone.codes.tolist()
        assert both.scale[i].item() == alone.scale.item() and both.zero_point[i].item() == alone.zero_point.item()


def test_ranges_without_zero_are_widened_and_zeros_stay():
    q = quantize(np.array([10.0, 20]), bits=4)
    assert q.scale.item() == 20 / 15 and q.zero_point.item() == 0
    q = quantize(np.array([-20.0, -10]), bits=4)
    assert q.zero_point.item() == 15 and q.dequantize()[0] == -20
    q = quantize(np.zeros((2, 3)), symmetric=True, axis=0)
    assert (q.scale == 1).all() and not q.dequantize().any()
    assert quantize(np.zeros((0, 4)), group=2).dequantize().shape == (0, 4)


def test_q8_0_is_symmetric_in_groups_of_32():
    """But for the scale, which a block holds as float16."""
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    q = quantize(x, bits=8, symmetric=True, group=32)
    blocks = find("Q8_0").encode(x).reshape(-1, 34)
    assert np.array_equal(q.scale.reshape(-1).astype(np.float16), blocks[:, :2].copy().view(np.float16)[:, 0])
    assert np.abs(q.codes.reshape(-1, 32).astype(int) - blocks[:, 2:].view(np.int8)).max() <= 1
    assert np.mean(q.codes.reshape(-1, 32) == blocks[:, 2:].view(np.int8)) > 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "2 to 8"),
        ({"bits": 9}, "2 to 8"),
        ({"axis": 2}, "axis 2 of an array of 2"),
        ({"group": 5}, "groups of 5 do not divide"),
        ({"group": 2, "axis": 0}, "either axis or group"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UsageError, match=message):
        quantize(np.ones((2, 4)), **arguments)


def test_what_is_no_number():
    with pytest.raises(UsageError, match="numbers are wanted"):
        quantize(np.array(["a"]))
    for bad in (np.nan, np.inf):
        with pytest.raises(FormatError, match="NaN or infinite"):
            quantize(np.array([1, bad]))


def test_importing_ggufkit_does_not_load_it():
    code = "import ggufkit, sys; assert 'ggufkit.affine' not in sys.modules; ggufkit.affine.quantize([1.0])"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
