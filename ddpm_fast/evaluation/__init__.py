"""How far samples are from the images they should look like, and whether two sets can be told apart."""

from .distances import (
    Evaluation,
    Statistics,
    evaluate,
    extrapolate,
    features_of,
    frechet_distance,
    is_statistics,
    kernel_distance,
    load_statistics,
    reference,
    save_statistics,
    statistics,
)

__all__ = [
    "Evaluation",
    "Statistics",
    "evaluate",
    "extrapolate",
    "features_of",
    "frechet_distance",
    "is_statistics",
    "kernel_distance",
    "load_statistics",
    "reference",
    "save_statistics",
    "statistics",
]
