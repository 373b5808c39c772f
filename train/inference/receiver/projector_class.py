"""The class of the projector. In an export, this module imports the class of the exported projector instead."""

from train.projectors.base import Projector as ProjectorClass

__all__ = ["ProjectorClass"]
