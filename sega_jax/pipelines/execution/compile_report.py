"""What compiling ahead of time reports."""

from typing import NamedTuple


class Program(NamedTuple):
    """A program that is compiled."""

    name: str  # what it computes: encode, start, advance, decode ...
    concepts: int | None  # of `advance`, how many concepts it predicts
    seconds: float  # that compiling took, little where it was compiled before
    memory: int | None  # bytes of a device for what is in between arguments and results; None where it is not known


class Compiled(NamedTuple):
    """What `compile` compiled, in the order of the call; printed, it is a table."""

    programs: tuple[Program, ...]

    @property
    def seconds(self) -> float:
        """In all."""
        return sum(program.seconds for program in self.programs)

    @property
    def memory(self) -> int | None:
        """Of the program that takes most, in bytes; None where it is not known."""
        return max((program.memory for program in self.programs if program.memory is not None), default=None)

    def __str__(self) -> str:
        lines = [f"{'program':<24}{'seconds':>9}{'temporary memory':>18}"]
        for name, concepts, seconds, memory in self.programs:
            name = name if concepts is None else f"{name}, {concepts} concept{'' if concepts == 1 else 's'}"
            lines.append(f"{name:<24}{seconds:>9.2f}{'unknown' if memory is None else f'{memory / 2**20:.1f} MiB':>18}")
        return "\n".join(lines)
