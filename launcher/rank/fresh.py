"""A rank in an interpreter of its own: `python -u fresh.py AGENT TASK ARGUMENTS`, AGENT being the agent's process."""

import sys

from dtrain.launcher.rank.entry import die_with_parent, main

die_with_parent(int(sys.argv[1]))
main(*sys.argv[2:])
