"""Runs that are killed, checkpoints that are spoiled, disks that are full: nothing is lost, nothing wrong is loaded."""
