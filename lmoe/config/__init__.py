"""The config of a run, one file a section, and how it is read. Imports neither torch nor lightning."""
