"""Reading a network's `config.json` strictly: a field that the code does not support is an error."""

import abc
import dataclasses
from typing import Any, ClassVar, Self, TypeVar

from sbv2_jax.diffusion.file_fields import as_declared, hashable, is_neutral
from sbv2_jax.errors import InputError, listed


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base of the configurations; its subclasses' fields are the supported ones, named as in the file.

    `FIXED` maps every further field of the file to the values of it that mean what the code does (the first
    is written back); `IGNORED` names the fields that have no influence on the network. `STEM` begins the names of the
    files of weights.
    """

    CLASS_NAME: ClassVar[str] = ""
    STEM: ClassVar[str] = "diffusion_pytorch_model"
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


C = TypeVar("C", bound=ModelConfig)
# Of what holds a configuration: that of one kind of network is one of any.
Kind = TypeVar("Kind", bound=ModelConfig, covariant=True)


def of_kind(config: ModelConfig, kind: type[C], source: str) -> C:
    """Returns a configuration that is to be of this kind; raises InputError, beginning with the source, for another."""
    if not isinstance(config, kind):
        raise InputError(f"{source} holds a {type(config).__name__}, a {kind.__name__} is expected")
    return config


class AutoencoderConfig(ModelConfig, abc.ABC):
    """What the configurations of autoencoders have in common.

    Callers multiply latents by `scaling_factor` after `encode` and divide by it before `decode`.
    """

    @property
    @abc.abstractmethod
    def latent_channels(self) -> int:
        """The channels of a latent."""

    @property
    @abc.abstractmethod
    def scaling_factor(self) -> float:
        """By which latents are multiplied."""

    @property
    @abc.abstractmethod
    def downsampling(self) -> int:
        """The number of pixels on the side of one latent."""


# What transformers 4 wrote into every config.json: text generation, labels, training. No network here reads any of it.
_GENERIC = """
    add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_factor initializer_range is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores prefix
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    use_bfloat16 use_cache
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformersConfig(ModelConfig):
    """The base of the configurations of transformers' networks, whose layout of the file differs from diffusers'."""

    STEM: ClassVar[str] = "model"
    IGNORED: ClassVar[frozenset[str]] = frozenset(_GENERIC.split())

    architectures: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the values to write back, in transformers' layout."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values = {k: v.to_dict() if isinstance(v, ModelConfig) else v for k, v in values.items()}
        if self.architectures is None:
            del values["architectures"]
        else:
            values["architectures"] = list(self.architectures)
        return {"model_type": self.FIXED["model_type"][0], **values}
