"""Three source folders, one installed package.

``kernels/`` and ``tokenizer/`` stand at the top of the repository but install as
``gpt2fast.kernels`` and ``gpt2fast.tokenizer``: other projects own those top-level names.
"""

from setuptools import setup

setup(
    package_dir={
        "gpt2fast": "gpt2fast",
        "gpt2fast.kernels": "kernels",
        "gpt2fast.tokenizer": "tokenizer",
    },
    packages=["gpt2fast", "gpt2fast.kernels", "gpt2fast.tokenizer"],
    package_data={
        "gpt2fast": ["py.typed"],
        "gpt2fast.tokenizer": ["data/*"],
    },
)
