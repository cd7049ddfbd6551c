"""Pickles that run a command where they are unpickled."""

import os


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, canary, call=os.system):
        self.canary, self.call = canary, call

    def __reduce__(self):
        if self.call is os.system:
            return os.system, (f"touch {self.canary}",)
        return self.call, (str(self.canary), "w")
