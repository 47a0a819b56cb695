"""Rows: the files and data sets that hold them, and what a record of each format means."""
