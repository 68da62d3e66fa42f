"""Networks for dictionaries of modalities: an encoder for each, and what puts their answers together."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from sg_lightning.backbones.base import Backbone, OverTime, activations, initialise, positive
from sg_lightning.domains import Domain
from sg_lightning.inputs import Input, batch_size, device_of
from sg_lightning.neurons import LIF
from sg_lightning.recipes import accepted, build, recipe

Fusion = Literal["late", "concat", "gated"]


class LateFusion(nn.Module):
    """Average the logits of the modalities that are there, by learned weights or equally.

    Args:
        modalities: Number of modalities.
        learn_weights: Learn one weight per modality, a softmax over those that are there.
    """

    def __init__(self, modalities: int, learn_weights: bool) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(modalities)) if learn_weights else None

    def forward(self, logits: list[Tensor], there: Tensor) -> Tensor:
        """Return the weighted mean (B, K) of logits M x (B, K); ``there`` (B, M) is 1 or 0."""
        stacked = torch.stack(logits, 1)
        scores = stacked.new_zeros(len(logits)) if self.scores is None else self.scores
        present = torch.where(there > 0, scores, torch.finfo(scores.dtype).min)
        weights = present.softmax(1) * there  # where nothing is there, the softmax is uniform
        return (weights.unsqueeze(2) * stacked).sum(1)


class Concatenation(nn.Module):
    """Join the features of all modalities in one hidden layer of neurons, then a linear layer, averaged over time.

    Args:
        sizes: Number of features of each modality.
        num_classes: Number of classes K.
        hidden: Width of the hidden layer.
        time_steps: Number of steps for which the hidden neurons see the joined features.
        neuron: Template of the neurons.
        spiking: ``False`` for ReLU and one step.
    """

    def __init__(
        self, sizes: list[int], num_classes: int, hidden: int, time_steps: int, neuron: LIF | None, spiking: bool
    ) -> None:
        super().__init__()
        self.time_steps = time_steps if spiking else 1
        self.hidden = OverTime(nn.Linear(sum(sizes), hidden), activations(neuron, spiking)())
        self.head = nn.Linear(hidden, num_classes)
        initialise(self)

    def forward(self, features: list[Tensor], there: Tensor) -> Tensor:
        """Return logits (B, K) of features M x (B, F); those of a missing modality count as silent."""
        joined = torch.cat(_silenced(features, there), 1)
        return self.head(self.hidden(joined.expand(self.time_steps, *joined.shape)).mean(0))


class GatedUnit(nn.Module):
    """Gated multimodal unit: h = sum over m of sigmoid(Z_m x) * tanh(W_m x_m), where x joins all x_m; then a linear layer.

    Gates see all modalities and so decide, feature by feature, which one to believe. A missing modality has features 0 and
    adds nothing.

    Args:
        sizes: Number of features of each modality.
        num_classes: Number of classes K.
        hidden: Width of the unit.

    Source:
        Arevalo et al., "Gated multimodal units for information fusion", arXiv 1702.01992: the unit for any number of
        modalities, without biases as there. (For two, they also tie the gates to z and 1 - z.)
    """

    def __init__(self, sizes: list[int], num_classes: int, hidden: int) -> None:
        super().__init__()
        self.values = nn.ModuleList(nn.Linear(size, hidden, bias=False) for size in sizes)
        self.gates = nn.ModuleList(nn.Linear(sum(sizes), hidden, bias=False) for _ in sizes)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, features: list[Tensor], there: Tensor) -> Tensor:
        """Return logits (B, K) of features M x (B, F)."""
        features = _silenced(features, there)
        joined = torch.cat(features, 1)
        parts = [
            gate(joined).sigmoid() * value(part).tanh()
            for part, value, gate in zip(features, self.values, self.gates, strict=True)
        ]
        return self.head(torch.stack(parts).sum(0))


def _silenced(features: list[Tensor], there: Tensor) -> list[Tensor]:
    return [part * there[:, k : k + 1] for k, part in enumerate(features)]


class FusionNet(Backbone):
    """Classify dictionaries of modalities: a spiking encoder for each, then one way to put them together.

    A modality is missing from a sample if all its values are 0, and from a batch also if its key is. What is missing has no
    say; a sample from which everything is missing gets the same logits as any other such.

    Args:
        encoders: Backbone of each modality. They are copied; where ``num_classes``, ``sizes`` or ``spiking`` asks for
            another one, it is built anew from its arguments with these changed.
        fusion: ``"late"``: each encoder classifies, and the logits are averaged. ``"concat"``: the rates of the encoders'
            last hidden layers are joined and go to one more layer of neurons. ``"gated"``: they go to a gated multimodal
            unit.
        num_classes: Number of classes K, at least 1.
        hidden: Width of the layer that joins features.
        head_steps: Number of steps of the neurons of ``"concat"``.
        neuron: Their template; ``None`` for ``LIF()``.
        learn_weights: ``"late"`` learns how much each modality counts; else all count alike.
        sizes: Arguments of each encoder that come from the data, such as ``{"audio": {"time_steps": 50}}``; those that it
            does not take are ignored.
        spiking: ``False`` for the ANN twin of everything.

    Shape:
        A dict of (B, *input_shape of the encoder) to logits (B, K).

    Raises:
        ValueError: on fewer than two encoders, an unknown ``fusion``, options of another fusion, or ``sizes`` of an unknown
            modality; in :meth:`forward` on a dictionary without a known modality, with an unknown one, or whose parts do
            not fit.
        TypeError: if an encoder is no :class:`Backbone`, or the input is no dictionary.
        NotImplementedError: if an encoder of one's own has no ``embedding`` and ``fusion`` is not ``"late"``.
    """

    def __init__(
        self,
        encoders: dict[str, Backbone],
        fusion: Fusion = "late",
        num_classes: int = 10,
        *,
        hidden: int = 128,
        head_steps: int = 4,
        neuron: LIF | None = None,
        learn_weights: bool = False,
        sizes: dict[str, dict[str, Any]] | None = None,
        spiking: bool = True,
    ) -> None:
        if not isinstance(encoders, Mapping) or len(encoders) < 2:
            raise ValueError(f"encoders must map at least two modalities to backbones, got {encoders!r}")
        if fusion not in get_args(Fusion):
            raise ValueError(f"unknown fusion {fusion!r}; choose one of {', '.join(get_args(Fusion))}")
        if learn_weights and fusion != "late":
            raise ValueError(f"learn_weights is for fusion='late', got {fusion!r}, which weighs features by itself")
        strange = set(sizes or {}) - set(encoders)
        if strange:
            raise ValueError(f"sizes names {', '.join(sorted(strange))}, but the encoders are {', '.join(encoders)}")
        fitted = {}
        for name, encoder in encoders.items():
            if not isinstance(encoder, Backbone):
                raise TypeError(f"the encoder of {name!r} must be a Backbone, got {type(encoder).__name__}")
            changes: dict[str, Any] = {**(sizes or {}).get(name, {}), "num_classes": num_classes}
            fitted[name] = _fitted(encoder, changes if spiking else {**changes, "spiking": False})
        super().__init__(
            num_classes=num_classes,
            input_shape=(),
            time_steps=max(encoder.time_steps for encoder in fitted.values()),
            spiking=any(encoder.spiking for encoder in fitted.values()),
            domain=Domain(),
        )
        self.input_shape = {name: encoder.input_shape for name, encoder in fitted.items()}  # type: ignore[assignment]
        self.domain = {name: encoder.domain for name, encoder in fitted.items()}  # type: ignore[assignment]
        self.encoders = nn.ModuleDict(fitted)
        self.late = fusion == "late"
        if self.late:
            self.fusion: nn.Module = LateFusion(len(fitted), learn_weights)
            return
        widths = [_headless(name, encoder) for name, encoder in fitted.items()]
        positive("hidden", hidden)
        if fusion == "concat":
            steps = positive("head_steps", head_steps)
            self.fusion = Concatenation(widths, num_classes, hidden, steps, neuron, spiking)
        else:
            self.fusion = GatedUnit(widths, num_classes, hidden)

    def logits(self, x: Input) -> Tensor:
        """Return logits (B, K) for a dictionary of modalities."""
        assert isinstance(x, dict)
        first = next(iter(x.values()))
        parts, there = [], []
        for name, module in self.encoders.items():
            encoder, part = cast(Backbone, module), x.get(name)
            if part is None:
                part = first.new_zeros(len(first), *encoder.input_shape)
            parts.append(encoder.logits(part) if self.late else encoder.embedding(part))
            there.append((part.detach() != 0).flatten(1).any(1))
        return self.fusion(parts, torch.stack(there, 1).to(parts[0].dtype))

    def check_input(self, x: Input) -> None:
        """Raise an error that says what is wrong unless ``x`` is a dictionary of what the encoders take."""
        if not isinstance(x, dict):
            raise TypeError(f"FusionNet needs a dict of modalities, got {type(x).__name__}")
        if not x or not self.encoders.keys() >= x.keys():
            raise ValueError(f"FusionNet was built for {', '.join(self.encoders)}, got {', '.join(x) or 'nothing'}")
        for name, part in x.items():
            cast(Backbone, self.encoders[name]).check_input(part)
            if len(part) != batch_size(x) or part.device != device_of(x):
                raise ValueError(
                    f"all modalities must have as many samples and be on one device, got {len(part)} on {part.device} of "
                    f"{name!r} and {batch_size(x)} on {device_of(x)}"
                )


def _fitted(encoder: Backbone, changes: dict[str, Any]) -> Backbone:
    """Copy an encoder, or build it anew where an argument changes."""
    taken = {key: value for key, value in changes.items() if key in accepted(type(encoder))}
    now, _ = encoder.arguments()
    if all(_same(now.get(key), value) for key, value in taken.items()):
        return deepcopy(encoder)
    made = recipe(encoder)
    made["init_args"] |= taken
    return build(made)


def _same(a: Any, b: Any) -> bool:
    return (list(a) if isinstance(a, tuple) else a) == (list(b) if isinstance(b, tuple) else b)


def _headless(name: str, encoder: Backbone) -> int:
    """Take the classifying layers of an encoder away and return how many features it gives."""
    head = getattr(encoder, "head", None)
    if not isinstance(head, nn.Linear) or type(encoder).embedding is Backbone.embedding:
        raise NotImplementedError(
            f"the encoder of {name!r}, {type(encoder).__name__}, has no embedding(x) and linear head; use fusion='late'"
        )
    encoder.head = nn.Identity()
    if isinstance(getattr(encoder, "readout", None), nn.Module):
        encoder.readout = nn.Identity()
    return head.in_features
