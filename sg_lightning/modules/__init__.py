"""LightningModules."""

from sg_lightning.modules.classifier import SpikingClassifier

__all__ = ["SpikingClassifier"]
