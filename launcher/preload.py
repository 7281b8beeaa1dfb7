"""Imported by the fork server before the modules that all ranks need.

The server must die with the agent, and take the ranks along. The kernel counts the thread that started the
server as its parent: that must be the agent's main thread.
"""

from dtrain.launcher.entry import die_with_parent

die_with_parent()
