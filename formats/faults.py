"""Which errors are failures of the machine, and not of a file or a command."""

import errno

OF_THE_MACHINE = {  # full or failing disks, lost network drives, too many open files, no memory
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.EREMOTEIO, errno.ENODEV),
    *(errno.ENOTCONN, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ESHUTDOWN),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
}


def is_of_the_machine(error):
    """Whether an error is a failure of the machine."""
    return isinstance(error, MemoryError) or getattr(error, 'errno', None) in OF_THE_MACHINE


def told(message, error):
    """An OSError with a message for the user and the errno of `error`."""
    failure = OSError(message)
    failure.errno = getattr(error, 'errno', None)
    return failure


def behind(error):
    """The failure of the machine that an error is or hides, or None."""
    while error is not None and not is_of_the_machine(error):
        error = error.__context__
    return error
