"""Objects whose pickles call a function when they are loaded."""

import os


class Hostile:
    """An object whose pickle calls a function when it is loaded, by default a shell command that creates `canary`."""

    def __init__(self, canary, call=os.system):
        self.canary, self.call = canary, call

    def __reduce__(self):
        if self.call is os.system:
            return os.system, (f"touch {self.canary}",)
        return self.call, (str(self.canary), "w")
