"""The batches of a run: their shapes, and each of them read, tokenized and split over the devices."""

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sbv2_jax.data.rows import Filling, spread
from sbv2_jax.devices.sharding import batch_sharding, batches_sharding
from sbv2_jax.distill.gradients import FRESH, Batch
from sbv2_jax.errors import InputError
from sbv2_jax.fields import imported
from sbv2_jax.models.tokenizer import Tokenizer, TokenizerPair
from sbv2_jax.run.build import Run
from sbv2_jax.run.sources import Source

# By the name of the column that each makes of the prompts.
Tokenizers = dict[str, Tokenizer | TokenizerPair]


def abstract_batch(size: int, run: Run, mesh: Mesh | None = None) -> Batch:
    """Returns the shapes of a batch, split over the mesh if there is one."""
    batch, batches = (batch_sharding(mesh), batches_sharding(mesh)) if mesh else (None, None)

    def column(*shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *shape), jnp.dtype(dtype), sharding=batch)

    towers = run.parts.text_encoders
    length = run.parts.prompt_length
    columns = {"input_ids": column(length) if len(towers) == 1 else column(len(towers), length)}
    for name, clip in run.method.columns.items():
        columns[name] = column(run.parts.term_prompt_length(clip))
    for rows in run.method.rows.values():
        columns |= {name: column(*one.shape, dtype=one.dtype) for name, one in rows.columns.items()}
    if (further := run.method.updates - 1) > 0:
        shape = (further, *columns["input_ids"].shape)
        columns[FRESH] = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batches)
    return columns  # type: ignore[return-value]  # its shapes, in the place of a batch


def open_rows(
    config: ConfigDict, run: Run, sources: Mapping[str, Source]
) -> tuple[list[Filling], dict[str, Source]]:
    """Opens what the terms fill rows of their own from; returns it, and its digests by the names of the terms.

    Each term's rows are spread evenly over those that the terms before it leave. Raises InputError for a source that
    cannot be opened, that does not fill its rows, or that was made from other `sources` than the run's.
    """
    fillings, digests, free = [], {}, list(range(config.batch_size))
    for name, rows in run.method.rows.items():
        source = imported(rows.reader, f"the term {name!r}")(config)
        others = [
            one for one, digest in source.made_from.items() if sources.get(one, {}).get("sha256") != digest
        ]
        if others:
            raise InputError(
                f"{rows.field}: {source!r} were made with another {', '.join(sorted(others))} than this run's"
            )
        own = spread(rows.count, free)
        free = [row for row in free if row not in own]
        elsewhere = {
            column: np.full(one.shape, one.elsewhere, one.dtype) for column, one in rows.columns.items()
        }
        fillings.append(Filling(source, elsewhere, own, config.seed, f"{rows.field}: {source!r}"))
        digests[name] = {"sha256": source.fingerprint()}
    return fillings, digests


def next_batch(
    batches: Iterator[list[str]],
    tokenizers: Tokenizers,
    mesh: Mesh,
    updates: int,
    fillings: Sequence[Filling],
    step: int,
) -> Batch:
    """Reads and tokenizes this process's prompts of a step and makes the global, sharded batch of them.

    With several `updates` of a player that follows the student each of them takes a batch of prompts. `fillings` put
    their rows of the global `step`, from 0, in the place of some, and add their columns.
    """
    prompts, sharding = next(batches), batch_sharding(mesh)
    first = jax.process_index() * len(prompts)
    columns: dict[str, np.ndarray] = {}
    for filling in fillings:
        prompts, own = filling.fill(step, prompts, first)
        columns |= own
    columns |= {column: tokenizer.encode(prompts) for column, tokenizer in tokenizers.items()}
    batch = {
        column: jax.make_array_from_process_local_data(sharding, values) for column, values in columns.items()
    }
    if updates > 1:
        fresh = [tokenizers["input_ids"].encode(next(batches)) for _ in range(updates - 1)]
        batch[FRESH] = jax.make_array_from_process_local_data(batches_sharding(mesh), np.stack(fresh))
    return batch
