"""The manual page and the completions of the shells, made from the parser: ``python -m tests.build_manual``.

They are kept in contrib/, and installed where ``man`` and the shells look for them. A test makes them again and
compares, so that no option is missing. What the parser does not know (the lines on stdin, the files, examples) is
written here.
"""
from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path

import udpchat
from terminal import COMMANDS
from tests.pages import ROOT

FOLDER = ROOT / "contrib"
HOME = "/HOME"            # of a user for whom the help is read; the page shows it as ~
DATE = "2026-11-26"       # of the version
NOTE = "made by: python -m tests.build_manual"


def parsers() -> dict[str, udpchat.Parser]:
    """Return the parser of each mode, as a user has it who has set nothing."""
    before = {name: os.environ.get(name) for name in ("HOME", "XDG_CONFIG_HOME")}
    os.environ.update(HOME=HOME, XDG_CONFIG_HOME="")
    try:
        return {mode: udpchat.build_parser(mode)[1] for mode in udpchat.MODES}
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def help_of(action: argparse.Action) -> str:
    """Return what an argument is for."""
    return ((action.help or "") % {**vars(action), "prog": "udpchat"}).replace(HOME, "~")


def value_of(action: argparse.Action) -> str:
    """Return what stands for the value of an option, "" for a switch."""
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        return "|".join(map(str, action.choices))
    return str(action.metavar)


def options_of(parser: udpchat.Parser) -> list[argparse.Action]:
    """Return the options of a mode, in the order of their names."""
    return sorted((action for action in parser.arguments if action.option_strings),
                  key=lambda action: action.option_strings[-1])


# --- the manual page ------------------------------------------------------------------------------------------

def roff(text: str) -> str:
    """Return ``text`` for troff: a dash of an option is one, and no line is taken for a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"(?m)^([.'])", r"\\&\1", text)


def synopsis(mode: str, parser: udpchat.Parser) -> str:
    """Return how a mode is called."""
    words = [str(action.metavar) if action.nargs is None else f"[{action.metavar}]"
             for action in parser.arguments if not action.option_strings]
    return f".B udpchat {mode}\n.RI [ OPTION ...]\n" + (f".I {roff(' '.join(words))}\n" if words else "")


def described(action: argparse.Action) -> str:
    """Return an argument and what it is for, as one paragraph."""
    if action.option_strings:
        head = ", ".join("\\fB" + roff(name) + "\\fR" for name in action.option_strings)
        if value_of(action):
            head += " \\fI" + roff(value_of(action)) + "\\fR"
        return f".TP\n{head}\n{roff(help_of(action))}\n"
    return f".TP\n.I {roff(str(action.metavar))}\n{roff(help_of(action))}\n"


BEFORE = r""".\" {note}
.TH UDPCHAT 1 {date} "udpchat {version}" "User Commands"
.SH NAME
udpchat \- a chat over bare UDP that a shell script can trust
.SH SYNOPSIS
{synopsis}.SH DESCRIPTION
People type into it, programs pipe into it. One server keeps the list of clients and the messages of those who are away;
clients talk to each other directly. Every
.B send
ends in one line that says what became of it: the recipient has it, the server keeps it, or it failed.
"""
COMMAND_HEAD = r""".SH COMMANDS
What
.B udpchat client
reads from stdin, one command a line. With
.B \-\-json
a line may be an object, such as {"send": "bob", "text": "hello"}.
"""
AFTER = r""".SH EXIT STATUS
.TP
.B 0
ended as asked, every message delivered or kept by the server
.TP
.B 1
not registered, stdout or stdin failed, some message was neither delivered nor kept, or a line on stdin was no command
.TP
.B 2
wrong arguments, or a mistake in the file with settings
.TP
.B 3
.B udpchat recv
and
.BR "udpchat ask" :
the time is over, and not all has come that was waited for
.SH ENVIRONMENT
.TP
.B UDPCHAT_SERVER
the server, HOST[:PORT]
.TP
.B UDPCHAT_SERVER_KEY
the fingerprint of the server, 60 digits
.TP
.B UDPCHAT_NICK
your nick
.TP
.B NO_COLOR
no colours, if it is not empty
.TP
.BR XDG_STATE_HOME ", " XDG_CONFIG_HOME
where the files below are, if these are absolute paths
.SH FILES
.TP
.I ~/.config/udpchat/config
settings: a section for each mode, [client], [send] and so on, with the long options as keys (nick = alice). Arguments
win over the environment, and that wins over the file.
.TP
.I ~/.local/state/udpchat/identity
the secret that proves which nicks are yours
.TP
.I ~/.local/state/udpchat/known
the keys that servers had at first contact
.TP
.I ~/.local/state/udpchat/history
the lines that were typed
.TP
.I ~/.local/state/udpchat/*.sock
where send finds a client of yours that runs under the nick
.TP
.I ~/.local/state/udpchat/shown
what recv and ask have shown, so that nothing is shown twice
.TP
.I ~/.local/state/udpchat/server\-PORT.db
the store of a server
.SH SIGNALS
SIGINT and SIGTERM end a client in order within two seconds, and a server at once. SIGUSR1 makes a server write its
counters to the log, SIGHUP makes it open its log file again.
.SH EXAMPLES
.TP
A server and two who chat:
.nf
udpchat server
udpchat client alice
udpchat client bob chat.example.org
.fi
.TP
One message from a cron job:
.nf
df \-h / | udpchat send \-q \-\-skip\-empty \-\-timeout 60 alice
.fi
.TP
Wait for one message, and for an answer:
.nf
udpchat recv \-\-from bob \-\-timeout 60
udpchat ask bob \-\-timeout 60 'shall I go on?'
.fi
"""


def manual() -> str:
    """Return the manual page."""
    modes = parsers()
    text = BEFORE.format(note=NOTE, version=udpchat.VERSION, date=DATE,
                         synopsis=".br\n".join(synopsis(mode, parser) for mode, parser in modes.items()))
    for mode, parser in modes.items():
        text += f".SH UDPCHAT {mode.upper()}\n{roff(udpchat.MODES[mode][0].capitalize())}.\n"
        text += "".join(described(action) for action in parser.arguments if not action.option_strings)
        text += "".join(map(described, options_of(parser)))
    text += COMMAND_HEAD
    text += "".join(f".TP\n.B {roff(spec.typed[0] or spec.usage)}\n{roff(spec.typed[1] or spec.help)}\n"
                    for spec in COMMANDS.values() if spec.help)
    return text + AFTER


# --- completions ----------------------------------------------------------------------------------------------

NICKS = "${XDG_STATE_HOME:-$HOME/.local/state}/udpchat/nicks"


def names_of(parser: udpchat.Parser) -> str:
    """Return all names of the options of a mode."""
    return " ".join(name for action in options_of(parser) for name in action.option_strings)


def with_values(modes: dict[str, udpchat.Parser]) -> Iterator[tuple[str, argparse.Action]]:
    """Yield each option that has a value, once, as a pattern of its names."""
    seen = set()
    for parser in modes.values():
        for action in options_of(parser):
            pattern = "|".join(action.option_strings)
            if action.nargs != 0 and pattern not in seen:
                seen.add(pattern)
                yield pattern, action


def bash() -> str:
    """Return the completion for bash."""
    modes, cases = parsers(), ""
    for pattern, action in with_values(modes):
        if action.choices is not None:
            found = f"COMPREPLY=($(compgen -W '{' '.join(map(str, action.choices))}' -- \"$word\"))"
        elif action.metavar == "PATH":
            found = 'compopt -o filenames 2> /dev/null; COMPREPLY=($(compgen -f -- "$word"))'
        else:
            found = ":"
        cases += f"        {pattern}) {found}; return ;;\n"
    options = "".join(f"        {mode}) options='{names_of(parser)}' ;;\n" for mode, parser in modes.items())
    return f"""\
# Completion of udpchat for bash; {NOTE}
_udpchat() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} mode=${{COMP_WORDS[1]}} options= listed
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W '{" ".join(modes)} help --help --version' -- "$word"))
        return
    fi
    case $before in
{cases}    esac
    case $mode in
{options}    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$word"))
    elif [[ $mode == send || $mode == ask ]] && ((COMP_CWORD == 2)); then
        listed=${{word%"${{word##*,}}"}}
        COMPREPLY=($(compgen -P "$listed" -W "$(cat "{NICKS}" 2> /dev/null)" -- "${{word##*,}}"))
    fi
}}
complete -F _udpchat udpchat
"""


def quoted(text: str) -> str:
    """Return ``text`` as one word of a shell."""
    return "'" + text.replace("'", "'\\''") + "'"


def zsh_option(action: argparse.Action) -> str:
    """Return how ``_arguments`` is told of an option."""
    text = re.sub(r"([\[\]:\\])", r"\\\1", help_of(action))
    value = ""
    if action.choices is not None:
        value = f":value:({' '.join(map(str, action.choices))})"
    elif action.nargs != 0:
        value = f":{str(action.metavar).lower()}:{'_files' if action.metavar == 'PATH' else ' '}".replace("[", "(")
        value = value.replace("]", ")").replace("(:port)", "")
    names = action.option_strings
    if len(names) == 1:
        return quoted(f"{names[0]}[{text}]{value}")
    return f"{{{','.join(names)}}}{quoted(f'[{text}]{value}')}"


def zsh() -> str:
    """Return the completion for zsh."""
    modes = parsers()
    described_modes = "\n".join("        " + quoted(f"{mode}:{purpose}")
                                for mode, (purpose, _) in udpchat.MODES.items())
    cases = ""
    for mode, parser in modes.items():
        options = " \\\n".join(f"            {zsh_option(action)}" for action in options_of(parser))
        rest = " \\\n            '1:nick:_udpchat_nicks'" if mode in udpchat.SENDING_MODES else ""
        cases += f"    {mode})\n        _arguments -s \\\n{options}{rest} ;;\n"
    return f"""\
#compdef udpchat
# Completion of udpchat for zsh; {NOTE}
_udpchat_nicks() {{
    local -a nicks
    nicks=(${{(f)"$(cat "{NICKS}" 2> /dev/null)"}})
    (($#nicks)) && _sequence compadd - $nicks
}}

_udpchat() {{
    local -a modes
    modes=(
{described_modes}
        'help:show what there is'
    )
    if ((CURRENT == 2)); then
        _describe mode modes
        return
    fi
    local mode=$words[2]
    shift words
    ((CURRENT--))
    case $mode in
{cases}    esac
}}

_udpchat "$@"
"""


def fish() -> str:
    """Return the completion for fish."""
    modes = parsers()
    lines = [f"# Completion of udpchat for fish; {NOTE}", "complete -c udpchat -f"]
    for mode, (purpose, _) in udpchat.MODES.items():
        lines.append(f"complete -c udpchat -n __fish_use_subcommand -a {mode} -d {quoted(purpose)}")
    for mode, parser in modes.items():
        for action in options_of(parser):
            names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                             for name in action.option_strings)
            value = ""
            if action.choices is not None:
                value = f" -x -a {quoted(' '.join(map(str, action.choices)))}"
            elif action.nargs != 0:
                value = " -r -F" if action.metavar == "PATH" else " -x"
            lines.append(f"complete -c udpchat -n '__fish_seen_subcommand_from {mode}' {names}{value}"
                         f" -d {quoted(help_of(action))}")
    nicks = NICKS.replace("${XDG_STATE_HOME:-$HOME/.local/state}", "$state")
    lines += ["function __udpchat_nicks", "    set -l state $XDG_STATE_HOME", "    test -n \"$state\"; or set state "
              "$HOME/.local/state", f"    cat {nicks} 2> /dev/null", "end",
              *(f"complete -c udpchat -n '__fish_seen_subcommand_from {mode}' -a '(__udpchat_nicks)'"
                for mode in udpchat.SENDING_MODES), ""]
    return "\n".join(lines)


def files() -> dict[Path, str]:
    """Return what is to be in which file."""
    shells = FOLDER / "completion"
    return {FOLDER / "udpchat.1": manual(), shells / "udpchat": bash(), shells / "_udpchat": zsh(),
            shells / "udpchat.fish": fish()}


if __name__ == "__main__":
    for path, content in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
