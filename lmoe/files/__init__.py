"""Reading files with limits, writing them whole, and the names of what a run leaves. Imports no torch."""
