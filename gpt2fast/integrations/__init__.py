"""Where gpt2fast meets other libraries; each module imports its library itself.

`gpt2fast.accelerate` and `gpt2fast.restore` (``accelerate.py``) put the kernels into a GPT-2 model
of transformers.
"""
