"""From a validated config to objects, and the record of where a run came from."""
