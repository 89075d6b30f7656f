"""Submit: a command as a Ray job, watched to its end; this process's exit code is the job's.

`ray job submit -- python -m jobs.NAME ...` does the same but for two things: it exits 0 when a job was stopped, and 1
whatever the job's own code was.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import stamina
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from rlfseg.config import SubmitConfig
from rlfseg.errors import REFUSED_SOME, ConfigError, DataError, JobError, ResourceError

LIMIT_MIB = 100  # of what the Jobs API takes; Ray itself says only that the body is too large
STOPPED = 143  # what a shell says of a process that was asked to end
INTERRUPTED = 130  # and of one that Ctrl-C has ended
POLL_S = 5.0  # between two looks at a job whose log no longer comes


def run(config: SubmitConfig) -> None:
    """Uploads the working directory, starts the job with this shell's MLFLOW_* settings, prints what it prints.

    A job of the same command that still runs is watched instead: a second one would write into the same folder.

    Args:
        config: Settings of the command.

    Raises:
        ConfigError: No such job, or the working directory is not this repository.
        DataError: The working directory is too large to upload; names its biggest parts.
        JobError: The job failed or was stopped, or goes on unwatched after Ctrl-C.
        ResourceError: No cluster answers, or it refuses the token.
    """
    name, *flags = config.command
    folder = Path(config.working_dir).absolute()
    if not (folder / "jobs" / f"{name}.py").is_file():
        known = ", ".join(sorted(p.stem for p in (folder / "jobs").glob("[!_]*.py"))) or "none: is it the repository?"
        raise ConfigError(f"command: no job {name!r} in {folder / 'jobs'}; there are {known}")
    client, entrypoint = _client(config.address), shlex.join(["python", "-m", f"jobs.{name}", *flags])
    try:
        job = _running(client, entrypoint)
        said = f"job {job} runs this command already" if job else ""
        job = job or once_taken(
            lambda: client.submit_job(
                entrypoint=entrypoint,
                runtime_env={"working_dir": str(folder)} | _tracking(),
                entrypoint_num_cpus=config.cpus,
            )
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise _too_large(folder) if "413" in str(error) else ResourceError(f"the job was not taken: {error}") from error
    print(
        f"{said or f'job {job}'}; `ray job stop {job}` stops it, the same command submitted again goes on from there",
        flush=True,
    )
    if config.wait:
        try:
            asyncio.run(_watch(client, job))
            _judge(job, _end(client, job))
        except KeyboardInterrupt:
            how = f"`ray job stop {job}` stops it, `ray job logs -f {job}` or the same command shows it"
            raise JobError(f"job {job} goes on; {how}", code=INTERRUPTED) from None


def _running(client: JobSubmissionClient, entrypoint: str) -> str | None:
    jobs = (j for j in client.list_jobs() if j.entrypoint == entrypoint and not j.status.is_terminal())
    return next((j.submission_id for j in jobs if j.submission_id), None)  # a driver that nobody submitted has none


def _tracking() -> dict[str, dict[str, str]]:
    """Where MLflow is, and as whom to speak to it: without, a job records into its own copy of the directory."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    return {"env_vars": variables} if variables else {}


def once_taken(submit: Callable[[], str]) -> str:
    """Submits a job, again where the node's agent isn't there yet: it starts later than the job server.

    Args:
        submit: Submits it and gives its id.

    Returns:
        The id.

    Raises:
        RuntimeError: The job server refuses it for another reason, or for longer than half a minute.
    """
    for attempt in stamina.retry_context(on=_no_agent, attempts=8, timeout=30, wait_initial=1, wait_max=5):
        with attempt:
            job = submit()
    return job


def _no_agent(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "No available agent" in str(error)


def _client(address: str | None) -> JobSubmissionClient:
    if address:  # Ray would take this variable, and RAY_ADDRESS, which every job has, before what it is given
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, RayError) as error:
        where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "this machine"
        reason = str(error).strip().partition("\n")[0]
        raise ResourceError(
            f"address: no job server at {where} takes us ({reason}); give --address http://HEAD:8265 and, where "
            "the cluster wants a token, RAY_AUTH_MODE=token with it in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from error


async def _watch(client: JobSubmissionClient, job: str) -> None:
    try:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)
    except (RuntimeError, aiohttp.ClientError) as error:
        print(f"rlfseg submit: job {job} goes on, its log is lost: {error}; waiting for its end", file=sys.stderr)


def _end(client: JobSubmissionClient, job: str) -> JobDetails:
    """How a job ended; waits where its log ended before it, and a minute for a server that is away."""
    info = stamina.retry(on=(RuntimeError, OSError), attempts=None, timeout=60, wait_max=POLL_S)(client.get_job_info)
    try:
        while not (end := info(job)).status.is_terminal():
            time.sleep(POLL_S)
    except (RuntimeError, OSError) as error:
        raise ResourceError(f"job {job}: its server is away, ask again by `ray job status {job}`: {error}") from error
    return end


def _judge(job: str, end: JobDetails) -> None:
    if end.status == JobStatus.STOPPED:
        raise JobError(f"job {job} was stopped", code=STOPPED)
    if end.driver_exit_code == REFUSED_SOME:
        raise JobError(
            f"job {job} is done; what it has refused stands above (Ray says {end.status})", code=REFUSED_SOME
        )
    if end.status != JobStatus.SUCCEEDED:
        lines = (end.message or "").strip().splitlines() or [""]
        # Ray's own words are the first line, then come the job's last ones; the job may say better what it was
        why = next((line for line in reversed(lines) if line.startswith("rlfseg ")), lines[0])
        raise JobError(f"job {job} ended as {end.status}: {why}", code=_exit_code(end.driver_exit_code))


def _exit_code(code: int | None) -> int:
    """As a shell has it: a process that a signal has killed is, to Python, -9."""
    return 128 - code if code is not None and code < 0 else code or 1


def _too_large(folder: Path) -> DataError:
    sizes = {p: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) if p.is_dir() else p.stat().st_size
             for p in folder.iterdir()}  # fmt: skip
    biggest = sorted(sizes, key=lambda p: -sizes[p])[:5]
    named = ", ".join(f"{p.name} {sizes[p] / 2**20:.0f} MiB" for p in biggest)
    return DataError(
        f"working_dir: {folder} is more than the {LIMIT_MIB} MiB that the Jobs API takes; name what jobs don't need in "
        f".rayignore. The biggest, before .gitignore and .rayignore: {named}"
    )
