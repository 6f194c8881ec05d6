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
from collections.abc import Callable, Iterable, Sequence


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


class LineFile:
    """A file of lines, the newest last, that is shortened to ``keep`` lines when it has more than ``limit``.

    Lines are appended at once, so they survive a kill. Several processes may share the file: each one reads the lines
    of the others when it starts. While one process shortens the file, a line that another one appends at that moment
    may be lost. Of a file with more than ``read_size`` bytes only the end is read.

    Lines that are torn, or that ``is_valid`` refuses, are skipped; they disappear when the file is shortened.
    """

    def __init__(self, path: str, keep: int, limit: int, read_size: int, is_valid: Callable[[str], bool]) -> None:
        self._path, self._keep, self._limit = path, keep, limit
        self._read_size, self._is_valid = read_size, is_valid
        self._count = 0              # of lines in the file, as far as this process knows
        self._is_long = False        # it had more lines than are kept when it was loaded
        self._is_torn = False        # it ends without a newline: the process that wrote the last line did not finish it

    def load(self) -> list[str]:
        """Return the last lines, at most ``keep``; none if there is no file yet. Raise OSError."""
        try:
            data, is_whole = self._read_end()
        except FileNotFoundError:
            return []                # the first line creates it
        self._is_torn = bool(data) and not data.endswith(b"\n")
        self._count = data.count(b"\n") + self._is_torn
        self._is_long = self._count > self._keep or not is_whole
        return self._valid_lines(data, is_whole)

    def tidy(self) -> None:
        """Shorten the file if there was more in it than is kept when it was loaded. Raise OSError."""
        if self._is_long:
            self._shorten()

    def append(self, lines: Sequence[str]) -> None:
        """Append lines, none of which has a newline in it. Raise OSError."""
        data = _encoded(lines)
        if self._is_torn:
            data = b"\n" + data
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
        try:
            descriptor = os.open(self._path, flags, 0o600)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self._path), 0o700, exist_ok=True)
            descriptor = os.open(self._path, flags, 0o600)
        try:
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, "not written whole", self._path)
        finally:
            os.close(descriptor)
        self._is_torn = False
        self._count += len(lines)
        if self._count > self._limit:
            self._shorten()

    def _shorten(self) -> None:
        """Leave only the last lines in the file. It is read again, for other processes may have added some."""
        lines = self._valid_lines(*self._read_end())
        target = os.path.realpath(self._path)
        # A random name, not one with the process id: all containers that share this directory may have the same id.
        draft = f"{target}.{os.urandom(8).hex()}"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(_encoded(lines))
            os.replace(draft, target)
        except OSError:
            os.unlink(draft)
            raise
        self._count = len(lines)
        self._is_torn = False

    def _read_end(self) -> tuple[bytes, bool]:
        """Return the last ``read_size`` bytes, and whether they are all of it.

        Raise OSError also if it is not a regular file. It is opened with O_NONBLOCK, because opening a FIFO would wait.
        """
        with open(self._path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", self._path)
            start = max(0, status.st_size - self._read_size)
            file.seek(start)
            return file.read(self._read_size), start == 0

    def _valid_lines(self, data: bytes, is_whole: bool) -> list[str]:
        """Return the last valid lines in the bytes of the file; its first line may be cut if they are not all of it."""
        lines = []
        for row in data.split(b"\n")[0 if is_whole else 1:]:
            try:
                line = row.decode()
            except UnicodeDecodeError:
                continue
            if self._is_valid(line):
                lines.append(line)
        return lines[-self._keep:]


def _encoded(lines: Iterable[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode("utf-8", "replace")


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
