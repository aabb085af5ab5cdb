"""Training of a DDPM: Algorithm 1 at scale, with EMA, resumed after a kill."""

from .run import TrainingDiverged, TrainResult, train

__all__ = ["TrainResult", "TrainingDiverged", "train"]
