"""Collects the pictures that a run has made but does not show, so that one warning names all of them."""

from pathlib import Path

from sega_jax.pipelines.messages import warn
from sega_jax.pipelines.run import PictureWarning
from sega_jax.sweep.planning.plan import Plan


class NotShown:
    """The pictures of a plan that are not finite or that the safety checker flagged.

    Args:
        plan: the stage's plan.
    """

    def __init__(self, plan: Plan):
        self._plan = plan
        self._broken: set[str] = set()
        self._flagged: set[str] = set()

    def add(self, name: str, finite: bool, flagged: bool | None) -> None:
        """Adds the picture with this name, unless it is shown."""
        if not finite:
            self._broken.add(name)
        elif flagged:
            self._flagged.add(name)

    def warn(self) -> None:
        """Warns about all pictures that were added."""
        if self._broken:
            warn(
                f"pictures with NaN or infinite values, which are not shown: {self._listed(self._broken)}; try smaller"
                " scales, or dtype float32 or bfloat16",
                PictureWarning,
            )
        if self._flagged:
            warn(
                f"pictures that the safety checker flagged, which are not shown: {self._listed(self._flagged)}; try"
                " another prompt or seed",
                PictureWarning,
            )

    def _listed(self, names: set[str]) -> str:
        """Lists the first five of some pictures by the names of their files."""
        shown = sorted(Path(self._plan.files[name]).stem for name in names)
        return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
