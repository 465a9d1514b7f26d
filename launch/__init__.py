"""The commands, one a file: scripts, and what an installation has as sbv2-NAME."""
