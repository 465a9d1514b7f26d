"""A live page of one-step pictures, for `launch/demo.py`."""
