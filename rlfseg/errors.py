"""Every error that rlfseg raises on purpose.

    RlfsegError
    ├── ConfigError     a setting is wrong: names the field, the value and the fix
    ├── DataError       a file or folder of data is damaged, unfinished or of another run
    │   └── BadSample   one sample is unusable: names the file and the sample; a job may skip it and go on
    ├── ModelError      a model, adapter or checkpoint can't be used: names the reference and the fix
    ├── ResourceError   the machine or cluster lacks what a job asks for: names the sum
    ├── JobError        a submitted job failed or was stopped: carries its exit code
    └── ServiceError    a service can't be reached or refuses a request: names the address and its reason

All are shown to users as one line without a traceback.
"""

from __future__ import annotations

REFUSED_SOME = 3  # exit code of a job that is done, but for samples that it refused


class RlfsegError(Exception):
    """Base of all; its text is meant for the user."""


class ConfigError(RlfsegError, ValueError):
    """A setting is wrong."""


class DataError(RlfsegError, ValueError):
    """A file or folder of data is damaged, unfinished or belongs to another run."""


class BadSample(DataError):
    """One sample is unusable.

    Args:
        reason: What is wrong, and with which value.
        file: The file it lies in.
        sample: Its id in that file, if the file could be opened.
    """

    def __init__(self, reason: str, *, file: str, sample: str | None = None):
        super().__init__(f"{file}{f' [{sample}]' if sample is not None else ''}: {reason}")
        self.reason, self.file, self.sample = reason, file, sample

    def __reduce__(self) -> tuple[object, ...]:
        """Survives the way between processes with its fields."""
        return _bad_sample, (self.reason, self.file, self.sample)


class ModelError(RlfsegError, ValueError):
    """A model, adapter or checkpoint can't be used."""


class ResourceError(RlfsegError, RuntimeError):
    """The machine or cluster lacks what a job asks for."""


class JobError(RlfsegError, RuntimeError):
    """A submitted job failed or was stopped.

    Args:
        reason: Which, and how it ended.
        code: The job's own exit code.
    """

    def __init__(self, reason: str, *, code: int):
        super().__init__(reason)
        self.code = code


class ServiceError(RlfsegError, RuntimeError):
    """A service can't be reached, refuses a request or stays busy."""


def _bad_sample(reason: str, file: str, sample: str | None) -> BadSample:
    return BadSample(reason, file=file, sample=sample)
