"""Reading a network's `config.json` strictly: a field that the code does not support is an error."""

import dataclasses
from typing import Any, ClassVar, Self

from sbv2_jax.diffusion.file_fields import as_declared, hashable, is_neutral
from sbv2_jax.errors import InputError, listed


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base of the configurations; its subclasses' fields are the supported ones, named as in the file.

    `FIXED` maps every further field of the file to the values of it that mean what the code does (the first
    is written back); `IGNORED` names the fields that have no influence on the network.
    """

    CLASS_NAME: ClassVar[str] = ""
    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {}
    IGNORED: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config.json") -> Self:
        """Builds the configuration from the file's values.

        A field that is not known passes where it is neutral (`file_fields.is_neutral`): what has a meaning is
        refused. Raises InputError that lists the unknown fields and the unsupported values.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        wrong = []
        for name, value in values.items():
            if name.startswith("_") or name in known or name in cls.IGNORED:
                continue
            if name not in cls.FIXED:
                if not is_neutral(name, value):
                    wrong.append(f"unknown field {name}={value!r}")
            elif hashable(value) not in cls.FIXED[name]:
                wrong.append(f"{name}={value!r} is not supported (only {cls.FIXED[name][0]!r})")
        if wrong:
            raise InputError(f"{source}: {listed(wrong)}")
        try:
            return cls(**as_declared(cls, {name: values[name] for name in known if name in values}))
        except (TypeError, ValueError) as error:
            raise InputError(f"{source}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Returns the values to write back, `_class_name` and the fixed fields included."""
        fixed = {name: allowed[0] for name, allowed in self.FIXED.items()}
        return {"_class_name": self.CLASS_NAME, **fixed, **dataclasses.asdict(self)}
