"""The words of the ladder's page that do not depend on a result."""

HEAD = """# The ladder

The claim of SwiftBrush v2 is a student of one step that is better than its teacher. This page climbs to it rung by
rung in the OpenMoji world: the rungs of the paper's tables 5, 6 and 7, baselines beside them, then what goes beyond.
It is written by `benchmarks/ladder.py` from the files in `docs/ladder/`, one for each rung and seed, and says what
they say; the protocol is in [evaluation.md](evaluation.md)."""

RULE = """## The rule

It was fixed before any of these runs. A student **wins** only if it is better than the teacher in the teacher's best
setting for certain: the 95 % interval of the difference, on the same prompts and noise, is on the better side of 0
for FD and for KID, with both networks, for each seed of the student and each of the noise; and neither recall nor the
share of drawings that are read is worse by more than a point in any of them. It **loses** if something is worse for
certain for every seed: an interval of FD or KID on the worse side of 0, or one of recall or drawings beyond a point.
Else it **matches**. With fewer than a rung's three seeds its word is provisional."""

TEACHER = "## The teacher"

RUNGS = """## The rungs

{count} captions of the test split, combinations that training never holds, for each of three seeds of the noise. The
mean over all seeds and, in brackets, half of the widest of their 95 % intervals over prompts; recall and drawings by
Lite0. The paper's column is on COCO with another teacher: the order of its rungs is to be compared, not the level.
Its merges are of two trainings on more prompts (11.27 and 11.02), and 8.14 needs pairs; (full) marks where it had a
full training. The student sees a CLIP, which the teacher does not, wherever a rung speaks of a CLIP loss; no network
that judges here has trained anything."""

WON = (
    "FD and KID are better for certain with both networks for every seed, and neither recall nor drawings are worse by "
    "more than a point"
)

SENTENCES = """In the words of the rule, where a seed is one of the student with one of the noise:"""

DIFFERENCES = """### Differences from the teacher

The student's figure minus that of the teacher at its best: the mean, and from the lowest to the highest bound of the
intervals of all seeds (of the student x of the noise)."""

DETAILS = """### Other figures

Diversity is that of four pictures of a prompt, of 200 prompts, by Lite0."""

MERGE = """## The merge over lambda

theta = lambda A + (1 - lambda) B, the paper's equation 6 and its figure 7: A is `full`, B `lora-falling`. On
validation prompts, so that a weight may be chosen by it; the rung above has the paper's 0.5 in any case."""

COST = """## Cost

Forwards of the UNet, in thousands, of all trainings that a rung needs, what it starts from and the pairs that it
reads among them; backward passes, decoders and CLIP are not counted. Minutes are of the steps of these trainings,
without compiling and drawing pairs; `latents/std` is the mean of the last 50 steps; MiB are on disk while a rung is
climbed."""

COST_HEAD = (
    "rung", "forwards", "of these the teacher's", "minutes", "latents/std", "forwards a picture", "MiB", "on", "commit",
)  # fmt: skip

FOOT = """## Climb it

```bash
pip install -e ".[openmoji,evaluate]"
python benchmarks/ladder.py --workdir=runs/ladder --dry_run
python benchmarks/ladder.py --workdir=runs/ladder
python benchmarks/ladder.py --workdir=runs/ladder --only=full --only=merge --seeds=0
python benchmarks/ladder.py --page
```

The whole takes days. Interrupted and started again it goes on: training within a run, measuring within 64 pictures,
and a rung of which `docs/ladder/` has a file is not run again, on no machine: commit the files. A file of another
teacher, recipe or number of pictures is stale, and is run again; a directory of such a run in `runs/ladder/` is
refused by `launch/train.py` and is to be deleted first. `--count` and `--steps` shorten all, with an `--out` of their
own.

A run keeps its checkpoint, its export and its pictures in `runs/ladder/RUNG-SEED/`, and what the networks saw lies in
`runs/ladder/measured/`. All of that may be deleted once the file is there; a rung that starts from a deleted one, or
merges it, trains it again. The rungs are a table in [rungs.py](../sbv2_jax/openmoji/ladder/rungs.py)."""
