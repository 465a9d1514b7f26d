"""The default rules of sharding, as data: which leaves are split over which axes of the mesh.

Nothing here imports jax, so that a configuration is checked before any device is touched.
"""

# (regular expression, strategy); see `config.mesh.rules` and `sharding.py`.
DEFAULT_RULES = (
    (r"(.*\.)?(step|key|count)", "replicate"),
    (r".*", "fsdp"),
)
