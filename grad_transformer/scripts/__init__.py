"""The commands, one file each. How one is written: see `_common`."""
