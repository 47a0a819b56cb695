"""What validation knows of runs, phases, routers, injection and blends. Imports neither torch nor lightning."""
