"""Which failures of a job may go better at another attempt: those that a scheduler or a machine caused."""

import errno

import jax

_ENDED = (MemoryError, ConnectionError, TimeoutError, KeyboardInterrupt, SystemExit)
_MACHINE = {  # what a disk, a network or a device does; a path that is wrong is none of them
    errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EAGAIN, errno.EBUSY, errno.EMFILE,
    errno.ENFILE, errno.ENODEV, errno.ENXIO, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH,
}  # fmt: skip
_STATUSES = (  # of XLA's runtime; INVALID_ARGUMENT and UNIMPLEMENTED are the program's
    "RESOURCE_EXHAUSTED", "INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "DATA_LOSS",
)  # fmt: skip
_BY_NAME = ("OutOfMemoryError", "UncompletedJobError")  # of PyTorch; of submitit at the end of a job's time
_NO_DEVICE = "Unable to initialize backend"


def may_succeed(error: BaseException) -> bool:
    """Whether another attempt at the same input may succeed.

    True where the job ran out of memory or time, was preempted or interrupted, or met a failing disk, network or
    device. False for every other exception: of the input, such as a missing file, and of the code.
    """
    if isinstance(error, _ENDED) or type(error).__name__ in _BY_NAME:
        return True
    if isinstance(error, OSError):
        return error.errno in _MACHINE
    if isinstance(error, jax.errors.JaxRuntimeError):
        return str(error).startswith(_STATUSES)
    return isinstance(error, RuntimeError) and _NO_DEVICE in str(error)
