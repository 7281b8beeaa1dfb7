"""What the ranks of `dtrain.launch` run, with the paths of a Mailbox as arguments.

Nothing else: the names in its module, which is __main__, become those of the process that has launched it.
"""

import sys

from dtrain.launcher.call import on_rank
from dtrain.launcher.call.mailbox import Mailbox

if __name__ == "__main__":
    on_rank.call(Mailbox(*sys.argv[1:]))
