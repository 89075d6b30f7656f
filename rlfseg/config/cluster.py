"""Settings of the commands for clusters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlfseg.config.parts import STRICT


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SubmitConfig:
    """Runs a command as a Ray job and exits with the job's own code."""

    command: tuple[str, ...]
    """The command and its settings, after `--`."""
    address: str | None = None
    """The job server, http://HEAD:8265; null: $RAY_API_SERVER_ADDRESS, else what $RAY_ADDRESS names, else here."""
    working_dir: str = "."
    """The repository: uploaded without what .gitignore and .rayignore name, at most 100 MiB."""
    cpus: Annotated[float, Field(ge=0)] = 0.0
    """Logical CPUs that the driver reserves. The work itself reserves its own."""
    wait: bool = True
    """Print what the job prints until it ends; false: return at once."""
