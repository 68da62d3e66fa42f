"""Training on dictionaries of modalities: adversarial training, the gradient penalty, both, checkpoints."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from sg_lightning.attacks import PGD, InTurn, OnModality
from sg_lightning.backbones import ConvNet, FusionNet, SpikingMLP
from sg_lightning.callbacks import RobustnessEvaluation, SparseGradient
from sg_lightning.domains import Binary, Box
from sg_lightning.modules import AdversarialClassifier, SpikingClassifier
from sg_lightning.objectives import sparse_gradient_penalty
from sg_lightning.threats import L2, Budget, EventFlips, Joint, JointBudget, Linf, Modality, RelaxedLinf

ATTACKS = {
    "image": PGD(Modality("image", Linf("2/16")), steps=2),
    "audio": OnModality(Modality("audio", EventFlips("5%", Binary())), PGD(EventFlips(1), steps=2)),
    "joint": PGD(Joint({"image": Linf("2/16"), "audio": EventFlips("5%", Binary())}), steps=2),
    "turns": InTurn(
        Joint({"image": Linf("2/16"), "audio": EventFlips("5%", Binary())}),
        (PGD(Linf(0), steps=2), PGD(EventFlips(0), steps=2)),
        rounds=1,
    ),
}
BUDGETS = {
    "image_linf": Budget(("2/16",), "2/16"),
    "audio_flips": Budget(("5%",), "5%"),
    "joint": JointBudget((1,), 1, of=("image_linf", "audio_flips")),
}


class Pairs(Dataset):
    """Brightness and firing rate both tell the class."""

    def __init__(self, size=48):
        generator = torch.Generator().manual_seed(0)
        self.y = torch.arange(size) % 3
        rate = (self.y + 1).view(-1, 1, 1) / 4
        self.x = {
            "image": (rate.unsqueeze(1) * torch.rand(size, 1, 4, 4, generator=generator) + rate.unsqueeze(1) / 3).clamp(
                0, 1
            ),
            "audio": (torch.rand(size, 5, 6, generator=generator) < rate).float(),
        }

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return {name: part[index] for name, part in self.x.items()}, self.y[index]


def net():
    torch.manual_seed(0)
    made = FusionNet(
        {"image": ConvNet(3, 1, 4, channels=(4,), hidden=8), "audio": SpikingMLP(6, (8,), 3, time_steps=5)},
        "concat", num_classes=3, hidden=8,
    )  # fmt: skip
    made.encoders["image"].features[1].bias.data.fill_(0.6)  # fires in evaluation mode before it has seen data
    return made


def fit(module, *callbacks, epochs=1, **options):
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), log_every_n_steps=1, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Pairs(), batch_size=12), DataLoader(Pairs(), batch_size=12))
    return trainer


def test_it_learns():
    module = SpikingClassifier(net(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.02))
    assert fit(module, epochs=40).callback_metrics["val/acc"] > 0.8


@pytest.mark.parametrize("kind", ATTACKS)
def test_adversarial_training(kind):
    module = AdversarialClassifier(net(), attack=ATTACKS[kind])
    seen = []
    module.backbone.register_forward_pre_hook(
        lambda _m, args: seen.append({k: v.detach().clone() for k, v in args[0].items()})
    )
    x, y = next(iter(DataLoader(Pairs(), batch_size=12)))
    (point,) = module.loss_inputs(x, y)
    threat = ATTACKS[kind].threat
    assert bool(threat.contains(point, x).all())
    moved = {name for name in x if not torch.equal(point[name], x[name])}
    assert moved == ({kind} if kind in x else {"image", "audio"})
    trainer = fit(module)
    assert trainer.global_step == 4
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_penalty_is_that_of_the_function():
    values = {}

    class Watch(SparseGradient):
        def _measure(self, trainer, pl_module, loss):
            found = super()._measure(trainer, pl_module, loss)
            values.setdefault("callback", found[0].penalty.item())
            return found

    module = SpikingClassifier(net())
    x, y = next(iter(DataLoader(Pairs(), batch_size=12)))
    module.backbone.train()
    state = {k: v.clone() for k, v in module.backbone.state_dict().items()}
    expected = sparse_gradient_penalty(
        module.backbone,
        x,
        y,
        direction="l0",
        coordinates=4,
        modality="audio",
        domain={"image": Box(), "audio": Binary()},
    )
    module.backbone.load_state_dict(state)
    trainer = fit(module, Watch(0.1, direction="l0", coordinates=4, modality="audio"))
    assert values["callback"] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert torch.isfinite(trainer.callback_metrics["train/sg_penalty"])


@pytest.mark.parametrize("options", [{}, {"modality": "image"}, {"step_size": {"image": 0.01, "audio": 0.1}}])
def test_penalty_at_attacked_points_and_evaluation_beside(options):
    module = AdversarialClassifier(net(), attack=ATTACKS["joint"])
    evaluation = RobustnessEvaluation(
        "quick", budgets=BUDGETS, domain={"image": Box(), "audio": Binary()}, max_samples=8
    )
    trainer = fit(module, SparseGradient(0.1, **options), evaluation)
    assert {"train/sg_penalty", "robust/audio_flips_5pct/acc", "robust/joint_1/acc"} <= set(trainer.callback_metrics)


def test_a_checkpoint_rebuilds_attack_and_network(tmp_path):
    module = AdversarialClassifier(net(), attack=ATTACKS["turns"])
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path, barebones=False,
                         enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DataLoader(Pairs(), batch_size=24), DataLoader(Pairs(), batch_size=24))
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    again = AdversarialClassifier.load_from_checkpoint(tmp_path / "it.ckpt")
    assert again.attack == module.attack
    x = Pairs().x
    assert torch.equal(again.eval()(x), module.eval()(x))


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (PGD(Linf(0.1)), "the attack is on a single tensor, but the inputs of FusionNet are image, audio"),
        (PGD(Modality("touch", Linf(0.1))), "the attack is on touch, but the inputs of FusionNet are image, audio"),
        (PGD(Modality("image", Linf(0.1, Box(-1, 1)))), r"has the domain Box \[-1, 1\] but the inputs"),
        (
            PGD(Joint({"image": Linf(0.1), "audio": Linf(0.1, Box(0, 2))})),
            r"has the domain Box \[0, 2\] but the inputs",
        ),
    ],
)
def test_attacks_that_do_not_fit_are_refused(attack, message):
    with pytest.raises(ValueError, match=message):
        AdversarialClassifier(net(), attack=attack)


def test_first_batch_is_checked():
    module = AdversarialClassifier(net(), attack=PGD(Joint({"audio": RelaxedLinf(0.1)}), steps=1))
    x, y = next(iter(DataLoader(Pairs(), batch_size=12)))
    with pytest.raises(ValueError, match="audio of x, attacked under Joint, has values in"):
        module.loss_inputs({**x, "audio": x["audio"] * 2}, y)


def test_training_on_spikes_that_no_sensor_can_produce_must_be_asked_for():
    for threat in (Joint({"audio": Linf(0.1)}), Modality("audio", L2(1.0))):
        with pytest.raises(
            ValueError, match=r"between the whole numbers .* Binary .*EventFlips\('5%', domain=Binary\(\)"
        ):
            AdversarialClassifier(net(), attack=PGD(threat, steps=1))
    AdversarialClassifier(net(), attack=PGD(Modality("audio", RelaxedLinf(0.1)), steps=1))
