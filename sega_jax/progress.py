"""The progress bar."""

import sys
import warnings
from typing import Any


def bar(total: int, unit: str, progress: bool | None, **options: Any) -> Any:
    """A tqdm bar with its options; None shows it in terminals and notebooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without widgets gets the plain bar
        from tqdm.auto import tqdm
    shown = ("ipykernel" in sys.modules or sys.stderr.isatty()) if progress is None else progress
    return tqdm(total=total, unit=unit, disable=not shown, **options)
