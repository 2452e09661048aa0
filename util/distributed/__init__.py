"""Several processes: the process group, launchers, signals."""
