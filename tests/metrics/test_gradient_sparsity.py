import math

import numpy as np
import pytest
import torch

from sg_lightning.metrics import gradient_sparsity

KEYS = {"l1", "l2", "linf", "zero_share", "small_share", "l1_over_l2", "hoyer", "gini", "participation"}
SHAPE_KEYS = sorted(KEYS - {"l1", "l2", "linf"})


def gini_of_pairs(a):
    """Gini by its first definition, the mean absolute difference of all pairs; nothing is sorted."""
    return np.abs(a[:, None] - a[None, :]).sum() / (2 * len(a) ** 2 * a.mean())


def reference(g):
    """The same measures of one float64 vector, by other formulas where there is one."""
    a = np.abs(g)
    p = a**2 / (a**2).sum()
    ratio = np.sqrt((a.sum() ** 2) / (a @ a))
    return {
        "l1": np.linalg.norm(g, 1),
        "l2": np.linalg.norm(g, 2),
        "linf": np.linalg.norm(g, np.inf),
        "zero_share": 1 - np.count_nonzero(g) / g.size,
        "small_share": sum(abs(v) < 1e-3 * a.max() for v in g) / g.size,
        "l1_over_l2": ratio,
        "hoyer": (math.sqrt(g.size) - ratio) / (math.sqrt(g.size) - 1),
        "gini": gini_of_pairs(a),
        "participation": 1 / (p**2).sum(),
    }


def gradients(batch=6, features=50):
    g = np.random.default_rng(0).normal(size=(batch, features)) ** 5  # heavy tails: shares that are neither 0 nor 1
    g[0, ::3] = 0
    g[1] = np.sign(g[1])
    return g


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_an_independent_implementation(dtype, tolerance):
    g = gradients()
    measures = gradient_sparsity(torch.tensor(g, dtype=dtype))
    assert set(measures) == KEYS
    for i, row in enumerate(g):
        for key, expected in reference(row).items():
            assert float(measures[key][i]) == pytest.approx(expected, rel=tolerance, abs=tolerance), (key, i)


def test_one_spike_is_the_sparse_end():
    g = torch.zeros(1, 3, 4)
    g[0, 1, 2] = -2.0
    found = {key: float(value) for key, value in gradient_sparsity(g).items()}
    expected = {"l1": 2, "l2": 2, "linf": 2, "zero_share": 11 / 12, "small_share": 11 / 12}
    expected |= {"l1_over_l2": 1, "hoyer": 1, "gini": 11 / 12, "participation": 1}
    assert found == pytest.approx(expected, abs=1e-6)


def test_equal_sizes_are_the_dense_end():
    g = torch.tensor([[1.0, -1.0, 1.0, -1.0] * 4]) * 0.5
    found = {key: float(value) for key, value in gradient_sparsity(g).items()}
    expected = {"l1": 8, "l2": 2, "linf": 0.5, "zero_share": 0, "small_share": 0}
    expected |= {"l1_over_l2": 4, "hoyer": 0, "gini": 0, "participation": 16}
    assert found == pytest.approx(expected, abs=1e-6)


def test_small_share_counts_strictly_below_a_thousandth_of_the_largest():
    g = torch.tensor([[1000.0, 1.5, 0.5, 0.0]])
    measures = gradient_sparsity(g)
    assert float(measures["small_share"]) == 0.5
    assert float(measures["zero_share"]) == 0.25


def test_zero_gradients_are_marked_and_never_nan():
    g = torch.randn(3, 5)
    g[1] = 0
    measures = gradient_sparsity(g)
    for key, value in measures.items():
        assert torch.isfinite(value).all()
        assert float(value[1]) == (1.0 if key.endswith("_share") else 0.0)
    alone = gradient_sparsity(g[[0, 2]])
    for key, value in measures.items():
        torch.testing.assert_close(value[[0, 2]], alone[key], msg=key)


def test_non_finite_gradients_give_nan_for_their_sample_only():
    g = torch.randn(4, 5)
    g[1, 2], g[3, 0] = float("nan"), float("-inf")
    for key, value in gradient_sparsity(g).items():
        assert torch.isnan(value).tolist() == [False, True, False, True], key


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15])
def test_shape_measures_do_not_depend_on_scale(scale):
    g = torch.tensor(gradients(), dtype=torch.float32)
    plain, scaled = gradient_sparsity(g), gradient_sparsity(g * scale)
    for key in SHAPE_KEYS:
        torch.testing.assert_close(scaled[key], plain[key], rtol=1e-5, atol=1e-6, msg=key)
    torch.testing.assert_close(scaled["l2"] / scale, plain["l2"], rtol=1e-5, atol=0)


def test_shape_of_the_sample_and_precision_of_the_input_do_not_matter():
    g = torch.randn(2, 3, 4, 5)
    flat = gradient_sparsity(g.flatten(1))
    for key, value in gradient_sparsity(g).items():
        assert value.shape == (2,)
        assert torch.equal(value, flat[key])
    half = gradient_sparsity(g.bfloat16())
    assert half["l1"].dtype == torch.float32
    torch.testing.assert_close(half["hoyer"], flat["hoyer"], rtol=0.02, atol=0.02)


def test_one_coordinate_and_no_sample():
    assert float(gradient_sparsity(torch.tensor([[2.0]]))["hoyer"]) == 0.0
    assert all(value.shape == (0,) for value in gradient_sparsity(torch.zeros(0, 3, 4)).values())


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(2, 0), torch.zeros(2, 3, dtype=torch.long), [[1.0]]])
def test_wrong_input_is_refused(bad):
    with pytest.raises(ValueError, match=r"grad must"):
        gradient_sparsity(bad)
