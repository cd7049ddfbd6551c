"""Noise schedules as tables with one row for each model call, computed on the host in float64.

A row holds the timestep for the network and the coefficients of the solver's update. The compiled loop scans over the
rows. Changing the number of steps, the spacing, the prediction type or the betas changes only the numbers in the table.
The same holds for switching to another solver of the same form.

To add a scheduler, write a function that turns options and steps into a table, and add an entry to `FAMILIES`.
"""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import jax
import numpy as np

from sega_jax.method.naming import assignment
from sega_jax.method.schedules.calls import DDIMRow as DDIMRow
from sega_jax.method.schedules.calls import MultistepRow as MultistepRow
from sega_jax.method.schedules.calls import Row as Row
from sega_jax.method.schedules.calls import TCDRow as TCDRow
from sega_jax.method.schedules.families import FAMILIES as FAMILIES
from sega_jax.method.schedules.families import of_torch as of_torch
from sega_jax.method.schedules.families import resolve
from sega_jax.method.schedules.spacing import cumulative, given_timesteps


class Config(dict[str, Any]):
    """The read-only contents of a `scheduler_config.json`. Options can also be read as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"the config has no option {name}; it has {', '.join(self)}", name=name, obj=self)
        return self[name]

    def _raise_read_only(self, *args: Any, **options: Any) -> NoReturn:
        raise TypeError(
            "a scheduler's config is read-only; give the pipeline a new config, as in"
            ' pipe.scheduler = {**pipe.scheduler.config, "timestep_spacing": "trailing"}'
        )

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = __ior__ = _raise_read_only
    update = pop = popitem = setdefault = clear = _raise_read_only


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """A checkpoint's scheduler. Its `table` method returns the table for a given number of steps.

    Attributes:
        options: All options of the scheduler's class, from the config or the defaults; read-only.
    """

    _config: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def config(self) -> Config:
        """A copy of the scheduler's `scheduler_config.json`."""
        return Config(self._config)

    @property
    def compatibles(self) -> list[str]:
        """The names of the scheduler classes that accept this config."""
        return list(FAMILIES)

    @property
    def name(self) -> str:
        """The name of the scheduler's class in diffusers."""
        return self._config["_class_name"]

    @property
    def solver(self) -> str:
        """The solver for this scheduler's tables, a key of `sega_jax.method.solvers.SOLVERS`."""
        return FAMILIES[self.name].solver(self.options)

    @property
    def eta(self) -> float | None:
        """The default eta, which is the share of fresh noise; None if the solver has no eta."""
        return FAMILIES[self.name].eta

    @property
    def training(self) -> str:
        """The kind of training that the scheduler assumes, a key of `sega_jax.method.schedules.families.TRAININGS`."""
        return FAMILIES[self.name].training

    def shares(self, timesteps: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns the shares of signal and noise at training timesteps, as in x = signal x0 + noise z.

        Args:
            timesteps: Integers [...].

        Returns:
            Two float64 arrays [...].

        Raises:
            ValueError: The scheduler has no betas.
        """
        if self.training != "betas":
            raise ValueError(f"{self.name} has no betas, so the share of noise at a timestep is unknown")
        bars = cumulative(self.options)[timesteps]
        return np.sqrt(bars), np.sqrt(1 - bars)

    def table(self, steps: int | str | Sequence[int], strength: float = 1.0) -> Row:
        """Returns the table, with one row for each model call.

        Most solvers make one call for each step. The exceptions are PNDM with steps + 1 calls (steps + 9 without
        `skip_prk_steps`), and Heun and KDPM2 with 2 * steps - 1 calls.

        Args:
            steps: The number of steps, spaced by `timestep_spacing`; or a descending list of timesteps; or the name of
                one of DeepFloyd-IF's lists: fast27, smart27, smart50, smart100, smart185, super27, super40, super100.
                To space the steps as in DeepFloyd-IF's own code, use the spacing "linspace"; the only difference is in
                the rounding of some timesteps halfway between two integers.
            strength: The share of the steps to run, in (0, 1]: the last int(steps * strength) steps, as in diffusers.
                As in diffusers, multi-step solvers then start with an empty memory, with two exceptions: LMS replaces
                missing outputs with 0, and PNDM starts as described in `sega_jax.method.schedules.ddim_ddpm_pndm.pndm`.

        Raises:
            TypeError: `steps` has the wrong type.
            ValueError: `steps` is below 1 or too large for the options, or `strength` leaves no step to run. For a
                list: the timesteps are outside the range of the training timesteps, do not descend, or conflict with an
                option (or a solver such as PNDM) that determines the timesteps.
        """
        options, most = self.options, self.options["num_train_timesteps"]
        if isinstance(steps, bool) or not isinstance(steps, numbers.Integral):
            options = {**options, "timesteps": given_timesteps(steps, most)}
            count = len(options["timesteps"])
        else:
            count = int(steps)
        if not 1 <= count <= most:
            raise ValueError(
                f"{assignment('steps', count)} should be from 1 to {most}, the number of training timesteps"
            )
        begin = count - min(int(count * strength), count)
        if begin == count:
            raise ValueError(
                f"{assignment('strength', strength)} leaves 0 of {count} steps to run; use a strength of at least"
                f" {1 / count:.2g}"
            )
        try:
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                family = FAMILIES[self.name]
                table = family.table({**options, "begin": begin}, count)
                table = _from(table, begin * (family.order or 0))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        columns = {**table._asdict(), **table.solver._asdict(), "solver": 0, "clip": 0}
        if not all(np.isfinite(column).all() for column in jax.tree.leaves(columns)):
            if self.options.get("rescale_betas_zero_snr") and self.options["prediction_type"] == "epsilon":
                raise ValueError(
                    f"{self.name}: with rescale_betas_zero_snr, the first of {count} steps has no signal, so x0 cannot"
                    " be computed from epsilon; prediction_type should be 'v_prediction' or 'sample'"
                )
            raise ValueError(
                f"{self.name}: {count} steps are too many, because two of them have the same timestep; use fewer steps"
            )
        if table.noise[0] == 0:
            raise ValueError(f"{self.name}: the first of {count} steps has no noise to remove; use more steps")
        return table


def _from(table: Row, call: int) -> Row:
    """Returns the rows of a table from call number `call` on, renumbered from 0."""
    table = jax.tree.map(lambda column: column[call:], table)
    return table._replace(call=np.arange(len(table.call), dtype=np.int32))


def from_config(config: Mapping[str, Any], *, strict: bool = True) -> Scheduler:
    """Returns the scheduler that a diffusers `scheduler_config.json` describes.

    Args:
        config: The config. Its class may also be a Flax class, such as `FlaxPNDMScheduler`.
        strict: Whether to reject an option that no supported scheduler has, instead of ignoring it.

    Raises:
        ValueError: The scheduler, an option or a value is not supported. The message lists the supported names or
            values.
    """
    items = of_torch(config).items()
    config = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in items}
    options = resolve(config, strict)
    # As in diffusers, aliases in the config are replaced by their values, so that other classes can read the config.
    aliases = FAMILIES[config["_class_name"]].aliases
    config |= {key: options[key] for key in aliases if key in config and config[key] is not None}
    return Scheduler(config, MappingProxyType(options))
