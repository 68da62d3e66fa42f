"""Attacks of other libraries as attacks of ours; each library is imported when its adapter is made."""

from sg_lightning.attacks.adapters.advertorch import Advertorch
from sg_lightning.attacks.adapters.base import ForeignAttack
from sg_lightning.attacks.adapters.foolbox import Foolbox
from sg_lightning.attacks.adapters.pyautoattack import PyAutoAttack
from sg_lightning.attacks.adapters.torchattacks import Torchattacks

__all__ = ["Advertorch", "Foolbox", "ForeignAttack", "PyAutoAttack", "Torchattacks"]
