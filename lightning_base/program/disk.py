"""A full disk, said in one sentence, wherever it shows."""

import errno

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit for the size of a file is reached",
}


def full_disk(error: BaseException) -> str | None:
    """What of a disk is used up, and the file that had no room; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in FULL:
        return None
    where = f": no room for {error.filename}" if error.filename else ""
    return FULL[error.errno] + where
