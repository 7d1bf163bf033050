"""Three source folders, one installed package.

``kernels/`` and ``tokenizer/`` stand at the top of the repository but install as
``gpt2fast.kernels`` and ``gpt2fast.tokenizer``: other projects own those top-level names.
"""

import hashlib
from pathlib import Path

from setuptools import find_packages, setup

ROOMS = {
    "gpt2fast": "gpt2fast",
    "gpt2fast.kernels": "kernels",
    "gpt2fast.tokenizer": "tokenizer",
}

# The merges as OpenAI published them. One changed byte (a line-ending conversion, say) would give
# wrong token ids without any error, so such a tree is not built at all.
MERGES = Path(__file__).resolve().parent / "tokenizer" / "data" / "vocab.bpe"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

digest = hashlib.sha256(MERGES.read_bytes()).hexdigest()
if digest != MERGES_SHA256:
    raise SystemExit(f"{MERGES} has sha256 {digest}, expected {MERGES_SHA256}")

setup(
    package_dir=ROOMS,
    packages=[
        ".".join([name, *nested])
        for name, folder in ROOMS.items()
        for nested in [[], *([package] for package in find_packages(folder))]
    ],
    include_package_data=False,
    package_data={
        "gpt2fast": ["py.typed", "bundled/*"],
        "gpt2fast.tokenizer": ["data/*"],
    },
)
