"""The default of `mesh.rules`: which leaves are split over which axes (see `sharding.py`); imports no jax."""

DEFAULT_RULES = (
    (r"(.*\.)?(step|key|count)", "replicate"),
    (r".*", "fsdp"),
)
