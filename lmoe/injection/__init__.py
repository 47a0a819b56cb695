"""Make a printable plan of where experts go, apply it, and say which role a parameter has."""
