"""Adversarial training as a mixin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from sg_lightning.attacks import Attack, Oracle
from sg_lightning.domains import Domain, check_values
from sg_lightning.evaluation.session import process
from sg_lightning.inputs import Input, batch_size
from sg_lightning.modules.checks import refuse_sharding
from sg_lightning.modules.classifier import SpikingClassifier
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Joint, Threat

if TYPE_CHECKING:
    _Host = SpikingClassifier
else:
    _Host = object  # a mixin: it stands before SpikingClassifier, or a subclass of it, in the bases

CraftingMode = Literal["eval", "train"]


class AdversarialTraining(_Host):
    """Train on attacked inputs instead of clean ones.

    The attack takes gradients with respect to the input only: no ``.grad`` is touched, so accumulation, clipping and
    DDP work as without it. Its random starts differ between samples and batches and follow ``seed_everything``; they
    belong to the place of a sample in the batch of all processes, so N processes train as one with N times the batch.
    Together with :class:`~sg_lightning.callbacks.SparseGradient` the penalty is taken at the attacked inputs (SR*).

    Args:
        *args: For the class behind the mixin.
        attack: Makes the inputs to train on; its threat model says how far they may be from the clean ones.
        crafting_mode: State of the network while the attack runs. ``"eval"``: running batch-norm statistics, no
            dropout. ``"train"``: statistics of the attacked batch, with dropout. The running statistics do not move in
            either; the loss is always taken in training mode.
        **kwargs: For the class behind the mixin.

    Raises:
        ValueError: if the attack may leave the domain of the backbone (values between whole numbers only with a relaxed
            threat) or is a minimal-norm attack, or on an unknown ``crafting_mode``; before training, under a strategy that splits the weights over processes; on a first batch
            that is outside the threat's domain, e.g. images under a threat on events.

    Source:
        Madry et al., "Towards deep learning models resistant to adversarial attacks", arXiv 1706.06083.
    """

    def __init__(self, *args: Any, attack: Attack, crafting_mode: CraftingMode = "eval", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(attack, Attack):
            raise TypeError(f"attack must be an Attack such as PGD(Linf('8/255')), got {type(attack).__name__}")
        if attack.minimal:
            raise ValueError(f"{attack.name} looks for small perturbations, not for a high loss; train with PGD, e.g.")
        if crafting_mode not in get_args(CraftingMode):
            raise ValueError(f"crafting_mode must be 'eval' or 'train', got {crafting_mode!r}")
        _check_domain(attack, self.backbone)
        self.attack = attack
        self.crafting_mode = crafting_mode

    def setup(self, stage: str) -> None:
        """Refuse strategies under which the network cannot be attacked."""
        super().setup(stage)
        if stage == "fit":
            name = type(self).__name__
            refuse_sharding(self.trainer, name, "the attack is a backward pass to the input beside the strategy's own")

    def loss_inputs(self, x: Input, y: Tensor) -> list[Input]:
        """Return the attacked version of every point that the class behind the mixin would train on."""
        if "train" not in self._checked:
            threat = self.attack.threat
            reached, name = _domains(threat), f"x, attacked under {type(threat).__name__},"
            if isinstance(x, Tensor) and "" in reached:
                check_values(x.detach(), reached[""], name)
            elif isinstance(x, dict):
                check_values({k: x[k].detach() for k in reached if k in x}, reached, name)
        return [self.craft(point, y) for point in super().loss_inputs(x, y)]

    @torch.compiler.disable
    def craft(self, x: Input, y: Tensor) -> Input:
        """Attack a batch; the network is left as it was."""
        # Drawn here: the oracle restores the random state, so keys drawn inside would be the same for every batch.
        # A distributed sampler deals samples out in turn: sample k of this process is k * world + rank of the whole
        # batch. Every process draws for the whole batch and takes its own, so N processes make the noise of one.
        rank, world = process()
        everyone = batch_size(x) * world
        noise = SampleGenerator.draw(everyone).select(torch.arange(rank, everyone, world))
        oracle = Oracle(self.backbone, mode=self.crafting_mode)
        return self.attack.run(oracle, x, y, generator=noise, goal="loss").x_adv


class AdversarialClassifier(AdversarialTraining, SpikingClassifier):
    """Train a backbone with cross-entropy on attacked inputs.

    ``train/loss`` and ``train/acc`` are those of the attacked inputs; ``val`` and ``test`` are clean.
    """


def _check_domain(attack: Attack, backbone: nn.Module) -> None:
    """Raise ``ValueError`` if attacked inputs may be values that the backbone does not expect."""
    domain = getattr(backbone, "domain", None)
    for modality, reached in _domains(attack.threat).items():
        allowed = domain.get(modality) if isinstance(domain, dict) else domain if not modality else None
        if isinstance(domain, dict) and allowed is None:
            raise ValueError(
                f"the attack is on {modality or 'a single tensor'}, but the inputs of {type(backbone).__name__} are "
                f"{', '.join(domain)}; use a threat on a modality, or Joint"
            )
        if isinstance(allowed, Domain) and (reached.low < allowed.low or reached.high > allowed.high):
            raise ValueError(
                f"the attack's threat has the domain {reached} but the inputs of {type(backbone).__name__} live in "
                f"{allowed}; build the threat with domain={allowed!r}"
            )
        if isinstance(allowed, Domain) and allowed.lattice and not reached.lattice and not attack.threat.relaxed:
            own = "Binary()" if allowed.lattice == "binary" else "Counts()"
            raise ValueError(
                f"{type(attack.threat).__name__} gives values between the whole numbers that {type(backbone).__name__} takes, {allowed}: "
                f"train with EventFlips('5%', domain={own}) or SpikeRetiming(1, domain={own}), e.g.; RelaxedLinf and its "
                "like say that no sensor can produce such values"
            )


def _domains(threat: Threat) -> dict[str, Domain]:
    """Return the domain of each attacked modality; that of a single tensor under ``""``."""
    if isinstance(threat, Joint):
        return {name: part.domain for name, part in threat.threats}
    return {getattr(threat, "modality", ""): threat.domain}
