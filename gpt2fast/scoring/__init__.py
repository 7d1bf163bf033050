"""Scoring texts: how likely a model finds each of their tokens.

Nothing is imported here, so that the command line can read its options without torch.
"""
