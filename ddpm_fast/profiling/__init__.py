"""Where a sampling step's time goes, and what the GPU does meanwhile."""

from .profiles import Call, Profile, Row, limits, profile, step_cost

__all__ = ["Call", "Profile", "Row", "limits", "profile", "step_cost"]
