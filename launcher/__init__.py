"""The command line and the processes of one node."""
