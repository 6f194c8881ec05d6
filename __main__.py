"""Start the program as it is packed: the command ``udpchat``, ``python -m udpchat``, and ``python udpchat.pyz``.

Installed, all modules lie in one folder, ``site-packages/udpchat``, and import each other by plain names, as in a
checkout. So that folder is the first place where Python looks for them: a ``protocol.py`` on PYTHONPATH or in the
current folder is somebody else's. In ``udpchat.pyz`` (tests/build_zipapp.py) the archive is that folder.

Python 2.7 and newer can read this file, so that an old one says what is wrong.
"""
import signal
import sys
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports ends the program without a traceback

if sys.version_info < (3, 10):
    sys.exit("udpchat: Python 3.10 or newer is needed, this is %d.%d" % sys.version_info[:2])

import os

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.modules.pop("udpchat", None)    # Python has imported the folder by this name; from here on it is the module in it

from udpchat import run    # noqa: E402

if __name__ == "__main__":
    run()
