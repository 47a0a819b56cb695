"""A mixture from adapters that exist: experts imported, added, left out."""
