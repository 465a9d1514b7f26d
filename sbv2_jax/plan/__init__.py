"""What a run would need of hardware that is not here: compiled for it, measured, and put into a report."""
