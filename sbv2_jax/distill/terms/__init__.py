"""The terms of the student's objective, one a file; `term.py` says what a term is, and opens those of a run."""
