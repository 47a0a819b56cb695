"""What validation knows of runs, phases, routers and injection. Imports neither torch nor lightning."""
