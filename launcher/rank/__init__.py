"""A rank's process around its program: how it starts, where its output goes, how it ends."""
