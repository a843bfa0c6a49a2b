"""The command line, the tour, checkpoints and artifacts: needed, but not taught."""
