"""Networks from inputs in their natural units to logits, each with its ANN twin (``spiking=False``)."""

from sg_lightning.backbones.base import Backbone, recompute
from sg_lightning.backbones.convnet import ConvNet
from sg_lightning.backbones.fusion import FusionNet
from sg_lightning.backbones.sew_resnet import SEWResNet
from sg_lightning.backbones.spiking_mlp import SpikingMLP
from sg_lightning.backbones.vgg import VGG
from sg_lightning.backbones.wide_resnet import WideResNet

__all__ = ["VGG", "Backbone", "ConvNet", "FusionNet", "SEWResNet", "SpikingMLP", "WideResNet", "recompute"]
