"""Weights that are numbers: a NaN or an infinity in one of them turns every picture black, and says nothing."""

from collections.abc import Collection

from sbv2_jax.errors import InputError

_NAMED = 10


def refuse_not_finite(names: Collection[str], source: str) -> None:
    """Raises InputError that names the tensors which `is_finite` refused, ten at most, where there are any."""
    if names:
        more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        raise InputError(
            f"{source} holds NaN or infinite values in {len(names)} tensor(s): "
            f"{', '.join(list(names)[:_NAMED])}{more}: take a sound copy of the weights"
        )
