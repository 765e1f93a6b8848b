"""Every error that a user can meet, in one tree, each with the exit code of the command line.

    Fp8PipeError                     5   a defect of fp8pipe itself when raised bare
    |-- InputError                   2   what the user gave; also a ValueError
    |   |-- ConfigError                  a recipe, suite, policy or collection file
    |   |-- ModelNotFound                the Hub has no such model, or the folder does not exist
    |   |-- RevisionNotFound             the model exists, the revision does not
    |   |-- AccessDenied                 gated, private, or the token may not
    |   |-- UnsafeWeights                pickled weights only
    |   |-- MalformedCheckpoint          header, offsets, index or shard names are not sound
    |   |-- UnsupportedArchitecture      nothing here knows how to quantize this model
    |   |-- UnmatchedEntry               a targets or ignore entry that matches nothing
    |   |-- NonFiniteWeight              NaN or Inf in a weight
    |   |-- NonFiniteActivation          a module got NaN or Inf while calibration data ran through the model
    |   |-- Withdrawn                    the repository's newest release was yanked
    |   |-- SourceChanged                not what was pinned, read or measured any more
    |   `-- CalibrationDataError         dataset empty, too short, or without a usable column
    |-- Refused                      1   the evidence forbids it: publishing without an accepted gate, ...
    `-- EnvironmentFault             4   the machine or the network, not the input
        |-- HubUnreachable               transient: worth a retry
        |-- DiskTooSmall                 the plan does not fit, or the disk filled up
        |-- NoSuitableDevice             no GPU of the class, no AVX-512
        |-- EngineFailed                 vLLM did not start, died, hung or ran out of memory
        `-- ServerFailed                 the embedded Prefect server or local Hub did not start

Messages say what, where, expected, found, and what to do next; never a secret. Classes add no constructor, so that
they survive pickling between Prefect processes.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class Fp8PipeError(Exception):
    """Base of everything fp8pipe raises on purpose."""

    exit_code: ClassVar[int] = 5
    transient: ClassVar[bool] = False
    """Whether trying again, unchanged, may succeed. Only these are retried."""


class InputError(Fp8PipeError, ValueError):
    """The request cannot be served as given."""

    exit_code = 2


class ConfigError(InputError):
    """A recipe, suite, policy or collection file that does not parse or does not fit its schema."""


class ModelNotFound(InputError):
    """The Hub has no model of this name, or the folder is not there."""


class RevisionNotFound(InputError):
    """The model exists, the revision does not."""


class AccessDenied(InputError):
    """The model is gated or private and the token (or its absence) does not open it."""


class UnsafeWeights(InputError):
    """The repository holds pickled weights only; fp8pipe reads safetensors and nothing else."""


class MalformedCheckpoint(InputError):
    """A safetensors header, an offset, an index or a shard name is not sound."""


class UnsupportedArchitecture(InputError):
    """The architecture is unknown, or cannot be quantized to what vLLM loads."""


class UnmatchedEntry(InputError):
    """An entry of targets or ignore matches no weight."""


class NonFiniteWeight(InputError):
    """A weight holds NaN or Inf."""


class NonFiniteActivation(InputError):
    """A module was given NaN or Inf while calibration data ran through the model."""


class SourceChanged(InputError):
    """A source or checkpoint is no longer what was pinned, read or measured."""


class Withdrawn(InputError):
    """The newest release of a repository was yanked, and nothing says that another may take its place."""


class CalibrationDataError(InputError):
    """The calibration dataset is empty, too short, or has no usable column."""


class Refused(Fp8PipeError):
    """The evidence forbids the action: publishing what was rejected, or what changed after its gate."""

    exit_code = 1


class EnvironmentFault(Fp8PipeError):
    """The machine or the network stands in the way."""

    exit_code = 4


class HubUnreachable(EnvironmentFault):
    """The Hub did not answer, or answered with a server error."""

    transient = True


class DiskTooSmall(EnvironmentFault):
    """Less free disk than the plan needs, or the disk filled up while writing."""


class NoSuitableDevice(EnvironmentFault):
    """No device here can do what was asked."""


class EngineFailed(EnvironmentFault):
    """vLLM did not start, died, hung, or ran out of memory. The message carries the tail of its log."""


class ServerFailed(EnvironmentFault):
    """A server that fp8pipe starts itself (embedded Prefect, local Hub) did not come up."""


_ABOUT_THE_PATH = frozenset(
    getattr(errno, name)
    for name in ("ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ELOOP", "ENAMETOOLONG", "EINVAL", "ENOTEMPTY", "EXDEV")
)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def from_system(error: BaseException) -> Fp8PipeError | None:
    """The error of ours that an ordinary error of the operating system, Python or an HTTP client stands for: a wrong
    path is the input's fault, a machine or server that refuses is the environment's. None for any other error: that is
    a defect."""
    if isinstance(error, Fp8PipeError):
        return error
    if isinstance(error, UnicodeEncodeError):
        return InputError(f"{error.object!r}: a name that is not valid text; rename the file or folder")
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # pathlib, before Python 3.13
        return InputError(f"{error}; name a folder or file that is no such link")
    if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout"):  # httpx, which is not imported here
        return EnvironmentFault(f"a server cannot be reached: {error}; start it, or correct its address")
    if isinstance(error, ConnectionError):
        return EnvironmentFault(f"a connection broke: {error}; see that the other side runs, and run again")
    if not isinstance(error, OSError):
        return None
    where = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    what = f"{where}: {error.strerror}" if where else str(error.strerror)
    if error.errno in _FULL:
        return DiskTooSmall(f"{what}; free some space and run again")
    if error.errno == errno.EIO:
        return EnvironmentFault(f"{what}; the disk or the network behind it fails")
    if not where:
        return None  # such as a wrong descriptor
    if error.errno in _ABOUT_THE_PATH:
        return InputError(f"{what}; name another path, or correct this one")
    return EnvironmentFault(f"{what}; let this user read and write there, or use another place")
