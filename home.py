"""What lies in the user's directories: where state is kept, and the secret that proves whose a nick is.

Rules of this file
------------------
- It knows nothing of chat, except that a nick has an owner.
- A file that cannot be used is an OSError; the command line reports it.
- A file appears whole or not at all, and only its owner can read it.

A nick belongs to the first user who registered it. The proof is a token, made of the user's secret for one server and
one nick: a server that learns it can use it nowhere else. The server keeps only a hash of it.
"""
from __future__ import annotations

import errno
import os
import stat
import time


def home_directory() -> str | None:
    """Return the user's home, None for a user without one: a container may run us under a number that has no name."""
    home = os.environ.get("HOME")
    if not home:
        import pwd      # here: a user without HOME is rare, and the start of the program is measured
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            return None
    return home if os.path.isabs(home) else None


def state_home() -> str | None:
    """Return our directory in the user's directory for state (XDG_STATE_HOME, or ~/.local/state), None without a home.

    A relative XDG_STATE_HOME is ignored, as the XDG Base Directory Specification says.
    """
    state, home = os.environ.get("XDG_STATE_HOME", ""), home_directory()
    if not os.path.isabs(state):
        if home is None:
            return None
        state = os.path.join(home, ".local", "state")
    return os.path.join(state, "udpchat")


def make_private(path: str) -> None:
    """Make sure that ``path``, which may not exist yet, is a file that its owner alone can read. Raise OSError.

    A regular file that belongs to somebody else stays as it is.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return      # a link to a file that is still to be made
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) & 0o077:
            os.chmod(path, stat.S_IMODE(status.st_mode) & 0o700)


def is_private(path: str) -> bool:
    """Return whether nobody but its owner may read the file ``path``. Raise OSError."""
    return not stat.S_IMODE(os.stat(path).st_mode) & 0o077


LOCK_ATTEMPTS = 40        # 50 ms apart: a process that makes an identity takes much less, one that was killed for ever
SECRET_BYTES = 32         # of randomness: nobody guesses it


def token_for(secret: bytes, server_id: bytes, nick: str) -> bytes:
    """Return the proof that ``nick`` is ours, good at one server only: HMAC-SHA256 (RFC 2104)."""
    import hmac     # here: only registrations need it, and a start is measured
    return hmac.digest(secret, server_id + nick.encode(), "sha256")


def hash_of(token: bytes) -> bytes:
    """Return what the store keeps of a token."""
    import hashlib      # here: only registrations need it, and a start is measured
    return hashlib.sha256(token).digest()


def is_hash_of(owner: bytes, token: bytes) -> bool:
    """Return whether ``owner`` is what is kept of ``token``, in a time that does not show how wrong a guess is."""
    import hmac
    return hmac.compare_digest(owner, hash_of(token))


def load_secret(path: str) -> bytes:
    """Return the secret in the file ``path``; make the file (0600) if there is none. Raise OSError."""
    try:
        with open(path, "rb") as file:
            secret = bytes.fromhex(file.read(1024).decode("ascii", "replace").strip())
        if len(secret) != SECRET_BYTES:
            raise ValueError
        return secret
    except ValueError:
        raise OSError(errno.EINVAL, "is not a udpchat identity") from None
    except FileNotFoundError:
        pass
    os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
    draft = f"{path}.{os.urandom(8).hex()}"    # not the process's number: a container gives the same to each
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(os.urandom(SECRET_BYTES).hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        publish(draft, path)
    finally:
        remove_quietly(draft)
    return load_secret(path)


def remove_quietly(path: str) -> None:
    """Remove a file, or an empty directory, if it is still there. Raise OSError."""
    try:
        if os.path.isdir(path):
            os.rmdir(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        pass


def publish(draft: str, path: str) -> None:
    """Give a whole file the name ``path``, unless there is one: another process was faster, and its secret is ours.

    A hard link does that in one step. Where the file system has none (exFAT, many shared folders), a directory is the
    lock under which the file is renamed. Raise OSError.
    """
    try:
        os.link(draft, path)
        return
    except FileExistsError:
        return
    except OSError:
        lock = path + ".lock"
    for _ in range(LOCK_ATTEMPTS):
        try:
            os.mkdir(lock)
            break
        except FileExistsError:
            time.sleep(0.05)
    try:
        if not os.path.exists(path):
            os.rename(draft, path)
    finally:
        remove_quietly(lock)        # two that waited in vain for a lock, left by a killed process, both come here
