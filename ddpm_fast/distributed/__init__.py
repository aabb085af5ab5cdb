"""Several processes as one, under torchrun."""

from .world import OtherProcessFailed, World, join, of_environment, own_device

__all__ = ["OtherProcessFailed", "World", "join", "of_environment", "own_device"]
