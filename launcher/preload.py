"""Imported by the fork server before the modules that all ranks need.

The server must die with the agent, and take the ranks along. The kernel counts the thread that started the
server as its parent: that must be the agent's main thread. A session of its own keeps signals to the agent's whole
process group (Ctrl-C, a closed terminal, `timeout`) away from the ranks: the agent decides what they mean.
"""

import os

from dtrain.launcher.entry import die_with_parent

os.setsid()
die_with_parent()
