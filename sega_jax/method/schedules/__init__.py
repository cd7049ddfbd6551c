"""Noise schedules as tables: one row per model call, computed on the host in float64.

A row holds what one call needs: the timestep for the network and the coefficients of the solver's
update. The compiled loop scans over the rows, so that another step count, spacing, prediction type, set
of betas, or another solver of the same form, is only other numbers.

A new scheduler is a function from options and steps to a table, and an entry in `FAMILIES`.
"""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import jax
import numpy as np

from sega_jax.method.checks import brief
from sega_jax.method.schedules.calls import DDIMRow as DDIMRow
from sega_jax.method.schedules.calls import MultistepRow as MultistepRow
from sega_jax.method.schedules.calls import Row as Row
from sega_jax.method.schedules.calls import TCDRow as TCDRow
from sega_jax.method.schedules.families import FAMILIES as FAMILIES
from sega_jax.method.schedules.families import of_torch as of_torch
from sega_jax.method.schedules.families import resolve
from sega_jax.method.schedules.spacing import cumulative, given_timesteps


class Config(dict[str, Any]):
    """The contents of a `scheduler_config.json`, whose options are attributes as well. It cannot be changed."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"the config has no option {name}; it has {', '.join(self)}", name=name, obj=self)
        return self[name]

    def _refuse(self, *args: Any, **options: Any) -> NoReturn:
        raise TypeError(
            "a scheduler's config cannot be changed; give the pipeline another one, as in"
            ' pipe.scheduler = {**pipe.scheduler.config, "timestep_spacing": "trailing"}'
        )

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = __ior__ = _refuse
    update = pop = popitem = setdefault = clear = _refuse


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """A checkpoint's scheduler: a table for a number of steps.

    Attributes:
        options: every option of its class, given or default; not to be changed.
    """

    _config: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def config(self) -> Config:
        """A copy of the `scheduler_config.json` that it was made from."""
        return Config(self._config)

    @property
    def compatibles(self) -> list[str]:
        """The names of the classes that its config goes with."""
        return list(FAMILIES)

    @property
    def name(self) -> str:
        """The name of diffusers' class."""
        return self._config["_class_name"]

    @property
    def solver(self) -> str:
        """The update that the rows are for, a key of `sega_jax.method.solvers.SOLVERS`."""
        return FAMILIES[self.name].solver(self.options)

    @property
    def eta(self) -> float | None:
        """The default share of fresh noise; None where the solver has no eta."""
        return FAMILIES[self.name].eta

    @property
    def training(self) -> str:
        """How the networks were trained that it samples, a key of `sega_jax.method.schedules.families.TRAININGS`."""
        return FAMILIES[self.name].training

    def shares(self, timesteps: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns the shares of signal and of noise, float64 [...], at timesteps of the training [...], where
        x = signal x0 + noise z.

        Raises:
            ValueError: it has no betas.
        """
        if self.training != "betas":
            raise ValueError(f"{self.name} has no betas that say how much noise a timestep has")
        bars = cumulative(self.options)[timesteps]
        return np.sqrt(bars), np.sqrt(1 - bars)

    def table(self, steps: int | str | Sequence[int], strength: float = 1.0) -> Row:
        """A row per model call: one a step, but steps + 1 for PNDM (+ 9 without `skip_prk_steps`) and
        2 steps - 1 for Heun and KDPM2.

        Args:
            steps: how many, spaced by `timestep_spacing`; or in its place their timesteps in falling order; or
                one of DeepFloyd-IF's lists of these: fast27, smart27, smart50, smart100, smart185, super27,
                super40, super100. That project's plain numbers are steps of the spacing "linspace" (some
                timesteps that lie halfway are rounded the other way).
            strength: in (0, 1], the share of the steps that is run: the last int(steps strength), as diffusers counts.
                Solvers that remember begin anew there, but for LMS, which weighs what it does not have yet as 0, and
                PNDM (`sega_jax.method.schedules.ddim_ddpm_pndm.pndm`): both as in diffusers.

        Raises:
            TypeError: steps is none of these.
            ValueError: steps is not from 1 to the number that these options allow, or none of them is run; timesteps
                that do not fall, are not of the training, or that other options, or PNDM, space by themselves.
        """
        options, most = self.options, self.options["num_train_timesteps"]
        if isinstance(steps, bool) or not isinstance(steps, numbers.Integral):
            options = {**options, "timesteps": given_timesteps(steps, most)}
            count = len(options["timesteps"])
        else:
            count = int(steps)
        if not 1 <= count <= most:
            raise ValueError(f"steps={brief(count)} should be from 1 to {most}, the timesteps of the training")
        begin = count - min(int(count * strength), count)
        if begin == count:
            raise ValueError(f"strength={strength:g} of {count} steps is less than one; give at least {1 / count:.2g}")
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
                    f"{self.name}: with rescale_betas_zero_snr the first of {count} steps has no signal, and epsilon"
                    " says nothing; prediction_type should be 'v_prediction' or 'sample'"
                )
            raise ValueError(f"{self.name}: {count} steps are so many that two fall together; take fewer")
        if table.noise[0] == 0:
            raise ValueError(f"{self.name}: the first of {count} steps has no noise to remove; take more steps")
        return table


def _from(table: Row, call: int) -> Row:
    """The rows from this one on, as calls that begin at 0."""
    table = jax.tree.map(lambda column: column[call:], table)
    return table._replace(call=np.arange(len(table.call), dtype=np.int32))


def from_config(config: Mapping[str, Any], *, strict: bool = True) -> Scheduler:
    """The scheduler of a diffusers `scheduler_config.json`, which may be of a class for Flax, such as
    `FlaxPNDMScheduler`.

    Args:
        strict: whether an option that no scheduler here has is an error, or means nothing.

    Raises:
        ValueError: a scheduler, option or value that is not supported; the message lists what is.
    """
    given = of_torch(config).items()
    config = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in given}
    options = resolve(config, strict)
    # As in diffusers, a value that stands for another one is written back, where other classes take the config over.
    aliases = FAMILIES[config["_class_name"]].aliases
    config |= {key: options[key] for key in aliases if key in config and config[key] is not None}
    return Scheduler(config, MappingProxyType(options))
