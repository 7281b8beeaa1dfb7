"""Imported by the fork server before the modules that all ranks need.

The server must die with the agent, and take the ranks along. The kernel counts the thread that started the
server as its parent: that must be the agent's main thread. A session of its own keeps signals to the agent's whole
process group (Ctrl-C, a closed terminal, `timeout`) away from the ranks: the agent decides what they mean.

Modules make no garbage to speak of, and looking for it takes a quarter of the time of their import.
"""

import gc
import os

import dtrain.launcher.forks  # noqa: F401 (what the ranks begin with)
from dtrain.launcher.entry import die_with_parent

gc.disable()
os.setsid()
die_with_parent()
