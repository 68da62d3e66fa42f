"""LightningModules: thin shells around a backbone and the pure functions of the rooms below."""

from sg_lightning.modules.adversarial import AdversarialClassifier, AdversarialTraining
from sg_lightning.modules.classifier import SpikingClassifier

__all__ = ["AdversarialClassifier", "AdversarialTraining", "SpikingClassifier"]
