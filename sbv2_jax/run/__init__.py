"""A distillation run: its configuration, its networks, its loop, its files."""
