"""What lies in the user's directories: state, settings, and the secret that proves whose a nick is.

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
from collections.abc import Sequence


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
    return _directory("XDG_STATE_HOME", ".local", "state")


def config_home() -> str | None:
    """Return our directory in the user's one for settings (XDG_CONFIG_HOME, or ~/.config), None without a home."""
    return _directory("XDG_CONFIG_HOME", ".config")


def _directory(variable: str, *default: str) -> str | None:
    above, home = os.environ.get(variable, ""), home_directory()
    if not os.path.isabs(above):
        if home is None:
            return None
        above = os.path.join(home, *default)
    return os.path.join(above, "udpchat")


CONFIG_SIZE = 65536       # bytes that a file with settings may have


def read_settings(path: str, section: str, sections: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return the settings of a section of an INI file: key, value, and where it stands, as ``PATH:LINE``.

    ``sections``: all that the file may have. Raise OSError if it cannot be read, ValueError if something is wrong in
    it, with one line that says what and where.
    """
    import configparser     # here: most users have no such file, and the start of the program is measured
    with open(path, "rb") as file:
        data = file.read(CONFIG_SIZE + 1)
    if len(data) > CONFIG_SIZE:
        raise ValueError(f"{path} is longer than {CONFIG_SIZE} bytes")
    text = data.decode("utf-8-sig", "replace")
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), default_section="")
    try:
        parser.read_string(text)
    except configparser.MissingSectionHeaderError as error:
        raise ValueError(f"{path}:{error.lineno}: a setting belongs below a [section]") from None
    except configparser.ParsingError as error:
        raise ValueError(f"{path}:{error.errors[0][0]}: neither a [section] nor key = value") from None
    except (configparser.DuplicateSectionError, configparser.DuplicateOptionError) as error:
        raise ValueError(f"{path}:{error.lineno}: this was said before") from None
    lines = _lines_of_settings(text)
    for name in parser.sections():
        if name not in sections:
            raise ValueError(f"{path}:{lines.get((name, ''), 1)}: there is no section [{name}], only "
                             + ", ".join(f"[{one}]" for one in sections))
    if section not in parser:
        return []
    return [(key, value, f"{path}:{lines.get((section, key), 1)}") for key, value in parser[section].items()]


def _lines_of_settings(text: str) -> dict[tuple[str, str], int]:
    """Return the number of the line of each section, (name, ""), and of each key in one."""
    found: dict[tuple[str, str], int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith("["):
            section = line[1:].partition("]")[0]
            found.setdefault((section, ""), number)
        elif "=" in line:
            found.setdefault((section, line.partition("=")[0].strip().lower()), number)
    return found


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


REMEMBERED_NICKS = 1000   # of the last table that was seen


def remember_nicks(nicks: Sequence[str]) -> None:
    """Write the nicks of the table to a file, from which shells complete them. If that fails, there are none."""
    state = state_home()
    if state is None:
        return
    path = os.path.join(state, "nicks")
    draft = f"{path}.{os.urandom(8).hex()}"
    try:
        os.makedirs(state, mode=0o700, exist_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write("".join(f"{nick}\n" for nick in nicks[:REMEMBERED_NICKS]))
        os.replace(draft, path)
    except OSError:
        try:
            remove_quietly(draft)
        except OSError:
            pass


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
