"""The commands, scaled over Ray."""
