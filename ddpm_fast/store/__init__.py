"""Sets of samples on the disk: shards and a manifest, claims on shards, workers that fill them, exports."""

from .samples import MANIFEST, UNFINISHED, OtherSet, SampleStore, StoreError

__all__ = ["MANIFEST", "UNFINISHED", "OtherSet", "SampleStore", "StoreError"]
