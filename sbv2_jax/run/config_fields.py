"""The fields of a distillation run, each declared once: default, what it may hold, what it does.

The defaults are the paper's full training: SwiftBrush v2 (Dao et al., 2024, arXiv 2408.14176v2) and, where it is
silent, SwiftBrush's published code. docs/results.md sets them beside the paper's, one by one.
"""

from sbv2_jax.devices.rules import DEFAULT_RULES
from sbv2_jax.fields import (
    Field,
    either,
    falling,
    number,
    number_or_range,
    one_of,
    regex,
    rules,
    strings,
    text,
    whole,
)

_WEIGHT_SCHEDULE = Field(
    "linear", one_of("linear", "constant"), 'Of the weight: "linear" falls to 0 at the end of the run.'
)

FIELDS: dict[str, Field] = {
    "steps": Field(
        48_000,
        whole(1),
        "Updates of the student: 48,000 for the paper's 3.3 million prompts, 20,000 for JourneyDB's 1.3 million alone.",
    ),
    "batch_size": Field(64, whole(1), "Images of one update, over all devices and accumulation."),
    "accumulate": Field(1, whole(1), "Gradient accumulation: passes that one update is split into."),
    "seed": Field(0, whole(0, 2**32 - 1), "Of the weights, noise, times and the order of the prompts."),
    "teacher": Field(
        "bundled", text(), 'A diffusers directory, a hub id, or "bundled" (the OpenMoji pipeline).'
    ),
    "architecture": Field(
        "",
        text(empty=True),
        '"sd15", "sd21-base", "sd21", "sdxl": what the teacher must be; sizes a dry run without it. "" is anything.',
    ),
    "resolution": Field(0, whole(0), "Pixels a side; 0 is what the teacher's UNet was made for."),
    "prompts": Field(
        "openmoji",
        text(),
        "Files of prompts: text with one a line, CSV, TSV, JSON, JSON Lines or Parquet, also compressed, by pattern, "
        'or several with commas between them; a TFDS or array_record directory; "openmoji" or "openmoji:COUNT"; or a '
        'source of your own, "package.module:Source".',
    ),
    "prompts_column": Field(
        "",
        text(empty=True),
        'The column or key of the prompts; "" is the one with a usual name, such as caption.',
    ),
    "terms": Field(
        ("vsd", "clip"),
        strings,
        'The student\'s objective: "vsd", "clip" and "reward" (where clip.model, reward.model name one), "regression" '
        '(on pairs.path), "gan" (on gan.path), and any of yours, as "package.module:Class" or "path/file.py:Class" '
        "(docs/extending.md).",
    ),
    "student.init": Field(
        "teacher",
        text(),
        '"teacher", or where its UNet comes from: as for `teacher`, such as SD-Turbo; or a run, of its export.',
    ),
    "student.mode": Field(
        "full", one_of("full", "lora"), '"full" trains every weight, "lora" trains low-rank updates of some.'
    ),
    "student.lr": Field(1e-6, number(0, above=True), "Learning rate of the student, full or LoRA."),
    "student.timesteps": Field(
        (),
        falling,
        "The timesteps at which the student predicts x0, its steps in generation: () is the last alone, one step; "
        "(999, 499) and (999, 749, 499, 249) are two and four. Training draws one of them for each step.",
    ),
    "student.lora.rank": Field(256, whole(1), 'Rank of the student\'s LoRA, in "lora" mode.'),
    "student.lora.alpha": Field(512.0, number(0, above=True), "The LoRA's update is scaled by alpha / rank."),
    "student.lora.targets": Field(
        r".*\.attn[12]\.to_(q|k|v|out\.0)",
        regex,
        "The modules that get a LoRA: a regular expression that matches the whole path.",
    ),
    "student.lora.init": Field(
        "",
        text(empty=True),
        'A LoRA to start from (a file, a folder or a hub id), of the same layers and rank; "" starts anew.',
    ),
    "score.lr": Field(
        1e-3,
        number(0, above=True),
        "Learning rate of the score model, the LoRA on the teacher that follows the student's distribution.",
    ),
    "score.rank": Field(64, whole(1), "Rank of the score model."),
    "score.alpha": Field(128.0, number(0, above=True), "Its update is scaled by alpha / rank."),
    "score.targets": Field(
        r".*\.attn[12]\.to_(q|v)", regex, "The teacher's modules that get it: as for `student.lora.targets`."
    ),
    "score.updates_per_step": Field(
        1,
        whole(1),
        "Score updates for one update of the student, all but one on fresh prompts, noise and samples, as in DMD2, "
        "which takes 5 to 10.",
    ),
    "score.null_prompt_probability": Field(
        0.1, number(0, 1), "How often a sample trains the score without its prompt."
    ),
    "score.weighting": Field(
        "epsilon",
        one_of("epsilon", "v", "native"),
        'Of the score model\'s loss: "epsilon": a_t^2 of the error in epsilon, as published, which is a_t^4 of that in '
        'v, so that a v network hardly learns at large t; "v": the error in v; "native": in what the network predicts.',
    ),
    "vsd.weight": Field(1.0, number(0), "Weight of the VSD loss in the student's objective."),
    "vsd.guidance": Field(
        4.5,
        number_or_range(0),
        "Classifier-free guidance of the teacher; 1 or less is none. Two numbers, (low, high): drawn for each sample, "
        "uniformly, and taken as they are.",
        mixed=True,
    ),
    "vsd.score_guidance": Field(4.5, number(0), "And of the score model; without it costs one forward less."),
    "vsd.weighting": Field(
        "sbv2", one_of("sbv2", "dmd"), '"sbv2": s_t^2; "dmd": by the teacher\'s own error, in x0.'
    ),
    "vsd.t_min": Field(20, whole(0), "Times are drawn from t_min to t_max, both included."),
    "vsd.t_max": Field(980, whole(1, 999), "See `vsd.t_min`."),
    "clip.model": Field(
        "", text(empty=True), 'A CLIP directory, a hub id, "bundled", or "" for no CLIP loss.'
    ),
    "clip.decoder": Field(
        "vae_tiny",
        text(),
        '"vae_tiny" or "vae" of the teacher, or the directory or hub id of an AutoencoderTiny, such as TAESD.',
    ),
    "clip.passes": Field(
        1, whole(1), "Parts of a batch that go through decoder and CLIP one after the other."
    ),
    "clip.weight": Field(0.0, number(0), "Weight of the CLIP loss at the first step."),
    "clip.schedule": _WEIGHT_SCHEDULE,
    "clip.tau": Field(
        0.35, number(-1, 1), "A sample whose picture and text agree (cosine) by more than this adds nothing."
    ),
    "reward.model": Field(
        "",
        text(empty=True),
        "A CLIP fitted to people's choices, such as HPSv2 (of convert.py from-openclip), as for `clip.model`; "
        '"" for no reward loss. Its pictures are decoded by `clip.decoder`, in `clip.passes`.',
    ),
    "reward.weight": Field(0.0, number(0), "Weight of the reward loss at the first step."),
    "reward.schedule": _WEIGHT_SCHEDULE,
    "reward.tau": Field(
        0.3,
        number(-1, 1),
        "A sample whose reward (cosine) is more than this adds nothing. The paper names none.",
    ),
    "pairs.path": Field(
        "", text(empty=True), 'A directory of pairs, of launch/pairs.py (docs/pairs.md); "" is none.'
    ),
    "pairs.share": Field(
        0.05,
        number(0, 1, above=True),
        "Share of a batch's rows that are pairs, at least one row; they stand in the place of prompts.",
    ),
    "pairs.weight": Field(
        0.25, number(0), "Weight of the regression on pairs: of its mean over them, whatever their share."
    ),
    "gan.path": Field(
        "",
        text(empty=True),
        'A directory of real pictures\' latents, of launch/latents.py (docs/gan.md); "" is none.',
    ),
    "gan.share": Field(
        0.5,
        number(0, 1, above=True),
        "Share of a batch's rows that have a real picture's caption for a prompt, and its latent to be told from; at "
        "least one row.",
    ),
    "gan.weight": Field(
        1e-3, number(0), "Weight of the GAN loss: of its mean over these rows, whatever their share. DMD2's."
    ),
    "gan.lr": Field(1e-4, number(0, above=True), "Learning rate of the discriminator."),
    "ema": Field(
        0.9999,
        number(0, 1, below=True),
        "Decay of the averaged student, at most (1 + n) / (10 + n) after n updates; 0 keeps none.",
    ),
    "optimizer.b1": Field(
        0.9, number(0, 1, below=True), "AdamW's first decay, for the student and the score model."
    ),
    "optimizer.b2": Field(0.999, number(0, 1, below=True), "AdamW's second decay."),
    "optimizer.eps": Field(1e-8, number(0, above=True), "AdamW's epsilon."),
    "optimizer.mu_dtype": Field(
        "float32",
        one_of("float32", "bfloat16"),
        'Of the stored first moment; "bfloat16" saves 2 bytes a weight.',
    ),
    "optimizer.weight_decay": Field(0.01, number(0), "AdamW's weight decay."),
    "optimizer.clip_norm": Field(
        1.0, number(0), "Largest global norm of a gradient, which is scaled down to it; 0 does not clip."
    ),
    "optimizer.schedule": Field(
        "constant",
        one_of("constant", "cosine"),
        'Of the learning rates; "cosine" falls to 0 at the last step.',
    ),
    "optimizer.warmup": Field(0, whole(0), "Steps over which the learning rates rise linearly from 0."),
    "mesh.replica": Field(
        1, whole(1), "TPU slices, or machines that a slow network joins; they share out the batch."
    ),
    "mesh.data": Field(
        -1, either(-1, whole(1)), "Devices that share out the batch; -1 is all that the others leave."
    ),
    "mesh.fsdp": Field(
        1,
        either(-1, whole(1)),
        "Devices that share out the batch and the weights; -1 is as few as memory allows.",
    ),
    "mesh.rules": Field(
        DEFAULT_RULES,
        rules,
        'How leaves such as "state.student.conv_in.kernel" and "frozen.teacher.conv_in.kernel" are split: the first '
        'expression that matches the whole name wins; "replicate", or the axes, joined by "+", over which a leaf\'s '
        "largest dimension is split.",
    ),
    "precision": Field(
        "float32",
        one_of("float32", "bfloat16"),
        "Of the networks' arithmetic; masters and losses stay float32.",
    ),
    "attention": Field(
        "auto",
        one_of("auto", "xla"),
        "TPU's splash kernel, cuDNN's on a GPU, else XLA; \"xla\" is XLA everywhere.",
    ),
    "programs": Field(
        "one",
        one_of("one", "stages"),
        '"stages" compiles the step in parts: in less memory, and side by side.',
    ),
    "remat": Field(
        "none",
        one_of("none", "block", "auto"),
        '"block" computes each block again in the backward pass; "auto" does where memory asks for it.',
    ),
    "checkpoint.every": Field(500, whole(1), "Steps between checkpoints."),
    "checkpoint.keep": Field(3, whole(1), "How many of the newest checkpoints to keep."),
    "evaluate.every": Field(
        0,
        whole(0),
        "Steps between measurements of the averaged student, each of which is saved; 0 measures none.",
    ),
    "evaluate.protocol": Field(
        "",
        text(empty=True),
        "How it is measured: a function of count= that returns a Protocol, as `package.module:NAME` or `file.py:NAME`, "
        "such as `sbv2_jax.openmoji.protocol:in_training`.",
    ),
    "evaluate.count": Field(500, whole(2), "Prompts of a measurement."),
    "evaluate.best": Field(
        "",
        text(empty=True),
        "The figure by which the best step is kept beside the newest ones, such as "
        "`evaluate/efficientnet-lite0/KID`; empty keeps none.",
    ),
    "evaluate.export": Field("last", one_of("last", "best"), "The step that export/ is of."),
    "limits.step_seconds": Field(
        0.0,
        number(0),
        "A step that takes longer dumps its stacks and ends the run, exit code 70; 0 waits for ever.",
    ),
    "limits.latents_std": Field(
        0.0,
        number(0),
        "A run whose `latents/std` is above it ends; what is saved is below it, by what its student draws then. 0 lets "
        "all pass.",
    ),
    "sample.every": Field(500, whole(0), "Steps between sample pictures; 0 draws none."),
    "sample.prompts": Field(
        ("a red apple on a blue background", "a smiling cat"), strings, "What the sample pictures show."
    ),
    "wandb.project": Field(
        "",
        text(empty=True),
        'A project of Weights & Biases that metrics and pictures go to as well (extra "wandb"); "" is none.',
    ),
}
