"""Where runs are submitted: what a cluster must do for dtrain's commands, and the table of known clusters."""
