"""The versions of this package and of those that a result depends on."""

from importlib.metadata import PackageNotFoundError, version

from sbv2_jax import __version__


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of this package and of others, by name; one that is not installed is left out."""
    found = {"sbv2_jax": __version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # it runs where it lies
            continue
    return found
