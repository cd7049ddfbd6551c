"""The report that ahead-of-time compilation returns."""

from typing import NamedTuple


class Program(NamedTuple):
    """A compiled program.

    Attributes:
        name: The name of the program's function, such as encode, start, advance or decode.
        concepts: The number of concepts that `advance` predicts; None for other programs.
        seconds: The compilation time, in seconds, which is short if the program had already been compiled.
        memory: The temporary memory on one device, in bytes; None if unknown.
    """

    name: str
    concepts: int | None
    seconds: float
    memory: int | None


class Compiled(NamedTuple):
    """The compiled programs, in the order in which a call runs them. `print` shows them as a table.

    Attributes:
        programs: The programs.
    """

    programs: tuple[Program, ...]

    @property
    def seconds(self) -> float:
        """The total compilation time, in seconds."""
        return sum(program.seconds for program in self.programs)

    @property
    def memory(self) -> int | None:
        """The temporary memory, in bytes, of the program that needs the most memory; None if unknown."""
        return max((program.memory for program in self.programs if program.memory is not None), default=None)

    def __str__(self) -> str:
        lines = [f"{'program':<24}{'seconds':>9}{'temporary memory':>18}"]
        for name, concepts, seconds, memory in self.programs:
            name = name if concepts is None else f"{name}, {concepts} concept{'' if concepts == 1 else 's'}"
            lines.append(f"{name:<24}{seconds:>9.2f}{'unknown' if memory is None else f'{memory / 2**20:.1f} MiB':>18}")
        return "\n".join(lines)
