"""Every error a user can cause or meet, as one tree.

RayloopError
├── RequestError            the request was wrong: exit code 2, one message, no traceback
│   ├── ConfigError         a setting is out of range or contradicts another
│   ├── DataMissing         a file, a dataset version, a run or a model is not there
│   ├── Corrupt             stored bytes do not match their digest
│   ├── StorageRefused      an object store, or a folder, does not let us do it
│   ├── StorageUnreachable  an object store or a tracking server does not answer
│   ├── DoesNotFit          the cluster cannot run what was asked for
│   └── Unreachable         nothing answers at the address of a cluster
└── WorkError               the work itself failed: exit code 1
    ├── DataRefused         too many rows break the row contract
    ├── Diverged            the training loss is no longer a number
    ├── StorageFull         a disk or a quota has no room for what must be written
    └── GateRefused         evidence does not pass a gate

Messages finish the sentence: what is wrong with its value, where it came from, what to do.
All arguments are one string, so every error survives pickling between Ray processes.
"""


class RayloopError(Exception):
    """Base of all errors rayloop raises on purpose; `exit_code` is what a job ends with."""

    exit_code = 1


class RequestError(RayloopError):
    """What was asked for cannot be done as asked; the message says what to ask instead."""

    exit_code = 2


class ConfigError(RequestError, ValueError):
    """A setting is out of its range or contradicts another setting."""


class DataMissing(RequestError):
    """Something named by the request does not exist: a file, a version, a run, a model."""


class Corrupt(RequestError):
    """Stored bytes do not match the digest recorded for them."""


class StorageRefused(RequestError):
    """An object store has no such bucket or denies what it is asked; a folder is not to be made."""


class StorageUnreachable(RequestError):
    """An object store or a tracking server does not answer; a moment later it may."""


class DoesNotFit(RequestError):
    """The cluster has not the resources the request needs, now or ever."""


class Unreachable(RequestError):
    """Nothing answers at the address of a cluster."""


class WorkError(RayloopError):
    """The request was right and the work failed."""


class DataRefused(WorkError):
    """More rows break the row contract than the configured share allows."""


class Diverged(WorkError):
    """The training loss became NaN or infinite; `step` says where."""

    step = -1


class StorageFull(WorkError):
    """A disk or a quota has no room for what must be written; what was there before is whole."""


class GateRefused(WorkError):
    """The evidence of a model does not pass a gate."""
