"""A checkpoint of ours as a folder of CTranslate2, by its own converter."""

from pathlib import Path

from ctranslate2.converters import TransformersConverter


def convert(checkpoint: Path, folder: Path, quantization: str) -> None:
    """Write ``folder``; ``quantization`` is "float32" or "int8"."""
    TransformersConverter(str(checkpoint)).convert(str(folder), quantization=quantization)
