"""What of the pages' shell blocks tests/test_page_commands.py does not run: a part of the line, and why.

The flags and fields of the programs' are checked by tests/test_pages.py in any case.
"""

_INSTALLS = "the environment of the tests has it; .ci/run makes one"
_HUB = "asks the hub; what it would fetch lies where it would put it"
_CLOUD = "asks for machines that are not here"
_BENCHMARK = "a figure's command, which takes minutes to hours"
_OPENMOJI = "takes minutes on the bundled pipeline"

NOT_RUN: dict[str, dict[str, str]] = {
    "README.md": {
        "pip install ": _INSTALLS,
        "--config=configs/openmoji.py": ".ci/run trains it, shortened",
        "--protocol=openmoji": f"{_OPENMOJI}; tests/openmoji/test_protocol.py",
    },
    "CONTRIBUTING.md": {
        "pip install ": _INSTALLS,
        "python -m pytest": "these are the tests",
        "ruff check": ".ci/run",
        "mkdocs serve": "does not end; tests/test_site.py serves and reads what it shows",
        "mkdocs build": "tests/test_site.py",
    },
    "docs/after_training.md": {"--push_to_hub=": "tests/run/test_hub.py has a hub of its own"},
    "docs/checkpoints.md": {"hf download ": _HUB},
    "docs/demo.md": {
        "pip install ": _INSTALLS,
        "launch/demo.py": "does not end; tests/demo/test_live_page.py",
        "benchmarks/": _BENCHMARK,
    },
    "docs/evaluation.md": {
        "pip install ": _INSTALLS,
        "--protocol=openmoji": f"{_OPENMOJI}; tests/openmoji/test_protocol.py",
        "from-inception": "the same in docs/checkpoints.md",
        "--protocol=coco30k-sbv2": "tests/evaluate/test_evaluation.py, and docs/reproduce.md",
        "--config.evaluate.every=100": f"{_OPENMOJI}; tests/run/test_scoring.py",
    },
    "docs/extending.md": {"--workdir=runs/pink": f"{_OPENMOJI}; tests/distill/test_own_term.py"},
    "docs/gan.md": {"launch/": f"{_OPENMOJI}; tests/run/test_real_latents.py"},
    "docs/ladder.md": {"pip install ": _INSTALLS, "benchmarks/": "takes days; tests/openmoji/test_ladder.py"},
    "docs/machines.md": {
        "docker ": "tests/run/test_container.py does what can be done without Docker",
        "gcloud ": _CLOUD,
        "git clone ": _CLOUD,
        "--pod": f"{_CLOUD}; tests/devices/test_processes.py joins processes of one",
        "srun ": f"{_CLOUD}; tests/devices/test_processes.py",
        "--coordinator=": "tests/devices/test_processes.py starts several",
        "pip install ": _INSTALLS,
        "launch/compile.py": "the same in docs/reproduce.md",
    },
    "docs/openmoji.md": {
        "pip install ": _INSTALLS,
        "launch/pretrain.py": "takes hours; tests/openmoji/test_pretrain.py",
        "launch/train.py": f"{_OPENMOJI}; .ci/run, tests/run/test_train.py",
        "launch/convert.py merge": "the same in docs/reproduce.md",
    },
    "docs/pairs.md": {"launch/": f"{_OPENMOJI}; tests/run/test_pairs.py, docs/reproduce.md"},
    "docs/performance.md": {"pip install ": _INSTALLS, "benchmarks/": _BENCHMARK},
    "docs/scaling.md": {"pip install ": _INSTALLS, "benchmarks/": _BENCHMARK},
    "docs/training.md": {
        "--workdir=runs/full": "the same in README.md",
        "--workdir=runs/xl": "tests/models/test_sdxl.py trains one",
        "--workdir=runs/two": "tests/run/test_few_step_student.py trains one",
    },
}
# Pages of which the rest is run, in tests/test_page_commands.py.
RUN = (
    "README.md",
    "docs/after_training.md",
    "docs/checkpoints.md",
    "docs/reproduce.md",
    "docs/small_gpu.md",
    "docs/training.md",
)
