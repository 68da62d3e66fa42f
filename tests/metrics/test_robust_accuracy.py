import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics import MetricCollection

from sg_lightning.metrics import RobustAccuracy, UnionAccuracy, transfer_ratio

CLASSES, THREATS = 5, ("linf", "l2", "l0")


def case(samples=157, seed=0):
    """Targets, and per threat two sets of logits that are right about 80 % of the time."""
    gen = torch.Generator().manual_seed(seed)
    target = torch.randint(CLASSES, (samples,), generator=gen)
    preds = {}
    for threat in THREATS:
        preds[threat] = []
        for _ in range(2):
            logits = torch.randn(samples, CLASSES, generator=gen)
            shown = torch.where(torch.rand(samples, generator=gen) < 0.8, target, (target + 1) % CLASSES)
            preds[threat].append(logits.scatter(1, shown[:, None], 10.0))
    return preds, target


def plain(preds, target):
    """The same figures by a loop over samples."""
    right = {
        t: [all(int(p[i].argmax()) == int(target[i]) for p in preds[t]) for i in range(len(target))] for t in preds
    }
    shares = {t: sum(values) / len(target) for t, values in right.items()}
    union = sum(all(values) for values in zip(*right.values(), strict=True)) / len(target)
    return shares | {"min": min(shares.values()), "union": union}


def rows(preds, index):
    return {threat: [logits[index] for logits in values] for threat, values in preds.items()}


@pytest.mark.parametrize("batch", [1, 10, 157, 500])
def test_equal_to_a_loop_over_samples_for_any_batch_size(batch):
    preds, target = case()
    union, robust = UnionAccuracy(THREATS), RobustAccuracy()
    for index in torch.arange(len(target)).split(batch):
        union.update(rows(preds, index), target[index])
        robust.update(rows(preds, index)["l2"], target[index])
    expected = plain(preds, target)
    assert {k: float(v) for k, v in union.compute().items()} == pytest.approx(expected, abs=1e-7)
    assert float(robust.compute()) == pytest.approx(expected["l2"], abs=1e-7)
    assert expected["union"] < expected["min"]  # the case tells the two apart


def _share(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    preds, target = case()
    index = torch.arange(len(target))
    index = index[:40] if rank == 0 else index[40:]  # unequal shares: a mean of means would be wrong
    union, robust = UnionAccuracy(THREATS), RobustAccuracy()
    union.update(rows(preds, index), target[index])
    robust.update(rows(preds, index)["l2"], target[index])
    results[rank] = ({k: float(v) for k, v in union.compute().items()}, float(robust.compute()))
    dist.destroy_process_group()


def test_two_processes_with_unequal_shares_give_the_figures_of_one(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_share, args=(tmp_path / "store", results), nprocs=2)
        found = dict(results)
    expected = plain(*case())
    for rank in (0, 1):
        assert found[rank][0] == pytest.approx(expected, abs=1e-7)
        assert found[rank][1] == pytest.approx(expected["l2"], abs=1e-7)


def test_logits_and_classes_are_the_same_and_non_finite_is_never_right():
    preds, target = case()
    logits = preds["l2"][0]
    by_class, by_logits = RobustAccuracy(), RobustAccuracy()
    by_class.update(logits.argmax(1), target)
    by_logits.update(logits, target)
    assert by_class.compute() == by_logits.compute() > 0
    broken = torch.full((3, 2), float("nan"))
    broken[2] = torch.tensor([float("inf"), 0.0])
    metric = RobustAccuracy()
    metric.update(broken, torch.zeros(3, dtype=torch.long))
    assert float(metric.compute()) == 0.0


def test_reset_collection_and_forward_work_as_torchmetrics_users_expect():
    preds, target = case()
    collection = MetricCollection({"robust": RobustAccuracy(), "again": RobustAccuracy()}, prefix="val/")
    first = collection(preds["l2"], target)
    assert float(first["val/robust"]) == pytest.approx(plain(preds, target)["l2"], abs=1e-7)
    collection.reset()
    collection.update(target, target)
    assert float(collection.compute()["val/again"]) == 1.0


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_before_the_first_sample_the_share_is_nan():
    assert torch.isnan(RobustAccuracy().compute())


@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), "for 2 targets"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.long), r"logits \(B, K\)"),
        ([], torch.zeros(2, dtype=torch.long), "empty list"),
        (torch.zeros(2, 4), torch.zeros(2), "integer classes"),
        (torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.long), "integer classes"),
    ],
)
def test_wrong_input_is_refused(preds, target, message):
    with pytest.raises(ValueError, match=message):
        RobustAccuracy().update(preds, target)


def test_union_refuses_unknown_missing_and_reserved_threats():
    preds, target = case()
    with pytest.raises(ValueError, match="exactly the threats"):
        UnionAccuracy((*THREATS, "l1")).update(preds, target)
    for names in ((), ("l2", "l2"), ("l2", "union")):
        with pytest.raises(ValueError, match="different names"):
            UnionAccuracy(names)


def test_transfer_ratio_by_hand():
    assert transfer_ratio(0.30, 0.20, 0.60) == pytest.approx(0.25)
    assert transfer_ratio(0.10, 0.20, 0.60) == pytest.approx(-0.25)
    assert transfer_ratio(0.70, 0.20, 0.60) == pytest.approx(1.25)


def test_transfer_ratio_is_withheld_unless_the_possible_gain_exceeds_five_points():
    assert transfer_ratio(0.5, 0.25, 0.30) is None  # exactly five points: not more
    assert transfer_ratio(0.5, 0.60, 0.30) is None  # the reference is worse than vanilla
    assert transfer_ratio(0.5, 0.25, 0.31) == pytest.approx(0.25 / 0.06)
    assert transfer_ratio(0.5, 0.25, 0.30, min_gain=0.01) == pytest.approx(5.0)
    with pytest.raises(ValueError, match="divide percentages by 100"):
        transfer_ratio(35.0, 0.2, 0.6)


def test_functions_do_not_pull_in_torchmetrics():
    code = "import sys, sg_lightning.metrics as m; m.gradient_sparsity; assert 'torchmetrics' not in sys.modules"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
